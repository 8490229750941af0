"""Ratio: how much smaller the gradient is at the first layer than at the last, measured and predicted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradmend.errors import SetupError
from gradmend.expected import expect
from gradmend.jacobian import block_factors
from gradmend.probe import measure
from gradmend.profile import Profile
from gradmend.readings import Expected, Reading
from gradmend.setup import Batch, Setup
from gradmend.theory import finite_width_deviation


@dataclass(frozen=True)
class GradientRatio:
    """log10(|d_1| / |d_L|), d_l the gradient with respect to all that the layer l puts out.

    Args:
        first: name of the first layer with weights.
        last: name of the last one.
        measured: -inf if nothing is left of the gradient.
        predicted: None if neither theory nor the blocks themselves tell.
        deviation: how far one network strays from the mean over all with layers as wide as these, by theory.
        reason: why nothing is predicted, if so.
    """

    first: str
    last: str
    measured: float
    predicted: float | None
    deviation: float
    reason: str | None


def gradient_ratio(setup: Setup, batch: Batch) -> GradientRatio:
    """Measure one step, and put beside the ratio of its gradients what mean-field theory predicts.

    Blocks without a formula are let through by what they do to random gradients. Below 1e-38 a gradient is
    lost in float32: there only models in float64 can be measured.

    Raises:
        SetupError: if gradients reach fewer than two layers with weights.
        BatchError: if model, batch and loss do not fit, or no gradient reaches any parameter.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gradmend.zoo import mlp
        >>> model = mlp(64, 2, width=256, depth=20, activation="relu", init="xavier")
        >>> batch = torch.randn(32, 64), torch.arange(32) % 2
        >>> ratio = gradient_ratio(Setup(model, nn.CrossEntropyLoss()), batch)
        >>> abs(ratio.measured - ratio.predicted) < 4 * ratio.deviation
        True

    Source: Schoenholz et al., Deep information propagation, 2017, https://arxiv.org/abs/1611.01232; for the
    deviation Hanin, Nica, Products of many large random matrices and gradients in deep neural networks, 2018,
    https://arxiv.org/abs/1812.05994
    """
    profile = measure(setup, batch)
    layers = [reading for reading in profile.weighted() if reading.gradient is not None]
    if len(layers) < 2:
        raise SetupError(f"A ratio needs two layers with weights that gradients reach, not {len(layers)}.")
    first, last = layers[0], layers[-1]
    expected, reason = _expected(setup, batch, profile)
    ends = [expected[r.site.index].gradient_norm for r in (first, last) if r.site.index in expected]
    return GradientRatio(
        first=first.site.name,
        last=last.site.name,
        measured=_decades(*(reading.gradient_norm or 0.0 for reading in (first, last))),
        predicted=_decades(*ends) if len(ends) == 2 else None,
        deviation=_deviation(layers[:-1]),
        reason=reason,
    )


def _expected(setup: Setup, batch: Batch, profile: Profile) -> tuple[dict[int, Expected], str | None]:
    if profile.unpredictable is None:
        return profile.expected, None
    factors = block_factors(setup, batch, range(len(profile.anatomy.sites)))
    return expect(profile.anatomy, profile.sites, profile.inputs, profile.parameters, factors)


def _decades(a: float, b: float) -> float:
    """log10(a / b), NaN if both are 0."""
    logs = [math.log10(x) if x > 0 else -math.inf for x in (a, b)]
    return logs[0] - logs[1]


def _deviation(layers: list[Reading]) -> float:
    """Of log10 |d|, half of that of log10 |d|^2; the variances of the layers add up."""
    return math.hypot(*(finite_width_deviation(1, r.site.units) for r in layers)) / math.log(100)
