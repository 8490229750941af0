"""Setups with one fault each in output, loss, targets, input or wiring, and the remedies that cure them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmend.causes import Cause
from gradmend.remedies import (
    AddMissingParameters,
    BendLayers,
    Descend,
    DropColumns,
    DropSquashing,
    Epsilon,
    FitLoss,
    LastActivation,
    LessDropout,
    OutputShape,
    OutputUnits,
    Reconnect,
    Relabel,
    Remedy,
    RescaleOutput,
    TrainMode,
    Unfreeze,
    UseOptimizer,
    WeighClasses,
    WeightDecay,
)
from gradmend.setup import Batch, Setup
from helpers import ADAM, SGD, blobs

CE = nn.CrossEntropyLoss()
X, Y = blobs()
ONE_HOT = F.one_hot(Y, 3).float()
YES = (Y == 0).float()[:, None]
AMOUNT = 2 * X[:, :1] + 0.1 * torch.randn(96, 1, generator=torch.Generator().manual_seed(0))
RARE = (torch.arange(96) % 24 == 0).long()


def network(*tail: nn.Module, out: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, out), *tail)


class Body(nn.Module):
    """A network whose last function is called by its own forward."""

    def __init__(self, out: int = 3) -> None:
        super().__init__()
        self.body = network(out=out)


class Softmax(Body):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.body(x), 1)


class Passing(Body):
    """Its softmax is a module that is made on the fly."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.Softmax(dim=1)(self.body(x))


class Sigmoid(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).sigmoid()


class Branching(Body):
    """Cannot be traced: what it does depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            x = x / 2
        return torch.softmax(self.body(x), 1)


class Cut(Body):
    """No gradient reaches its first layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.body[2](self.body[1](self.body[0](x)).detach())


class Dropping(Body):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(self.body[1](self.body[0](x)), 0.98, self.training)
        return self.body[2](hidden)


def dropping() -> nn.Sequential:
    return network().insert(2, nn.Dropout(0.98))


def asleep() -> nn.Sequential:
    return network().insert(1, nn.BatchNorm1d(32).eval())


def frozen() -> nn.Sequential:
    model = network()
    model[0].requires_grad_(False)
    return model


def half_held() -> Setup:
    model = network()
    return Setup(model, CE, torch.optim.Adam(model[2:].parameters(), lr=1e-3))


def on_logits(output: Tensor, target: Tensor) -> Tensor:
    return -output.log_softmax(1).gather(1, target[:, None]).mean()


def on_shares(output: Tensor, target: Tensor) -> Tensor:
    return -(target * output.clamp(1e-7, 1).log()).sum(1).mean()


def on_batch_shares(output: Tensor, target: Tensor) -> Tensor:
    return -(target * output.log_softmax(0)).sum(1).mean()


def binary(output: Tensor, target: Tensor) -> Tensor:
    yes, no = (p.clamp(1e-7, 1 - 1e-7).log() for p in (output, 1 - output))
    return -(target * yes + (1 - target) * no).mean()


def half_binary(output: Tensor, target: Tensor) -> Tensor:
    return -(target * output.clamp_min(1e-7).log()).mean()


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()  # torch's own warns of broadcasting


def absolute(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().mean()


def percent(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) / target.abs().clamp(min=1e-7)).abs().mean()


def by_number(output: Tensor, target: Tensor) -> Tensor:
    return -(target * output.log_softmax(1)).sum(1).mean()


def all_pairs(output: Tensor, target: Tensor) -> Tensor:
    return (output - target[:, 0]).square().mean()


def hinge(output: Tensor, target: Tensor) -> Tensor:
    return (1 - output * target).relu().mean()


