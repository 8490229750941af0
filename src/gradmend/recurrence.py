"""What happens along time in recurrent layers: pure functions of one call of torch's RNN, GRU or LSTM.

While a step is measured, `observe` looks at the call, `observe_gradient` at the gradient of the layer's
input; both return one small tensor on the device. `read` makes a record of the fetched numbers.

The layer is run again, without gradients and without dropout between its layers, on the first 24 steps of at
most 4 samples: as if the sequences ended there. Shapes: `D` directions of one layer, `P` paths (layers x
directions, in torch's order), `S` steps, `n` samples, `H` hidden units, `G` gates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gradmend.cells import CELLS, STEPS, Cell, growth_and_radius
from gradmend.samples import places, real

SAMPLES = 4
"""So many samples are run again."""

SHOWN = 64
"""The gradient is shown at no more than so many steps."""


@dataclass(frozen=True)
class Layout:
    """How a recurrent function was called.

    Args:
        kind: `lstm`, `gru`, `rnn_tanh` or `rnn_relu`.
        directions: 2 if bidirectional.
        batch_first: whether the input is [batch, steps, features] rather than [steps, batch, features].
        steps: length of the (longest) sequence; 1 for the call of a cell.
        batch_sizes: of a packed sequence, else empty.
    """

    kind: str
    directions: int
    batch_first: bool
    steps: int
    batch_sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class PathReading:
    """One direction of one recurrent layer.

    Args:
        saturation: per gate, the share of values where it is flat: sigmoids below 0.01 or above 0.99, tanh
            and ReLU where the slope is under 1 % of its maximum. LSTM: `i f g o`, and `c`, the tanh of the
            cell; GRU: `r z n`; RNN: `h`.
        memory: mean of the gate that keeps the state: the LSTM's forget gate, the GRU's z; NaN for an RNN.
        growth: factor of the gradient at the state (LSTM: hidden and cell) per step back along the
            trajectory: what makes gradients vanish or explode through time.
        radius: spectral radius of the Jacobian of one step, mean over samples. Of gated layers it says
            little about the gradient, because from step to step the Jacobians differ.
    """

    saturation: dict[str, float]
    memory: float
    growth: float
    radius: float

    @property
    def time_constant(self) -> float:
        """Steps until the memory has faded to 1/e by the mean gate alone: -1 / ln(memory).

        Source: Tallec, Ollivier, Can recurrent neural networks warp time?, 2018,
        https://arxiv.org/abs/1804.11188

        >>> round(PathReading({}, memory=0.5, growth=1.0, radius=1.0).time_constant, 2)
        1.44
        """
        if self.memory <= 0:
            return 0.0
        return math.inf if self.memory >= 1 else -1 / math.log(self.memory)


@dataclass(frozen=True)
class TimeReading:
    """What happens along time in one recurrent call.

    Args:
        paths: layer by layer, in each the forward and then the reverse direction.
        gradients: per direction of the layer, (steps before that direction's end, rms of the loss's gradient
            at the input of that step), nearest first; empty if no gradient was seen.
    """

    paths: tuple[PathReading, ...]
    gradients: tuple[tuple[tuple[int, float], ...], ...] = ()

    @property
    def gradient_factors(self) -> tuple[float, ...]:
        """Per direction, the factor of the gradient's rms per step back in time; see `factor_per_step`.

        The input's gradient is the sum of what both directions send. Going back, each prevails only near
        its own end, so of a bidirectional layer each direction is judged by the third of the steps nearest
        its end: an estimate, if there are losses at the ends only. If every step has its own loss, each adds
        to the gradient there, and the factor lies near one.
        """
        if len(self.gradients) == 1:
            return (factor_per_step(self.gradients[0]),)
        return tuple(factor_per_step(points[: max(2, len(points) // 3)]) for points in self.gradients)


def factor_per_step(points: Sequence[tuple[int, float]]) -> float:
    """The factor by which positive values change per step: the exponential of the median slope of their log.

    Values that are zero or no numbers are left out (padding; gradients below the smallest number). NaN if
    fewer than two are left, but zero if one is left and zeros follow it.

    Args:
        points: (step, value), in order.

    Source: Sen, Estimates of the regression coefficient based on Kendall's tau, 1968,
    https://doi.org/10.1080/01621459.1968.10480934

    >>> factor_per_step([(0, 8.0), (1, 4.0), (2, 0.0), (3, 1.0)])
    0.5
    """
    logs = [(step, math.log(value)) for step, value in points if 0 < value < math.inf]
    if len(logs) < 2:
        return 0.0 if logs and points[-1][0] > logs[0][0] and points[-1][1] == 0 else math.nan
    return math.exp(median((b - a) / (then - now) for (now, a), (then, b) in combinations(logs, 2)))


class _Call(NamedTuple):
    layout: Layout
    input: Tensor
    states: tuple[Tensor, ...]  # hidden, and the LSTM's cell: [paths, batch, units]
    weights: Sequence[Sequence[Sequence[Tensor]]]  # of each layer, of each direction, in torch's order


class _Layer(NamedTuple):
    """The weights of one layer for the state, and what its gates did."""

    recurrent: Float[Tensor, "D GH K"]
    projection: Float[Tensor, "D K H"] | None
    gates: tuple[Float[Tensor, "D S n H"], ...]


def layout(function: str, args: Sequence[Any]) -> Layout:
    """How a recurrent function was called.

    Args:
        function: `lstm`, `gru`, `rnn_tanh`, `rnn_relu`, or the same with `_cell`.
        args: its positional arguments, as `torch.nn` passes them; packed sequences too.

    >>> gru, x, h = torch.nn.GRU(3, 4), torch.zeros(5, 2, 3), torch.zeros(1, 2, 4)
    >>> layout("gru", (x, h, gru._flat_weights, True, 1, 0.0, True, False, False)).steps
    5
    """
    return _call(function, args).layout


@torch.no_grad()
def observe(function: str, args: Sequence[Any]) -> Float64[Tensor, " numbers"]:
    """Gates, spectral radius and growth along the trajectory of every layer and direction.

    Gates are exact for the steps and samples looked at. Growth is that of random gradients, in the half of
    the steps that they reach last; at initialization it agrees within about 3 % with the gradient's factor
    per step over long sequences. The radius, by power iteration, is within 5 %, mostly a little low. A cell's
    call is one step: its growth is that of a random gradient before it turns to the direction that lasts.

    Args:
        function: as for `layout`.
        args: as for `layout`; not changed.

    Returns:
        What `read` takes.

    Source: Vogt, Puelma Touzel, Shlizerman, Lajoie, On Lyapunov exponents for RNNs, 2020,
    https://arxiv.org/abs/2006.14123; Pascanu, Mikolov, Bengio, On the difficulty of training recurrent
    neural networks, 2013, https://arxiv.org/abs/1211.5063

    >>> cell = torch.nn.RNNCell(2, 2)
    >>> args = (torch.ones(1, 2), torch.zeros(1, 2), *cell.parameters())
    >>> read(layout("rnn_tanh_cell", args), observe("rnn_tanh_cell", args).tolist()).paths[0].saturation
    {'h': 0.0}
    """
    call = _call(function, args)
    with torch.autocast(call.input.device.type, enabled=False):
        chosen, x = _window(call)
        layered = (len(call.weights), -1, len(chosen))
        states = [real(s.index_select(1, chosen)).view(*layered, s.shape[2]) for s in call.states]
        layers = []
        for weights, first in zip(call.weights, zip(*states, strict=True), strict=True):
            layer, x = _layer(call.layout.kind, [[real(w) for w in each] for each in weights], x, first)
            layers.append(layer)
        return _numbers(CELLS[call.layout.kind], layers)


@torch.no_grad()
def observe_gradient(gradient: Float[Tensor, "..."], layout: Layout) -> Float64[Tensor, " numbers"]:
    """The rms of the gradient at the layer's input, by steps before the end of each direction.

    It is the input's gradient that shows the flow through time: the one at the output of a fused layer has
    only what the later layers send to each step directly. Steps are counted from each sequence's own end
    where it is packed; padding that the layer does not know of counts as steps.

    Args:
        gradient: of the loss, in the shape of the layer's input; packed: [rows, features].
        layout: of the call.

    Returns:
        What `read` takes as `gradients`.

    >>> gradient = torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1)
    >>> observe_gradient(gradient, Layout("gru", 1, batch_first=False, steps=3)).tolist()
    [2.0, 1.0, 0.5]
    """
    squares = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float64).square()
    means = _packed_means(squares, layout) if layout.batch_sizes else _means(squares, layout)
    shown = torch.tensor(_shown(layout.steps), device=gradient.device)
    return (means.index_select(1, shown) / gradient.shape[-1]).sqrt().flatten()


def _means(squares: Float64[Tensor, "..."], layout: Layout) -> Float64[Tensor, "D S"]:
    """The mean over samples, from the last step and from the first."""
    means = squares.mean(dim=0 if layout.batch_first else 1)
    return torch.stack([means.flip(0), means][: layout.directions])


def _packed_means(squares: Float64[Tensor, " rows"], layout: Layout) -> Float64[Tensor, "D S"]:
    """The same, in each sequence from its own ends."""
    sizes = torch.tensor(layout.batch_sizes)
    step = torch.arange(layout.steps).repeat_interleave(sizes)
    sample = torch.cat([torch.arange(size) for size in layout.batch_sizes])
    back = torch.bincount(sample)[sample] - 1 - step
    padded = squares.new_zeros(layout.directions, layout.steps, layout.batch_sizes[0])
    for direction, steps in zip(padded, (back, step), strict=False):
        direction[steps.to(squares.device), sample.to(squares.device)] = squares
    return padded.sum(dim=2) / sizes.to(squares.device)


def read(layout: Layout, values: Sequence[float], gradients: Sequence[float] = ()) -> TimeReading:
    """The record of one recurrent call.

    Args:
        layout: of the call.
        values: from `observe`.
        gradients: from `observe_gradient`; without them the record has none.

    >>> rnn = Layout("rnn_tanh", 1, batch_first=False, steps=2)
    >>> read(rnn, [math.nan, 0.9, 0.8, 0.0], [1.0, 0.5]).gradient_factors
    (0.5,)
    """
    names = tuple(CELLS[layout.kind].flat)
    size = len(names) + 3
    paths = tuple(_path(names, values[at : at + size]) for at in range(0, len(values), size))
    back = _shown(layout.steps)
    series = [gradients[at : at + len(back)] for at in range(0, len(gradients), len(back))]
    return TimeReading(paths, tuple(tuple(zip(back, rms, strict=True)) for rms in series))


def _path(names: Sequence[str], values: Sequence[float]) -> PathReading:
    memory, growth, radius, *saturation = values
    return PathReading(dict(zip(names, saturation, strict=True)), memory, growth, radius)


def _shown(steps: int) -> list[int]:
    """At most 64 steps, evenly spread from the first to the last."""
    count = min(steps, SHOWN)
    return [round(i * (steps - 1) / max(1, count - 1)) for i in range(count)]


def _call(function: str, args: Sequence[Any]) -> _Call:
    kind = function.removesuffix("_cell")
    if kind != function:
        x, hx, *weights = args
        states = tuple(state.reshape(1, -1, state.shape[-1]) for state in _states(hx))
        given = [[[w for w in weights if w is not None]]]
        return _Call(Layout(kind, 1, False, 1), x.reshape(1, -1, x.shape[-1]), states, given)
    packed = isinstance(args[3], (tuple, list))
    x, hx, flat, layers, bidirectional = (args[i] for i in ((0, 2, 3, 5, 8) if packed else (0, 1, 2, 4, 7)))
    directions = 2 if bidirectional else 1
    if packed:
        sizes = tuple(args[1].tolist())
        found = Layout(kind, directions, False, len(sizes), sizes)
    else:
        found = Layout(kind, directions, args[8], x.shape[1 if args[8] else 0])
    return _Call(found, x, _states(hx), _parts(_parts(flat, layers * directions), layers))


def _parts(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """So many parts of equal length."""
    size = len(items) // count
    return [items[at : at + size] for at in range(0, len(items), size)]


def _states(hx: Any) -> tuple[Tensor, ...]:
    return tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)


def _window(call: _Call) -> tuple[Tensor, Float[Tensor, "S n I"]]:
    """The first steps of a few samples, always the same; of packed sequences those that last so long."""
    sizes, x = call.layout.batch_sizes, call.input
    steps = min(call.layout.steps, STEPS)
    if not sizes:
        x = x.movedim(1, 0) if call.layout.batch_first else x
        chosen = places(x.shape[1], SAMPLES, x.device)
        return chosen, real(x[:steps].index_select(1, chosen))
    chosen = places(sizes[steps - 1], SAMPLES, x.device)
    starts = torch.tensor((0, *sizes[: steps - 1]), device=x.device).cumsum(0)
    return chosen, real(x[starts[:, None] + chosen])


def _layer(
    kind: str,
    weights: Sequence[Sequence[Tensor]],
    x: Float[Tensor, "S n I"],
    first: Sequence[Float[Tensor, "D n _"]],
) -> tuple[_Layer, Float[Tensor, "S n DK"]]:
    """Run one layer: what its gates did, and its output."""
    output, before = _run(kind, weights, x, first)
    given, recurrent, *rest = (torch.stack(each) for each in zip(*weights, strict=True))
    biases = [bias.unsqueeze(1) for bias in rest[:2]] if len(rest) > 1 else [given.new_zeros(())] * 2
    both = torch.stack([x, x.flip(0)][: len(weights)])
    shares = [
        (values.flatten(1, 2) @ weight.mT + bias).view(len(weights), *x.shape[:2], -1)
        for values, weight, bias in zip((both, before), (given, recurrent), biases, strict=True)
    ]
    gates = CELLS[kind].gates(*shares, before, *first[1:])
    return _Layer(recurrent, rest[-1] if len(rest) % 2 else None, gates), output


def _run(
    kind: str,
    weights: Sequence[Sequence[Tensor]],
    x: Float[Tensor, "S n I"],
    first: Sequence[Float[Tensor, "D n _"]],
) -> tuple[Float[Tensor, "S n DK"], Float[Tensor, "D S n K"]]:
    """Let torch run one layer: its output, and for each direction the hidden states before its steps."""
    flat = [w for direction in weights for w in direction]
    both, biased = len(weights) == 2, len(weights[0]) > 3
    hx = first if len(first) > 1 else first[0]
    with _without_cudnn():
        output = getattr(torch, kind)(x, hx, flat, biased, 1, 0.0, False, both, False)[0]
    after = output.chunk(len(weights), dim=2)
    after = torch.stack([after[0], *(reverse.flip(0) for reverse in after[1:])])
    return output, torch.cat([first[0].unsqueeze(1), after[:, :-1]], dim=1)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """It warns of one layer's weights that they are only a part of the whole model's."""
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def _numbers(cell: Cell, layers: Sequence[_Layer]) -> Float64[Tensor, " numbers"]:
    """Per path: mean memory, growth, radius, and the saturation of each gate."""
    gates = [torch.cat(values) for values in zip(*(layer.gates for layer in layers), strict=True)]
    memory = torch.full_like(gates[0], math.nan) if cell.memory is None else gates[cell.memory]
    flat = [is_flat(x) for is_flat, x in zip(cell.flat.values(), gates, strict=False)]
    memories, *shares = (x.flatten(1).double().mean(dim=1) for x in (memory, *flat))
    recurrent = torch.cat([layer.recurrent for layer in layers])
    projections = [layer.projection for layer in layers if layer.projection is not None]
    projection = torch.cat(projections) if projections else None
    growth, radius = growth_and_radius(cell.linearise(*gates), recurrent, projection)
    return torch.stack([memories, growth, radius, *shares], dim=1).flatten()
