"""What mean-field theory knows of the values at one place of a network, and of the gradient there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from jaxtyping import Float64

from gradmend.theory.quadrature import LARGEST, SMALLEST

Field: TypeAlias = Float64[np.ndarray, "..."]
Lengths: TypeAlias = float | Field
"""One number for all positions, or one for each."""


@dataclass(frozen=True)
class Signal:
    """The values at one place of a network whose weights are random.

    Args:
        q: the second moment of one value.
        gap: 1 - cosine between two samples; unlike the cosine it keeps its digits when they are almost equal.
        mean: of the values of one sample.
        gaussian: whether the values are Gaussian over units, as an activation needs them.
        far: 1 - cosine between two positions far from each other, of the same sample or of two; None where
            positions do not count.
        batch: of how many samples each unit's values have just been normalized; None: not just now.
        weights: the weights it was last multiplied by, as a set of bits; bit 0 is the network's input.
    """

    q: Lengths
    gap: float
    mean: float = 0.0
    gaussian: bool = False
    far: float | None = None
    batch: int | None = None
    weights: int = 1

    @property
    def length(self) -> float:
        """The mean of q over all positions."""
        return mean(self.q)

    def shifted(self, by: float) -> Signal:
        """With a constant added to all values; what samples differ in stays."""
        if by == 0:
            return self
        q = self.q + by * (2 * self.mean + by)
        kept = self.length / max(mean(q), SMALLEST)
        far = None if self.far is None else min(kept * self.far, 2.0)
        return replace(self, q=held(q), gap=min(kept * self.gap, 2.0), far=far, mean=self.mean + by)


@dataclass(frozen=True)
class Gradient:
    """The gradient of the loss with respect to the values at one place.

    Args:
        log: ln of its squared norm, over all samples, units and positions.
        cosine: between the gradients of two samples; NaN: not followed, which saves half the time. Only
            batch normalization needs it, and takes it for 0 then.
        share: of the squared norm, by position, or by sample where lengths of each are known; its mean is 1.
        twist: E d^2 x^2 / (E d^2 E x^2) - 1, with x the value there: 0 if they are independent.
        pair_twist: E d_1 d_2 x_1 x_2 of two samples less what it were if independent, over E d^2 E x^2.
        radial: units x cosine^2 between gradient and values of one sample: 1 if they are independent, and not
            followed below that, where it does not matter.
        units: how many there are; infinitely many do not feel what is radial.
    """

    log: float = 0.0
    cosine: float = math.nan
    share: Lengths = 1.0
    twist: float = 0.0
    pair_twist: float = 0.0
    radial: Lengths = 1.0
    units: float = math.inf

    def times(self, factor: Lengths) -> Gradient:
        """With its squared norm multiplied, at each position by a factor of its own."""
        share = self.share * np.minimum(factor, LARGEST)
        total = mean(share)
        if not total > 0:
            return replace(self, log=-math.inf)
        return replace(self, log=self.log + math.log(total), share=share / total)

    def over(self, positions: tuple[int, ...]) -> Gradient:
        """Even, if the positions that it is known by are not these."""
        known = np.shape(self.share)
        if not known or not positions or known == positions:
            return self
        return replace(self, share=1.0, radial=mean(self.radial))


def mean(q: Lengths) -> float:
    """Over all positions."""
    return float(q.mean()) if isinstance(q, np.ndarray) else q


def held(q: Lengths) -> Lengths:
    """Within what expectations are computed for."""
    return q.clip(SMALLEST, LARGEST) if isinstance(q, np.ndarray) else min(max(q, SMALLEST), LARGEST)