def negated(output: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(output, target)


def xor() -> Batch:
    x = torch.rand(256, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return x, (x[:, 0] * x[:, 1] > 0).long()


def numbered_rows() -> Tensor:
    return torch.cat([X[:, :7], 100 * torch.arange(96.0)[:, None]], 1)


class Reader(nn.Module):
    """A recurrent layer, and a linear one on its last output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0][:, -1])


def reading(kind: type[nn.RNNBase]) -> tuple[Setup, Batch]:
    """Sequences of 25 steps."""
    return Setup(Reader(kind(8, 8, batch_first=True)), CE, ADAM), (X[:, None] * torch.ones(25, 1), Y)


Ill = tuple[Callable[[], Setup], Batch, Remedy, Cause]


def ill(model: Callable[..., Any], loss: Any, y: Any, remedy: Remedy, cause: Cause, **options: Any) -> Ill:
    """A fault in output, loss or targets."""
    out = {"out": options.pop("out")} if "out" in options else {}
    return lambda: Setup(model(**out), loss, options.get("optimizer", SGD)), (X, y), remedy, cause


def ends(*tail: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    return lambda out=3: network(*(make() for make in tail), out=out)


SOFTMAX, SIGMOID = partial(nn.Softmax, dim=1), nn.Sigmoid
TWICE, ONCE = Cause.SOFTMAX_BEFORE_LOGITS_LOSS, Cause.LOGITS_BEFORE_PROBABILITY_LOSS
OUTPUTS: dict[str, Ill] = {
    "softmax": ill(ends(SOFTMAX), CE, Y, DropSquashing(), TWICE),
    "softmax as a function": ill(Softmax, CE, Y, DropSquashing(), TWICE),
    "softmax on the fly": ill(Passing, CE, Y, DropSquashing(), TWICE),
    "softmax, own loss": ill(Softmax, on_logits, Y, DropSquashing(), TWICE),
    "sigmoid as a method": ill(
        Sigmoid, nn.BCEWithLogitsLoss(), YES, DropSquashing(), Cause.SIGMOID_BEFORE_LOGITS_LOSS, out=1
    ),
    "no softmax": ill(network, nn.NLLLoss(), Y, LastActivation(), ONCE),
    "no softmax, own loss": ill(network, on_shares, ONE_HOT, LastActivation(), ONCE),
    "relu for sigmoid": ill(ends(nn.ReLU), binary, YES, LastActivation(), ONCE, out=1),
    "softmax of one": ill(
        ends(SOFTMAX), nn.BCELoss(), YES, LastActivation(), Cause.SOFTMAX_OVER_ONE_UNIT, out=1
    ),
    "softmax of the batch": ill(
        ends(partial(nn.Softmax, dim=0)), on_shares, ONE_HOT, LastActivation(), Cause.SOFTMAX_OVER_THE_BATCH
    ),
    "sigmoid for softmax": ill(ends(SIGMOID), on_shares, ONE_HOT, LastActivation(), Cause.UNFIT_LOSS),
    "sigmoid for amounts": ill(
        ends(SIGMOID), nn.MSELoss(), AMOUNT, LastActivation(), Cause.UNREACHABLE_TARGETS, out=1
    ),
    "sigmoid function for amounts": ill(
        Sigmoid, nn.MSELoss(), AMOUNT, LastActivation(), Cause.UNREACHABLE_TARGETS, out=1
    ),
    "sigmoid stretched": ill(
        ends(SIGMOID), nn.MSELoss(), AMOUNT, RescaleOutput(), Cause.UNREACHABLE_TARGETS, out=1
    ),
    "large amounts": ill(
        network,
        nn.MSELoss(),
        1000 * AMOUNT + 5000,
        RescaleOutput(),
        Cause.UNSCALED_TARGETS,
        out=1,
        optimizer=partial(torch.optim.Adam, lr=0.01),
    ),
    "one unit, three classes": ill(
        network, nn.BCEWithLogitsLoss(), Y[:, None].float(), OutputUnits(), Cause.WRONG_OUTPUT_COUNT, out=1
    ),
    "one sigmoid, three classes": ill(
        ends(SIGMOID), binary, Y[:, None].float(), OutputUnits(), Cause.WRONG_OUTPUT_COUNT, out=1
    ),
    "three units, one amount": ill(network, squared, AMOUNT, OutputUnits(), Cause.WRONG_OUTPUT_COUNT),
    "one unit, three amounts": ill(
        network, squared, X[:, :3].clone(), OutputUnits(), Cause.WRONG_OUTPUT_COUNT, out=1
    ),
    "hinge, three classes": ill(network, hinge, Y[:, None].float(), OutputUnits(), Cause.UNFIT_LOSS, out=1),
    "three units, absolute error": ill(network, absolute, AMOUNT, OutputUnits(), Cause.WRONG_OUTPUT_COUNT),
    "column against row": ill(network, squared, AMOUNT[:, 0], OutputShape(), Cause.MISMATCHED_SHAPES, out=1),
    "row against column": ill(
        ends(partial(nn.Flatten, 0)), squared, AMOUNT, OutputShape(), Cause.MISMATCHED_SHAPES, out=1
    ),
}
LOSSES: dict[str, Ill] = {
    "no softmax": ill(network, nn.NLLLoss(), Y, FitLoss(), ONCE),
    "relu for sigmoid": ill(ends(nn.ReLU), binary, YES, FitLoss(), ONCE, out=1),
    "softmax of the batch": ill(network, on_batch_shares, ONE_HOT, FitLoss(), Cause.SOFTMAX_OVER_THE_BATCH),
    "hinge for 0 and 1": ill(network, hinge, YES, FitLoss(), Cause.UNFIT_LOSS, out=1),
    "half a loss": ill(ends(SIGMOID), half_binary, YES, FitLoss(), Cause.UNFIT_LOSS, out=1),
    "absolute error of shares": ill(ends(SOFTMAX), nn.L1Loss(), ONE_HOT, FitLoss(), Cause.UNFIT_LOSS),
    "squared error of shares": ill(Softmax, nn.MSELoss(), ONE_HOT, FitLoss(), Cause.UNFIT_LOSS),
    "binary loss of shares": ill(ends(SOFTMAX), nn.BCELoss(), ONE_HOT, FitLoss(), Cause.UNFIT_LOSS),
    "classes for amounts": ill(network, nn.BCEWithLogitsLoss(), AMOUNT, FitLoss(), Cause.UNFIT_LOSS, out=1),
    "hinge for amounts": ill(network, hinge, AMOUNT, FitLoss(), Cause.UNFIT_LOSS, out=1),
    "counts below zero": ill(network, nn.PoissonNLLLoss(), AMOUNT, FitLoss(), Cause.UNFIT_LOSS, out=1),
    "percent of zero": ill(network, percent, ONE_HOT, FitLoss(), Cause.UNFIT_LOSS),
    "multiplied by the class": ill(network, by_number, Y[:, None].float(), FitLoss(), Cause.UNFIT_LOSS),
    "all pairs": ill(network, all_pairs, AMOUNT, FitLoss(), Cause.MISMATCHED_SHAPES, out=1),
    "uphill": ill(network, negated, Y, Descend(), Cause.WRONG_DIRECTION),
    "uphill, other loss": ill(network, negated, Y, FitLoss(), Cause.WRONG_DIRECTION),
    "maximize": ill(
        network,
        CE,
        Y,
        Descend(),
        Cause.WRONG_DIRECTION,
        optimizer=partial(torch.optim.SGD, lr=0.1, maximize=True),
    ),
    "rare class": ill(network, CE, RARE, WeighClasses(), Cause.CLASS_IMBALANCE, out=2),
    "rare class, function": ill(network, F.cross_entropy, RARE, WeighClasses(), Cause.CLASS_IMBALANCE, out=2),
    "rare class, smoothed": ill(
        network,
        nn.CrossEntropyLoss(label_smoothing=0.2),
        RARE,
        WeighClasses(),
        Cause.CLASS_IMBALANCE,
        out=2,
    ),
    "rare yes": ill(
        network,
        nn.BCEWithLogitsLoss(),
        RARE[:, None].float(),
        WeighClasses(),
        Cause.CLASS_IMBALANCE,
        out=1,
    ),
}
PARTS: dict[str, Ill] = {
    "half held": (half_held, (X, Y), AddMissingParameters(), Cause.NOT_IN_OPTIMIZER),
    "frozen": (lambda: Setup(frozen(), CE, SGD), (X, Y), Unfreeze(), Cause.FROZEN_PARAMETERS),
    "cut off": ill(Cut, CE, Y, Reconnect(), Cause.NO_GRADIENT),
    "asleep": (lambda: Setup(asleep(), CE, SGD), (X, Y), TrainMode(), Cause.EVAL_MODE),
    "affine": (
        lambda: Setup(nn.Sequential(nn.Linear(2, 32), nn.Linear(32, 2)), CE, ADAM),
        xor(),
        BendLayers(),
        Cause.TOO_LITTLE_CAPACITY,
    ),
    "decay": ill(
        network,
        CE,
        Y,
        WeightDecay(),
        Cause.TOO_MUCH_WEIGHT_DECAY,
        optimizer=partial(torch.optim.SGD, lr=0.01, weight_decay=10.0),
    ),
    "epsilon": ill(
        network, CE, Y, Epsilon(), Cause.UNFIT_OPTIMIZER, optimizer=partial(torch.optim.Adam, eps=10.0)
    ),
    "epsilon, other optimizer": ill(
        network,
        CE,
        Y,
        UseOptimizer("AdamW"),
        Cause.UNFIT_OPTIMIZER,
        optimizer=partial(torch.optim.Adam, eps=10.0),
    ),
}
CONFORMING: dict[str, Ill] = {
    "labels from 1": ill(
        network, nn.BCEWithLogitsLoss(), YES + 1, Relabel(), Cause.LABELS_OUT_OF_RANGE, out=1
    ),
    "labels of both signs": ill(
        ends(SIGMOID), binary, 2 * YES - 1, Relabel(), Cause.LABELS_OUT_OF_RANGE, out=1
    ),
    "numbered rows": (
        lambda: Setup(network(), CE, SGD),
        (numbered_rows(), Y),
        DropColumns(),
        Cause.STRAY_COLUMN,
    ),
    "dropout": ill(dropping, CE, Y, LessDropout(), Cause.TOO_MUCH_DROPOUT),
    "dropout as a function": ill(Dropping, CE, Y, LessDropout(), Cause.TOO_MUCH_DROPOUT),
}
"""Where the diagnosis looks at the raw data, or is not sure: these are judged by training alone."""


def cases() -> dict[str, Callable[[], tuple[Setup, Batch]]]:
    """For each remedy that has nothing to do on sound setups one on which it has, by its name."""
    found: dict[str, Callable[[], tuple[Setup, Batch]]] = {}
    for make, batch, remedy, _ in (
        *OUTPUTS.values(),
        *LOSSES.values(),
        *PARTS.values(),
        *CONFORMING.values(),
    ):
        found.setdefault(type(remedy).__name__, lambda make=make, batch=batch: (make(), batch))
    plain, gated = partial(reading, nn.RNN), partial(reading, nn.GRU)
    found |= dict.fromkeys(("Gated", "OrthogonalRecurrence", "IdentityRecurrence"), plain)
    return found | dict.fromkeys(("ForgetBias", "Chrono", "Truncate"), gated)
