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
        bias_variance: mean squared bias, less what `shift` explains (weighted sites).
        shift: biases that were made of the weights, as those that take a mean out: W x + b = W (x + shift).
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
    bias_variance: float = 0.0
    shift: float = 0.0
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
        descent: the cosine between the first step and the gradient: negative if it goes downhill; None if one
            of the two is zero, or no number.
        shrinking: the cosine between the first step of all weights and minus the weights.
        weights: how many values `shrinking` is a cosine of.
    """

    before: float
    line: tuple[tuple[float, float], ...]
    losses: tuple[float, ...]
    descent: float | None = None
    shrinking: float = 0.0
    weights: int = 0

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


@dataclass(frozen=True)
class LossReading:
    """What a loss function does, found by its slope at outputs made up for it.

    Args:
        family: cross entropy, binary cross entropy, squared, absolute, hinge, poisson; flat, if the output
            does not change it; undefined, if it is no number for such targets; None where only `wants` is
            known.
        wants: what the output must be: logits, probabilities, log probabilities or values; nothing, if it
            tells nothing.
        axis: of the output, along which its units share one probability; None if each unit is by itself.
        normalizes: whether it divides the output by its sum along the axis.
        sign: 1 if it is lowest where output and target agree, -1 if it falls as they part.
        ignored: share of the samples that it takes no notice of, whatever their output.
        kinds: how many of the classes in the targets it tells apart; None if that was not asked.
        weighted: whether it counts a sample of the rarest class more than one of the commonest.
        endless: whether it falls for ever with the output of some sample, so that nothing is the lowest.
        divides: whether it is far steeper where the target is near zero, as if it divided by it.
        floored: whether it takes all targets below zero for zero.
        line: `file:line` of its code, if known.
    """

    family: str | None
    wants: str
    axis: int | None = None
    normalizes: bool = False
    sign: int = 1
    ignored: float = 0.0
    kinds: int | None = None
    weighted: bool = False
    endless: bool = False
    divides: bool = False
    floored: bool = False
    line: str | None = None

    @property
    def per_class(self) -> bool:
        """Whether the units along an axis stand for classes that exclude each other."""
        return self.axis is not None

    def blind(self, target: TargetReading) -> bool:
        """Whether it tells no more than two of several classes apart, or not even two."""
        return self.kinds is not None and self.kinds < min(3, target.distinct)


@dataclass(frozen=True)
class OutputReading:
    """What the network puts out.

    Args:
        shape: of the whole output.
        low, high: the extreme values that were measured; NaN where some are no numbers.
        function: the torch function that it comes from, unchanged but for its shape; None if unknown.
        kind: of that site, such as softmax, activation or linear.
        site: name of that site.
        line: `file:line` of it, if known.
        bounds: between which it stays whatever the weights; None if unknown.
        positive: whether that function is above zero everywhere.
        sums_to_one: the axis along which the output is non-negative and sums to one.
        logs_of_one: the axis along which its exponentials sum to one.
    """

    shape: tuple[int, ...]
    low: float
    high: float
    function: str | None = None
    kind: str | None = None
    site: str | None = None
    line: str | None = None
    bounds: tuple[float, float] | None = None
    positive: bool = False
    sums_to_one: int | None = None
    logs_of_one: int | None = None

    @property
    def units(self) -> int:
        """The size of the last axis, if there is one beside that of the samples."""
        return self.shape[-1] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class TargetReading:
    """The targets of all batches that were looked at.

    Args:
        shape: of those of one batch.
        dtype: such as `int64`.
        low, high, mean, deviation: of all values.
        whole: whether all values are whole numbers.
        distinct: how many values are different.
        counts: how often each class comes, by its number, if the targets are classes: whole numbers of few
            kinds, or one-hot rows.
        one_hot: the axis along which they are zero but for a single one.
        distributions: the axis along which they are non-negative and sum to one.
        samples: how many samples there are.
        sorted: whether each of several batches holds a single class, and these rise or fall.
        partial: whether an optimizer step takes more batches than were given.
    """

    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float
    mean: float
    deviation: float
    whole: bool
    distinct: int
    counts: tuple[tuple[float, int], ...]
    one_hot: int | None
    distributions: int | None
    samples: int
    sorted: bool = False
    partial: bool = False

    @property
    def rms(self) -> float:
        """Root mean square of all values."""
        return math.hypot(self.mean, self.deviation)

    @property
    def binary(self) -> bool:
        """Whether there is nothing but zeros and ones."""
        return self.whole and self.low >= 0 and self.high <= 1

    @property
    def signs(self) -> bool:
        """Whether there are two kinds, 1 and -1."""
        return self.distinct == 2 and self.low == -1 and self.high == 1


@dataclass(frozen=True)
class ColumnsReading:
    """The columns of an input that is a table: rows of numbers.

    Args:
        count: how many columns there are.
        constant: those with one value in all rows.
        stray: those that seem to number the rows, or count seconds: whole numbers that are different, rise or
            are spread evenly, and are a hundred times as large as the middle one of the other columns.
        spread: of the largest stray column over the middle one of the others.
        same: whether all rows are equal.
        rows: how many rows were looked at.
    """

    count: int
    constant: tuple[int, ...]
    stray: tuple[int, ...]
    spread: float
    same: bool
    rows: int


@dataclass(frozen=True)
class LearnableReading:
    """How much the inputs say about the targets, by two quick guessers, over what chance would give.

    Args:
        score: the better of two correlations with the targets: of the nearest neighbour's target, and of a
            ridge regression that has not seen the sample.
        chance: the mean of these scores with permuted targets.
        spread: their standard deviation.
        clustered: distance of the nearest neighbour over that of any two samples, the median.
    """

    score: float
    chance: float
    spread: float
    clustered: float
    samples: int


@dataclass(frozen=True)
class Contract:
    """How output, loss, targets and inputs of a setup fit together.

    Args:
        output: None if it is not one tensor.
        target: None if it is not one tensor of numbers.
        loss: None if its nature is not sure.
        columns: None if the input is not one table.
        shortfall: the least mean squared error that any output within its bounds can reach, over the
            variance of the targets.
        paired: whether the loss compares each output with the target of the same sample; None if unknown, or
            if both have one shape.
        learnable: None where samples are too few, or neighbours mean nothing.
        descent: cosine between the optimizer's next step and the gradient of the loss: -1 for the steepest
            way down, above zero on the way up; None if unknown.
        asleep: modules that act differently in training and are in eval mode, in a model that trains.
        evaluating: whether the whole model was handed over in eval mode.
    """

    output: OutputReading | None = None
    target: TargetReading | None = None
    loss: LossReading | None = None
    columns: ColumnsReading | None = None
    shortfall: float | None = None
    paired: bool | None = None
    learnable: LearnableReading | None = None
    descent: float | None = None
    asleep: tuple[str, ...] = ()
    evaluating: bool = False
