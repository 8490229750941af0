"""Mean-field theory of deep networks: what signals and gradients do, layer by layer, before any training.

In all of it `weight_variance` means fan_in x Var(W), and chi is the growth per layer of the SQUARED gradient
norm going backward. Numbers go in, numbers come out. Exact for infinite width; `gradient_deviation`
says how far one network strays.
"""

from __future__ import annotations

from gradmend.theory.convolution import Convolution
from gradmend.theory.factors import (
    Growth,
    batch_norm_depth,
    isometry_gain,
    norm_factor,
    padding_factor,
    residual_factor,
    residual_growth,
    squared_weight_gradient,
)
from gradmend.theory.meanfield import (
    DepthScales,
    correlation_fixed_point,
    correlation_map,
    correlation_slope,
    depth_scales,
    fixed_point,
    gradient_factor,
    length_map,
    length_slope,
    trainable_depth,
)
from gradmend.theory.network import Node, Prediction, propagate
from gradmend.theory.phase import Critical, PhaseDiagram, critical, phase_diagram
from gradmend.theory.quadrature import Activation, expectation, output_moment, slope_moment, tabulate
from gradmend.theory.recurrent import gru_factor, lstm_factor, memory_length, rnn_factor
from gradmend.theory.rules import (
    BatchNormalization,
    Dropout,
    Elementwise,
    Linear,
    Normalization,
    Rule,
    Scale,
    Sum,
)
from gradmend.theory.signals import Gradient, Signal
from gradmend.theory.tailored import Tailoring, leaky_slope, tailor
from gradmend.theory.width import Layer, finite_width_deviation, finite_width_mean, gradient_deviation

__all__ = [
    "Activation",
    "BatchNormalization",
    "Convolution",
    "Critical",
    "DepthScales",
    "Dropout",
    "Elementwise",
    "Gradient",
    "Growth",
    "Layer",
    "Linear",
    "Node",
    "Normalization",
    "PhaseDiagram",
    "Prediction",
    "Rule",
    "Scale",
    "Signal",
    "Sum",
    "Tailoring",
    "batch_norm_depth",
    "correlation_fixed_point",
    "correlation_map",
    "correlation_slope",
    "critical",
    "depth_scales",
    "expectation",
    "finite_width_deviation",
    "finite_width_mean",
    "fixed_point",
    "gradient_deviation",
    "gradient_factor",
    "gru_factor",
    "isometry_gain",
    "leaky_slope",
    "length_map",
    "length_slope",
    "lstm_factor",
    "memory_length",
    "norm_factor",
    "output_moment",
    "padding_factor",
    "phase_diagram",
    "propagate",
    "residual_factor",
    "residual_growth",
    "rnn_factor",
    "slope_moment",
    "squared_weight_gradient",
    "tabulate",
    "tailor",
    "trainable_depth",
]
