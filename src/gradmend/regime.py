"""Regime: the numbers that say how a setup trains: its optimizer, its noise, and what else was tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LEARNT = 0.5
"""A loss below this share of that with exchanged targets was learnt: chance gives 0.7 and more."""


@dataclass(frozen=True)
class GroupReading:
    """The settings of one parameter group; None where its optimizer has no such setting.

    Args:
        names: of its parameters.
        rate: the learning rate.
        momentum: of SGD and RMSprop.
        betas: of Adam and its kin.
        epsilon: added to the root of the squared gradients.
        vanishes: whether epsilon is zero in the parameters' own dtype.
        decay: the weight decay.
    """

    names: tuple[str, ...]
    rate: float
    momentum: float | None
    betas: tuple[float, float] | None
    epsilon: float | None
    vanishes: bool
    decay: float


@dataclass(frozen=True)
class OptimizerReading:
    """An optimizer as it stands.

    Args:
        kind: the name of its class.
        groups: its parameter groups.
    """

    kind: str
    groups: tuple[GroupReading, ...]


@dataclass(frozen=True)
class Capacity:
    """What the targets of the measured rows ask of a network.

    Args:
        rows: how many were looked at.
        columns: of the input.
        rank: of the targets about their mean.
        lost: by width, the least share of the targets' variance that a layer so narrow leaves out.
        linear: share of the targets' variance that the best affine map of the input explains, corrected for
            its number of columns (adjusted R²).
        neighbour: the share explained by the target of the nearest other row.
    """

    rows: int
    columns: int
    rank: int
    lost: tuple[float, ...]
    linear: float
    neighbour: float


@dataclass(frozen=True)
class Regime:
    """How a setup trains, from a few more passes over one batch on a copy.

    Args:
        optimizer: its settings.
        shrinking: the cosine between the next update of all weights and minus the weights: 1 if the step
            does nothing but pull them to zero.
        weights: how many values `shrinking` is a cosine of.
        novelty: the loss over that of the same rows with their targets exchanged: about 1 before anything is
            learnt; None if the batch is not `(x, y)`.
        noise_scale: rows over which the gradient's noise would average to its signal; infinite if the two
            halves of the batch do not agree at all, None if it could not be split.
        dropout_scale: the same for the noise of dropout alone; None without dropout.
        capacity: what the targets ask for; None if they cannot be compared with the input.
        tried: the loss before and after each of a few steps with one thing changed, by what was changed.
        flushes: whether the processor takes denormal numbers for zero.
        affine: whether the network is an affine map of its input up to its last weights, by trial.
    """

    optimizer: OptimizerReading
    shrinking: float
    weights: int
    novelty: float | None = None
    noise_scale: float | None = None
    dropout_scale: float | None = None
    capacity: Capacity | None = None
    tried: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    flushes: bool = False
    affine: bool = False

    @property
    def learnt(self) -> bool:
        """Whether the outputs fit their own targets better than those of other rows."""
        return self.novelty is not None and self.novelty < LEARNT
