"""Build: what one trial trains, made from the levels of its arm and its seed."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Final

import torch
from torch.optim import Optimizer, lr_scheduler

from gradmend.errors import BatchError, NoEffectWarning, NotApplicableError, SetupError
from gradmend.remedies import Remedy, UseOptimizer
from gradmend.remedies.factory import with_options
from gradmend.remedies.schedule import SCHEDULES, UseSchedule
from gradmend.setup import Batch, Setup
from gradmend.study.bases import Base, Length
from gradmend.study.levels import TRAINING, written
from gradmend.zoo import Recipe

_OPTIONS: Final = {"learning_rate": "lr", "momentum": "momentum", "weight_decay": "weight_decay"}
"""Settings of the optimizer, and what torch calls them."""

_BATCHES: Final = 4
"""So many a remedy sees."""


def build(
    base: Base, changes: Mapping[str, Any], remedies: Sequence[Remedy], seed: int, length: Length
) -> Recipe:
    """Setup and data of one trial: the network by the recipe, then what trains it, then the remedies.

    Args:
        base: what it starts from.
        changes: settings, of the network and of `TRAINING`.
        remedies: applied in this order.
        seed: of all that is drawn.
        length: of the training.

    Raises:
        NotApplicableError: if a setting or a remedy has nothing to change here, or does not fit.
        SetupError: for a setting with an impossible value.
        DataError: if the data cannot be loaded.

    Examples:
        >>> from gradmend.remedies import BatchNorm
        >>> made = build(Base("deep", "deep"), {"depth": 2}, [BatchNorm()], 0, Length(steps=100))
        >>> [type(layer).__name__ for layer in made.setup.model]
        ['After', 'Sigmoid', 'After', 'Sigmoid', 'Linear']
    """
    network = {key: value for key, value in changes.items() if key not in TRAINING}
    made = base.make(seed, changes.get("data"), changes.get("batch_size"), length, **network)
    setup = _trained(made.setup, changes, length.steps or made.epochs * _batches(made))
    if remedies:
        generator = torch.Generator().manual_seed(seed)
        seen = list(islice(made.data.batches(made.batch_size, generator=generator, epochs=1), _BATCHES))
        for remedy in remedies:
            setup = _treated(setup, remedy, seen, seed)
    return replace(made, setup=setup, batch_size=setup.batch_size or made.batch_size)


def _batches(made: Recipe) -> int:
    return math.ceil(len(made.data.x) / made.batch_size)


def _trained(setup: Setup, changes: Mapping[str, Any], steps: int) -> Setup:
    """With the optimizer, its options and the schedule that the settings say."""
    options = {_OPTIONS[key]: value for key, value in changes.items() if key in _OPTIONS}
    if "optimizer" in changes:
        setup = replace(setup, optimizer=_factory(str(changes["optimizer"]), options))
    elif options:
        setup = _with_options(setup, options)
    if "schedule" in changes:
        setup = replace(setup, schedule=_schedule(str(changes["schedule"]), steps))
    return setup


def _factory(wish: str, options: Mapping[str, Any]) -> Callable[..., Optimizer]:
    """A factory from `NAME` or `NAME:LR`, such as `SGD:0.1`."""
    name, _, rate = wish.partition(":")
    kind = getattr(torch.optim, UseOptimizer(name).name)
    given = {**({"lr": _number("learning_rate", rate)} if rate else {}), **options}
    _check_options(name, given, inspect.signature(kind).parameters)
    return partial(kind, **given)


def _with_options(setup: Setup, options: Mapping[str, Any]) -> Setup:
    optimizer = setup.build_optimizer()
    _check_options(type(optimizer).__name__, options, optimizer.param_groups[0])
    return with_options(setup, **options)


def _check_options(name: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key, value in options.items():
        if key not in known:
            raise NotApplicableError(f"{name} has no {key}.")
        _number(key, value)


def _number(name: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise SetupError(f"{value!r} is no {name}: it is a number, 0 or more.")
    return number


def _schedule(name: str, steps: int) -> Callable[[Optimizer], Any]:
    kind, options = SCHEDULES[UseSchedule(name).name](steps)
    return partial(getattr(lr_scheduler, kind), **options)


def _treated(setup: Setup, remedy: Remedy, batches: Sequence[Batch], seed: int) -> Setup:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        try:
            change = remedy.apply(setup, batches, seed=seed)
        except (SetupError, BatchError) as error:
            raise NotApplicableError(f"{written(remedy)} does not fit this network: {error}") from error
    if not change.edits:
        raise NotApplicableError(
            " ".join([f"{written(remedy)} finds nothing to change in this network.", *change.by_hand])
        )
    return change.setup
