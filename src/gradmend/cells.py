"""Torch's recurrent cells in closed form: the gates of known states, and the steps to first order.

Shapes: `P` paths (one direction of one layer), `S` steps, `n` samples, `H` hidden units, `G` gates, `K`
values of the hidden state that the next step sees (`H` unless an LSTM projects it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torch.nn import functional as F

Values = Float[Tensor, "P S n H"]
Gates = Float[Tensor, "P S n GH"]
States = Float[Tensor, "P S n K"]
First = Float[Tensor, "P n H"]
Rows = Float[Tensor, "P r _"]
PerPath = Float64[Tensor, " P"]

STEPS = 24
"""So many steps are looked at; the spectral radius takes as many power iterations."""

_ROWS = 4  # vectors multiplied for the growth, and as many for the radius
_UNIT_EVERY = 4  # iterations: often enough for float32 to hold what grows or fades by 1e9 in each
_TINY = 1e-37


class Linear(NamedTuple):
    """A step to first order.

    Args:
        keep: factor of the memory (the LSTM's cell, the GRU's hidden state) from step to step.
        gates: what one more in a gate's argument adds to the memory (the LSTM's `o`: to the hidden state).
        out: what one more in the LSTM's cell adds to the hidden state.
    """

    keep: Float[Tensor, "*where H"]
    gates: Float[Tensor, "*where G H"]
    out: Float[Tensor, "*where H"] | None = None

    def back(
        self,
        state: Sequence[Rows],
        weight: Float[Tensor, "P GH K"],
        projection: Tensor | None,
    ) -> tuple[Rows, ...]:
        """Send gradients of the state (LSTM: hidden, cell) after one step back to the state before it.

        Args:
            state: the gradients, one per row `r`; `self` is of one step and has the same rows.
            weight: of the hidden state.
            projection: [P, K, H] of an LSTM with projections.

        >>> linear = Linear(torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 0.25))
        >>> linear.back((torch.ones(1, 1, 1),), torch.full((1, 1, 1), 2.0), None)[0].item()
        1.0
        """
        if self.out is None:
            moved = self.gates * state[0].unsqueeze(2)
            return (torch.baddbmm(self.keep * state[0], moved.flatten(2), weight),)
        hidden, cell = state
        hidden = hidden if projection is None else torch.bmm(hidden, projection)
        cell = torch.addcmul(cell, self.out, hidden)
        moved = self.gates * torch.stack([cell, cell, cell, hidden], dim=2)
        return torch.bmm(moved.flatten(2), weight), self.keep * cell


class Cell(NamedTuple):
    """A kind of cell.

    Args:
        gates: (input's share of the gates' arguments, state's share, hidden states before the steps; for the
            LSTM also the first cell) -> the values of the gates, and what else the slopes need.
        linearise: what `gates` returns -> the steps to first order.
        flat: per gate, in the order of `gates`, which of its values lie where it is flat.
        memory: which of `gates` keeps the memory.
    """

    gates: Callable[..., tuple[Values, ...]]
    linearise: Callable[..., Linear]
    flat: Mapping[str, Callable[[Values], Bool[Tensor, "P S n H"]]]
    memory: int | None = None


def _lstm(given: Gates, asked: Gates, _before: States, first: First) -> tuple[Values, ...]:
    i, f, g, o = (given + asked).chunk(4, dim=-1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cells = [first]
    for added, kept in zip((i * g).unbind(1), f.unbind(1), strict=True):
        cells.append(torch.addcmul(added, kept, cells[-1]))
    return i, f, g, o, torch.stack(cells[1:], dim=1).tanh(), torch.stack(cells[:-1], dim=1)


def _linear_lstm(i: Values, f: Values, g: Values, o: Values, seen: Values, cell: Values) -> Linear:
    slopes = (g * i * (1 - i), cell * f * (1 - f), i * (1 - g * g), seen * o * (1 - o))
    return Linear(f, torch.stack(slopes, dim=-2), o * (1 - seen * seen))


def _gru(given: Gates, asked: Gates, before: States) -> tuple[Values, ...]:
    r, z, _ = (given + asked).sigmoid().chunk(3, dim=-1)
    proposed, recalled = given.chunk(3, dim=-1)[2], asked.chunk(3, dim=-1)[2]
    return r, z, torch.addcmul(proposed, r, recalled).tanh(), recalled, before


def _linear_gru(r: Values, z: Values, n: Values, recalled: Values, before: Values) -> Linear:
    slope = (1 - z) * (1 - n * n)
    slopes = (slope * recalled * r * (1 - r), (before - n) * z * (1 - z), slope * r)
    return Linear(z, torch.stack(slopes, dim=-2))


def _rnn_tanh(given: Gates, asked: Gates, _before: States) -> tuple[Values, ...]:
    return ((given + asked).tanh(),)


def _linear_rnn_tanh(h: Values) -> Linear:
    return Linear(torch.zeros_like(h), (1 - h * h).unsqueeze(-2))


def _rnn_relu(given: Gates, asked: Gates, _before: States) -> tuple[Values, ...]:
    return ((given + asked).relu(),)


def _linear_rnn_relu(h: Values) -> Linear:
    return Linear(torch.zeros_like(h), h.sign().unsqueeze(-2))


def _sigmoid_flat(x: Values) -> Bool[Tensor, "P S n H"]:
    return (x - 0.5).abs() > 0.49


def _tanh_flat(x: Values) -> Bool[Tensor, "P S n H"]:
    return 1 - x * x < 0.01


def _relu_flat(x: Values) -> Bool[Tensor, "P S n H"]:
    return x == 0


_LSTM = {"i": _sigmoid_flat, "f": _sigmoid_flat, "g": _tanh_flat, "o": _sigmoid_flat, "c": _tanh_flat}
_GRU = {"r": _sigmoid_flat, "z": _sigmoid_flat, "n": _tanh_flat}

CELLS = {
    "lstm": Cell(_lstm, _linear_lstm, _LSTM, memory=1),
    "gru": Cell(_gru, _linear_gru, _GRU, memory=1),
    "rnn_tanh": Cell(_rnn_tanh, _linear_rnn_tanh, {"h": _tanh_flat}),
    "rnn_relu": Cell(_rnn_relu, _linear_rnn_relu, {"h": _relu_flat}),
}
"""By the names of torch's functions."""


