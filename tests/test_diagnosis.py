"""Every illness is found where it is, and nothing is found in networks that train."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradmend as gm
from deep import HE, LECUN, X, Y, batches, mlp
from gradmend.causes import Cause
from gradmend.diagnosis import RULES, Finding, Severity, course, look
from helpers import ADAM, SGD, Table, blobs, plain

CE = nn.CrossEntropyLoss()
BATCH = blobs(128)


def finding(cause: Cause, setup: gm.Setup, batch: Any = BATCH) -> Finding:
    found = {f.cause: f for f in gm.diagnose(setup, batch).findings}
    assert cause in found, found
    return found[cause]


def line_of(function: Callable[..., Any], text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    offset = next(i for i, line in enumerate(lines) if text in line)
    return f"{Path(__file__)}:{first + offset}"


# ---- wiring -----------------------------------------------------------------------------------------------


class Ends(nn.Module):
    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.end = nn.Linear(8, 3), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.linear(x))


def test_softmax_before_a_loss_on_logits() -> None:
    def end(h: Tensor) -> Tensor:
        return torch.softmax(h, dim=1)

    found = finding(Cause.SOFTMAX_BEFORE_LOGITS_LOSS, gm.Setup(Ends(end), CE))
    assert (found.severity, found.sites) == (Severity.ERROR, ("softmax",))
    assert found.where == (line_of(end, "torch.softmax"),)


@pytest.mark.parametrize("end", [nn.Sigmoid(), torch.sigmoid, Tensor.sigmoid, lambda h: h.sigmoid().float()])
def test_sigmoid_before_a_loss_on_logits(end: Any) -> None:
    x, y = BATCH
    setup = gm.Setup(Ends(end), nn.BCEWithLogitsLoss())
    found = finding(Cause.SIGMOID_BEFORE_LOGITS_LOSS, setup, (x, F.one_hot(y, 3).float()))
    assert found.severity is Severity.ERROR


@pytest.mark.parametrize(
    ("end", "loss"),
    [
        (nn.Identity(), CE),
        (nn.LogSoftmax(dim=1), nn.NLLLoss()),
        (nn.LogSoftmax(dim=1), CE),  # applying it twice changes nothing
        (lambda h: torch.softmax(h, 1).log(), CE),
        (lambda h: 5 * torch.sigmoid(h), CE),
    ],
)
def test_outputs_that_suit_their_loss(end: Any, loss: Any) -> None:
    causes = gm.diagnose(gm.Setup(Ends(end), loss), BATCH).causes
    assert not causes & {Cause.SOFTMAX_BEFORE_LOGITS_LOSS, Cause.SIGMOID_BEFORE_LOGITS_LOSS}


def test_parameters_that_the_optimizer_does_not_hold() -> None:
    model = plain(1, nn.Tanh)
    live = torch.optim.SGD(model[2].parameters(), lr=0.1)
    found = finding(Cause.NOT_IN_OPTIMIZER, gm.Setup(model, CE, live))
    assert (found.severity, found.sites) == (Severity.ERROR, ("0.weight", "0.bias"))


def test_parameters_that_the_gradient_does_not_reach() -> None:
    def end(h: Tensor) -> Tensor:
        return h

    model = Ends(end)
    model.unused = nn.Linear(2, 2)
    found = finding(Cause.NO_GRADIENT, gm.Setup(model, CE, SGD))
    assert (found.severity, found.sites) == (Severity.WARNING, ("unused.weight", "unused.bias"))


def test_frozen_parameters_are_a_note() -> None:
    model = plain(2, nn.Tanh)
    model[0].requires_grad_(False)
    setup = gm.Setup(model, CE, SGD)
    assert finding(Cause.FROZEN_PARAMETERS, setup).sites == ("0.weight", "0.bias")
    assert gm.diagnose(setup, BATCH).healthy


@pytest.mark.parametrize(
    ("change", "severity"),
    [
        (lambda x: x * 100, Severity.ERROR),
        (lambda x: x / 1000, Severity.ERROR),
        (lambda x: x + 20, Severity.WARNING),
        (lambda x: x * torch.tensor([1.0] * 7 + [3e4]) / 1e4, Severity.ERROR),
        (lambda x: x * torch.tensor([1.0] * 7 + [3e2]) / 40, Severity.WARNING),
    ],
)
def test_unscaled_inputs(change: Any, severity: Severity) -> None:
    x, y = BATCH
    assert finding(Cause.UNSCALED_INPUT, gm.Setup(plain(1, nn.Tanh), CE), (change(x), y)).severity is severity


@pytest.mark.parametrize(
    "change", [lambda x: x, torch.sigmoid, lambda x: x.clamp(-1, 1), lambda x: x * 3 + 1]
)
def test_usual_scalings_are_fine(change: Any) -> None:
    x, y = BATCH
    causes = [f.cause for f in gm.diagnose(gm.Setup(plain(1, nn.Tanh), CE), (change(x), y)).findings]
    assert Cause.UNSCALED_INPUT not in causes


def test_rare_pixels_and_normalized_inputs_are_no_illness() -> None:
    x, y = BATCH
    pixels = torch.cat([x.sigmoid(), torch.zeros(128, 8)], dim=1)
    pixels[3, 8] = 1 / 255  # a pixel at the edge that is hardly ever on
    quiet = gm.diagnose(gm.Setup(plain(1, nn.Tanh, features=16), CE), (pixels, y))
    raw = nn.Sequential(nn.BatchNorm1d(8), plain(1, nn.Tanh))
    assert not {Cause.UNSCALED_INPUT} & {f.cause for f in quiet.findings}
    assert gm.diagnose(gm.Setup(raw, CE, ADAM), (x * 1000, y)).healthy


def test_the_first_value_that_is_no_number() -> None:
    def end(h: Tensor) -> Tensor:
        h = torch.relu(h)
        h = h @ torch.full((3, 3), math.nan)
        return F.elu(h)

    found = finding(Cause.NON_FINITE, gm.Setup(Ends(end), CE, SGD))
    assert (found.severity, found.sites) == (Severity.ERROR, ("matmul",))
    assert found.where == (line_of(end, "h @"),)


def test_the_first_gradient_that_is_no_number() -> None:
    def end(h: Tensor) -> Tensor:
        h = torch.tanh(h)
        return F.elu(torch.relu(h).sqrt())  # the root is infinitely steep at 0

    found = finding(Cause.NON_FINITE, gm.Setup(Ends(end), CE, SGD))
    assert found.sites == ("relu",)
    assert "gradient" in found.sentence


# ---- learning rates ---------------------------------------------------------------------------------------

NETS = {"mlp": lambda: mlp(3, nn.ReLU), "linear": lambda: nn.Sequential(nn.Linear(64, 10))}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_learning_rates_too_low(net: str, name: str) -> None:
    for rate in (1e-9, 1e-7):
        torch.manual_seed(0)
        setup = gm.Setup(NETS[net](), CE, partial(getattr(torch.optim, name), lr=rate))
        assert finding(Cause.LEARNING_RATE_TOO_LOW, setup, batches()).severity is Severity.ERROR


@pytest.mark.parametrize(("name", "rates"), [("SGD", (100.0, 1e4, 1e30)), ("Adam", (1.0, 10.0, 1e3))])
def test_learning_rates_too_high(name: str, rates: tuple[float, ...]) -> None:
    for rate in rates:
        torch.manual_seed(0)
        setup = gm.Setup(mlp(3, nn.ReLU), CE, partial(getattr(torch.optim, name), lr=rate))
        assert finding(Cause.LEARNING_RATE_TOO_HIGH, setup, batches()).severity is Severity.ERROR


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("name", "rates"), [("SGD", (0.01, 0.1, 0.5)), ("Adam", (1e-4, 1e-3, 1e-2))])
def test_usual_learning_rates(net: str, name: str, rates: tuple[float, ...]) -> None:
    for rate in rates:
        torch.manual_seed(0)
        setup = gm.Setup(NETS[net](), CE, partial(getattr(torch.optim, name), lr=rate))
        assert gm.diagnose(setup, batches()).healthy


@pytest.mark.parametrize("live", [True, False])
def test_a_network_that_has_learnt_all_has_no_bad_learning_rate(live: bool) -> None:
    """A new Adam disturbs it at first, and a good one has next to nothing left to do."""
    model = mlp(2, nn.ReLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    _train(gm.Setup(model, CE, optimizer), batches(), 400)
    setup = gm.Setup(model, CE, optimizer if live else partial(torch.optim.Adam, lr=1e-2))
    assert gm.diagnose(setup, batches()).healthy


# ---- healthy networks -------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block as written by hand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(h)))


def resnet() -> nn.Module:
    stem = (nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(
        *stem, Block(8), Block(8), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


def cnn() -> nn.Module:
    parts: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for a, b in ((1, 8), (8, 16)):
        parts += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(64, 10))


class Transformer(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = partial(nn.TransformerEncoderLayer, 16, 2, 32, dropout=0.1, batch_first=True)
        self.embed, self.place = nn.Linear(8, 16), nn.Parameter(0.02 * torch.randn(8, 16))
        self.blocks = nn.Sequential(*[layer(norm_first=norm_first) for _ in range(3)])
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.embed(x.view(-1, 8, 8)) + self.place)
        return self.out(self.norm(h).mean(dim=1))


class Rows(nn.Module):
    """An image read row by row."""

    def __init__(self, cell: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.cell, self.out = cell(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x.view(-1, 8, 8))[0][:, -1])


class Residual(nn.Module):
    """x + scale f(x); a learnt scale that begins at zero is ReZero."""

    def __init__(self, depth: int, scale: float, learnt: bool, norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(depth)])
        self.norms = nn.ModuleList([nn.LayerNorm(64) if norm else nn.Identity() for _ in range(depth)])
        scales = torch.full((depth,), scale)
        self.scales = nn.Parameter(scales) if learnt else nn.Buffer(scales)
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm, scale in zip(self.layers, self.norms, self.scales, strict=True):
            x = x + scale * F.relu(layer(norm(x)))
        return self.out(x)


class Dense(nn.Module):
    """Each layer reads all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64 + 32 * i, 32) for i in range(5)])
        self.out = nn.Linear(64 + 32 * 5, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], dim=1)
        return self.out(x)


