"""`mend` beside published searches for better settings, on the faults that these were run on.

The searches (random, HEBO, BOHB) ran the original programs in Keras on the original data, so only shares of
the reachable gain are compared: (repaired - broken) / (best known fix - broken), each in its own world.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from time import process_time
from typing import Any, ClassVar

from scipy.stats import ttest_ind_from_stats

from benchmarks.corpora.answers import to_truth
from benchmarks.corpora.cases import Json, Truth, builder
from benchmarks.corpora.references import affordable, own_steps
from benchmarks.corpora.repairs import LEARNT, TRIAL_STEPS, given, trained, well_score
from benchmarks.corpora.runner import Job, isolated, step_seconds
from benchmarks.corpora.tasks import constant, read_task
from benchmarks.corpora.tools.gradmend import setup as as_setup
from benchmarks.timing import first_line
from gradmend import Budget, mend

SEEDS, TRAININGS, FLOOR = 5, 5, 5.0
"""Each is trained with so many seeds; `mend` and the training after it may take the time of so many
trainings, and so many seconds in any case: a training of a few steps takes less time than to look at one."""

_REACHED, _P, _D = 0.01, 0.05, 0.2


@dataclass(frozen=True)
class Comparison:
    """The scores of a program as it is, fixed by its developer, and mended, for each seed.

    Args:
        status: "ran", "not built", "too slow" or "failed".
        own: how many steps the program takes by itself.
        steps: how many it took here.
        guess: the score of a constant.
        well: the scores of a network of its size that is set well.
        trainings: the time of `mend` and the training after it, over that of one training, on average.
        trials: the same in steps, those of the trials of `mend` and of the training after it.
        changes: what was changed with each seed.
        published: gains of the searches and of AUTOTRAINER, as published, by name.
    """

    tool: ClassVar[str] = "gradmend"
    truth: Truth
    status: str
    problem: str = ""
    own: int = 0
    steps: int = 0
    guess: float = 0.0
    broken: tuple[float, ...] = ()
    fixed: tuple[float, ...] = ()
    well: tuple[float, ...] = ()
    mended: tuple[float, ...] = ()
    trainings: float = 0.0
    trials: float = 0.0
    changes: tuple[str, ...] = ()
    published: tuple[tuple[str, float], ...] = ()

    @property
    def reachable(self) -> tuple[float, ...]:
        """The scores of the developer's fix, or of a well-set network where that fix does not learn here."""
        fix = fmean(self.fixed) if self.fixed else -math.inf
        learns = fix >= self.guess + LEARNT and fix > fmean(self.broken) + _REACHED
        return self.fixed if learns else self.well

    @property
    def gain(self) -> float | None:
        """The share of the reachable gain that `mend` recovers, from -1 to 1; None where there is none."""
        if not self.mended or not self.reachable or fmean(self.reachable) < self.guess + LEARNT:
            return None
        return share(fmean(self.broken), fmean(self.mended), fmean(self.reachable))

    @property
    def weak(self) -> bool:
        """Significantly better than the program as it is (MLM4DNN, FSE 2025; DeepCrime, ISSTA 2021)."""
        return surely_better(self.mended, self.broken)

    @property
    def strong(self) -> bool:
        """Weak, and no worse than the fix."""
        return self.weak and not surely_better(self.reachable, self.mended)


def share(broken: float, repaired: float, best: float) -> float | None:
    """The share of the reachable gain, from -1 to 1; None where there is nothing to gain."""
    if best <= broken + _REACHED:
        return None
    return max(-1.0, min(1.0, (repaired - broken) / (best - broken)))


