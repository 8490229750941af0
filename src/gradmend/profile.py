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

from gradmend.anatomy import INPUT, Anatomy
from gradmend.console import Printable, bar, number, plain_data
from gradmend.disturbance import Disturbance
from gradmend.expected import expect
from gradmend.readings import (
    Contract,
    Expected,
    InputReading,
    ParameterReading,
    Reading,
    ResidualReading,
    Response,
)
from gradmend.regime import Regime

ROWS = 20
"""A picture of more sites than this shows some of them, evenly spaced."""


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
        compiled: whether the model, or a part of it, is compiled; it is measured as it was written.
        regime: how the setup trains, if that was looked at.
        disturbance: what becomes of a small change of the input, if that was measured.
        planned: how many optimizer steps are planned, if that was told.
        contract: how output, loss, targets and inputs fit together, if that was read.
        tried: how many samples of each batch steps were tried on, if fewer than it has.
    """

    anatomy: Anatomy
    loss: float
    sites: tuple[Reading, ...]
    parameters: tuple[ParameterReading, ...]
    inputs: InputReading | None
    samples: int
    response: Response | None = None
    compiled: bool = False
    disturbance: Disturbance | None = None
    regime: Regime | None = None
    planned: int | None = None
    contract: Contract | None = None
    tried: int | None = None

    def weighted(self) -> list[Reading]:
        """The readings at the pre-activations, in the order of execution."""
        return [reading for reading in self.sites if reading.site.weighted]

    @property
    def repeated(self) -> dict[str, tuple[Reading, ...]]:
        """The readings of places that are called several times, such as a cell in a loop, by the first name.

        With the same parameters, for one line of code may serve many layers, as in Keras.
        """
        calls: dict[tuple[str, tuple[str, ...]], list[Reading]] = {}
        for reading in self.sites:
            place = reading.site.name.partition("#")[0]
            calls.setdefault((place, reading.site.parameters), []).append(reading)
        return {found[0].site.name: tuple(found) for found in calls.values() if len(found) > 1}

    @property
    def residuals(self) -> tuple[ResidualReading, ...]:
        """What each branch adds to its stream, at the sums of two sites."""
        rms = {reading.site.index: reading.rms for reading in self.sites}
        if self.inputs is not None:
            rms[INPUT] = self.inputs.rms
        sums = [r for r in self.sites if r.site.kind == "sum" and len(r.site.direct) == 2]
        known = [r for r in sums if all(rms.get(index) for index in r.site.direct)]
        return tuple(ResidualReading(r.site, r.rms, *(rms[index] for index in r.site.direct)) for r in known)

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
        return expect(self.anatomy, self.sites, self.inputs, self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: numbers, strings, lists; NaN and infinity become None."""
        measured: dict[str, Any] = plain_data(self)
        return {**measured, "expected": plain_data(self.expected), "unpredictable": self.unpredictable}

    def __rich__(self) -> RenderableType:
        title = f"loss {number(self.loss, 4)}, {self.samples} samples, {len(self.sites)} sites"
        note = [Text("Compiled: measured as it was written.", style="dim")] if self.compiled else []
        return Group(Text(title), depth_picture(self), *note)


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
