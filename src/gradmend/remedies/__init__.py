"""Remedies: changes to a setup, each a small frozen dataclass with one interface."""

from __future__ import annotations

from gradmend.remedies.activation import ACTIVATIONS, SwapActivation
from gradmend.remedies.base import SEED, Change, Remedy, anatomy_of
from gradmend.remedies.gradient import ClipNorm, ClipValue
from gradmend.remedies.initialization import LSUV, He, LeCun, Orthogonal, Xavier
from gradmend.remedies.normalization import BatchNorm, LayerNorm
from gradmend.remedies.optimization import LearningRate, UseOptimizer, UseSchedule, WeightDecay
from gradmend.remedies.repairs import AddMissingParameters, DropSquashing, StandardizeInput
from gradmend.remedies.residual import AddSkips

__all__ = [
    "LSUV",
    "REMEDIES",
    "SEED",
    "AddMissingParameters",
    "AddSkips",
    "BatchNorm",
    "Change",
    "ClipNorm",
    "ClipValue",
    "DropSquashing",
    "He",
    "LayerNorm",
    "LeCun",
    "LearningRate",
    "Orthogonal",
    "Remedy",
    "StandardizeInput",
    "SwapActivation",
    "UseOptimizer",
    "UseSchedule",
    "WeightDecay",
    "Xavier",
    "anatomy_of",
]

REMEDIES: tuple[Remedy, ...] = (
    DropSquashing(),
    AddMissingParameters(),
    StandardizeInput(),
    LearningRate(),
    UseOptimizer("Adam"),
    WeightDecay(),
    UseSchedule(),
    He(),
    Orthogonal(),
    Xavier(),
    LeCun(),
    LSUV(),
    ClipNorm(),
    ClipValue(),
    *(SwapActivation(name) for name in ACTIVATIONS),
    BatchNorm(),
    LayerNorm(),
    AddSkips(),
)
"""Every remedy with its usual parameters: the table behind `mend`, the conformance tests and the docs."""
