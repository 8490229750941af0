"""Any model: whatever forward is made of, readings are those of plain autograd, and nothing is disturbed."""

# ruff: noqa: ARG005  # lambdas that stand for a forward pass take what a forward pass takes

import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gradmend as gm
import helpers
from gradmend.profile import Profile
from gradmend.readings import Reading
from helpers import ADAM, SGD, Convolutional, assert_same, blobs, images, plain, trace

CE = nn.CrossEntropyLoss()
X, Y = blobs()
TOKENS, WORDS = torch.arange(16 * 7).reshape(16, 7) * 3 % 10, torch.arange(16) % 3
SERIES = torch.sin(torch.arange(16 * 7 * 8.0)).reshape(16, 7, 8)


class Net(helpers.Net):
    """A forward pass given as a function of the module and the input, over some parts.

    A twin of it notes every signal, with its gradient and its line, and writes nothing in place.
    """

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__(forward, **parts)
        self.log: list[tuple[Tensor, int]] | None = None

    @property
    def is_twin(self) -> bool:
        return self.log is not None

    def note(self, signal: Tensor) -> Tensor:
        if self.log is not None:
            if signal.requires_grad:
                signal.retain_grad()
            self.log.append((signal, sys._getframe(1).f_lineno))
        return signal


def rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def assert_reads(reading: Reading, signal: Tensor, gradient: Tensor | None) -> None:
    """Signals of float32 agree to about 1e-6; gradients sum more terms."""
    assert reading.rms == pytest.approx(rms(signal), rel=1e-5)
    if gradient is None:
        assert reading.gradient is None
    else:
        assert reading.gradient == pytest.approx(rms(gradient), rel=1e-4)


def assert_measures(setup: gm.Setup, batch: Any) -> tuple[Profile, Any]:
    """A profile, found without a trace, and the twin of the model: a copy after the same step in autograd."""
    before = trace(setup)
    profile = gm.measure(setup, batch)
    gm.diagnose(setup, batch)
    assert_same(before, trace(setup))
    twin = setup.copy()
    outputs = kept_outputs(twin.model)
    loss = twin.loss(next(iter(batch)) if isinstance(batch, list) else batch)
    loss.backward()
    assert profile.loss == pytest.approx(loss.item(), rel=1e-6)
    for reading, p in zip(profile.parameters, twin.model.parameters(), strict=True):
        expected = None if p.grad is None else pytest.approx(rms(p.grad.to_dense()), rel=1e-4)
        assert reading.gradient == expected
    for reading in profile.sites:
        if reading.site.name in outputs:
            signal = outputs[reading.site.name]
            assert_reads(reading, signal, signal.grad if signal.requires_grad else None)
    return profile, twin.model


