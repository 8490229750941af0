"""Portrait: the numbers of measured steps as pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from plotly.graph_objects import Figure

from gradmend.anatomy import INPUT, Activation, Anatomy, Site
from gradmend.errors import SetupError
from gradmend.pictures.depth import Mark, Track, depth
from gradmend.pictures.lines import Values
from gradmend.pictures.phase import Place, phase
from gradmend.pictures.time import Series, through_time
from gradmend.readings import Expected, InputReading, ParameterReading, Reading
from gradmend.recurrence import TimeReading
from gradmend.theory import tabulate

_LAYERS: Final = frozenset(("linear", "convolution", "embedding", "recurrent", "attention"))
_NEVER_FLAT: Final = 0.25
"""An activation with so many zeros is one that has a flat side; there the share of dead units tells more."""

_SHALLOW: Final = 4
"""In a network of no more layers the gradient through time tells most."""
_WAYS: Final = ("forward", "backward")
_PLAIN: Final = frozenset(("rnn_tanh", "rnn_relu", "rnn_tanh_cell", "rnn_relu_cell"))
_CHAIN: Final = frozenset(("linear", "convolution", "embedding", "activation", "dropout"))
"""What a network may hold for the plane of initializations to tell all of it."""


@dataclass(frozen=True)
class Portrait:
    """What pictures show of a measured step; see `Profile`.

    Args:
        anatomy: the model as read.
        sites: one reading per site.
        parameters: one reading per parameter.
        inputs: what the first layer gets.
        expected: what theory predicts, by the index of the site.
        loops: the readings of what is called step by step.
    """

    anatomy: Anatomy
    sites: tuple[Reading, ...]
    parameters: tuple[ParameterReading, ...]
    inputs: InputReading | None
    expected: Mapping[int, Expected]
    loops: tuple[tuple[Reading, ...], ...]


def portraits(
    steps: Mapping[str, Portrait], marks: Sequence[Mark] = (), dark: bool = False
) -> dict[str, Figure]:
    """All pictures that can be made of the same network, measured once or several times.

    Args:
        steps: by name, such as before and after; the last is drawn strong.
        marks: what was found, at sites or parameters.
        dark: for a dark background.
    """
    tracks = {name: track(step) for name, step in steps.items()}
    if not any(each.layers for each in tracks.values()):
        return {}
    placed = [_placed(mark, steps.values()) for mark in marks]
    found = {"depth": depth(tracks, placed, dark)}
    time = _in_time(steps, dark)
    shallow = max(len(each.layers) for each in tracks.values()) <= _SHALLOW
    return {**(time if shallow else {}), **found, **time, **_in_plane(steps, dark)}


def _in_time(steps: Mapping[str, Portrait], dark: bool) -> dict[str, Figure]:
    found = {when: list(series(step)) for when, step in steps.items()}
    found = {when: some for when, some in found.items() if some}
    return {"time": through_time(found, dark)} if found else {}


def _in_plane(steps: Mapping[str, Portrait], dark: bool) -> dict[str, Figure]:
    """Of several measurements only those of the last one's activation lie in one plane."""
    found = {when: initialization(step) for when, step in steps.items()}
    last = list(found.values())[-1]
    if last is None:
        return {}
    try:
        tabulate(last.activation)
    except SetupError:  # theory takes functions of one number alone
        return {}
    same = {when: each.places for when, each in found.items() if each and each.activation is last.activation}
    return {"phase": phase(last.activation, last.name, same, dark, last.unit)}


def layers(step: Portrait) -> list[Reading]:
    """The readings where weights act; all of them in a network without any."""
    found = [reading for reading in step.sites if reading.site.kind in _LAYERS]
    return found or list(step.sites)


def track(step: Portrait) -> Track:
    """What was measured at each layer, at its activation where that tells it, and what is expected."""
    shown, known = layers(step), {reading.site.index: reading for reading in step.sites}
    bends = [step.anatomy.activation_after(reading.site) for reading in shown]
    ends = [known.get(bend.index) if bend else None for bend in bends]
    guesses = [step.expected.get(reading.site.index) for reading in shown]
    expected: dict[str, Values] = {
        "gradient": [guess.gradient_norm if guess else None for guess in guesses],
        "rms": [guess.rms if guess else None for guess in guesses],
        "cosine": [guess.cosine if guess else None for guess in guesses],
    }
    measured: dict[str, Values] = {
        "gradient": [reading.gradient_norm for reading in shown],
        "rms": [reading.rms for reading in shown],
        "saturated": [_saturated(end) for end in ends],
        "dead": [end.dead if end else None for end in ends],
        "cosine": [_number(reading.cosine) for reading in shown],
    }
    return Track(tuple(r.site.label for r in shown), measured, expected if any(guesses) else {})


