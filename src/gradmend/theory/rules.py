"""What each known piece of a network does to signals going forward, and to gradients going backward.

Weights are taken for random and for new in every layer, and layers for wide. Sources: Schoenholz et al.,
Deep information propagation, 2017, https://arxiv.org/abs/1611.01232; Yang, Schoenholz, Mean field residual
networks: on the edge of chaos, 2017, https://arxiv.org/abs/1712.08969; Yang et al., A mean field theory of
batch normalization, 2019, https://arxiv.org/abs/1902.08129; the rest is derived here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gradmend.theory.angles import AngleMap
from gradmend.theory.quadrature import (
    SMALLEST,
    Activation,
    GaussianTable,
    Moments,
    PairMoments,
    require_nonnegative,
    tabulate,
)
from gradmend.theory.signals import Field, Gradient, Lengths, Signal, held, mean

_GRID = 33
"""Second moments, between the smallest and the largest position, at which an activation is looked at."""

_FEWEST = 32
"""Samples whose variance says something of values that are not Gaussian."""


class Rule(ABC):
    """A piece of a network that theory has a formula for."""

    @abstractmethod
    def forward(self, inputs: Sequence[Signal]) -> Signal | str:
        """The signal that comes out, or why the formula does not hold for these inputs."""

    @abstractmethod
    def backward(self, gradient: Gradient, inputs: Sequence[Signal]) -> list[Gradient]:
        """What arrives at each input of the gradient at the output."""


@dataclass(frozen=True)
class Linear(Rule):
    """Multiplies by weights and adds biases.

    Args:
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).
        fan_in: how many values each unit sums; None: so many that nothing depends on it.
        shift: what biases that depend on the weights add to each input: W x + b = W (x + shift).
    """

    weight_variance: float
    bias_variance: float = 0.0
    fan_in: int | None = None
    shift: float = 0.0

    def __post_init__(self) -> None:
        require_nonnegative(weight_variance=self.weight_variance, bias_variance=self.bias_variance)

    def forward(self, inputs: Sequence[Signal]) -> Signal:
        """q' = weight_variance q + bias_variance; the biases are the same for all samples."""
        x = inputs[0].shifted(self.shift)
        return weighted(replace(x, far=None), self.weight_variance * x.length, self.bias_variance)

    def backward(self, gradient: Gradient, inputs: Sequence[Signal]) -> list[Gradient]:
        """|d_in|^2 = weight_variance |d_out|^2, and a little more the more of it is radial.

        The weights are known to lead the input to the output, and so its direction back; all else is random.
        """
        (x,) = inputs
        if np.shape(x.q):  # positions, which are mixed
            return [Gradient(gradient.log, gradient.cosine).times(self.weight_variance)]
        units = math.inf if self.fan_in is None else float(self.fan_in)
        more = 1 + (gradient.radial - 1) / units
        share = (1 + self.shift * x.mean / max(x.length, SMALLEST)) ** 2  # of x, along x + shift
        product = self.weight_variance * x.length * share
        q = self.weight_variance * x.shifted(self.shift).length + self.bias_variance
        kept = product / max(q, SMALLEST)
        radial = np.maximum(gradient.radial / more * kept, 1.0)
        arrived = Gradient(gradient.log, gradient.cosine, gradient.share, radial=radial, units=units)
        return [arrived.times(self.weight_variance * more)]


def weighted(x: Signal, product: Lengths, bias_variance: float) -> Signal:
    """The signal x after random weights that make `product` of its q, and after biases."""
    q = product + bias_variance
    gap, far = gaps(x, mean(product), q)
    return Signal(held(q), gap, gaussian=True, far=far, weights=x.weights)


def gaps(x: Signal, part: float, q: Lengths) -> tuple[float, float | None]:
    """Those of x, where only `part` of the new q differs between samples and positions as x does."""
    share = part / mean(q) if mean(q) else 0.0
    return min(share * x.gap, 2.0), None if x.far is None else min(share * x.far, 2.0)