def surely_better(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether the mean is higher, with p < .05 (t test) and Cohen's d of .2 or more."""
    difference, (first, second) = fmean(one) - fmean(other), (stdev(one), stdev(other))
    spread = ((first**2 + second**2) / 2) ** 0.5
    if difference <= 0 or spread == 0:
        return difference > 0
    found = ttest_ind_from_stats(fmean(one), first, len(one), fmean(other), second, len(other))
    return bool(found.pvalue < _P and difference / spread >= _D)


def read(paths: Iterable[Path]) -> list[Comparison]:
    """The comparisons in these files."""
    rows = (json.loads(line) for path in paths for line in path.read_text().splitlines())
    return [_comparison(row) for row in rows]


def _comparison(row: Json) -> Comparison:
    pairs = tuple((name, gain) for name, gain in row.pop("published"))
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Comparison(**{**plain, "truth": to_truth(row["truth"]), "published": pairs})


def concerns(row: Json) -> bool:
    """Whether searches were run on it."""
    return bool(row.get("repair_baselines"))


def run_one(job: Job, limit: float) -> Comparison:
    """Compare on one program, in a process of its own."""
    found = isolated(partial(comparison, job), SEEDS * limit)
    return found if isinstance(found, Comparison) else Comparison(job.truth, "failed", found)


def comparison(job: Job) -> Comparison:
    """Train the program as it is, fixed and mended, with each seed."""
    module = builder(job.cases)
    blank = Comparison(job.truth, "not built", published=tuple(published(job.row).items()))
    try:
        case = module.build(job.row, seed=0, data_root=job.data)
    except module.CannotBuild as error:
        return replace(blank, problem=str(error))
    steps = affordable(case, step_seconds(case, 0))
    known = replace(blank, own=own_steps(case), steps=steps, guess=constant(case, read_task(case)))
    if not steps:
        return replace(known, status="too slow", problem=f"of {known.own} steps too few fit")
    try:
        return _filled(known, [_seeded(module, job, seed, steps) for seed in range(SEEDS)])
    except Exception as error:  # whatever a program may raise
        return replace(known, status="failed", problem=first_line(error))


@dataclass(frozen=True)
class _Seeded:
    broken: float
    fixed: float | None
    well: float | None
    mended: float
    trainings: float
    trials: float
    changes: str


def _filled(known: Comparison, runs: Sequence[_Seeded]) -> Comparison:
    def column(name: str) -> tuple[float, ...]:
        return tuple(value for run in runs if (value := getattr(run, name)) is not None)

    scores = {name: column(name) for name in ("broken", "fixed", "well", "mended")}
    changes = tuple(run.changes for run in runs)
    time, trials = (fmean(getattr(run, name) for run in runs) for name in ("trainings", "trials"))
    return replace(known, status="ran", trainings=time, trials=trials, changes=changes, **scores)


def _seeded(module: Any, job: Job, seed: int, steps: int) -> _Seeded:
    case = module.build(job.row, seed=seed, data_root=job.data)
    task, broken = read_task(case), as_setup(case)
    untreated, _ = trained(broken, case, task, steps, seed)
    one = steps * step_seconds(case, seed)  # a training may end early, where it diverges
    budget = affordable_budget(steps, one)
    start = process_time()
    treatment = mend(broken, given(case, seed), budget, steps=steps)
    spent = process_time() - start
    return _Seeded(
        untreated,
        _fixed(module, job, seed),
        well_score(case, task, steps, seed),
        trained(treatment.setup, case, task, steps, seed)[0],
        1 + spent / one,
        1 + sum(len(trial.losses) for trial in treatment.trials) / steps,
        "; ".join(change.text for change in treatment.changes),
    )


def affordable_budget(steps: int, seconds: float) -> Budget:
    """What `mend` may spend on a program whose training takes so many steps and seconds.

    >>> affordable_budget(1000, 3.0)
    Budget(steps=200, seconds=12.0, trials=20)
    """
    each, trainings = min(TRIAL_STEPS, steps), TRAININGS - 1
    return Budget(steps=each, seconds=max(FLOOR, trainings * seconds), trials=trainings * steps // each)


def _fixed(module: Any, job: Job, seed: int) -> float | None:
    row = fixed_row(job.row, module.load(job.cases))
    if row is None:
        return None
    case = module.build(row, seed=seed, data_root=job.data)
    steps = affordable(case, step_seconds(case, seed))
    return trained(as_setup(case), case, read_task(case), steps, seed)[0] if steps else None


def fixed_row(row: Json, rows: Sequence[Json]) -> Json | None:
    """The program as its developer fixed it: its partner, or itself with the fixed parameters."""
    if pair := next((other for other in rows if other["id"] == row.get("pair_id")), None):
        return pair
    params: Json | None = row.get("developer_fix_params")
    if not params:
        return None
    fixed = copy.deepcopy(row)
    weighted = [layer for layer in fixed["layers"] if "kernel_init" in layer or layer["type"] == "dense"]
    for number, layer in enumerate(weighted, 1):
        _fix_layer(layer, params, str(number))
    optimizer = {"name": params["optimizer"], "lr": params["lr"]}
    sizes = {key: int(params[key]) for key in ("batch_size", "epochs")}
    return {**fixed, "loss": params["loss"], "optimizer": optimizer, **sizes}


def _fix_layer(layer: Json, params: Json, number: str) -> None:
    for key, field in (("ki", "kernel_init"), ("bi", "bias_init"), ("act", "activation")):
        if (value := params.get(key + number)) is not None:
            layer[field] = _initializer(value) if field.endswith("init") else value
    if (units := params.get("unit" + number)) is not None:
        layer["filters" if "filters" in layer else "units"] = int(units)


def _initializer(value: str) -> str | Json:
    given = re.fullmatch(r"RandomNormal\(stddev=([\d.]+)\)", value)
    if given:
        return {"name": "random_normal", "stddev": float(given[1])}
    return {"normal": "random_normal"}.get(value, value)


def published(row: Json) -> dict[str, float]:
    """By tool and budget, such as `hebo@50x`, the share of the gain that it recovered, as published."""
    told, truth = row["repair_baselines"], row["alt_ground_truth"]
    sign = -1 if "lower is better" in told["metric"] else 1
    broken, best = (sign * truth[key] for key in ("faulty_metric_mean", "best_metric_mean"))
    found = {
        name: share(broken, sign * run["holdout_of_best_mean"], best)
        for name, run in told["search_budget_in_training_times"].items()
    }
    if repairer := told.get("autotrainer"):
        reached = repairer["repaired_accuracy_mean"]
        found["autotrainer"] = share(broken, broken if reached is None else reached, best)
    return {name: gain for name, gain in found.items() if gain is not None}
