"""Growth of the squared gradient norm per step through time, of plain, LSTM and GRU cells.

The weights of a cell are the same at every step, its inputs are taken as new at each. `weight_variance` is
units x Var(W) of each matrix that reads the hidden state, `drive` the second moment of what else enters each
pre-activation: input size x Var(W) x E x^2, and Var(b).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradmend.theory.meanfield import fixed_point, gradient_factor
from gradmend.theory.quadrature import Activation, Moments, require_nonnegative, tabulate

_ROUNDS = 50  # lengths settle to ten digits in fewer


def rnn_factor(phi: Activation, weight_variance: float, drive: float) -> float:
    """The growth chi per step of h' = phi(W h + V x + b), where lengths have settled.

    chi = weight_variance x E phi'^2 at the fixed point q = weight_variance x E phi^2 + drive. It, not the
    spectral radius of W, is 1 where gradients keep their norm: `critical(phi, drive)` is that point.

    Args:
        phi: the activation.
        weight_variance: units x Var(W); 1 for orthogonal weights.
        drive: the second moment of what enters each pre-activation from outside.

    Examples:
        >>> round(rnn_factor(torch.tanh, weight_variance=1.0, drive=0.05), 3)
        0.759

    Source: Poole et al., 2016, https://arxiv.org/abs/1606.05340, for layers; derived here for steps.
    """
    q = fixed_point(phi, weight_variance, drive)
    return gradient_factor(phi, q, weight_variance)


def lstm_factor(forget_bias: float, weight_variance: float, drive: float) -> float:
    """The growth chi per step of the squared gradient with respect to an LSTM's cells.

    The forget gate keeps a share E f of it, and the way through the hidden state adds to that, step after
    step the same: chi = (E f + sqrt(weight_variance) E i E tanh'(g) E o E tanh'(c))^2 but for the noise of
    the gates, which is counted too. Where chi exceeds 1 the cells drive themselves until they saturate, so
    that the gradient of a long sequence stays near 1.

    Args:
        forget_bias: the sum of both biases of the forget gate; those of the other gates are 0.
        weight_variance: units x Var(W) of each gate's matrix; 1/3 by torch's default.
        drive: the second moment of what enters each pre-activation from outside.

    Examples:
        >>> round(lstm_factor(1.0, weight_variance=1 / 3, drive=1 / 6) ** 0.5, 3)
        0.841

    Source: derived here; Gilboa et al., Dynamical isometry and a mean field theory of LSTMs and GRUs, 2019,
    https://arxiv.org/abs/1901.08987, for weights that are new at each step.
    """
    require_nonnegative(weight_variance=weight_variance, drive=drive)
    tables = map(tabulate, (torch.sigmoid, _gate(forget_bias), torch.tanh, _tanh_slope))
    gate, forget, tanh, slope = (table.moments for table in tables)
    q, cell = drive, 0.0
    for _ in range(_ROUNDS):
        cell = gate(q).output * tanh(q).output / (1 - forget(q).output)
        q = drive + weight_variance * gate(q).output * tanh(cell).output
    read = 0.5 * slope(cell).mean
    written = 0.5 * slope(q).mean
    read_square = gate(q).output * tanh(cell).slope
    written_square = gate(q).output * tanh(q).slope + gate(q).slope * tanh(q).output + forget(q).slope * cell
    way = weight_variance * (read * written) ** 2, weight_variance * read_square * written_square
    return _growth(forget(q), *way)


def gru_factor(update_bias: float, weight_variance: float, drive: float) -> float:
    """The growth chi per step of the squared gradient with respect to a GRU's hidden state.

    chi = (E z + sqrt(weight_variance) E(1 - z) E tanh'(n) E r)^2 but for the noise of the gates, which is
    counted too. In torch's terms: h' = (1 - z) n + z h, n = tanh(V x + r W h).

    Args:
        update_bias: the sum of both biases of the update gate z; those of the others are 0.
        weight_variance: units x Var(W) of each gate's matrix; 1/3 by torch's default.
        drive: the second moment of what enters each pre-activation from outside.

    Examples:
        >>> round(gru_factor(1.0, weight_variance=1 / 3, drive=1 / 6) ** 0.5, 3)
        0.793

    Source: derived here; Gilboa et al., 2019, https://arxiv.org/abs/1901.08987, as for `lstm_factor`.
    """
    require_nonnegative(weight_variance=weight_variance, drive=drive)
    tables = map(tabulate, (torch.sigmoid, _gate(update_bias), torch.tanh, _tanh_slope))
    gate, update, tanh, slope = (table.moments for table in tables)
    q, hidden, candidate = drive, 0.0, drive
    for _ in range(_ROUNDS):
        renewed = 1 - 2 * update(q).mean + update(q).output
        hidden = renewed * tanh(candidate).output / (1 - update(q).output)
        q = drive + weight_variance * hidden
        candidate = drive + weight_variance * hidden * gate(q).output
    way = (1 - update(q).mean) * slope(candidate).mean * 0.5
    reset = gate(q).output + gate(q).slope * weight_variance * hidden
    way_square = renewed * tanh(candidate).slope * reset + update(q).slope * (hidden + tanh(candidate).output)
    return _growth(update(q), weight_variance * way**2, weight_variance * way_square)


def memory_length(gate_bias: float) -> float:
    """Over how many steps a gate of this bias forgets e-fold: an LSTM's forget, a GRU's update gate (torch).

    -1 / ln sigmoid(bias)

    Args:
        gate_bias: the sum of both biases of the gate.

    Examples:
        >>> [round(memory_length(bias), 1) for bias in (0.0, 1.0, 2.0, 3.0)]
        [1.4, 3.2, 7.9, 20.6]

    Source: Tallec, Ollivier, Can recurrent neural networks warp time?, 2018,
    https://arxiv.org/abs/1804.11188
    """
    rate = math.log1p(math.exp(-abs(gate_bias))) + max(-gate_bias, 0.0)
    return 1 / rate if rate else math.inf


def _growth(gate: Moments, steady: float, total: float) -> float:
    """The growth chi of |J_1^T J_2^T ... d|^2, where each J is diag(gate) and a random matrix.

    `total` is units x the second moment of the matrix's entries, `steady` of their mean over time; what is
    not steady is new at each step, as is the noise of the gate. Without it all, chi is the squared spectral
    radius (E gate + sqrt(steady))^2; if all is new, chi is the second moment. Between them chi solves
    noise x sum over t of E |J^t|^2 / chi^(t + 1) = 1 with the mean J, and that sum is a Legendre series.
    """
    kept = gate.mean**2
    noise = gate.output - kept + total - steady
    return kept + steady + math.sqrt(4 * kept * steady + noise**2)


def _gate(bias: float) -> Activation:
    return lambda h: torch.sigmoid(h + bias)


def _tanh_slope(h: Tensor) -> Tensor:
    return 1 - torch.tanh(h) ** 2