@dataclass(frozen=True)
class Elementwise(Rule):
    """An activation of Gaussian values. Use one object for all places that have it: it keeps a table.

    Args:
        phi: the activation.
    """

    phi: Activation

    def forward(self, inputs: Sequence[Signal]) -> Signal | str:
        """q' = E phi^2, gap' = 1 - E phi_1 phi_2 / E phi^2."""
        (x,) = inputs
        if not x.gaussian:
            return "its input is not Gaussian"
        moments, middle = self._moments(x.q), self._moments(x.length)
        if x.batch:
            pair = self._pair(x.length, x.batch)
            gap = 1 - pair.pair / pair.output if pair.output else 0.0
            return Signal(held(pair.output), gap, middle.mean, weights=x.weights)
        gap = self._angles.gap(x.length, middle, x.gap)
        far = None if x.far is None else self._angles.gap(x.length, middle, x.far)
        return Signal(held(moments.output), gap, mean(moments.mean), far=far, weights=x.weights)

    def backward(self, gradient: Gradient, inputs: Sequence[Signal]) -> list[Gradient]:
        """|d_in|^2 = E phi'^2 |d_out|^2, and E phi'_1 phi'_2 for the inner product of two samples'."""
        (x,) = inputs
        plain = Gradient(gradient.log, gradient.cosine, gradient.share)
        if x.batch:
            return [_after_batch(plain, self._pair(x.length, x.batch), x)]
        moments = self._moments(x.q)
        more, radial = _radial(gradient, x.q, moments)
        arrived = replace(plain, radial=radial, units=gradient.units).times(moments.slope * more)
        if math.isnan(gradient.cosine):
            return [arrived]
        shrunk = self._angles.slope(x.length, self._moments(x.length), x.gap)
        return [replace(arrived, cosine=gradient.cosine * shrunk)]

    @cached_property
    def _table(self) -> GaussianTable:
        return tabulate(self.phi)

    @cached_property
    def _angles(self) -> AngleMap:
        return AngleMap(self._table)

    @cached_property
    def _known(self) -> dict[float, Moments]:
        return {}

    @cached_property
    def _known_pairs(self) -> dict[tuple[float, int], PairMoments]:
        return {}

    def _pair(self, q: float, batch: int) -> PairMoments:
        if (q, batch) not in self._known_pairs:
            self._known_pairs[q, batch] = self._table.batch(q, batch)
        return self._known_pairs[q, batch]

    def _moments(self, q: Lengths) -> Moments:
        if isinstance(q, np.ndarray):
            return self._interpolated(q)
        if q not in self._known:
            self._known[q] = self._table.moments(q)
        return self._known[q]

    def _interpolated(self, q: Field) -> Moments:
        """By position, in ln q and the logarithms of what is positive, which are straight for power laws."""
        low, high = float(q.min()), float(q.max())
        if high <= low * (1 + 1e-9):
            return self._moments(low)
        grid = np.unique(q) if q.size <= _GRID else np.geomspace(low, high, _GRID)
        rows = np.array([self._table.moments(float(x)) for x in grid]).T
        logs = np.log(rows[1:].clip(SMALLEST)), rows[0] / np.sqrt(grid)
        *positive, mean = (np.interp(np.log(q), np.log(grid), row) for row in np.vstack(logs))
        return Moments(mean * np.sqrt(q), *map(np.exp, positive))


def _radial(gradient: Gradient, q: Lengths, m: Moments) -> tuple[Lengths, Lengths]:
    """How much more of a gradient an activation lets through, and `Gradient.radial` behind it.

    Where a longer signal becomes longer still, layer by layer, the loss depends on lengths more than on all
    else, and gradients turn towards the signal: at finite width they grow by that.
    """
    if gradient.units == math.inf:
        return 1.0, 1.0
    excess = gradient.radial - 1
    with np.errstate(all="ignore"):  # beyond the range of float64
        output, slope = np.maximum(m.output, SMALLEST), np.maximum(m.slope, SMALLEST)
        more = np.nan_to_num(1 + excess / gradient.units * (m.along / output / slope - 1), nan=1.0)
        carried = (q * m.length / output) ** 2 * (output / q / slope)
        radial = np.nan_to_num((m.steepness / q / slope + excess * carried) / more, nan=1.0)
    return more, np.clip(radial, 1.0, gradient.units)


