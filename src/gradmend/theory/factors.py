"""Growth of lengths and of the squared gradient norm under normalization, residual branches and padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradmend.errors import SetupError, suggest
from gradmend.theory.meanfield import e_folding
from gradmend.theory.quadrature import (
    LARGEST,
    SMALLEST,
    Activation,
    GaussianTable,
    require_nonnegative,
    tabulate,
)

_NORMS = ("batch", "layer", "rms")
_PLACES = ("pre", "post")


@dataclass(frozen=True)
class Growth:
    """What a stack of blocks does to signals, in natural logarithms.

    Args:
        log_length: ln(q_L / q_0), q the mean square of one unit.
        log_gradient: ln(|d_0|^2 / |d_L|^2), d the gradient with respect to what lies between blocks.
    """

    log_length: float
    log_gradient: float


def isometry_gain(phi: Activation) -> float:
    """The growth chi per layer when the weights are scaled to keep every pre-activation at variance 1.

    E phi'(z)^2 / E phi(z)^2, z ~ N(0, 1). Only where it is 1 does unit variance also preserve gradients.

    Args:
        phi: the activation.

    Examples:
        >>> import torch
        >>> round(isometry_gain(torch.tanh), 4)
        1.1778
    """
    return norm_factor(phi, "rms")


def norm_factor(
    phi: Activation, kind: str, batch_size: int | None = None, *, after: bool = False, q: float = 1.0
) -> float:
    """The growth chi per layer with a normalization before the activation, or after it.

    q E phi'(sqrt(q) z)^2 / E phi(sqrt(q) z)^2, where a mean that the normalization takes out again leaves
    Var phi of E phi^2: for batch at either place, for layer after the activation, for rms nowhere.
    That is exact for layer and rms. For batch it is the limit of large batches; with a batch size, and the
    normalization before the activation, the factor is exact as long as samples keep apart like random ones.
    In large batches they do where lambda = d ln Var phi / d ln q is 1 at most. Else a few samples grow longer
    than all others, lambda times per layer at first, and gradients more than this says: SiLU 1.10, GELU 1.06.
    Above 1 for every activation: batch normalization makes gradients explode.

    Args:
        phi: the activation.
        kind: "batch", "layer" or "rms".
        batch_size: samples per batch, 4 or more; matters for batch normalization before the activation only.
        after: whether the activation comes first, then the normalization, then the weights.
        q: the second moment of what enters the activation: gain^2 of a normalization before it,
            weight_variance x gain^2 of one after it.

    Examples:
        >>> import torch
        >>> round(norm_factor(torch.relu, "batch", batch_size=64), 4)
        1.4931
        >>> round(norm_factor(torch.relu, "layer"), 4), round(norm_factor(torch.relu, "layer", after=True), 4)
        (1.0, 1.4669)

    Source: Yang, Pennington, Rao, Sohl-Dickstein, Schoenholz, A mean field theory of batch normalization,
    2019, https://arxiv.org/abs/1902.08129 (batch: theorem 8 is the case of ReLU); derived here for the rest.
    """
    require_nonnegative(q=q)
    if kind not in _NORMS:
        raise SetupError(f"No normalization is called {kind!r}. {suggest(kind, _NORMS)}")
    if batch_size is not None and batch_size < 4:
        raise SetupError(
            f"The gradient through batch normalization needs 4 samples or more, not {batch_size}."
        )
    table, q = tabulate(phi), max(q, SMALLEST)
    if kind == "batch" and batch_size is not None and not after:
        return _batch_factor(table, q, batch_size)
    moments = table.moments(q)
    centred = kind == "batch" or (kind == "layer" and after)
    return _ratio(q * moments.slope, moments.output - (moments.mean**2 if centred else 0))


def batch_norm_depth(phi: Activation, batch_size: int | None = None) -> float:
    """How many layers can be trained with batch normalization before each activation, and no skips.

    L < 16 / |ln chi|, an empirical rule.

    Args:
        phi: the activation.
        batch_size: samples per batch, 4 or more; without it, the limit of large batches.

    Examples:
        >>> import torch
        >>> round(batch_norm_depth(torch.relu, batch_size=64))
        40

    Source: Yang et al., A mean field theory of batch normalization, 2019, https://arxiv.org/abs/1902.08129
    """
    return 16 * e_folding(norm_factor(phi, "batch", batch_size))


def residual_factor(
    phi: Activation, q: float, weight_variance: float, scale: float = 1.0, norm: str | None = None
) -> float:
    """The growth chi through one residual block x + scale W phi(x).

    chi = 1 + scale^2 weight_variance E phi'(sqrt(q) z)^2. With layer or RMS normalization of the branch's
    input ("pre") the second summand is taken at q = 1 and divided by q; with one of the sum ("post") chi is
    divided by the sum's q' = q + scale^2 weight_variance E phi(sqrt(q) z)^2.

    Args:
        phi: the activation.
        q: E x^2 of one unit of the stream.
        weight_variance: fan_in x Var(W).
        scale: what the branch is multiplied with.
        norm: None, "pre" or "post".

    Examples:
        >>> import torch
        >>> round(residual_factor(torch.relu, 1.0, weight_variance=2.0, scale=1.0), 6)
        2.0

    Source: Yang, Schoenholz, Mean field residual networks: on the edge of chaos, 2017,
    https://arxiv.org/abs/1712.08969; with normalization derived here.
    """
    require_nonnegative(weight_variance=weight_variance, q=q)
    return _block(tabulate(phi), max(q, SMALLEST), scale**2 * weight_variance, norm)[1]


def residual_growth(
    phi: Activation,
    depth: int,
    weight_variance: float,
    scale: float = 1.0,
    norm: str | None = None,
    q: float = 1.0,
) -> Growth:
    """The growth of lengths and gradients through a stack of equal residual blocks x + scale W phi(x).

    Without normalization and at scale 1 it is exponential in the depth for ReLU, and exp(O(sqrt(depth)))
    for tanh; at scale depth^-1/2 it is bounded, at scale 0 nothing grows. With "pre" it is a power of the
    depth, the first for ReLU.

    Args:
        phi: the activation.
        depth: how many blocks.
        weight_variance: fan_in x Var(W).
        scale: what each branch is multiplied with.
        norm: None, "pre" or "post", as in `residual_factor`.
        q: E x^2 of one unit of the stream before the first block.

    Examples:
        >>> import torch
        >>> growth = residual_growth(torch.relu, 100, weight_variance=2.0, scale=100**-0.5)
        >>> round(math.exp(growth.log_gradient), 3)
        2.705

    Source: Yang, Schoenholz, Mean field residual networks: on the edge of chaos, 2017,
    https://arxiv.org/abs/1712.08969; with normalization derived here.
    """
    require_nonnegative(depth=float(depth), weight_variance=weight_variance, q=q)
    table, q = tabulate(phi), max(q, SMALLEST)
    log_length = log_gradient = 0.0
    for _ in range(depth):
        length, chi = _block(table, q, scale**2 * weight_variance, norm)
        log_length += math.log(length / q)
        log_gradient += math.log(chi)
        q = min(length, LARGEST)
    return Growth(log_length, log_gradient)


def padding_factor(sizes: Sequence[int], kernel: int | Sequence[int] = 3) -> float:
    """What zero padding takes from each convolution that keeps the map's size, lengths and gradients alike.

    Of n places along an axis, those near the border see fewer than `kernel` neighbours. Far from both ends
    of a deep stack lengths grow by the largest eigenvalue of that count, over `kernel`, axis by axis: for
    kernel 3, (1 + 2 cos(pi / (n + 1))) / 3. Circular padding and delta-orthogonal kernels lose nothing.

    Args:
        sizes: places along each axis of the map.
        kernel: places of the kernel along each axis, odd.

    Examples:
        >>> round(padding_factor((8, 8)), 3), round(padding_factor((32, 32)), 3)
        (0.921, 0.994)

    Source: derived here.
    """
    kernels = [kernel] * len(sizes) if isinstance(kernel, int) else list(kernel)
    if len(kernels) != len(sizes) or not all(k > 0 and k % 2 for k in kernels) or min(sizes, default=0) < 1:
        raise SetupError(
            f"`sizes` {tuple(sizes)} are 1 or more, and `kernel` {kernel} is one odd number, or one per axis."
        )
    return math.prod(_band_eigenvalue(n, k) / k for n, k in zip(sizes, kernels, strict=True))


def squared_weight_gradient(
    gradient: float, signal: float, gradient_cross: float, signal_cross: float, batch_size: int
) -> float:
    """The squared norm of one weight's gradient of a mean loss, from what its outputs and inputs have.

    |G|^2 = p x / B + (1 - 1 / B) p_c x_c

    Args:
        gradient: p = |d|^2, d the gradient of one sample's loss with respect to the whole pre-activation.
        signal: x = |x|^2 of one sample's whole input to the layer.
        gradient_cross: p_c = <d, d'> of two samples, which grows by `correlation_slope`.
        signal_cross: x_c = <x, x'> of two samples.
        batch_size: samples per batch, B.

    Examples:
        >>> squared_weight_gradient(4.0, 2.0, 0.0, 1.0, batch_size=8)
        1.0

    Source: derived here; Yang, Schoenholz, 2017, https://arxiv.org/abs/1712.08969 has the case of B = 1.
    """
    require_nonnegative(gradient=gradient, signal=signal)
    if batch_size < 1:
        raise SetupError(f"`batch_size` counts samples: not {batch_size}.")
    return gradient * signal / batch_size + (1 - 1 / batch_size) * gradient_cross * signal_cross


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


def _block(table: GaussianTable, q: float, gain: float, norm: str | None) -> tuple[float, float]:
    """The next q, and chi, of a residual block whose branch has scale^2 x weight variance for gain."""
    if norm is not None and norm not in _PLACES:
        raise SetupError(f"No normalization stands at {norm!r} in a residual block. {suggest(norm, _PLACES)}")
    moments = table.moments(1.0 if norm == "pre" else q)
    length = q + gain * moments.output
    chi = 1 + gain * moments.slope / (q if norm == "pre" else 1)
    return (1.0, chi / length) if norm == "post" else (length, chi)


def _batch_factor(table: GaussianTable, q: float, size: int) -> float:
    """chi where no two samples of a batch of B are more alike than others.

    A unit's values over the batch are then sqrt(B) u, u uniform on the unit sphere of centred vectors, before
    phi, and Gaussian before the normalization, where E 1 / |h|^2 is 1 / (B - 3) variances. With D = diag phi'
    and P the projection off the mean and off u, which is the normalization's gradient, chi is
    B E tr(P D (1 - 11^T / B) D P) / ((B - 1)(B - 3)(E phi1^2 - E phi1 phi2)).
    """
    m = table.batch(q, size)
    along = (m.slope + (size - 1) * m.pair_slope) / size
    radial = (m.steepness + (size - 1) * m.pair_steepness) / size / q
    trace = m.slope * (size - 1) - m.steepness / q - m.slope + along + radial
    return _ratio(q * size * trace, (size - 1) * (size - 3) * (m.output - m.pair))


def _band_eigenvalue(size: int, kernel: int) -> float:
    """The largest eigenvalue of the matrix that counts neighbours up to kernel // 2 away, itself included."""
    place = np.arange(size)
    band = np.abs(place[:, None] - place) <= kernel // 2
    return float(np.linalg.eigvalsh(band.astype(np.float64))[-1])
