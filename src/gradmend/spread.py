"""Spread: how the outputs of every hidden layer, and the gradients there, are distributed in one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gradmend.anatomy import Anatomy, Site
from gradmend.console import Printable
from gradmend.harmless import undisturbed, untouched
from gradmend.recorder import Call, Recorder
from gradmend.setup import Batch, Setup

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from gradmend.pictures.ridges import Ridges

Shares = Float64[np.ndarray, "bins layers"]
Ranges = Mapping[str, tuple[float, float]]
"""`outputs` and `gradients`: from where to where they are counted."""

BINS: Final = 47
"""An odd number, so that zeros, ones and the like lie within bins, not between them."""

_WHAT: Final = ("outputs", "gradients")
_MOST: Final = 2**16
"""Of larger layers so many values are counted, evenly chosen."""

_GRADIENTS: Final = (-14.0, 2.0)
_ROOM: Final = 1.05
"""So that what is bounded by 1 does not end at the edge."""
_NEGATIVE: Final = 0.02
"""Outputs above this share of the range on the negative side count as none there."""


@dataclass(frozen=True, eq=False)
class Spread(Printable):
    """What share of the values of a layer lies in which of 47 equal bins.

    What lies beyond a range is counted at its edge, and so is a gradient of exactly zero; NaN is not counted.

    Args:
        layers: names of the hidden layers.
        outputs: of each, after its activation [bins, layers].
        gradients: of the loss by these outputs: log10 of their sizes [bins, layers].
        ranges: from where to where the bins reach.
    """

    layers: tuple[str, ...]
    outputs: Shares
    gradients: Shares
    ranges: Ranges

    def figures(self, dark: bool = False) -> dict[str, Figure]:
        """The pictures that there are, by their names.

        Args:
            dark: for a dark background.
        """
        from gradmend.pictures.ridges import ridges

        if not self.layers:
            return {}
        columns = [_column(self, what) for what in _WHAT]
        return {"spread": ridges(columns, "How outputs and gradients of the layers are spread", dark)}


def spread(setup: Setup, batch: Batch, ranges: Ranges | None = None) -> Spread:
    """Histograms of each hidden layer, of one forward and backward pass that leaves no trace.

    Args:
        setup: stays as it is.
        batch: what passes through.
        ranges: in which values are counted; by default such that most layers fit in.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
        >>> setup = Setup(model, nn.CrossEntropyLoss())
        >>> found = spread(setup, (torch.randn(64, 8), torch.randint(2, (64,))))
        >>> found.layers, found.outputs.shape, round(float(found.outputs.sum()), 6)
        (('0',), (47, 1), 1.0)

    Source: Glorot, Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010,
    https://proceedings.mlr.press/v9/glorot10a.html
    """
    outputs: dict[int, Tensor] = {}
    gradients: dict[int, Tensor] = {}

    def watch(_: Call, site: Site, output: Tensor) -> None:
        if output.requires_grad:
            outputs[site.index] = _some(output)
            output.register_hook(partial(_keep, gradients, site.index))  # type: ignore[no-untyped-call]

    anatomy = passed(setup, batch, watch)
    places = {place: name for place, name in _hidden(anatomy).items() if place in gradients}
    values = {
        "outputs": [outputs[place] for place in places],
        "gradients": [gradients[place].abs().log10() for place in places],
    }
    known = ranges or {"outputs": _symmetric(values["outputs"]), "gradients": _decades(values["gradients"])}
    shares = {what: _shares(values[what], known[what]) for what in values}
    return Spread(tuple(places.values()), **shares, ranges=known)


def compared(before: Spread, after: Spread, dark: bool = False) -> dict[str, Figure]:
    """Two spreads beside each other: of the outputs, and of the gradients.

    Args:
        before: on the left.
        after: on the right.
        dark: for a dark background.
    """
    from gradmend.pictures.ridges import ridges

    if not (before.layers and after.layers):
        return {}
    return {
        what: ridges(
            [_column(before, what, "before"), _column(after, what, "after")],
            f"How the {what} of the layers are spread, before and after",
            dark,
        )
        for what in _WHAT
    }


def _column(of: Spread, what: str, when: str = "") -> Ridges:
    from gradmend.pictures.ridges import Ridges

    title = f"{what}, {when}" if when else what
    decades, pale = what == "gradients", when == "before"
    return Ridges(title, of.layers, getattr(of, what), of.ranges[what], decades, pale)


def passed(setup: Setup, batch: Batch, watch: Callable[[Call, Site, Tensor], None]) -> Anatomy:
    """One forward and backward pass that leaves no trace; the watch is shown the output of every site."""
    recorder, batch = Recorder(setup.model, after=watch), untouched(batch)
    with undisturbed(setup.model):
        with recorder.watching(batch):
            loss = setup.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
    return recorder.anatomy()


def _some(values: Tensor) -> Tensor:
    """A copy, for forward may overwrite its own; odd strides meet all channels."""
    flat = values.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _MOST) | 1].float().clone()


def _keep(kept: dict[int, Tensor], place: int, gradient: Tensor) -> None:
    kept[place] = _some(gradient)


def _hidden(anatomy: Anatomy) -> dict[int, str]:
    """The names of all layers but the last, by where they give their output: behind their activation."""
    layers = [site for site in anatomy.sites if site.weighted or site.kind in ("recurrent", "attention")]
    places: dict[int, str] = {}
    for site in layers[:-1]:
        places.setdefault((anatomy.activation_after(site) or site).index, site.label)
    return places


def _shares(values: Sequence[Tensor], reach: tuple[float, float]) -> Shares:
    if not values:
        return np.zeros((BINS, 0))
    counts = [torch.histc(one[~one.isnan()].clamp(*reach), BINS, *reach) / max(1, len(one)) for one in values]
    return torch.stack(counts, dim=1).double().cpu().numpy()


def _symmetric(values: Sequence[Tensor]) -> tuple[float, float]:
    """A round number that holds nearly all of the middle layer, on both sides of zero if need be."""
    sizes = [float(one.quantile(0.99)) for one in map(_finite, [v.abs() for v in values]) if len(one)]
    reach = _round_up(_ROOM * float(np.median(sizes))) if sizes else 1.0
    negative = any(bool((one < -_NEGATIVE * reach).any()) for one in values)
    return (-reach if negative else 0.0), reach


def _round_up(value: float) -> float:
    """To 1, 2 or 5 times a power of ten.

    >>> [_round_up(value) for value in (0.0, 0.99, 1.5, 30.0)]
    [1.0, 1.0, 2.0, 50.0]
    """
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(power * step for step in (1.0, 2.0, 5.0, 10.0) if power * step >= value)


def _decades(logs: Sequence[Tensor]) -> tuple[float, float]:
    """Whole powers of ten that hold nearly all sizes of all layers but zero."""
    known = [one for one in map(_finite, logs) if len(one)]
    if not known:
        return _GRADIENTS
    low = math.floor(min(float(one.quantile(0.01)) for one in known))
    high = math.ceil(max(float(one.quantile(0.999)) for one in known))
    return float(low), float(max(high, low + 2))


def _finite(values: Float[Tensor, " values"]) -> Float[Tensor, " kept"]:
    return values[values.isfinite()]
