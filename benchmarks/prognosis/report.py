"""How good the prognosis is on what it has not seen: data sets, widths and depths at once.

Of every example it is made by curves fitted to examples of other data sets, other widths and other depths:
those that share one of the three are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from benchmarks.prognosis.fit import Array, calibrated, folds, outcomes
from benchmarks.prognosis.table import Example, read
from benchmarks.timing import Row, compare
from benchmarks.workloads import ADAM, WORKLOADS, Workload
from gradmend.probe import measure
from gradmend.response import look_ahead
from gradmend.setup import Setup

AUC, ERROR, COST = 0.95, 0.05, 10.0
"""The numbers to reach: area under the curve, expected calibration error, cost in plain steps."""

WIDTHS, DEPTHS = (24, 80), (4, 12)
"""Where bands of widths and depths begin, beside the first."""

BINS, RESAMPLES = 10, 500


def run() -> Iterator[str | Row]:
    torch.set_num_threads(1)
    examples = read()
    y, p = outcomes(examples), probability(unseen_log_odds(examples))
    yield f"prognosis of {len(y)} random networks of unseen widths, depths and data sets"
    yield Row("area under the curve", auc(y, p), (AUC, 1.0))
    yield Row("expected calibration error", calibration_error(y, p), ERROR)
    yield "prognosis: its cost in plain steps"
    yield from (cost(workload) for workload in WORKLOADS if "1,000" not in workload.name)


def report(examples: Sequence[Example]) -> None:
    y, p = outcomes(examples), probability(unseen_log_odds(examples))
    print(f"{len(y)} examples, {y.mean():.1%} train; {agreement(examples)}")
    print(f"area under the curve        {interval(auc, y, p)}")
    print(f"expected calibration error  {interval(calibration_error, y, p)}")
    print(f"  that of a perfect forecast of so many examples: {perfect(p):.3f}")
    print("\nforecast     examples  mean forecast  share that trains")
    for which in bins(p):
        if which.any():
            print(f"{which.sum():19d}  {p[which].mean():13.2f}  {y[which].mean():17.2f}")
    clear = np.array([abs(e.outcome.share - 0.5) > 0.2 for e in examples])
    print(f"\narea under the curve by kind\n  {'not near the border':24} {line(y[clear], p[clear])}")
    for key in ("family", "optimizer", "init", "norm", "output", "inputs", "task"):
        values = np.array([str(getattr(e.setup, key)) for e in examples])
        print(key)
        for value in sorted(set(values)):
            print(f"  {value:24} {line(y[values == value], p[values == value])}")


def line(y: Array, p: Array) -> str:
    area = f"{auc(y, p):.3f}" if 0 < y.sum() < len(y) else "  -  "
    return f"{area}  {len(y):5d} examples, {y.mean():4.0%} train, {p.mean():4.0%} forecast"


def agreement(examples: Sequence[Example]) -> str:
    pairs = [(e.outcome.trains, e.again.trains) for e in examples if e.again is not None]
    same = sum(a == b for a, b in pairs)
    return f"{same} of {len(pairs)} that were trained twice came out the same"


def unseen_log_odds(examples: Sequence[Example]) -> Array:
    found = np.full(len(examples), np.nan)
    width = np.digitize([e.setup.width for e in examples], WIDTHS)
    depth = np.digitize([e.setup.depth for e in examples], DEPTHS)
    for data in folds(examples):
        for w in range(len(WIDTHS) + 1):
            for d in range(len(DEPTHS) + 1):
                asked = data & (width == w) & (depth == d)
                shown = ~data & (width != w) & (depth != d)
                fitted = calibrated([e for e, use in zip(examples, shown, strict=True) if use])
                wanted = (e for e, use in zip(examples, asked, strict=True) if use)
                found[asked] = [fitted.log_odds(e.features) for e in wanted]
    return found


def probability(log_odds: Array) -> Array:
    found: Array = 1 / (1 + np.exp(-log_odds))
    return found


def auc(y: Array, p: Array) -> float:
    """The probability that one that trains is given a higher forecast than one that does not."""
    ones = y.sum()
    return float((rankdata(p)[y == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(y) - ones)))


def calibration_error(y: Array, p: Array) -> float:
    """Mean distance of forecast and frequency over ten bins (Naeini, Cooper, Hauskrecht 2015)."""
    return float(sum(abs((y[which] - p[which]).sum()) for which in bins(p)) / len(y))


def bins(p: Array) -> list[Array]:
    places = np.minimum((p * BINS).astype(int), BINS - 1)
    return [places == k for k in range(BINS)]


def interval(measured: Callable[[Array, Array], float], y: Array, p: Array) -> str:
    """The number, and where 95 % of those of resampled examples lie."""
    rng = np.random.default_rng(0)
    rows = (rng.integers(len(y), size=len(y)) for _ in range(RESAMPLES))
    low, high = np.quantile([measured(y[chosen], p[chosen]) for chosen in rows], (0.025, 0.975))
    return f"{measured(y, p):.4f} ({low:.3f} to {high:.3f})"


def perfect(p: Array) -> float:
    """The mean calibration error of forecasts that are right, by chance alone."""
    rng = np.random.default_rng(0)
    drawn = ((rng.random(len(p)) < p).astype(float) for _ in range(RESAMPLES))
    return float(np.mean([calibration_error(y, p) for y in drawn]))


def cost(workload: Workload) -> Row:
    job, twin = workload.job(ADAM), workload.job(ADAM)
    setup, batch = Setup(twin.model, nn.CrossEntropyLoss(), ADAM), (twin.x, twin.y)
    subjects = {"prognosis": partial(both, setup, batch)}
    return Row(workload.name, compare(job.step, subjects)["prognosis"], COST)


def both(setup: Setup, batch: object) -> None:
    measure(setup, batch)
    look_ahead(setup, [batch] * 4)
