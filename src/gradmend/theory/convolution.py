"""The rule of convolutions, whose zero padding takes from signals and gradients near the border."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Int64

from gradmend.theory.quadrature import require_nonnegative
from gradmend.theory.rules import Rule, weighted
from gradmend.theory.signals import Field, Gradient, Lengths, Signal, mean


@dataclass(frozen=True)
class Convolution(Rule):
    """A linear map at every position, where taps that fall on the padding bring nothing.

    Args:
        weight_variance: fan_in x Var(W).
        bias_variance: Var(b).
        inputs: positions along each axis. Along one that is shorter than what the kernel reads, the signal
            was made longer before, with values of its own (circular or reflected padding).
        outputs: positions along each axis.
        kernel: taps along each axis; stride, padding and dilation likewise.
        transposed: a transposed convolution: taps lead from each input to several outputs.
        shift: what biases that depend on the weights add to each input: W x + b = W (x + shift).

    Source: Xiao, Bahri, Sohl-Dickstein, Schoenholz, Pennington, Dynamical isometry and a mean field theory
    of CNNs, 2018, https://arxiv.org/abs/1806.05393 (circular padding); zero padding is derived here.
    """

    weight_variance: float
    bias_variance: float
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    shift: float = 0.0

    def __post_init__(self) -> None:
        require_nonnegative(weight_variance=self.weight_variance, bias_variance=self.bias_variance)

    def forward(self, inputs: Sequence[Signal]) -> Signal:
        """q' = weight_variance x the mean of q over the taps + bias_variance."""
        x, padding = inputs[0].shifted(self.shift), self.shift**2
        carried = self._carry(_placed(x.q, self.inputs) - padding, back=False) + padding
        product = self.weight_variance * carried
        far = 1 - x.mean**2 / x.length if x.far is None else x.far
        return weighted(replace(x, far=far), product, self.bias_variance)

    def backward(self, gradient: Gradient, inputs: Sequence[Signal]) -> list[Gradient]:
        """|d_in|^2 = weight_variance |d_out|^2, less what falls on the padding."""
        share = self._carry(_placed(gradient.share, self.outputs), back=True)
        ratio = math.prod(self.inputs) / math.prod(self.outputs)
        return [Gradient(gradient.log, gradient.cosine).times(self.weight_variance * ratio * share)]

    def _carry(self, field: Field, back: bool) -> Field:
        """Along the taps, from inputs to outputs or back."""
        for axis, taps in enumerate(self._taps):
            if back == self.transposed:
                field = _gathered(field, axis, taps)
            else:
                size = (self.outputs if self.transposed else self.inputs)[axis]
                field = _scattered(field, axis, taps, size)
        return field

    @cached_property
    def _taps(self) -> list[Int64[np.ndarray, "reading taps"]]:
        ends = (self.outputs, self.inputs) if self.transposed else (self.inputs, self.outputs)
        sides = zip(*ends, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return [_axis_taps(*side) for side in sides]


def _placed(q: Lengths, positions: tuple[int, ...]) -> Field:
    """By position; the mean everywhere if it was known for other positions."""
    return np.asarray(q) if np.shape(q) == positions else np.full(positions, mean(q))


def _axis_taps(
    read: int, reading: int, kernel: int, stride: int, padding: int, dilation: int
) -> Int64[np.ndarray, "reading taps"]:
    """Which position each tap reads along one axis, from each position that reads; -1 on the padding."""
    taps = np.arange(reading)[:, None] * stride + dilation * np.arange(kernel) - padding
    beyond = int(taps.max()) + 1 - read - padding
    if beyond > 0:  # padded before: with values as good as any others
        return (taps - beyond // 2) % read
    return np.where((taps >= 0) & (taps < read), taps, -1)


def _gathered(field: Field, axis: int, taps: Int64[np.ndarray, "reading taps"]) -> Field:
    """The mean over the taps."""
    along = np.moveaxis(field, axis, 0)
    padded = np.concatenate((along, np.zeros_like(along[:1])))
    return np.moveaxis(padded[taps].mean(1), 0, axis)


def _scattered(field: Field, axis: int, taps: Int64[np.ndarray, "reading taps"], size: int) -> Field:
    """Each position's share for each of its taps, added up where they lead."""
    along = np.moveaxis(field, axis, 0)
    padded = np.zeros((size + 1, *along.shape[1:]))
    np.add.at(padded, taps, along[:, None] / taps.shape[1])
    return np.moveaxis(padded[:-1], 0, axis)
