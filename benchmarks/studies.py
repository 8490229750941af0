"""Studies: what recording and analysis cost beside training, and what a second Ray worker gains."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import torch

from benchmarks.timing import Ratio, Row
from gradmend.stack import train_many
from gradmend.study.design import Study
from gradmend.study.engine import finished

REPEATS = 3


def run() -> Iterator[Row | str]:
    torch.set_num_threads(1)
    yield "Studies"
    yield Row("all of a study / its training alone, CPU time", _overhead())
    yield Row("recording and analysis / training, CPU time", _bookkeeping(), 0.05)
    yield from _ray()


def _study(steps: int) -> Study:
    return Study(
        "deep", settings={"depth": 10}, factors={"activation": ["sigmoid", "relu", "tanh"]}, steps=steps
    )


def _overhead() -> Ratio:
    """Everything, also that each start is measured and each step is timed."""
    study = _study(460)
    return _ratio(lambda: _seconds(partial(_whole, study)) / _seconds(partial(_trained, study)))


def _bookkeeping() -> Ratio:
    study = _study(460)

    def share() -> float:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "study.gradmend"
            results = study.run(path, progress=False)
            copied = Path(folder) / "copy.gradmend"
            seconds = _seconds(lambda: _recorded(study, results, copied))
        return seconds / _seconds(partial(_trained, study))

    return _ratio(share)


def _recorded(study: Study, results: Any, path: Path) -> None:
    """What the engine does beside training: store all outcomes, read them again, and analyse them."""
    from gradmend.study.store import Store, trials_of

    trials = trials_of(study)
    with Store(path) as store:
        number = store.begin(study, trials)
        for trial, outcome in zip(trials, results.outcomes, strict=True):
            store.add(number, {trial.key: outcome})
    str(finished(study, path).to_dict())


def _whole(study: Study) -> None:
    with TemporaryDirectory() as folder:
        study.run(Path(folder) / "study.gradmend", progress=False)


def _trained(study: Study) -> None:
    """The same trials, without a study."""
    for arm in study.arms():
        recipes = [study.build(arm, seed) for seed in study.seeds]
        setups = [recipe.setup for recipe in recipes]
        train_many(
            setups, recipes[0].data, seeds=study.seeds, steps=study.steps, batch_size=recipes[0].batch_size
        )


def _ray() -> Iterator[Row]:
    try:
        import ray
    except ImportError:
        yield Row("two Ray workers / one, trials per second", "ray is not installed: pip install ray")
        return
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    found = _ratio(lambda: _on_ray(ray, 1) / _on_ray(ray, 2))
    yield Row("two Ray workers / one, trials per second", found, (1.7, math.inf))


def _on_ray(ray: Any, workers: int) -> float:
    """Seconds of a study on so many workers that have imported all they need."""
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        with TemporaryDirectory() as folder:
            _wide(20).run(Path(folder) / "warm.gradmend", "ray", progress=False)
            start = perf_counter()
            _wide(600).run(Path(folder) / "study.gradmend", "ray", progress=False)
            return perf_counter() - start
    finally:
        ray.shutdown()


def _wide(steps: int) -> Study:
    """Of eight structures: three, as above, cannot be shared out evenly among two workers."""
    return Study(
        "deep", factors={"activation": ["sigmoid", "relu", "tanh", "elu"], "depth": [8, 10]}, steps=steps
    )


def _seconds(call: Callable[[], object]) -> float:
    start = process_time()
    call()
    return process_time() - start


def _ratio(measure: Callable[[], float]) -> Ratio:
    low, median, high = quantiles([measure() for _ in range(REPEATS)], n=4)
    return Ratio(median, low, high)