def _after_batch(gradient: Gradient, pair: PairMoments, x: Signal) -> Gradient:
    """Through an activation whose input x lies on the sphere of a normalized batch."""
    arrived = gradient.times(pair.slope)
    if not pair.slope:
        return arrived
    cosine = 0.0 if math.isnan(gradient.cosine) else gradient.cosine
    twist = pair.steepness / (x.length * pair.slope) - 1
    together = pair.pair_steepness / x.length - (1 - x.gap) * pair.pair_slope
    shrunk = pair.pair_slope / pair.slope
    return replace(arrived, cosine=cosine * shrunk, twist=twist, pair_twist=cosine * together / pair.slope)


@dataclass(frozen=True)
class Normalization(Rule):
    """Layer, group or rms normalization: each sample divided by its own deviation, or rms.

    Args:
        centred: whether the sample's mean is taken out (layer, group) or not (rms).
        gain: root mean square of the factors that the result is multiplied by.
        bias: root mean square of what is added then.
        eps: added to the variance.
    """

    centred: bool = True
    gain: float = 1.0
    bias: float = 0.0
    eps: float = 0.0

    def forward(self, inputs: Sequence[Signal]) -> Signal:
        """q' = gain^2 + bias^2, but for eps."""
        (x,) = inputs
        factor, middle = self._factor(x), 0.0 if self.centred else x.mean
        q = factor * (x.q - x.mean**2 + middle**2) + self.bias**2
        gap, far = gaps(x, factor * x.length, q)
        return Signal(held(q), gap, math.sqrt(factor) * middle, x.gaussian, far, weights=x.weights)

    def backward(self, gradient: Gradient, inputs: Sequence[Signal]) -> list[Gradient]:
        """|d_in|^2 = gain^2 / variance x |d_out|^2: of many units, two directions lost do not matter."""
        (x,) = inputs
        return [Gradient(gradient.log, gradient.cosine, gradient.share).times(self._factor(x))]

    def _factor(self, x: Signal) -> float:
        variance = x.length - x.mean**2 if self.centred else x.length
        return self.gain**2 / max(variance + self.eps, SMALLEST)


@dataclass(frozen=True)
class BatchNormalization(Rule):
    """Each unit less its mean over the batch, divided by its deviation over the batch.

    Args:
        samples: of the batch.
        gain: root mean square of the factors that the result is multiplied by.
        bias: root mean square of what is added then.
        eps: added to the variance.
        positions: at which each sample has a value of the unit; they count as samples do.
    """

    samples: int
    gain: float = 1.0
    bias: float = 0.0
    eps: float = 0.0
    positions: int = 1

    @property
    def size(self) -> int:
        """How many values are normalized together."""
        return self.samples * self.positions

    def forward(self, inputs: Sequence[Signal]) -> Signal | str:
        """q' = gain^2 + bias^2 but for eps; without positions and biases, cosines are -1 / (samples - 1)."""
        (x,) = inputs
        least = 4 if x.gaussian else _FEWEST
        if self.size < least:
            return f"it normalizes fewer than {least} values"
        factor = self.gain**2 / (self._variance(x) + self.eps)
        q = factor * self._variance(x) * (x.q / x.length) + self.bias**2
        gap, far = gaps(x, factor * x.length, q)
        batch = None if self.bias or self.positions > 1 or isinstance(q, np.ndarray) else self.size
        return Signal(held(q), gap, 0.0, x.gaussian, far, batch, x.weights)

    def backward(self, gradient: Gradient, inputs: Sequence[Signal]) -> list[Gradient]:
        """What is left without the batch's mean and deviation, over the variance.

        The inverse variance is (n - 1) / (n - 3) times larger on average than that of the mean variance.
        """
        (x,) = inputs
        size, variance = self.size, self._variance(x)
        rest = variance / (variance + self.eps)
        cosine = 0.0 if math.isnan(gradient.cosine) else gradient.cosine
        centred = 1 - (1 + (self.samples - 1) * cosine) / size
        along = size / (size - 1) * centred + gradient.twist + (size - 1) * gradient.pair_twist
        left = max(centred - (2 - rest) * rest * along / size, 0.0)
        inverse = 1 / (variance * (size - 3) / (size - 1) + self.eps)
        apart = 1 - (1 - cosine) / centred if centred else 0.0
        return [Gradient(gradient.log, apart, gradient.share).times(self.gain**2 * left * inverse)]

    def _variance(self, x: Signal) -> float:
        """Of a unit over the batch; other positions are as far apart as other samples, or farther."""
        alike, far = self.samples - 1, x.gap if x.far is None else x.far
        gap = (alike * x.gap + (self.size - 1 - alike) * far) / self.size
        return max(x.length * gap, SMALLEST)