class Healthy(NamedTuple):
    model: Callable[[], nn.Module]
    optimizer: Any = ADAM
    loss: Any = CE
    x: Tensor = X
    y: Tensor = Y


def sgd(rate: float) -> Any:
    return partial(torch.optim.SGD, lr=rate, momentum=0.9)


def adam(rate: float) -> Any:
    return partial(torch.optim.Adam, lr=rate)


def autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8), nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 64)
    )


HEALTHY = {
    "linear": Healthy(lambda: nn.Linear(64, 10), sgd(0.05)),
    "three ReLU layers": Healthy(lambda: mlp(3, nn.ReLU)),
    "three ReLU layers, SGD": Healthy(lambda: mlp(3, nn.ReLU), sgd(0.02)),
    "two sigmoid layers": Healthy(lambda: mlp(2, nn.Sigmoid), adam(1e-2)),
    "eight ReLU layers": Healthy(lambda: mlp(8, nn.ReLU, width=128)),
    "six GELU layers": Healthy(lambda: mlp(6, nn.GELU)),
    "six tanh layers, Xavier": Healthy(lambda: mlp(6, nn.Tanh, nn.init.xavier_normal_), sgd(0.01)),
    "twenty ReLU layers, He": Healthy(lambda: mlp(20, nn.ReLU, HE), adam(3e-4)),
    "twenty SELU layers, LeCun": Healthy(lambda: mlp(20, nn.SELU, LECUN), adam(3e-4)),
    "dropout": Healthy(lambda: mlp(3, nn.ReLU, extra=partial(nn.Dropout, 0.2))),
    "batch norm": Healthy(lambda: mlp(10, nn.ReLU, extra=partial(nn.BatchNorm1d, 64)), sgd(0.05)),
    "layer norm": Healthy(lambda: mlp(10, nn.ReLU, extra=partial(nn.LayerNorm, 64))),
    "raw pixels from 0 to 1": Healthy(
        cnn, x=torch.tensor(load_digits().data[:1280] / 16, dtype=torch.float32)
    ),
    "CNN": Healthy(cnn, sgd(0.05)),
    "ResNet": Healthy(resnet, sgd(0.05)),
    "pre-LN transformer": Healthy(partial(Transformer, True), adam(3e-3)),
    "post-LN transformer": Healthy(partial(Transformer, False), adam(3e-3)),
    "GRU": Healthy(partial(Rows, nn.GRU), adam(1e-2)),
    "LSTM": Healthy(partial(Rows, nn.LSTM), adam(1e-2)),
    "ReZero": Healthy(partial(Residual, 12, 0.0, learnt=True)),
    "residual, scaled": Healthy(partial(Residual, 12, 12**-0.5, learnt=False)),
    "residual, pre-LN": Healthy(partial(Residual, 12, 1.0, learnt=False, norm=True)),
    "dense": Healthy(Dense),
    "autoencoder": Healthy(autoencoder, adam(1e-2), nn.MSELoss(), y=X),
    "regression": Healthy(
        lambda: nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1)),
        adam(1e-2),
        nn.MSELoss(),
        y=X[:, 10:11] * X[:, 20:21],
    ),
    "yes or no": Healthy(
        lambda: nn.Sequential(mlp(2, nn.ReLU), nn.Linear(10, 1), nn.Flatten(0)),
        loss=nn.BCEWithLogitsLoss(),
        y=(Y > 4).float(),
    ),
}


