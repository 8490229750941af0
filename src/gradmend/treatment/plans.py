"""Plans: remedies that are applied one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from gradmend.anatomy import Anatomy
from gradmend.remedies import (
    BendLayers,
    DepthRates,
    FitLoss,
    He,
    LastActivation,
    LearningRate,
    LessDropout,
    Remedy,
    RescaleOutput,
    SelfNormalizing,
    StandardizeInput,
    SwapActivation,
    Tailor,
    UseOptimizer,
    WeightDecay,
)
from gradmend.setup import Setup

Plan: TypeAlias = tuple[Remedy, ...]

UNTREATED = "untreated"

ORDER = (
    "repairs",
    "outputs",
    "losses",
    "scales",
    "recurrent",
    "activation",
    "normalization",
    "residual",
    "initialization",
    "gradient",
    "optimization",
    "rates",
    "schedule",
)
"""The scale of the output goes with the loss. Weights are drawn for the structure that they belong to, and
the optimizer is made for both."""

_SEVERAL = frozenset(("repairs", "outputs", "losses", "optimization", "recurrent"))
"""Groups of which a plan may hold several remedies."""

_USUAL: Plan = (
    StandardizeInput(),
    FitLoss(),
    LastActivation(),
    RescaleOutput(),
    LessDropout(),
    BendLayers(),
    UseOptimizer("Adam"),
    LearningRate(0.001),
    WeightDecay(0.0),
)
"""As textbooks set a network (Goodfellow, Bengio, Courville, Deep Learning, 2016, chapters 6 to 8)."""

_DEEP, _VERY_DEEP = 20, 100
"""Plain networks of more layers than the first need more than ReLUs and weights that go with them (VGG has
19: Simonyan, Zisserman, 2014, https://arxiv.org/abs/1409.1556). In more than the second those between the
first and the last must learn more slowly."""


def group(remedy: Remedy) -> str:
    """The group of a remedy: the module that holds it."""
    return type(remedy).__module__.rpartition(".")[-1]


def kind(remedy: Remedy) -> str:
    """Remedies of one kind exclude each other: one initialization, but several repairs."""
    if isinstance(remedy, (SelfNormalizing, Tailor)):  # they draw the weights that belong to them
        return "initialization"
    return type(remedy).__name__ if group(remedy) in _SEVERAL else group(remedy)


def joined(*plans: Iterable[Remedy]) -> Plan:
    """One plan of several, in the order in which remedies are applied; the first of each kind."""
    found: dict[str, Remedy] = {}
    for plan in plans:
        for remedy in plan:
            found.setdefault(kind(remedy), remedy)
    return tuple(sorted(found.values(), key=lambda remedy: ORDER.index(group(remedy))))


def fallbacks(setup: Setup, anatomy: Anatomy) -> list[Plan]:
    """What nearly all that trains at all trains with: the usual ReLUs unless it is deep, tailored ones."""
    depth = len(anatomy.weighted())
    tailored: Plan = (Tailor(), DepthRates()) if depth > _VERY_DEEP else (Tailor(),)
    layers = [tailored] if depth > _DEEP else [(SwapActivation("ReLU"), He()), tailored]
    return [tuple(r for r in (*_USUAL, *more) if r.applies_to(setup, anatomy)) for more in layers]


def cost(plan: Plan) -> int:
    """How much a plan intrudes."""
    return sum(remedy.intrusion for remedy in plan)


def describe(plan: Plan) -> str:
    """A plan in words."""
    return " + ".join(remedy.title for remedy in plan) or UNTREATED
