"""Programs made to run, in the form that `benchmarks.corpora` asks of its cases."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.mutations.operators import OPERATORS
from benchmarks.mutations.programs import DATA, Program

Json = dict[str, Any]
LossFn = Callable[[Tensor, Tensor], Tensor]

_TESTED, _EPS = 0.25, 1e-7


class CannotBuild(Exception):
    """Why a program cannot be made."""


class Net(nn.Sequential):
    """Layers, and which weights are penalized, as (parameter, l1, l2)."""

    penalties: tuple[tuple[nn.Parameter, float, float], ...] = ()

    def penalty(self) -> Tensor:
        """What the penalties add to the loss."""
        parts = [l1 * p.abs().sum() + l2 * p.square().sum() for p, l1, l2 in self.penalties]
        return torch.stack([torch.zeros(()), *parts]).sum()


@dataclass(frozen=True)
class Case:
    """A program with its data. Targets are float32: rows of one-hot classes, else a column."""

    model: Net
    loss_fn: LossFn
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    batch_size: int
    epochs: int
    metric: str
    data_is_standin: bool = False

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss and the penalties."""
        return self.loss_fn(self.model(x), y) + self.model.penalty()


def load(path: Path) -> list[Json]:
    """The lines of a file of cases."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def parts_of(row: Json) -> list[str]:
    """The parts of the setup that the operator changed."""
    return [part for fault in row["labels"]["faults"] for part in OPERATORS[fault].parts]


def program_of(row: Json) -> Program:
    """The program of a line, as it was written by `asdict`."""
    facts = row["program"]
    return Program(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    )


def build(row: Json, seed: int = 0, data_root: Path | None = None) -> Case:  # noqa: ARG001
    """Draw the weights, split and scale the data.

    Raises:
        CannotBuild: if the output does not fit the targets.
    """
    return make(program_of(row), seed)


def make(program: Program, seed: int) -> Case:
    """The same of a program."""
    x_train, y_train, x_test, y_test = _data(program, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _network(program, x_train, y_train)
    loss_fn = LOSSES[program.loss]
    try:
        with torch.no_grad():
            loss_fn(model(x_train[:2]), y_train[:2])
    except (RuntimeError, IndexError) as error:
        raise CannotBuild(str(error)) from error
    return Case(
        model=model,
        loss_fn=loss_fn,
        optimizer=partial(_optimizer, program),
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        batch_size=min(program.batch, len(x_train)),
        epochs=program.epochs,
        metric="mse" if program.task == "amounts" else "accuracy",
    )


# ---- data -------------------------------------------------------------------------------------------------


def _data(program: Program, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, labels = DATA[program.data].rows()
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=draw)
    x, given = torch.tensor(rows).float()[order], torch.tensor(labels)[order]
    train = int(len(x) * (1 - _TESTED))
    x = program.factor * _odd(program, _scaled(x, x[:train], program.scaling)) + program.offset
    if program.filters:
        x = x.unflatten(-1, (8, 8)).unsqueeze(1)
    y = _targets(program, given, given[:train])
    learnt = y[:train].clone()
    exchanged = torch.rand(train, generator=draw) < program.exchanged
    learnt[exchanged] = learnt[exchanged][torch.randperm(int(exchanged.sum()), generator=draw)]
    return x[:train], learnt, x[train:], y[train:]


def _scaled(x: Tensor, seen: Tensor, way: str) -> Tensor:
    """By what is seen in training: each column standardized, all values to 0 to 1, or as they are."""
    if way == "standardized":
        return (x - seen.mean(0)) / seen.std(0).clamp_min(1e-6)
    return (x - seen.min()) / (seen.max() - seen.min()) if way == "unit" else x


def _odd(program: Program, x: Tensor) -> Tensor:
    if program.odd == "numbers":
        return torch.cat([torch.arange(len(x))[:, None].float(), x], 1)
    if program.odd == "large":
        return torch.cat([1e3 * x[:, :1], x[:, 1:]], 1)
    return x


def _targets(program: Program, given: Tensor, seen: Tensor) -> Tensor:
    if program.task == "classes" and program.loss in _DENSE:
        return F.one_hot(given.long()).float()
    column = given.float()[:, None]
    if program.task == "amounts":
        column = program.stretch * _scaled(column, seen.float()[:, None], program.amounts)
    return column


# ---- network ----------------------------------------------------------------------------------------------

_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "softmax": partial(nn.Softmax, dim=-1),
    "linear": nn.Identity,
}


def _network(program: Program, x: Tensor, y: Tensor) -> Net:
    layers = list(_layers(program, x, y))
    model = Net(*layers)
    weighted = [layer for layer in layers if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for layer in weighted:
        _draw(layer, program)
        layer.requires_grad_(layer is weighted[-1] or not program.frozen)
    if program.penalty:
        model.penalties = tuple((layer.weight, 0.0, program.penalty) for layer in weighted)
    return model


def _layers(program: Program, x: Tensor, y: Tensor) -> Iterable[nn.Module]:
    biased = program.bias is not None
    for channels, filters in pairwise((1, *program.filters)):
        yield from (nn.Conv2d(channels, filters, 3, bias=biased), nn.ReLU(), nn.MaxPool2d(2))
    flat = x[0].numel() if not program.filters else program.filters[-1] * 9
    if program.filters:
        yield nn.Flatten()
    for inner, outer in pairwise((flat, *program.hidden)):
        yield nn.Linear(inner, outer, bias=biased)
        if program.normalized:
            yield nn.BatchNorm1d(outer)
        yield _ACTIVATIONS[program.activation]()
        if program.dropout:
            yield nn.Dropout(program.dropout)
    yield nn.Linear((flat, *program.hidden)[-1], program.units or _wanted(program, y), bias=biased)
    if program.last != "linear":
        yield _ACTIVATIONS[program.last]()


def _wanted(program: Program, y: Tensor) -> int:
    return int(y.max()) + 1 if program.task == "classes" and program.loss not in _DENSE else y.shape[1]


@torch.no_grad()
def _draw(layer: nn.Linear | nn.Conv2d, program: Program) -> None:
    """As Keras draws them."""
    _INITS[program.init](layer.weight)
    if layer.bias is not None:
        layer.bias.fill_(program.bias or 0.0)


_INITS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "glorot_uniform": nn.init.xavier_uniform_,
    "he_normal": nn.init.kaiming_normal_,
    "zeros": nn.init.zeros_,
    "ones": nn.init.ones_,
    "constant": partial(nn.init.constant_, val=0.1),
    "tiny": partial(nn.init.normal_, std=1e-4),
    "normal": partial(nn.init.normal_, std=0.05),
    "wide": partial(nn.init.normal_, std=1.0),
    "huge": partial(nn.init.normal_, std=10.0),
    "positive": partial(nn.init.uniform_, a=0.0, b=1.0),
}

# ---- loss and optimizer -----------------------------------------------------------------------------------


def _categorical(p: Tensor, y: Tensor) -> Tensor:
    return -(y * (p / p.sum(-1, keepdim=True)).clamp(_EPS, 1 - _EPS).log()).sum(-1).mean()


def _binary(p: Tensor, y: Tensor) -> Tensor:
    p = p.clamp(_EPS, 1 - _EPS)
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


def _by_number(p: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(p, y[:, 0].long())


LOSSES: Mapping[str, LossFn] = {
    "categorical_crossentropy": _categorical,
    "binary_crossentropy": _binary,
    "logits": _by_number,
    "binary_logits": lambda p, y: F.binary_cross_entropy_with_logits(p, y.expand_as(p)),
    "dense_logits": lambda p, y: -(y * p.log_softmax(-1)).sum(-1).mean(),
    "mse": lambda p, y: (p - y).square().mean(),
    "mae": lambda p, y: (p - y).abs().mean(),
    "hinge": lambda p, y: (1 - y * p).clamp(min=0).mean(),
    "poisson": lambda p, y: (p - y * (p + _EPS).log()).mean(),
    "pairs": lambda p, y: (p - y[:, 0]).square().mean(),
    "sum": lambda p, y: (p - y).square().sum(),
}
"""By the names of Keras; "logits" takes raw scores and class numbers; "pairs" compares all with all."""

_DENSE = frozenset(LOSSES) - {"logits"}
"""These take classes as rows."""

_KINDS: Mapping[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
}


def _optimizer(program: Program, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    options: Json = {"lr": program.rate, "maximize": program.uphill}
    if program.optimizer == "sgd":
        options["momentum"] = program.momentum
    else:
        options["eps"] = program.epsilon
    if program.optimizer == "rmsprop":
        options["alpha"] = 0.9  # of Keras
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    return _KINDS[program.optimizer](learning, **options)
