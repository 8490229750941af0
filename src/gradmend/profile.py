"""Profile: the statistics of one training step, per site and per parameter, beside what theory predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradmend.anatomy import INPUT, Anatomy
from gradmend.console import Fitted, Printable, bar, number, plain_data, shortened
from gradmend.disturbance import Disturbance
from gradmend.expected import expect
from gradmend.pictures.labels import spread_out
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
from gradmend.terminal import BLUE, one_line

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from gradmend.portrait import Portrait

_LOOP = 4
"""What is called so many times is a loop over steps."""

ROWS = 20
"""A picture of more sites than this shows some of them, evenly spaced."""

_BAR, _LEAST_BAR, _NAME, _GAP = 30, 16, 18, 2
"""Columns of a terminal: of a bar, at most and at least; of a name before more numbers; between two."""


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
        return list(self._weighted)

    @cached_property
    def _weighted(self) -> tuple[Reading, ...]:
        return tuple(reading for reading in self.sites if reading.site.weighted)

    @cached_property
    def repeated(self) -> dict[str, tuple[Reading, ...]]:
        """The readings of places that are called several times, such as a cell in a loop, by the first name.

        With the same parameters, for one line of code may serve many layers, as in Keras.
        """
        calls: dict[tuple[str, tuple[str, ...]], list[Reading]] = {}
        for reading in self.sites:
            place = reading.site.name.partition("#")[0]
            calls.setdefault((place, reading.site.parameters), []).append(reading)
        return {found[0].site.name: tuple(found) for found in calls.values() if len(found) > 1}

    @cached_property
    def loops(self) -> tuple[tuple[Reading, ...], ...]:
        """The readings of recurrent cells, and of what else has weights, that are called step by step."""
        found = [calls for calls in self.repeated.values() if len(calls) >= _LOOP]
        return tuple(calls for calls in found if calls[0].time or calls[0].site.weighted)

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

    def figures(self, dark: bool = False) -> dict[str, Figure]:
        """The pictures that there are, by their names, the most telling first.

        Args:
            dark: for a dark background.
        """
        from gradmend.portrait import portraits

        return portraits({"": self.portrait}, dark=dark)

    @property
    def portrait(self) -> Portrait:
        """What pictures show of it."""
        from gradmend.portrait import Portrait

        return Portrait(self.anatomy, self.sites, self.parameters, self.inputs, self.expected, self.loops)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: numbers, strings, lists; NaN and infinity become None."""
        measured: dict[str, Any] = plain_data(self)
        return {**measured, "expected": plain_data(self.expected), "unpredictable": self.unpredictable}

    def __rich__(self) -> RenderableType:
        title = f"loss {number(self.loss, 4)}, {self.samples} samples, {len(self.sites)} sites"
        note = [Text("Compiled: measured as it was written.", style="dim")] if self.compiled else []
        return Group(Text(title), depth_picture(self), *note)


def depth_picture(profile: Profile) -> RenderableType:
    """Per weighted site: the gradient's norm as a logarithmic bar, with the predicted one marked.

    Where no gradient is known, as in a step that is not finite, the signal's rms stands for it.
    """
    return Fitted(partial(_depth_picture, profile))


def _depth_picture(profile: Profile, width: int) -> RenderableType:
    readings = [r for r in profile.weighted() if r.gradient_norm is not None] or list(profile.sites)
    shown = [readings[place] for place in spread_out(len(readings), ROWS)]
    logs, predicted, quantity = _logarithms(profile, shown)
    names = [one_line(reading.site.name) for reading in shown]
    columns = {
        "measured": [_fixed(log) for log in logs],
        "◆ predicted": [_fixed(guess) for guess in predicted],
        "rms": [number(reading.rms) for reading in shown],
        "cosine": [number(reading.cosine) for reading in shown],
    }
    known = {
        heading: cells for heading, cells in columns.items() if heading != quantity and {*cells} != {"-"}
    }
    kept, room, bar_room = _fitting(names, known, width)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("layer", f"log10 {quantity}"):
        table.add_column(heading, no_wrap=True)
    for heading in kept:
        table.add_column(heading, justify="right", no_wrap=True)
    bars = [Text(drawn, style=BLUE) for drawn in _bars(logs, predicted, bar_room)]
    for name, *cells in zip(names, bars, *kept.values(), strict=True):
        table.add_row(Text(shortened(name, room)), *cells)
    return Group(table, *(Text(note, style="dim") for note in _notes(profile, len(shown), len(readings))))


def _logarithms(profile: Profile, shown: Sequence[Reading]) -> tuple[list[float], list[float], str]:
    """What is drawn of each site, what theory predicts of it, and its name."""
    logs = [_log10(reading.gradient_norm) for reading in shown]
    if any(map(math.isfinite, logs)):
        expected = [profile.expected.get(reading.site.index) for reading in shown]
        return logs, [_log10(e.gradient_norm) if e else math.nan for e in expected], "|gradient|"
    return [_log10(reading.rms) for reading in shown], [math.nan] * len(shown), "rms"


def _fitting(
    names: Sequence[str], columns: Mapping[str, Sequence[str]], width: int
) -> tuple[dict[str, Sequence[str]], int, int]:
    """The first columns, as many as leave room for names and bars, and how wide these are then."""
    longest = max(map(cell_len, ("layer", *names)))
    wide = [_GAP + max(map(len, (heading, *cells))) for heading, cells in columns.items()]
    least = min(longest, _NAME) + _GAP + _LEAST_BAR
    most = next((n for n in range(len(wide), 1, -1) if width - sum(wide[:n]) >= least), 1)
    room = width - sum(wide[:most]) - _GAP
    name = min(longest, max(room - _LEAST_BAR, len("layer")))
    return dict(islice(columns.items(), most)), name, max(1, min(_BAR, room - name))


def _bars(logs: Sequence[float], predicted: Sequence[float], width: int) -> list[str]:
    finite = [v for v in (*logs, *predicted) if math.isfinite(v)] or [0.0]
    low, high = min(finite) - 0.5, max(max(finite), min(finite) + 1.0)
    drawn = [bar(log, low, high, width) for log in logs]
    return [_mark(picture, guess, low, high) for picture, guess in zip(drawn, predicted, strict=True)]


def _notes(profile: Profile, shown: int, all_: int) -> list[str]:
    few = [f"{shown} of {all_} layers shown."] if shown < all_ else []
    return [*few, f"Not predicted: {profile.unpredictable}."] if profile.unpredictable else few


def _log10(value: float | None) -> float:
    return math.log10(value) if value is not None and value > 0 else math.nan


def _fixed(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "-"


def _mark(picture: str, value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return picture
    place = round((value - low) / (high - low) * (len(picture) - 1))
    return picture[:place] + "◆" + picture[place + 1 :]