def _saturated(reading: Reading | None) -> float | None:
    flat_side = reading is not None and (reading.zero or 0.0) >= _NEVER_FLAT
    return None if reading is None or flat_side else reading.saturation


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _placed(mark: Mark, steps: Iterable[Portrait]) -> Mark:
    """The same at the layers whose weights, activations or parameters are concerned."""
    found = {at for step in steps for at in _owners(step, mark.layers)}
    return Mark(mark.words, mark.tone, frozenset(found))


def _owners(step: Portrait, names: frozenset[str]) -> Iterable[str]:
    """The last layer up to each site of these names, and those that have a parameter of such a name."""
    shown, last = {reading.site.index for reading in layers(step)}, ""
    for site in step.anatomy.sites:
        last = site.label if site.index in shown else last
        if last and (site.name in names or not names.isdisjoint(site.parameters)):
            yield last


def series(step: Portrait) -> Iterator[Series]:
    """The gradient back through time, in recurrent layers and at what is called in a loop."""
    for reading in step.sites:
        if reading.time and reading.time.gradients:
            yield from _fused(reading, reading.time)
    for calls in step.loops:
        if calls[0].gradient is not None:
            sizes = tuple(call.gradient or 0.0 for call in reversed(calls))
            yield Series(calls[0].site.name, tuple(range(len(sizes))), sizes)


def _fused(reading: Reading, time: TimeReading) -> Iterator[Series]:
    """One for each direction; the layer that forgets slowest sets the pace."""
    ways = len(time.gradients)
    for way, points in enumerate(time.gradients):
        direction = f", {_WAYS[way]}" if ways > 1 else ""
        factor = max((path.growth for path in time.paths[way::ways]), default=math.nan)
        if len(points) > 2:
            back, sizes = zip(*points, strict=True)
            yield Series(reading.site.label + direction, back, sizes, factor)


@dataclass(frozen=True)
class Initialization:
    """Where layers, or the steps of a plain recurrent network, lie in the plane of initializations."""

    activation: Activation
    name: str
    places: list[Place]
    unit: str


def initialization(step: Portrait) -> Initialization | None:
    """Of a network that is nothing but layers and one activation; None of all others."""
    plain = [reading.site for reading in step.sites if reading.site.function in _PLAIN]
    if plain:
        return _recurrent(step, plain)
    weighted = step.anatomy.weighted()
    inner = step.anatomy.sites[: weighted[-1].index if weighted else 0]
    bends = [step.anatomy.activation_after(site) for site in weighted[:-1]]
    kinds = {bend.activation if bend else None for bend in bends}
    if len(kinds) != 1 or not all(site.kind in _CHAIN for site in inner):
        return None
    places = [place for reading in step.sites if (place := _layer(step, reading, weighted[0]))]
    phi = kinds.pop()
    return Initialization(phi, bends[0].function, places, "layer") if phi and bends[0] and places else None


def _layer(step: Portrait, reading: Reading, first: Site) -> Place | None:
    """A layer that reads the activation; dropout between them acts as larger weights."""
    if reading.weight_variance is None or reading.site.index == first.index:
        return None
    before = [step.anatomy.sites[at] for at in reading.site.direct if at >= 0]
    keep = math.prod(1 - site.settings["p"] for site in before if site.kind == "dropout")
    variance = reading.weight_variance / keep if keep else math.nan
    place = Place(reading.site.name, variance, reading.bias_variance)
    return place if math.isfinite(place.weight_variance + place.bias_variance) else None


def _recurrent(step: Portrait, sites: Sequence[Site]) -> Initialization | None:
    """The first layer of each, where it is known what enters."""
    kinds = {site.function.partition("_cell")[0] for site in sites}
    entering = [(site, _entering(step, site)) for site in sites]
    places = [_steps(step, site, size) for site, size in entering if size is not None]
    if len(kinds) > 1 or not places:
        return None
    name = kinds.pop().removeprefix("rnn_")
    return Initialization(getattr(torch, name), name, places, "step")


def _entering(step: Portrait, site: Site) -> float | None:
    """The mean square of the input."""
    sizes = {reading.site.index: reading.rms for reading in step.sites}
    if step.inputs is not None:
        sizes[INPUT] = step.inputs.rms
    size = sizes.get(site.direct[0]) if site.direct else None
    return size**2 if size is not None and math.isfinite(size) else None


def _steps(step: Portrait, site: Site, size: float) -> Place:
    known = {parameter.name: parameter for parameter in step.parameters}
    weights = next(name for name in site.parameters if "weight_hh" in name)
    state, given = known[weights], known[weights.replace("weight_hh", "weight_ih")]
    biases = [known.get(weights.replace("weight_hh", bias)) for bias in ("bias_ih", "bias_hh")]
    drive = given.shape[-1] * given.rms**2 * size + sum(bias.rms**2 for bias in biases if bias)
    return Place(site.label, state.shape[-1] * state.rms**2, drive)