def growth_and_radius(
    linear: Linear, weight: Float[Tensor, "P GH K"], projection: Float[Tensor, "P K H"] | None
) -> tuple[PerPath, PerPath]:
    """Send random gradients of the state back, and see how their norms grow per step.

    Four of them go back along the trajectory, each in its own sample; their growth is a root mean square.
    Four stay at the last state of their sample, and so turn to the largest eigenvalues of the Jacobian there
    (Gelfand's formula), of which we take the mean. All turn first: half of the steps do not count.

    Args:
        linear: the steps, [P, S, n, ...], at most 24 of them.
        weight: of the hidden state.
        projection: of an LSTM with projections.

    >>> linear = Linear(torch.full((1, 3, 2, 5), 0.5), torch.zeros(1, 3, 2, 1, 5))
    >>> growth, radius = growth_and_radius(linear, torch.zeros(1, 5, 5), None)
    >>> round(growth.item(), 5), round(radius.item(), 5)
    (0.5, 0.5)
    """
    steps = linear.keep.shape[1]
    state = _random_state(linear, weight)
    logs = {}
    for step, now in enumerate(_iterations(linear), start=1):
        state = now.back(state, weight, projection)
        if step % _UNIT_EVERY == 0 or step in (steps // 2, steps):
            state, logs[step] = _unit(state)
    along = torch.stack([log[:, :_ROWS] for step, log in logs.items() if steps // 2 < step <= steps])
    still = torch.stack([log[:, _ROWS:] for step, log in logs.items() if step > STEPS // 2])
    growth = along.sum(dim=0).mul(2).exp().mean(dim=1) ** (0.5 / (steps - steps // 2))
    return growth, still.sum(dim=0).div(STEPS // 2).exp().mean(dim=1)


def _iterations(linear: Linear) -> Iterator[Linear]:
    """Per iteration the step, of its own sample, that each vector goes back through next."""
    paths, steps, samples = linear.keep.shape[:3]
    places = _places(steps, samples, linear.keep.device)
    parts = [
        [None] * STEPS
        if part is None
        else part.flatten(1, 2).index_select(1, places).view(paths, STEPS, -1, *part.shape[3:]).unbind(1)
        for part in linear
    ]
    return (Linear(*now) for now in zip(*parts, strict=True))


@lru_cache(maxsize=256)
def _places(steps: int, samples: int, device: torch.device) -> Tensor:
    """Where each vector finds its steps: [iterations * vectors] in [steps * samples]."""
    sample = torch.arange(_ROWS) % samples
    back = (steps - 1 - torch.arange(STEPS)).clamp_min(0)[:, None]
    last = torch.full_like(back, steps - 1)
    with torch.inference_mode(False):
        return torch.cat([back * samples + sample, last * samples + sample], dim=1).flatten().to(device)


def _random_state(linear: Linear, weight: Float[Tensor, "P GH K"]) -> tuple[Rows, ...]:
    paths, _, hidden = weight.shape
    cell = 0 if linear.out is None else linear.keep.shape[-1]
    rows = _random_rows(hidden + cell, weight.dtype, weight.device).expand(paths, -1, -1)
    return (rows[..., :hidden], rows[..., hidden:]) if cell else (rows,)


@lru_cache(maxsize=256)
def _random_rows(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random vectors of unit length, always the same."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        rows = torch.randn(2 * _ROWS, size, generator=generator, dtype=torch.float64)
        return F.normalize(rows).to(device, dtype)


def _unit(state: Sequence[Rows]) -> tuple[tuple[Rows, ...], Float64[Tensor, "P r"]]:
    """Bring each vector (all parts of the state together) to unit length; the log of its length."""
    whole = torch.cat(tuple(state), dim=2)
    length = torch.linalg.vector_norm(whole, dim=2, keepdim=True, dtype=torch.float64)
    divisor = length.clamp_min(_TINY).to(whole.dtype)
    return tuple(part / divisor for part in state), length.squeeze(2).log()