def kept_outputs(twin: nn.Module) -> dict[str, Tensor]:
    """What the first call of each layer returns, by its name."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        signal = output[0] if isinstance(output, tuple) else output
        if isinstance(signal, Tensor) and name not in outputs:
            outputs[name] = signal
            if signal.requires_grad:
                signal.retain_grad()

    for name, module in twin.named_modules():
        module.inplace = False  # or it would overwrite what the layer before it returned
        if not list(module.children()):
            module.register_forward_hook(partial(keep, name))
    if isinstance(twin, Net):
        twin.log = []
    return outputs


# ---- functions in forward ---------------------------------------------------------------------------------


def activations(net: Any, x: Tensor) -> Tensor:
    h = net.note(torch.sigmoid(net.note(net.a(x))))
    h = net.note(h + net.note(F.relu(net.note(net.b(h)))))
    h = net.note(F.softmax(h, dim=-1))
    h = net.note(torch.special.expit(net.note(h.tanh())))
    return net.note(net.out(h))


def products(net: Any, x: Tensor) -> Tensor:
    h = net.note(x @ net.w)
    h = net.note(F.linear(h, net.w, net.c))
    h = net.note(torch.einsum("bi,ij->bj", h, net.w))
    h = net.note(torch.addmm(net.c, h, net.w))
    h = net.note(torch.bmm(h[:, None], net.w.expand(96, 8, 8)))[:, 0]
    return net.note(net.out(h))


def attention(net: Any, x: Tensor) -> Tensor:
    q = net.note(net.a(x)).view(-1, 2, 4)
    k = net.note(net.b(x)).view(-1, 2, 4)
    h = net.note(F.scaled_dot_product_attention(q, k, x.view(-1, 2, 4)))
    weights = net.note(torch.softmax(net.note(net.note(h @ k.transpose(-1, -2)) / 2), dim=-1))
    return net.note(net.out(net.note(weights @ h).flatten(1)))


def in_place(net: Any, x: Tensor) -> Tensor:
    relu = F.relu if net.is_twin else F.relu_
    h = net.note(relu(net.note(net.a(x))))
    h = net.note(net.b(net.note(2 * h)))
    h = net.note(h.relu() if net.is_twin else h.relu_())
    other = net.note(3 * net.note(net.a(h.clone())))
    other = net.note(other + h if net.is_twin else other.__iadd__(h))
    h = net.note(other.tanh() if net.is_twin else other.tanh_())
    return net.note(net.out(h))


def many_calls(net: Any, x: Tensor) -> Tensor:
    """Layers in containers, called several times, and one with the weights of another."""
    for _ in range(3):
        for stack in net.parts["stacks"]:
            h = net.note(stack[0](x))
            x = net.note(torch.tanh(h))
    return net.note(F.linear(x, net.parts["stacks"][0][0].weight))


def loops(net: Any, x: Tensor) -> Tensor:
    """A recurrent net of one's own: each step is a site."""
    h = torch.zeros(x.shape[0], 8)
    for _ in range(3):
        h = net.note(torch.tanh(net.note(net.note(net.a(x)) + net.note(net.b(h)))))
    return net.note(net.out(h))


def stopped(net: Any, x: Tensor) -> Tensor:
    """Part of the signal passes where no gradient is recorded."""
    h = net.note(torch.tanh(net.note(net.a(x))))
    with torch.no_grad():
        target = net.note(torch.tanh(net.note(net.b(x))))
    return net.note(net.out(net.note(h + target.detach())))


def other_shapes(net: Any, x: Tensor) -> Tensor:
    """Two inputs and a vector per sample at last, from values that the batch chooses."""
    picked = torch.where(x > 0, x, x.flip(0))[torch.arange(95, -1, -1)]
    h = net.note(net.a(net.note(torch.cat([picked[:, :4], x[:, 4:]], dim=1))))
    h = net.note(net.note(torch.stack([h, h.roll(1, 0)])).amax(dim=0))
    return net.note(net.out(h))


FORWARDS = (activations, products, attention, in_place, many_calls, loops, stopped, other_shapes)


def net_of(forward: Callable[..., Any]) -> Net:
    stacks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0)) for _ in range(2)])
    return Net(
        forward,
        a=nn.Linear(8, 8),
        b=nn.Linear(8, 8),
        w=nn.Parameter(torch.randn(8, 8) / 3),
        c=nn.Parameter(torch.randn(8)),
        out=nn.Linear(8, 3),
        parts=nn.ModuleDict({"stacks": stacks}),
    )


@pytest.mark.parametrize("forward", FORWARDS)
def test_functions_against_a_twin_that_keeps_every_signal(forward: Any) -> None:
    loss = CE if forward is not many_calls else lambda o, t: CE(o[:, :3], t)
    profile, twin = assert_measures(gm.Setup(net_of(forward), loss, SGD), (X, Y))
    assert len(profile.sites) == len(twin.log)
    for reading, (signal, line) in zip(profile.sites, twin.log, strict=True):
        assert_reads(reading, signal, signal.grad)
        assert reading.site.line == f"{__file__}:{line}"


def test_the_names_of_many_calls() -> None:
    setup = gm.Setup(net_of(many_calls), lambda o, t: CE(o[:, :3], t))
    names = [r.site.name for r in gm.measure(setup, (X, Y)).sites]
    first = ["parts.stacks.0.0", "tanh", "parts.stacks.1.0", "tanh#2"]
    assert names[:4] == first
    assert names[4:6] == ["parts.stacks.0.0#2", "tanh#3"]
    assert names[-1] == "linear"


