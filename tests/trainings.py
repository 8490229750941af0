"""Trainings of many kinds, as users write them: `python trainings.py KIND...` prints what each came to.

They know nothing of gradmend. The numbers printed are exact, so that two runs can be compared.
"""

import hashlib
import sys
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)
STEPS = 12


def fingerprint(*parts: Tensor | nn.Module | Iterable[Tensor]) -> str:
    """A number that changes with every bit of the tensors."""
    digest = hashlib.sha256()
    for part in parts:
        tensors = part.state_dict().values() if isinstance(part, nn.Module) else part
        for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def plain() -> str:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return fingerprint(model, losses)


def adversaries() -> str:
    generator, critic = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8)), nn.Linear(8, 1)
    first = torch.optim.Adam(generator.parameters(), lr=0.01)
    second = torch.optim.SGD(critic.parameters(), lr=0.01)
    real, fake = torch.ones(64, 1), torch.zeros(64, 1)
    for _ in range(STEPS):
        made = generator(torch.randn(64, 4))
        second.zero_grad()
        judged = critic(X), critic(made.detach())
        loss = F.binary_cross_entropy_with_logits(judged[0], real)
        (loss + F.binary_cross_entropy_with_logits(judged[1], fake)).backward()
        second.step()
        first.zero_grad()
        F.binary_cross_entropy_with_logits(critic(made), real).backward()
        first.step()
    return fingerprint(generator, critic)


def scaled() -> str:
    """Mixed precision, two micro-batches, clipping; a step is skipped where the gradient overflows."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
    scales = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for half in (slice(0, 32), slice(32, 64)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(X[half]), Y[half]) / 2
            scaler.scale(loss * (1e38 if step == 5 else 1)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(torch.tensor(scaler.get_scale()))
    return fingerprint(model, scales)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu_(self.first(x))
        for again in (True, False):
            h = checkpoint(lambda h: F.dropout(self.second(h).relu(), 0.1), h, use_reentrant=again)
        return self.out(h)


def checkpointed() -> str:
    model = Checkpointed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return fingerprint(model)


def compiled() -> str:
    model = network()
    fast = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(fast(X), Y).backward()
        optimizer.step()
    return fingerprint(model)


def compiled_step() -> str:
    """The whole of forward and loss in one compiled function, where modules are called within."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile(backend="eager", fullgraph=True)
    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(X, Y).backward()
        optimizer.step()
    return fingerprint(model)


def closure() -> str:
    model = nn.Linear(8, 3)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

    def loss_of() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(loss_of)
    return fingerprint(model)


def folds() -> str:
    """One model after another, each forgotten before the next."""
    prints = []
    for fold in range(3):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rows = torch.arange(64) % 3 != fold
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(X[rows]), Y[rows]).backward()
            optimizer.step()
        prints.append(fingerprint(model))
    return " ".join(prints)


def parts() -> str:
    """Encoder and decoder, called one after the other by the loop and stepped by one optimizer."""
    encoder, decoder = nn.GRU(4, 16, batch_first=True), nn.Linear(16, 3)
    optimizer = torch.optim.RMSprop([*encoder.parameters(), *decoder.parameters()], lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        hidden = encoder(X.reshape(64, 2, 4))[0][:, -1]
        F.cross_entropy(decoder(hidden), Y).backward()
        optimizer.step()
    return fingerprint(encoder, decoder)


def loader() -> str:
    """Batches from child processes that are forked while the training is watched."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = DataLoader(TensorDataset(X, Y), 16, shuffle=True, num_workers=2, multiprocessing_context="fork")
    for _ in range(3):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return fingerprint(model)


def bare() -> str:
    """No module, no optimizer: tensors and arithmetic."""
    weight = torch.zeros(8, 3, requires_grad=True)
    for _ in range(STEPS):
        F.cross_entropy(X @ weight, Y).backward()
        with torch.no_grad():
            weight -= 0.1 * weight.grad
            weight.grad = None
    return fingerprint(weight)


KINDS: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(plain, adversaries, scaled, checkpointed, compiled, compiled_step),
        *(closure, folds, parts, loader, bare),
    )
}


def train(names: Iterable[str]) -> None:
    """One after the other, each from the same random state."""
    torch.set_num_threads(1)
    for name in names:
        torch.manual_seed(0)
        sys.stdout.write(f"{name} {KINDS[name]()}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    train(sys.argv[1:] or KINDS)
