"""Trainings: studies for the atlas, run in a journal that is thrown away."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import Float64

from gradmend.study.analysis import Results
from gradmend.study.design import Study

Curves = Mapping[tuple[str, ...], Float64[np.ndarray, "seeds steps"]]


Values = Mapping[tuple[str, ...], Float64[np.ndarray, " seeds"]]


def run(study: Study) -> Results:
    """Run all trials of a study, without a bar."""
    with TemporaryDirectory() as folder:
        return study.run(Path(folder) / "atlas.gradmend", progress=False)


def losses(results: Results) -> Curves:
    """The loss of every step, by the labels of the arm's levels; NaN after a loss that was no number."""
    found: dict[tuple[str, ...], list[tuple[float, ...]]] = {}
    for outcome in results.outcomes:
        found.setdefault(tuple(outcome.arm.values()), []).append(outcome.losses)
    most = max((len(row) for rows in found.values() for row in rows), default=0)
    return {arm: np.stack([_filled(row, most) for row in rows]) for arm, rows in found.items()}


def measured(results: Results, measure: str) -> Values:
    """A measure of every trial, by the labels of the arm's levels."""
    found: dict[tuple[str, ...], list[float]] = {}
    for outcome in results.outcomes:
        found.setdefault(tuple(outcome.arm.values()), []).append(outcome.measures.get(measure, np.nan))
    return {arm: np.array(values) for arm, values in found.items()}


def smooth(losses: Float64[np.ndarray, " steps"], over: int = 15) -> Float64[np.ndarray, " steps"]:
    """The mean of each step and the ones around it.

    >>> smooth(np.array([0.0, 3.0, 0.0]), over=3).tolist()
    [1.5, 1.0, 1.5]
    """
    ones = np.ones(min(over, len(losses)))
    return np.convolve(losses, ones, mode="same") / np.convolve(np.ones(len(losses)), ones, mode="same")


def _filled(row: tuple[float, ...], most: int) -> Float64[np.ndarray, " steps"]:
    return np.array([*row, *([np.nan] * (most - len(row)))], dtype=np.float64)