def _train(setup: gm.Setup, given: list[Any], steps: int) -> list[float]:
    optimizer, losses = setup.build_optimizer(), []
    setup.model.train()
    for i in range(steps):
        optimizer.zero_grad()
        loss = setup.loss(given[i % len(given)])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_networks_are_called_healthy(name: str) -> None:
    """Before, and after 100 steps that show that they train."""
    net = HEALTHY[name]
    model, given = net.model(), batches(net.x, net.y)
    fresh = gm.diagnose(gm.Setup(model, net.loss, net.optimizer), given)
    assert fresh.healthy, str(fresh)
    setup = gm.Setup(model, net.loss, net.optimizer(model.parameters()))
    losses = _train(setup, given, 100)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    trained = gm.diagnose(setup, given)
    assert trained.healthy, str(trained)


# ---- the diagnosis ----------------------------------------------------------------------------------------


def test_verdicts() -> None:
    well = gm.diagnose(gm.Setup(plain(1, nn.Tanh), CE, SGD), BATCH)
    assert (well.findings, well.causes, well.verdict) == ((), frozenset(), "Healthy: nothing found.")
    model = plain(2, nn.Tanh)
    model[0].requires_grad_(False)
    assert gm.diagnose(gm.Setup(model, CE, SGD), BATCH).verdict == "Healthy, with remarks: frozen parameters."
    ill = gm.diagnose(gm.Setup(mlp(20, nn.Sigmoid), CE, SGD), batches())
    assert ill.verdict == "This setup will hardly train: contracting activation."
    assert [f.severity for f in ill.findings] == sorted((f.severity for f in ill.findings), reverse=True)


