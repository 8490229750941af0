"""Disturbance: what becomes of a small change of the input on its way through the network, and back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Echo:
    """What reaches one weighted site.

    Args:
        index: of the site.
        apart: mean squared distance of a sample from its disturbed self, over that of two samples: 1 if they
            are as much strangers as any two.
        gradient_cosine: between the gradients of a sample and of its disturbed self, mean; NaN without them.
    """

    index: int
    apart: float
    gradient_cosine: float


@dataclass(frozen=True)
class Disturbance:
    """What a small disturbance of every sample does, measured by a second pass over the batch.

    Args:
        echoes: at the weighted sites, in the order of execution.
        tokens: per site whose output is [samples, places, units]: its index, and 1 - mean cosine between the
            places of one sample.
    """

    echoes: tuple[Echo, ...]
    tokens: tuple[tuple[int, float], ...] = ()
