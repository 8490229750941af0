"""Profile: the statistics of one training step, per site and per parameter, beside what theory predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradmend import theory
from gradmend.anatomy import Anatomy, Site
from gradmend.console import Printable, bar, number, plain_data

ROWS = 20
"""A picture of more sites than this shows some of them, evenly spaced."""


@dataclass(frozen=True)
class Expected:
    """What mean-field theory predicts for one site, from the measured weights and input."""

    rms: float
    cosine: float
    gradient_norm: float


@dataclass(frozen=True)
class Reading:
    """The statistics of one site, averaged over the measured batches.

    Args:
        site: where.
        mean: of the output.
        rms: root mean square of the output.
        zero: share of outputs that are exactly zero; at sites other than activations, of 32 samples.
        dead: share of units that are zero for every sample of every batch.
        saturation: share of an activation's inputs where its slope is under 1 % of its maximum.
        cosine: mean cosine between the outputs of two samples.
        rank: effective rank of the samples' outputs (participation ratio).
        gradient: rms of the loss's gradient at the output; the loss is a mean over the batch if the
            user's loss is.
        gradient_zero: share of exactly-zero gradient.
        gradient_cosine: mean cosine between the gradients of two samples.
        weight_variance: fan-in x mean squared weight (weighted sites).
        bias_variance: mean squared bias (weighted sites).
    """

    site: Site
    mean: float
    rms: float
    zero: float
    dead: float
    saturation: float | None
    cosine: float
    rank: float
    gradient: float | None = None
    gradient_zero: float | None = None
    gradient_cosine: float | None = None
    weight_variance: float | None = None
    bias_variance: float | None = None

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


@dataclass(frozen=True)
class Profile(Printable):
    """One measured training step.

    Args:
        anatomy: the model as read during the step.
        loss: of the batch, or its mean over the batches.
        sites: one reading per site, in the order of execution.
        parameters: one reading per parameter.
        inputs: what the first layer gets; None where no layer with weights comes first.
        samples: how many samples were measured.
        response: how the loss answers to steps, if that was measured.
    """

    anatomy: Anatomy
    loss: float
    sites: tuple[Reading, ...]
    parameters: tuple[ParameterReading, ...]
    inputs: InputReading | None
    samples: int
    response: Response | None = None

    def weighted(self) -> list[Reading]:
        """The readings at the pre-activations, in the order of execution."""
        return [reading for reading in self.sites if reading.site.weighted]

    @property
    def expected(self) -> dict[int, Expected]:
        """What theory predicts, by the index of the site; empty if it cannot."""
        return self._prediction[0]

    @property
    def unpredictable(self) -> str | None:
        """Why theory predicts nothing, if it does not."""
        return self._prediction[1]

    @cached_property
    def _prediction(self) -> tuple[dict[int, Expected], str | None]:
        return _predict(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: numbers, strings, lists; NaN and infinity become None."""
        measured: dict[str, Any] = plain_data(self)
        return {**measured, "expected": plain_data(self.expected), "unpredictable": self.unpredictable}

    def __rich__(self) -> RenderableType:
        title = f"loss {number(self.loss, 4)}, {self.samples} samples, {len(self.sites)} sites"
        return Group(Text(title), depth_picture(self))


def depth_picture(profile: Profile) -> RenderableType:
    """Per weighted site: the gradient's norm as a logarithmic bar, with the predicted one marked."""
    readings = [r for r in profile.weighted() if r.gradient_norm is not None] or list(profile.sites)
    shown = _thinned(readings)
    logs = [_log10(r.gradient_norm) for r in shown]
    expected = [profile.expected.get(r.site.index) for r in shown]
    predicted = [_log10(e.gradient_norm) if e else math.nan for e in expected]
    finite = [v for v in (*logs, *predicted) if math.isfinite(v)] or [0.0]
    low, high = min(finite) - 0.5, max(max(finite), min(finite) + 1.0)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", no_wrap=True, max_width=18)
    table.add_column("log10 |gradient|" + ("   ◆ predicted" if _any(predicted) else ""), no_wrap=True)
    for heading in ("measured", "predicted", "rms", "cosine"):
        table.add_column(heading, justify="right", no_wrap=True)
    for reading, log, guess in zip(shown, logs, predicted, strict=True):
        picture = _mark(bar(log, low, high, width=30), guess, low, high)
        cells = (_fixed(log), _fixed(guess), number(reading.rms), number(reading.cosine))
        table.add_row(Text(reading.site.name), Text(picture, style="cyan"), *cells)
    notes = [] if len(shown) == len(readings) else [f"{len(shown)} of {len(readings)} layers shown."]
    if profile.unpredictable:
        notes.append(f"Not predicted: {profile.unpredictable}.")
    return Group(table, *(Text(note, style="dim") for note in notes))


def _thinned(readings: Sequence[Reading]) -> list[Reading]:
    if len(readings) <= ROWS:
        return list(readings)
    return [readings[round(i * (len(readings) - 1) / (ROWS - 1))] for i in range(ROWS)]


def _log10(value: float | None) -> float:
    return math.log10(value) if value is not None and value > 0 else math.nan


def _fixed(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "-"


def _any(values: Sequence[float]) -> bool:
    return any(math.isfinite(v) for v in values)


def _mark(picture: str, value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return picture
    place = round((value - low) / (high - low) * (len(picture) - 1))
    return picture[:place] + "◆" + picture[place + 1 :]


def _predict(profile: Profile) -> tuple[dict[int, Expected], str | None]:
    """What theory expects at each linear site, with the gradient anchored at the last one; or why not."""
    stack, inputs = profile.anatomy.stack(), profile.inputs
    if isinstance(stack, str):
        return {}, stack
    if inputs is None or math.isnan(inputs.cosine):
        return {}, "the input is not a batch of real vectors"
    by_site = {reading.site.index: reading for reading in profile.sites}
    readings = [by_site[linear.index] for linear, _ in stack]
    if not all(reading.finite for reading in readings):
        return {}, "values are not finite"
    phis = [after.activation if after else None for _, after in stack]
    layers = [
        theory.Layer(phi, r.weight_variance or 0.0, r.bias_variance or 0.0)
        for phi, r in zip(phis, readings, strict=True)
    ]
    predicted = theory.predict(layers, inputs.rms**2, inputs.cosine)
    last = readings[-1].gradient_norm or 0.0
    triples = zip(predicted.q, predicted.cosine, predicted.log_gradient, strict=True)
    return {
        reading.site.index: Expected(math.sqrt(q), cosine, last * math.exp(log / 2))
        for reading, (q, cosine, log) in zip(readings, triples, strict=True)
    }, None
