"""Make the training set: draw setups, measure their first steps, train them really."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.prognosis.networks import Description, build, draw
from benchmarks.prognosis.outcome import Outcome, train
from benchmarks.prognosis.table import Example, append, read, write
from gradmend.diagnosis.prognosis import features
from gradmend.probe import measure
from gradmend.response import look_ahead

BATCHES = 4
"""So many are looked at, as `gradmend.diagnose` does."""

_TWICE = 20
"""Of so many setups one is trained again with other batches: how much of the outcome is chance?"""


def make(path: Path, seconds: float, most: int) -> None:
    """Add examples to a table until time or number is reached; it goes on where the last run ended."""
    stop, known = time.monotonic() + seconds, {example.setup.seed for example in read(path)}
    for seed in islice((seed for seed in count() if seed not in known), most):
        if time.monotonic() > stop:
            break
        append(example(seed), path)
    write(read(path), path)


def example(seed: int) -> Example:
    d = draw(seed)
    measured = measured_features(d)
    again = trained(d, batches=1) if seed % _TWICE == 0 else None
    return Example(d, measured, trained(d, batches=0), again)


def measure_again(path: Path) -> None:
    """Measure the features of all examples anew, as they are defined now, and train nothing."""
    write([replace(known, features=measured_features(known.setup)) for known in read(path)], path)


def measured_features(d: Description) -> dict[str, float]:
    setup, x, y = build(d)
    given = first_batches(d, x, y)
    outlook = look_ahead(setup, given)
    assert not isinstance(outlook, str), outlook
    return features(measure(setup, given[0]), outlook)


def first_batches(d: Description, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(d.seed))
    rows = [order[torch.arange(k * d.batch, (k + 1) * d.batch) % len(x)] for k in range(BATCHES)]
    return [(x[chosen], y[chosen]) for chosen in rows]


def trained(d: Description, batches: int) -> Outcome:
    """Numbers below the normal ones count as zero here: they only make training slow."""
    torch.set_flush_denormal(True)
    try:
        return train(d, *build(d), seed=batches)
    finally:
        torch.set_flush_denormal(False)
