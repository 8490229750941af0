"""Fit the curves of the prognosis, calibrate them, and write them into the package.

Each curve is a sum of ramps between knots with weights that are not negative, so it never falls. The weights
minimize the logistic loss with a small penalty on their sum, which leaves out what is of no use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

import gradmend.diagnosis.prognosis as prognosis
from benchmarks.prognosis.table import Example
from gradmend.diagnosis.prognosis import FEATURES, Curve

DATA = Path(prognosis.__file__).with_suffix(".json")

KNOTS, SUM_PENALTY, SQUARE_PENALTY = 10, 5e-4, 1e-2
FOLDS = 5
BORDER = 0.1
"""Around the border the outcome is chance: of the same network trained with other batches, the share that is
closed differs by about twice as much (one standard deviation)."""
_LEAST = 0.02
"""A curve that rises by less is left out."""

Array = np.ndarray


@dataclass(frozen=True)
class Fitted:
    """An additive logistic model: the log-odds of an average setup, and a curve per feature."""

    base: float
    curves: Mapping[str, Curve]

    def log_odds(self, features: Mapping[str, float]) -> float:
        return self.base + sum(curve(features[name]) for name, curve in self.curves.items())

    def scaled(self, slope: float, shift: float) -> Fitted:
        """All log-odds times the slope, plus the shift."""
        curves = {
            name: Curve(curve.knots, tuple(slope * value for value in curve.log_odds))
            for name, curve in self.curves.items()
        }
        return Fitted(slope * self.base + shift, curves)


def fit(examples: Sequence[Example]) -> None:
    """Fit all examples and write the curves."""
    fitted = calibrated(examples)
    curves = {
        name: {"knots": rounded(curve.knots), "log_odds": rounded(curve.log_odds)}
        for name, curve in fitted.curves.items()
    }
    data = {"examples": len(examples), "base": round(fitted.base, 5), "curves": curves}
    DATA.write_text(json.dumps(data, indent=1) + "\n")
    print(f"{len(examples)} examples, {outcomes(examples).mean():.0%} of which train: {DATA.name}")
    for name, curve in fitted.curves.items():
        print(f"  {curve.log_odds[0]:+6.2f} to {curve.log_odds[-1]:+6.2f}  {name}")


def rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def calibrated(examples: Sequence[Example]) -> Fitted:
    """Fitted, with slope and shift found on data sets that were left out (Platt 1999)."""
    held_out = np.empty(len(examples))
    for held in folds(examples):
        fitted = fit_curves([e for e, out in zip(examples, held, strict=True) if not out])
        held_out[held] = [fitted.log_odds(e.features) for e, out in zip(examples, held, strict=True) if out]
    return fit_curves(examples).scaled(*platt(held_out, outcomes(examples)))


def folds(examples: Sequence[Example]) -> Iterator[Array]:
    """Which examples to hold out: all those of some data sets at a time."""
    names = np.array([source(e) for e in examples])
    every = sorted(set(names))
    for k in range(FOLDS):
        if (held := np.isin(names, every[k::FOLDS])).any():
            yield held


def source(example: Example) -> str:
    """Its data set; the same digits come as rows and as images."""
    return {"digit images": "digits"}.get(example.setup.task, example.setup.task)


def outcomes(examples: Sequence[Example]) -> Array:
    return np.array([float(e.outcome.trains) for e in examples])


def sureness(examples: Sequence[Example]) -> Array:
    """How surely each trains: 1/2 at the border, near 0 or 1 further away than chance leads."""
    shares = np.array([e.outcome.share for e in examples])
    found: Array = 1 / (1 + np.exp(-(np.clip(shares, -1.0, 2.0) - 0.5) / BORDER))
    return found


def fit_curves(examples: Sequence[Example]) -> Fitted:
    x = np.array([[e.features[name] for name in FEATURES] for e in examples])
    knots = [knots_of(column[np.isfinite(column)]) for column in x.T]
    known = [ramps(column, places) for column, places in zip(x.T, knots, strict=True)]
    means = [np.nanmean(r, 0) for r in known]
    columns = [np.nan_to_num(r - mean) for r, mean in zip(known, means, strict=True)]
    *weights, base = solve(np.concatenate(columns, 1), sureness(examples))
    curves, start = {}, 0
    for name, places, mean in zip(FEATURES, knots, means, strict=True):
        own = np.array(weights[start : start + len(mean)])
        start += len(mean)
        if own.sum() > _LEAST:
            heights = np.concatenate([[0.0], own.cumsum()]) - own @ mean
            curves[name] = Curve(tuple(places.tolist()), tuple(heights.tolist()))
    return Fitted(float(base), curves)


def knots_of(values: Array) -> Array:
    """Quantiles, the outermost 2 % left out; two at least."""
    found = np.unique(np.quantile(values, np.linspace(0.02, 0.98, KNOTS)))
    return found if len(found) > 1 else found[0] + np.array([-0.5, 0.5])


def ramps(values: Array, knots: Array) -> Array:
    """Per interval between knots the share of it that lies below the value: [values, knots - 1]."""
    found = np.clip((values[:, None] - knots[:-1]) / np.diff(knots), 0.0, 1.0)
    found[~np.isfinite(values)] = np.nan
    return found


def solve(x: Array, y: Array) -> Array:
    """Weights that are not negative, and the intercept."""

    def loss(theta: Array) -> tuple[float, Array]:
        weights, z = theta[:-1], x @ theta[:-1] + theta[-1]
        wrong = (1 / (1 + np.exp(-z)) - y) / len(y)
        value = np.mean(np.logaddexp(0.0, z) - y * z)
        penalty = SUM_PENALTY * weights.sum() + SQUARE_PENALTY / 2 * weights @ weights
        slope = x.T @ wrong + SUM_PENALTY + SQUARE_PENALTY * weights
        return value + penalty, np.append(slope, wrong.sum())

    bounds = [(0.0, None)] * x.shape[1] + [(None, None)]
    found = minimize(loss, np.zeros(len(bounds)), jac=True, method="L-BFGS-B", bounds=bounds)
    weights: Array = found.x
    return weights


def platt(log_odds: Array, y: Array) -> tuple[float, float]:
    """Slope and shift of log-odds that fit the outcomes best."""

    def loss(theta: Array) -> float:
        z = theta[0] * log_odds + theta[1]
        return float(np.mean(np.logaddexp(0.0, z) - y * z))

    slope, shift = minimize(loss, np.array([1.0, 0.0]), method="Nelder-Mead").x
    return float(slope), float(shift)