# ---- modules, inputs and outputs of every sort ------------------------------------------------------------


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


class ModelOutput(OrderedDict[str, Any]):
    """In the manner of Hugging Face: a dict whose entries are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def small(**parts: Any) -> dict[str, Any]:
    return {"body": nn.Linear(8, 8), "out": nn.Linear(8, 3), **parts}


def own_loss(net: Any, input_ids: Tensor, labels: Tensor, note: str = "") -> ModelOutput:
    logits = net.out(torch.tanh(net.table(input_ids)).mean(dim=1))
    return ModelOutput(loss=CE(logits, labels), logits=logits)


def packed(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    together = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    outputs, _ = pad_packed_sequence(net.rnn(together)[0], batch_first=True)
    return net.out(outputs.mean(dim=1))


def masked(net: Any, x: Tensor, mask: Tensor) -> Tensor:
    return net.out(net.encoder(x, src_key_padding_mask=mask).mean(dim=1))


def answers(wrap: Callable[[Tensor, Tensor], Any]) -> Net:
    return Net(lambda m, x: wrap(m.out(torch.tanh(m.body(x))), x), **small())


def stacked(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(wrap(nn.Linear(8, 8)), nn.Tanh(), wrap(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 3))


def encoder(norm_first: bool, dropout: float = 0.0) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def half_frozen() -> nn.Module:
    model = plain(3, nn.Tanh)
    model[:4].requires_grad_(False)
    return model


def lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))
    model(X)
    return model


def out_of_torch(net: Any, x: Tensor) -> Tensor:
    """A frozen encoder whose output leaves torch, which a tensor with a gradient may not."""
    return net.out(torch.from_numpy(net.rnn(x)[0].numpy())[:, -1])


def frozen_encoder() -> Net:
    return Net(out_of_torch, rnn=nn.GRU(8, 8, batch_first=True).requires_grad_(False), out=nn.Linear(8, 3))


def by_name(loss: Any) -> Any:
    return lambda output, target: loss(output.logits, target)


BAG = nn.EmbeddingBag(10, 8, sparse=True, mode="sum")
PADDING = torch.arange(7) >= torch.arange(16)[:, None] % 6 + 1
CASES: dict[str, Callable[[], tuple[gm.Setup, Any]]] = {
    "dataclass": lambda: (gm.Setup(answers(lambda o, x: Answer(o)), by_name(CE), SGD), (X, Y)),
    "named tuple": lambda: (gm.Setup(answers(Pair), by_name(CE), SGD), (X, Y)),
    "two outputs": lambda: (
        gm.Setup(answers(lambda o, x: (o, o * 2)), lambda o, t: CE(o[0], t) + o[1].square().mean(), SGD),
        (X, Y),
    ),
    "two targets": lambda: (
        gm.Setup(answers(lambda o, x: o), lambda o, t: CE(o, t[0]) + F.mse_loss(o, t[1]["z"]), SGD),
        (X, (Y, {"z": X[:, :3]})),
    ),
    "nested input": lambda: (
        gm.Setup(Net(lambda m, x: m.out(torch.tanh(m.body(x[0] + x[1]["z"]))), **small()), CE, SGD),
        ((X, {"z": X.flip(0)}), Y),
    ),
    "dict batch": lambda: (
        gm.Setup(Net(own_loss, table=nn.Embedding(10, 8), out=nn.Linear(8, 3)), optimizer=SGD),
        {"labels": WORDS, "input_ids": TOKENS, "note": "text passes"},
    ),
    "namespace batch": lambda: (
        gm.Setup(answers(lambda o, x: o), step=lambda m, b: CE(m(b.x), b.y), optimizer=SGD),
        [SimpleNamespace(x=X, y=Y)],
    ),
    "no dimension": lambda: (
        gm.Setup(answers(lambda o, x: torch.sigmoid(o.mean())), lambda o, t: (o - t).square(), SGD),
        (X, torch.tensor(0.2)),
    ),
    "one dimension": lambda: (
        gm.Setup(answers(lambda o, x: o[:, 0]), nn.BCEWithLogitsLoss(), SGD),
        (X, (Y > 0).float()),
    ),
    "one row": lambda: (gm.Setup(plain(2, nn.ReLU), CE, SGD), (X[:1], Y[:1])),
    "one image": lambda: (gm.Setup(Convolutional(), CE, SGD), tuple(t[:1] for t in images())),
    "channels last": lambda: (
        gm.Setup(Convolutional().to(memory_format=torch.channels_last), CE, SGD),
        (images()[0].contiguous(memory_format=torch.channels_last), images()[1]),
    ),
    "float64": lambda: (gm.Setup(plain(2, nn.Tanh).double(), CE, ADAM), (X.double(), Y)),
    "weight norm": lambda: (gm.Setup(stacked(parametrizations.weight_norm), CE, SGD), (X, Y)),
    "orthogonal": lambda: (gm.Setup(stacked(parametrizations.orthogonal), CE, SGD), (X, Y)),
    "spectral norm": lambda: (gm.Setup(stacked(parametrizations.spectral_norm), CE, SGD), (X, Y)),
    "old spectral norm": lambda: (gm.Setup(stacked(nn.utils.spectral_norm), CE, SGD), (X, Y)),
    "old weight norm": lambda: (gm.Setup(stacked(nn.utils.weight_norm), CE, SGD), (X, Y)),
    "frozen": lambda: (gm.Setup(half_frozen(), CE, SGD), (X, Y)),
    "lazy": lambda: (gm.Setup(lazy(), CE, SGD), (X, Y)),
    "sparse bag": lambda: (gm.Setup(nn.Sequential(BAG, nn.Linear(8, 3)), CE, SGD), (TOKENS, WORDS)),
    "multi-head": lambda: (
        gm.Setup(
            Net(
                lambda m, x: m.out(m.attention(x, x, x)[0].mean(dim=1)),
                attention=nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True),
                out=nn.Linear(8, 3),
            ),
            *(CE, SGD),
        ),
        (SERIES, WORDS),
    ),
    "encoder in eval": lambda: (
        gm.Setup(nn.Sequential(encoder(False), nn.Flatten(), nn.Linear(56, 3)).eval(), CE, SGD),
        (SERIES, WORDS),
    ),
    "encoder with mask": lambda: (
        gm.Setup(Net(masked, encoder=encoder(True, dropout=0.1), out=nn.Linear(8, 3)), CE, SGD),
        (SERIES, PADDING, WORDS),
    ),
    "packed": lambda: (
        gm.Setup(
            Net(packed, rnn=nn.LSTM(8, 8, 2, dropout=0.2, batch_first=True), out=nn.Linear(8, 3)), CE, SGD
        ),
        (SERIES, (~PADDING).sum(dim=1), WORDS),
    ),
    "batch first": lambda: (
        gm.Setup(
            Net(lambda m, x: m.out(m.rnn(x)[0][:, -1]), rnn=nn.GRU(8, 8, batch_first=True), **small()),
            *(CE, SGD),
        ),
        (SERIES, WORDS),
    ),
    "frozen encoder": lambda: (gm.Setup(frozen_encoder(), CE, SGD), (SERIES, WORDS)),
    "time first": lambda: (
        gm.Setup(Net(lambda m, x: m.out(m.rnn(x)[0][-1]), rnn=nn.GRU(8, 8), **small()), CE, SGD),
        (SERIES.transpose(0, 1), WORDS),
    ),
    "every place": lambda: (
        gm.Setup(
            Net(
                lambda m, x: m.out(m.table(x)).flatten(0, 1), table=nn.Embedding(10, 8), out=nn.Linear(8, 10)
            ),
            *(CE, SGD),
        ),
        (TOKENS, TOKENS.roll(-1, 1).flatten()),
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_models_against_their_twins(name: str) -> None:
    setup, batch = CASES[name]()
    profile, twin = assert_measures(setup, batch)
    layers = {n for n, m in twin.named_modules() if n and isinstance(m, (nn.Linear, nn.Conv2d))}
    assert {r.site.name for r in profile.sites} & layers
