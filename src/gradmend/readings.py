"""Readings: the numbers of one measured step, per site and per parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradmend.anatomy import Site
from gradmend.attention import AttentionReading
from gradmend.recurrence import TimeReading


@dataclass(frozen=True)
class Expected:
    """What mean-field theory predicts for one site, from the measured weights and input."""

    rms: float
    cosine: float
    gradient_norm: float


@dataclass(frozen=True)
class DriftReading:
    """How far the running statistics of a batch normalization are from those of the measured batch.

    Args:
        shift: |mean of the batch - running mean| over the running deviation, averaged over channels.
        ratio: deviation of the batch over the running deviation, geometric mean over channels.
    """

    shift: float
    ratio: float


@dataclass(frozen=True)
class Reading:
    """The statistics of one site, averaged over the measured batches.

    Args:
        site: where.
        mean: of the output.
        rms: root mean square of the output.
        zero: share of outputs that are exactly zero, of 16 samples (activations).
        dead: share of units that are zero for every sample of every batch.
        saturation: share of an activation's inputs where its slope is under 1 % of its maximum.
        cosine: mean cosine between the outputs of two samples, of 16; NaN at activations, for their inputs
            have one.
        rank: effective rank of these samples' directions (participation ratio); NaN at activations.
        gradient: rms of the loss's gradient at the output; the loss is a mean over the batch if the
            user's loss is.
        gradient_zero: share of exactly-zero gradient, of 16 samples (all but activations).
        gradient_cosine: mean cosine between the gradients of two samples (all but activations).
        weight_variance: fan-in x mean squared weight (weighted sites).
        bias_variance: mean squared bias (weighted sites).
        time: what happens along time (recurrent sites; of a cell in a loop every 2nd, 4th, 8th ... call).
        attention: how sharp it is (attention sites, and the softmax of a product of two signals).
        drift: running statistics against the batch's (batch normalization in training mode).
    """

    site: Site
    mean: float
    rms: float
    zero: float | None
    dead: float
    saturation: float | None
    cosine: float
    rank: float
    gradient: float | None = None
    gradient_zero: float | None = None
    gradient_cosine: float | None = None
    weight_variance: float | None = None
    bias_variance: float | None = None
    time: TimeReading | None = None
    attention: AttentionReading | None = None
    drift: DriftReading | None = None

    @property
    def variance(self) -> float:
        """Variance of the output over samples and units."""
        return max(0.0, self.rms**2 - self.mean**2)

    @property
    def finite(self) -> bool:
        """Whether the output and its gradient are numbers."""
        return math.isfinite(self.rms) and (self.gradient is None or math.isfinite(self.gradient))

    @property
    def gradient_norm(self) -> float | None:
        """Norm of the gradient at the output, over all samples and units."""
        return None if self.gradient is None else self.gradient * math.sqrt(math.prod(self.site.shape))


@dataclass(frozen=True)
class ResidualReading:
    """One sum of a stream and a branch.

    Args:
        site: the sum.
        rms: root mean square of the sum.
        stream: of what comes from further back.
        branch: of what is added to it.
    """

    site: Site
    rms: float
    stream: float
    branch: float

    @property
    def growth(self) -> float:
        """The rms of the sum over that of the stream before it."""
        return self.rms / self.stream

    @property
    def share(self) -> float:
        """The branch's share of the summed mean squares: 0 if it adds nothing, 1/2 if as much as there is."""
        return self.branch**2 / (self.branch**2 + self.stream**2)


@dataclass(frozen=True)
class ParameterReading:
    """One parameter tensor: its size, its gradient, and what the optimizer's next step would do to it.

    Args:
        rms: root mean square of the values.
        gradient: rms of the gradient; None if the loss does not reach it.
        update: rms of the optimizer's next update; None without optimizer.
        trained: whether the optimizer holds it; None without optimizer.
        frozen: whether `requires_grad` is off.
        symmetric: whether all its rows are equal and get equal gradients.
    """

    name: str
    shape: tuple[int, ...]
    rms: float
    gradient: float | None
    update: float | None
    trained: bool | None
    frozen: bool
    symmetric: bool

    @property
    def update_ratio(self) -> float | None:
        """The next update over the present size; None without optimizer, or if all values are zero."""
        return self.update / self.rms if self.update is not None and self.rms else None


@dataclass(frozen=True)
class InputReading:
    """What the network's first layer gets, after all that the user's forward does to the batch.

    Args:
        mean: of all values.
        rms: root mean square of all values.
        cosine: mean cosine between two samples.
        deviations: median and largest standard deviation among the columns that vary.
        constant: how many columns do not vary at all in this batch.
    """

    mean: float
    rms: float
    cosine: float
    deviations: tuple[float, float]
    constant: int


@dataclass(frozen=True)
class Response:
    """How the loss answers to the optimizer's steps, on one batch and a copy of the setup.

    Args:
        before: the loss as it stands.
        line: (fraction, loss) along the first step: `1.0` is the whole step.
        losses: the loss after each of a few steps on the same batch.
    """

    before: float
    line: tuple[tuple[float, float], ...]
    losses: tuple[float, ...]

    @property
    def best_fraction(self) -> float:
        """The fraction of the first step at which the loss is lowest; the smallest if nowhere finite."""
        finite = [(loss, fraction) for fraction, loss in self.line if math.isfinite(loss)]
        return min(finite, default=(math.inf, self.line[0][0]))[1]

    @property
    def reachable(self) -> float:
        """The lowest loss along the first step."""
        return min((loss for _, loss in self.line if math.isfinite(loss)), default=math.inf)

    @property
    def overshoots(self) -> bool:
        """Whether the first step is four times too long, and all do not bring half of what one could."""
        enough = (self.before + self.reachable) / 2
        return self.best_fraction <= 0.25 and not self.losses[-1] <= enough
