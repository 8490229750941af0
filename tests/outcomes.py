"""Outcomes of made-up studies, whose truth is known."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np

from gradmend.study.analysis import Results
from gradmend.study.outcome import Outcome

Levels = Mapping[str, Sequence[str]]


def trial(
    arm: Mapping[str, str], seed: int, status: str = "done", reason: str = "", **measures: float
) -> Outcome:
    """One trial, without curves."""
    return Outcome(dict(arm), seed, status, reason, measures, (), ())


def arms(levels: Levels) -> list[dict[str, str]]:
    """All combinations."""
    return [dict(zip(levels, labels, strict=True)) for labels in product(*levels.values())]


def outcomes(
    levels: Levels,
    truth: Callable[..., float],
    seeds: int = 5,
    noise: float = 0.01,
    measure: str = "test_accuracy",
) -> list[Outcome]:
    """A full factorial with noise of each seed, that all arms share, and as much of each trial."""
    rng = np.random.default_rng(0)
    shared = noise * rng.standard_normal(seeds)
    return [
        trial(arm, seed, **{measure: truth(**arm) + shared[seed] + noise * float(rng.standard_normal())})
        for arm in arms(levels)
        for seed in range(seeds)
    ]


def results(
    trials: Sequence[Outcome], levels: Levels | None = None, measure: str = "test_accuracy"
) -> Results:
    """What these outcomes show."""
    known = {factor: tuple(labels) for factor, labels in (levels or {}).items()}
    return Results("made up", "What helps?", trials, measure=measure, levels=known)
