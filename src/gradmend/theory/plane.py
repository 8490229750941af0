"""The plane of initializations on a fine grid, for pictures: from a table of moments, in no time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import Float64

from gradmend.theory.quadrature import Activation, tabulate

Grow: TypeAlias = Callable[
    [Float64[np.ndarray, "..."], Float64[np.ndarray, "..."]], Float64[np.ndarray, "..."]
]
"""From weight and bias variances to chi."""

_LOGS: Final = np.arange(-80, 81) / 4
"""ln of the second moments at which an activation is read."""
_TINY: Final = 1e-300
REACH: Final = (1e-2, 1e3)
"""Weight variances of a plane."""
_COLUMNS, _ROWS, _HALVINGS = 101, 33, 14


@dataclass(frozen=True, eq=False)
class Plane:
    """The growth of the squared gradient per layer, where lengths have settled.

    Args:
        weight_variances: the columns.
        bias_variances: the rows.
        chi: above 1 gradients explode, below they vanish.
        critical: of each row, the weight variance where chi is 1, or NaN.
    """

    weight_variances: Float64[np.ndarray, " weights"]
    bias_variances: Float64[np.ndarray, " biases"]
    chi: Float64[np.ndarray, "biases weights"]
    critical: Float64[np.ndarray, " biases"]


@lru_cache(maxsize=16)
def plane(phi: Activation, biases: float) -> Plane:
    """The phases of an activation for weight variances from 0.01 to 1,000, from a table of its moments.

    As `theory.phase_diagram`, but for a picture: in a tenth of a second on a fine grid, to about a hundredth.

    Args:
        phi: the activation.
        biases: up to which bias variance.

    Examples:
        >>> import torch
        >>> found = plane(torch.tanh, 0.05)
        >>> round(float(found.critical[-1]), 2)
        1.76

    Source: Poole et al., Exponential expressivity in deep neural networks through transient chaos, 2016,
    https://arxiv.org/abs/1606.05340
    """
    columns, rows = np.geomspace(*REACH, _COLUMNS), biases * np.linspace(0.0, 1.0, _ROWS) ** 2
    grow = _growth(phi)
    chi = grow(columns[None, :], rows[:, None])
    return Plane(columns, rows, chi, _critical(grow, columns, rows, chi))


def _growth(phi: Activation) -> Grow:
    """Where the length map leads from 1 on, by interpolation between tabulated moments, and chi there."""
    table = tabulate(phi)
    moments = [table.moments(math.exp(log)) for log in _LOGS]
    output, slope = np.array([(each.output, each.slope) for each in moments]).T

    def grow(
        weights: Float64[np.ndarray, "..."], biases: Float64[np.ndarray, "..."]
    ) -> Float64[np.ndarray, "..."]:
        excess = np.log(np.maximum(weights[..., None] * output + biases[..., None], _TINY)) - _LOGS
        growth: Float64[np.ndarray, "..."] = weights * np.interp(_settled(excess), _LOGS, slope)
        return growth

    return grow


def _settled(excess: Float64[np.ndarray, "*plane logs"]) -> Float64[np.ndarray, "*plane"]:
    """ln of the fixed point: up from 1 where lengths grow, else down, to the first change of sign."""
    start = len(_LOGS) // 2
    upward = excess[..., start:] <= 0
    above = np.where(upward.any(-1), start + upward.argmax(-1), len(_LOGS) - 1)
    downward = excess[..., start::-1] >= 0
    below = np.where(downward.any(-1), start - downward.argmax(-1), 0)
    rises = excess[..., start] > 0
    high = np.where(rises, above, np.minimum(below + 1, start))
    low = np.where(rises, above - 1, below)
    ends = [np.take_along_axis(excess, at[..., None], -1)[..., 0] for at in (low, high)]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.nan_to_num(ends[0] / (ends[0] - ends[1]), nan=0.0).clip(0.0, 1.0)
    settled: Float64[np.ndarray, "*plane"] = _LOGS[low] + share * (_LOGS[high] - _LOGS[low])
    return settled


def _critical(
    grow: Grow,
    columns: Float64[np.ndarray, " weights"],
    rows: Float64[np.ndarray, " biases"],
    chi: Float64[np.ndarray, "biases weights"],
) -> Float64[np.ndarray, " biases"]:
    """Of each row, the first crossing from order to chaos, found by halving."""
    crossing = (chi[:, :-1] < 1) & (chi[:, 1:] >= 1)
    first = crossing.argmax(axis=1)
    low, high = np.log(columns[first]), np.log(columns[first + 1])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        chaotic = grow(np.exp(middle), rows) >= 1
        low, high = np.where(chaotic, low, middle), np.where(chaotic, middle, high)
    return np.where(crossing.any(axis=1), np.exp((low + high) / 2), np.nan)