def test_every_cause_has_one_rule_of_its_name() -> None:
    """Of the course of a training, too; values that are no numbers may be found before it and in it."""
    names = [rule.__name__ for rule in (*RULES, *course.RULES, course.dying_units)]
    assert sorted({*names} - {"born_non_finite"}) == sorted(cause.name.lower() for cause in Cause)
    assert len(names) == len(Cause) + 1


def test_rules_are_silent_on_what_was_not_measured() -> None:
    """A model without any site, without an optimizer and without float inputs."""

    tokens = torch.arange(64) % 10
    assert gm.diagnose(gm.Setup(Table(), CE), (tokens, tokens % 3)).findings == ()


def test_looking_is_diagnosing_without_steps() -> None:
    setup = gm.Setup(plain(1, nn.Tanh), CE, partial(torch.optim.SGD, lr=1e-9))
    assert look(setup, BATCH).profile.response is None
    assert look(setup, BATCH).healthy
    assert not gm.diagnose(setup, BATCH).healthy


@pytest.mark.parametrize(("rows", "samples"), [(128, 128), (32, 128), (100, 200)])
def test_as_many_batches_are_measured_as_say_enough(rows: int, samples: int) -> None:
    def endless() -> Any:
        while True:
            yield BATCH[0][:rows], BATCH[1][:rows]

    assert gm.diagnose(gm.Setup(plain(1, nn.Tanh), CE), endless()).profile.samples == samples
