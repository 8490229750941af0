"""Mean-field theory of deep networks: what signals and gradients do, layer by layer, before any training.

In all of it `weight_variance` means fan_in x Var(W), and chi is the growth per layer of the SQUARED gradient
norm going backward. Numbers go in, numbers come out. Exact for infinite width; `finite_width_deviation`
says how far one network strays.
"""

from __future__ import annotations

from gradmend.theory.factors import finite_width_deviation, isometry_gain, norm_factor, residual_factor
from gradmend.theory.meanfield import (
    Critical,
    DepthScales,
    correlation_fixed_point,
    correlation_map,
    correlation_slope,
    critical,
    depth_scales,
    fixed_point,
    gradient_factor,
    length_map,
    length_slope,
    trainable_depth,
)
from gradmend.theory.quadrature import Activation, expectation, output_moment, slope_moment, tabulate
from gradmend.theory.trajectory import Layer, Prediction, predict

__all__ = [
    "Activation",
    "Critical",
    "DepthScales",
    "Layer",
    "Prediction",
    "correlation_fixed_point",
    "correlation_map",
    "correlation_slope",
    "critical",
    "depth_scales",
    "expectation",
    "finite_width_deviation",
    "fixed_point",
    "gradient_factor",
    "isometry_gain",
    "length_map",
    "length_slope",
    "norm_factor",
    "output_moment",
    "predict",
    "residual_factor",
    "slope_moment",
    "tabulate",
    "trainable_depth",
]
