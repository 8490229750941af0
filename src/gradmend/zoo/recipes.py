"""Recipes: a network, its data and how it is trained, by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LinearLR

from gradmend.data import Data, load
from gradmend.errors import DataError, TargetError, suggest
from gradmend.setup import OptimizerFactory, Setup
from gradmend.zoo.networks import TAILORED, check_name, mlp
from gradmend.zoo.recurrent import recurrent


@dataclass(frozen=True, eq=False)
class Recipe:
    """A setup with the data it is trained on, and for how long: its schedule, if it has one, ends then.

    Args:
        name: of the recipe.
        setup: network, loss and optimizer.
        data: training and test rows.
        batch_size: rows per batch.
        epochs: how many times through the data.
    """

    name: str
    setup: Setup
    data: Data
    batch_size: int
    epochs: int


@dataclass(frozen=True)
class _Plan:
    """A recipe before the data is loaded.

    Args:
        data: what `load` takes.
        settings: of the network.
        optimizer: its factory.
        batch_size: rows per batch; None for all of them.
        epochs: how many times through the data.
        falling: whether the rate falls to 0.
        network: whose keyword arguments the settings are.
        unit: whether one sigmoid unit tells two classes apart, instead of one output per class.
    """

    data: str
    settings: Mapping[str, Any]
    optimizer: OptimizerFactory
    batch_size: int | None
    epochs: int
    falling: bool = False
    network: Callable[..., nn.Module] = mlp
    unit: bool = False


def _by_depth(parameters: Sequence[nn.Parameter], lr: float) -> Optimizer:
    """Adam, slower between the first and the last layer: their steps add up, as they act alike."""
    ends, between = [*parameters[:2], *parameters[2:][-2:]], parameters[2:-2]
    factor = min(1.0, _SHALLOW / max(1, len(between) // 2))
    groups: list[dict[str, Any]] = [{"params": ends}, {"params": between, "lr": factor * lr}]
    return Adam(groups, lr=lr)


_SHALLOW: Final = 20
"""So many layers in a row may learn at the full rate."""

_PLANS: Final[Mapping[str, _Plan]] = {
    "mnist": _Plan(
        data="mnist",
        settings={"width": 128, "depth": 2, "activation": "relu", "init": "xavier", "norm": "batch"},
        optimizer=partial(Adam, lr=1e-3),
        batch_size=32,
        epochs=10,
    ),
    "deep": _Plan(
        data="digits",
        settings={},
        optimizer=partial(SGD, lr=0.1),
        batch_size=64,
        epochs=40,
    ),
    "very-deep": _Plan(
        data="digits",
        settings={"depth": 1000, "activation": TAILORED, "init": TAILORED},
        optimizer=partial(_by_depth, lr=1e-3),
        batch_size=64,
        epochs=10,
        falling=True,
    ),
    "two-class": _Plan(
        data="breast-cancer",
        settings={"depth": 2},
        optimizer=partial(Adam, lr=1e-3),
        batch_size=None,
        epochs=100,
        unit=True,
    ),
    "neuron": _Plan(
        data="two-samples",
        settings={"depth": 0},
        optimizer=partial(SGD, lr=1.0),
        batch_size=None,
        epochs=100,
        unit=True,
    ),
    "residual-gru": _Plan(
        data="recall-100",
        settings={"width": 32},
        optimizer=partial(Adam, lr=3e-3),
        batch_size=32,
        epochs=10,
        network=recurrent,
    ),
}

RECIPES: Final[tuple[str, ...]] = tuple(_PLANS)
"""The names that `recipe` and `train` know."""


def recipe(
    name: str,
    *,
    data: Data | str | None = None,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
    **changes: Any,
) -> Recipe:
    """A shipped recipe; torch's global random state stays as it was.

    - `mnist`: 784-128-128-10 with batch normalization and ReLU, Xavier initialization, Adam at 1e-3.
    - `deep`: 30 hidden layers of 64 sigmoid units, torch's initialization, SGD at 0.1, on `digits`. It
      does not learn: its gradients vanish.
    - `very-deep`: 1,000 hidden layers of 64 units without skips or normalization, on `digits`. It learns:
      tailored rectifiers and weights, Adam at 1e-3 and slower between the first and the last layer, the
      rate falling to 0.
    - `two-class`: two hidden layers of 64 sigmoid units and one sigmoid unit as output, binary cross-entropy,
      Adam at 1e-3, 100 epochs of all rows at once, on `breast-cancer`. On `random-labels` there is nothing
      to understand: what it learns of the training rows is learnt by heart, and new rows are guessed.
    - `neuron`: one sigmoid unit, binary cross-entropy, gradient descent at 1.0 on `two-samples`, small
      enough to be followed by hand.
    - `residual-gru`: a residual block, batch normalization, a GRU of 32 units and a linear output, Adam at
      3e-3, on `recall-100`; its gates remember as many steps as the sequences have.

    The first three and the last take the cross-entropy, or the mean squared error for data without classes.

    Args:
        name: one of `RECIPES`.
        data: what to train on instead: a `Data`, or what `load` takes.
        seed: of the initial weights.
        epochs: how many times through the data instead.
        batch_size: rows per batch instead.
        steps: of the optimizer until a falling rate is 0; None counts those of the epochs.
        changes: what `mlp` takes: width, depth, activation, init, norm, skip, ...; for `residual-gru` what
            `recurrent` takes: cell, width, depth, memory.

    Raises:
        TargetError: for an unknown recipe.
        SetupError: for an unknown change.
        DataError: if the data cannot be loaded, or is none for this network.

    Examples:
        >>> recipe("deep", depth=10, activation="relu").data
        Data('digits', 1437 + 360 rows of [64], 10 classes)
    """
    if name not in _PLANS:
        raise TargetError(f"There is no recipe {name!r}. {suggest(name, RECIPES)}")
    plan = _PLANS[name]
    for change in changes:
        check_name("network setting", change, usual_settings(name))
    rows = data if isinstance(data, Data) else load(data or plan.data)
    rows = _as_unit(rows, name) if plan.unit else rows
    model = _network(plan, rows, seed, {**plan.settings, **changes})
    size, times = batch_size or plan.batch_size or len(rows.x), epochs or plan.epochs
    total = steps or times * math.ceil(len(rows.x) / size)
    falling = partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=total)
    setup = Setup(model, _loss(plan, rows), plan.optimizer, falling if plan.falling else None)
    return Recipe(name, setup, rows, size, times)


def _as_unit(data: Data, name: str) -> Data:
    """The same data with 0 and 1 as targets [rows, 1], for one unit."""
    if data.classes != 2:
        has = "none" if data.classes is None else data.classes
        raise DataError(
            f"{name} tells two classes apart, and {data.name} has {has}. Type: --data breast-cancer"
        )
    y, y_test = (part.float().reshape(-1, 1) for part in (data.y, data.y_test))
    return replace(data, y=y, y_test=y_test)


def _network(plan: _Plan, data: Data, seed: int, settings: Mapping[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if plan.network is recurrent:
            return _recurrent(data, settings)
        inside = mlp(data.x[0].numel(), 1 if plan.unit else _outputs(data), **settings)
    flat = [] if data.x.dim() == 2 else [nn.Flatten()]
    layers = [*flat, *inside, *([nn.Sigmoid()] if plan.unit else [])]
    return nn.Sequential(*layers)


def _outputs(data: Data) -> int:
    return data.y[0].numel() if data.classes is None else data.classes


def _recurrent(data: Data, settings: Mapping[str, Any]) -> nn.Module:
    """A recurrent network whose gates remember as long as the sequences are, if nothing else is said."""
    if data.x.dim() != 3:
        raise DataError(
            f"A recurrent network reads [rows, steps, values], and {data.name} has rows of "
            f"{list(data.x.shape[1:])}. Type for example: --data digits-rows"
        )
    steps, values = data.x.shape[1:]
    return recurrent(values, _outputs(data), **{"memory": max(2, steps), **settings})


def _loss(plan: _Plan, data: Data) -> nn.Module:
    if plan.unit:
        return nn.BCELoss()
    return nn.MSELoss() if data.classes is None else nn.CrossEntropyLoss()


def usual_settings(name: str) -> dict[str, Any]:
    """The settings of a recipe's network, with the values that they have if nothing is said.

    Examples:
        >>> usual_settings("deep")["activation"]
        'sigmoid'
    """
    plan = _PLANS[name]
    parameters = inspect.signature(plan.network).parameters.values()
    return {**{p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}, **plan.settings}


def usual_data(name: str) -> str:
    """What a recipe trains on if nothing is said: what `load` takes.

    >>> usual_data("deep")
    'digits'
    """
    return _PLANS[name].data
