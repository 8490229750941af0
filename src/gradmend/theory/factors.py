"""Growth of the squared gradient norm per layer under unit variance, normalization and residual branches."""

from __future__ import annotations

import math

import torch

from gradmend.errors import SetupError, suggest
from gradmend.theory.quadrature import Activation, require_nonnegative, tabulate


def isometry_gain(phi: Activation) -> float:
    """The growth chi per layer when the weights are scaled to keep every pre-activation at variance 1.

    E phi'(z)^2 / E phi(z)^2, z ~ N(0, 1). Only where it is 1 does unit variance also preserve gradients.

    Args:
        phi: the activation.

    Example:
        >>> round(isometry_gain(torch.tanh), 4)
        1.1778
    """
    moments = tabulate(phi).moments(1.0)
    return _ratio(moments.slope, moments.output)


def norm_factor(phi: Activation, kind: str, batch_size: int | None = None) -> float:
    """The growth chi per layer with a normalization before the activation.

    layer, rms: E phi'^2 / E phi^2. batch: E phi'^2 / Var phi, the limit of large batches; for ReLU with a
    batch size B, exactly [(J' + B - 1) / ((B - 3)(1 - J)) - 1 / (B - 3)] with J, J' the ReLU correlation map
    and its slope at -1 / (B - 1). Above 1 for every activation: batch normalization makes gradients explode.

    Args:
        phi: the activation.
        kind: "batch", "layer" or "rms".
        batch_size: samples per batch, 4 or more; matters for ReLU after batch normalization only.

    Example:
        >>> round(norm_factor(torch.relu, "batch", batch_size=64), 4)
        1.4931
        >>> round(norm_factor(torch.relu, "layer"), 4)
        1.0

    Source: Yang, Pennington, Rao, Sohl-Dickstein, Schoenholz, A mean field theory of batch normalization,
    2019, theorem 8, https://arxiv.org/abs/1902.08129
    """
    moments = tabulate(phi).moments(1.0)
    if kind in ("layer", "rms"):
        return _ratio(moments.slope, moments.output)
    if kind != "batch":
        raise SetupError(f"No normalization is called {kind!r}. {suggest(kind, ('batch', 'layer', 'rms'))}")
    if batch_size is not None and batch_size < 4:
        raise SetupError(
            f"The gradient through batch normalization needs 4 samples or more, not {batch_size}."
        )
    if batch_size is not None and _is_relu(phi):
        return _relu_batch_factor(batch_size)
    return _ratio(moments.slope, moments.output - moments.mean**2)


def residual_factor(phi: Activation, q: float, weight_variance: float, scale: float) -> float:
    """The growth chi through one residual block x + scale W phi(x).

    chi = 1 + scale^2 weight_variance E phi'(sqrt(q) z)^2

    Args:
        phi: the activation.
        q: E x^2 of one unit of the stream.
        weight_variance: fan_in x Var(W).
        scale: what the branch is multiplied with.

    Example:
        >>> round(residual_factor(torch.relu, 1.0, weight_variance=2.0, scale=1.0), 6)
        2.0

    Source: Yang, Schoenholz, Mean field residual networks: on the edge of chaos, 2017,
    https://arxiv.org/abs/1712.08969
    """
    require_nonnegative(q=q, weight_variance=weight_variance)
    return 1 + scale**2 * weight_variance * tabulate(phi).moments(q).slope


def finite_width_deviation(depth: int, width: int) -> float:
    """How far one network's ln(|d_1|^2 / |d_L|^2) strays from the mean-field prediction, as a deviation.

    sqrt(5 depth / width), measured for ReLU layers with Gaussian weights at critical variance.

    Args:
        depth: how many layers.
        width: units per layer.

    Example:
        >>> round(finite_width_deviation(100, 256), 4)
        1.3975

    Source: Hanin, Nica, Products of many large random matrices and gradients in deep neural networks, 2018,
    https://arxiv.org/abs/1812.05994
    """
    if depth < 0 or width < 1:
        raise SetupError(f"`depth` counts layers and `width` units: not {depth} and {width}.")
    return math.sqrt(5 * depth / width)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


def _is_relu(phi: Activation) -> bool:
    probe = torch.tensor([-3.0, -1.0, -0.1, 0.1, 1.0, 3.0], device="cpu")
    return torch.equal(phi(probe.clone()).detach(), probe.clamp(min=0))


def _relu_batch_factor(batch_size: int) -> float:
    c = -1 / (batch_size - 1)
    angle = math.acos(c)
    image, slope = (math.sqrt(1 - c * c) + (math.pi - angle) * c) / math.pi, 1 - angle / math.pi
    return (slope + batch_size - 1) / ((batch_size - 3) * (1 - image)) - 1 / (batch_size - 3)