@dataclass(frozen=True)
class Sum(Rule):
    """Two signals added, of which one at least ends in weights that the other has not met.

    Args:
        sign: -1 where the second is subtracted.
    """

    sign: float = 1.0

    def forward(self, inputs: Sequence[Signal]) -> Signal | str:
        """q' = q_1 + q_2, and twice the product of the means."""
        a, b = inputs
        if a.weights & b.weights:
            return "its summands come from the same weights"
        same = np.shape(a.q) == np.shape(b.q) or not np.shape(a.q) or not np.shape(b.q)
        lengths = a.q + b.q if same else a.length + b.length
        q = lengths + 2 * self.sign * a.mean * b.mean
        total = max(mean(q), SMALLEST)
        gap = min((a.length * a.gap + b.length * b.gap) / total, 2.0)
        far = None if a.far is None or b.far is None else (a.length * a.far + b.length * b.far) / total
        gaussian, weights = a.gaussian and b.gaussian, a.weights | b.weights
        return Signal(held(q), gap, a.mean + self.sign * b.mean, gaussian, far, weights=weights)

    def backward(self, gradient: Gradient, inputs: Sequence[Signal]) -> list[Gradient]:
        """The same gradient for both."""
        return [Gradient(gradient.log, gradient.cosine, gradient.share)] * 2


@dataclass(frozen=True)
class Scale(Rule):
    """Multiplies by a constant, or by a vector of this root mean square."""

    factor: float

    def forward(self, inputs: Sequence[Signal]) -> Signal:
        """q' = factor^2 q."""
        (x,) = inputs
        return replace(x, q=held(self.factor**2 * x.q), mean=self.factor * x.mean)

    def backward(self, gradient: Gradient, inputs: Sequence[Signal]) -> list[Gradient]:
        """|d_in|^2 = factor^2 |d_out|^2."""
        return [gradient.times(self.factor**2)]


@dataclass(frozen=True)
class Dropout(Rule):
    """Keeps each value with a probability and divides it by that; each sample has a mask of its own."""

    keep: float

    def forward(self, inputs: Sequence[Signal]) -> Signal | str:
        """q' = q / keep, and the same inner product of two samples."""
        (x,) = inputs
        if not 0 < self.keep <= 1:
            return "it keeps nothing"
        if self.keep == 1:
            return x
        gap = 1 - self.keep + self.keep * x.gap
        far = None if x.far is None else 1 - self.keep + self.keep * x.far
        return Signal(held(x.q / self.keep), gap, x.mean, far=far, weights=x.weights)

    def backward(self, gradient: Gradient, inputs: Sequence[Signal]) -> list[Gradient]:
        """|d_in|^2 = |d_out|^2 / keep, and the same inner product of two samples'."""
        plain = Gradient(gradient.log, self.keep * gradient.cosine, gradient.share)
        return [gradient if self.keep == 1 else plain.times(1 / self.keep)]
