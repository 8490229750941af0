"""Training: the pictures of one training, and of several side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from plotly.graph_objects import Figure

from gradmend.look import Look
from gradmend.pictures.course import Curves, Span, course, multiples, overlay
from gradmend.pictures.heat import CELLS, Heat, Scale, heatmap, heatmaps

SCALES: Final = {
    "gradient": Scale("gradient at the output of each layer"),
    "signal": Scale("size of the output of each layer", middle=0.0),
    "weight gradient": Scale("gradient of each weight"),
    "step": Scale("step of each weight over its size", middle=-3.0),
    "weights": Scale("size of each weight"),
    "dead": Scale("share of dead units", powers=False),
    "saturated": Scale("saturation of each activation", powers=False),
    "likeness": Scale("cosine between the outputs of two samples", powers=False),
}
"""What is drawn of every layer at every step, the most telling first; sizes are root mean squares."""


@dataclass(frozen=True, eq=False)
class Training:
    """What there is to draw of a training.

    Args:
        name: of what trained.
        curves: over its steps.
        spans: of what was found.
        heats: by a name of `SCALES`.
    """

    name: str
    curves: Curves
    spans: tuple[Span, ...] = ()
    heats: Mapping[str, Heat] = field(default_factory=dict)


Draw: TypeAlias = Callable[..., Figure]
"""Calls what comes first with what follows: a function that draws."""


def at_once(function: Callable[..., Figure], *given: Any) -> Figure:
    """Draw it now; others may know a picture from before."""
    return function(*given)


def pictures(training: Training, look: Look, room: int = CELLS, draw: Draw = at_once) -> dict[str, Figure]:
    """The pictures of one training by their names, its course first; what has no data is left out.

    Args:
        training: to draw.
        look: of the pictures.
        room: cells of each heatmap.
        draw: calls the functions that draw.
    """
    drawn = {"course": draw(course, training.name, training.curves, training.spans, look)}
    for name, scale in SCALES.items():
        if name in training.heats:
            heat = training.heats[name]
            drawn[name] = draw(heatmap, training.name, heat, scale, training.spans, look, room)
    return drawn


def comparison(trainings: Sequence[Training], look: Look, draw: Draw = at_once) -> dict[str, Figure]:
    """The losses of several trainings in one picture, each for itself, and their gradients.

    Args:
        trainings: at least one, with names of their own.
        look: of the pictures.
        draw: calls the functions that draw.
    """
    curves = {training.name: training.curves for training in trainings}
    spans = {training.name: training.spans for training in trainings}
    drawn = {"losses": draw(overlay, curves, look), "runs": draw(multiples, curves, spans, look)}
    heats = {each.name: each.heats["gradient"] for each in trainings if "gradient" in each.heats}
    if heats:
        drawn["gradients"] = draw(heatmaps, heats, SCALES["gradient"], look)
    return drawn
