"""The outcomes of repairs as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, median, pstdev

from rich.table import Table

from benchmarks.corpora.answers import Answer, Level
from benchmarks.corpora.references import EPOCHS, LEAST, SECONDS, STEPS
from benchmarks.corpora.repairs import LEARNT, POINTS, SHARE, TRIAL_SECONDS, TRIAL_STEPS, Outcome
from benchmarks.corpora.scoring import over_groups
from benchmarks.corpora.searches import FLOOR, SEEDS, TRAININGS, Comparison
from benchmarks.corpora.tables import plain_table

NOTES = f"""\
Each buggy program is trained for its own number of steps ({EPOCHS} epochs where its corpus tells
none), at most {STEPS:,}, and at most as many as take {SECONDS:g} s of CPU time of the program as it is; where
fewer than {LEAST} of them fit, it is left out as too slow. A network of its size that is set well (ReLU,
weights by He, the right output and loss, Adam 1e-3, standardized data), the mended program, and its
published fix (for its own steps) likewise. Scores are accuracy, or R² of amounts, on the test rows.
A program trains if it comes within {POINTS:g} of its fix, or reaches {SHARE:.0%} of the well-set network.
A reference less than {LEARNT:g} better than a constant guess tells nothing; where none is left, nothing is
learnt here whatever is done, and the program is left out.
`mend` may spend {TRIAL_SECONDS:g} s, in trials of at most {TRIAL_STEPS} steps, on the first batches.
Shares as elsewhere: over groups of programs, with Wilson's interval. n: programs/groups."""

PEER = """\
AUTOTRAINER (Zhang et al., ICSE 2021; TDSC 2024, https://github.com/shiningrain/AUTOTRAINER), as published:
98 % of the problems in 701 models repaired, where repaired means that its own detector falls silent;
repair takes 1.14 times one training beyond the first. Measured by others on 17 faults, 50 runs each (ICST
2023, https://github.com/testingautomated-usi/dl-fl-repair): 5 solved in all runs, 1 in some, 3 in part,
8 never."""

KINDS: Mapping[str, Callable[[Outcome], bool]] = {
    "all": lambda _: True,
    "without those whose labels are shuffled": lambda o: "wrong_labels" not in o.truth.faults,
    "with a published fix that learns": lambda o: o.fixed is not None and o.fixed >= o.guess + LEARNT,
    "classes": lambda o: o.kind == "class",
    "amounts": lambda o: o.kind == "amounts",
    "not on stand-in data": lambda o: not o.stand_in,
}


def coverage(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """How many programs there are, and what became of them."""
    counts = {
        "buggy programs": len(outcomes),
        **{
            status: sum(o.status == status for o in outcomes)
            for status in ("not built", "too slow", "failed")
        },
        "nothing is learnt by any reference": sum(o.status == "ran" and not o.judged for o in outcomes),
        "train in spite of the label": sum(o.judged and o.trains for o in outcomes),
        "do not train": sum(o.judged and not o.trains for o in outcomes),
    }
    yield ", ".join(f"{count} {what}" for what, count in counts.items())


def repair_table(outcomes: Sequence[Outcome], title: str) -> Table:
    table = plain_table(
        title, "programs that do not train", "n", "repaired", "changed", "changes", "mend / training"
    )
    for kind, wanted in KINDS.items():
        ill = [o for o in outcomes if o.judged and not o.trains and wanted(o)]
        if not ill:
            continue
        changed = [o for o in ill if o.changes]
        size = f"{len(ill)}/{len({o.truth.group for o in ill})}"
        changes = f"{median(len(o.changes) for o in changed):g}" if changed else "-"
        cost = f"{median(o.mend_seconds / o.seconds for o in ill):.1f}"
        table.add_row(kind, size, str(over_groups(ill, _repaired)), f"{len(changed)}", changes, cost)
    return table


def _repaired(outcome: Outcome) -> float:
    return outcome.repaired


def found_table(outcomes: Sequence[Outcome], answers: Sequence[Answer], title: str) -> Table:
    """What `diagnose` finds in buggy programs that train, and in those that do not."""
    alarms = {a.truth.id: a.alarm(Level.ERROR) for a in answers if a.tool == "gradmend" and a.status == "ran"}
    table = plain_table(title, "buggy programs that", "n", "with an error found")
    groups = {
        "train badly": [o for o in outcomes if o.judged and not o.trains],
        "train well": [o for o in outcomes if o.judged and o.trains],
        "have no reference that learns": [o for o in outcomes if o.status == "ran" and not o.judged],
        "were not trained": [o for o in outcomes if o.status in ("too slow", "failed")],
    }
    for name, of in groups.items():
        size = f"{len(of)}/{len({o.truth.group for o in of})}"
        table.add_row(name, size, str(over_groups(of, lambda o: alarms.get(o.truth.id, False))))
    return table


def mistakes(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Each program that does not train, with its scores and what was changed."""
    for o in outcomes:
        if o.judged and not o.trains:
            verdict = "repaired" if o.repaired else "NOT REPAIRED"
            scores = (
                f"{o.untreated:.3f} -> {o.mended:.3f}, fix {o.fixed}, well set {o.well}, guess {o.guess:.3f}"
            )
            yield f"{o.truth.id}  {verdict}  {scores}, {o.steps} of {o.own} steps"
            yield f"    {'; '.join(o.changes) or 'nothing changed'}  ({', '.join(o.truth.faults)})"
        elif o.status in ("failed", "too slow"):
            yield f"{o.truth.id}  {o.status}: {o.problem}"


SEARCH_NOTES = f"""\
Each program is trained as it is, as its developer fixed it, and mended, with {SEEDS} seeds (of the weights,
of data that are drawn, and of the order of the rows); steps and scores as for repairs. `mend` and the
training after it may take the time of {TRAININGS} trainings, or {FLOOR:g} s where that is more (a training
of a few steps takes less time than to look at one), and its trials the steps of all but one of them in any
case; trainings: that time, and the steps of all trials, in such units.
Gain: (mended - broken) / (fixed - broken) of the means; where the fix does not learn here, a well-set
network of the same size takes its place (well). Weak: better than the program as it is, p < .05 and Cohen's
d >= .2; strong: also no worse than the fix (MLM4DNN, FSE 2025).
Searches and AUTOTRAINER: gains over their own broken program and best known fix, in Keras on the original
data (https://github.com/testingautomated-usi/dl-fl-repair); the budget is so many trainings."""

TOOLS = ("random", "hebo", "bohb")
BUDGETS = ("10x", "20x", "50x")
GOOD = 0.9


def search_table(comparisons: Sequence[Comparison], title: str) -> Table:
    ours = ("steps", "broken", "fixed", "mended", "gain", "weak", "strong", "trainings (steps)")
    searches = [f"{tool}@50x" for tool in TOOLS]
    table = plain_table(title, "program", *ours, *searches, "autotrainer")
    for c in comparisons:
        told = dict(c.published)
        others = [_share(told.get(name)) for name in (*searches, "autotrainer")]
        table.add_row(c.truth.id, *_ours(c), *others)
    return table


def _ours(c: Comparison) -> tuple[str, ...]:
    if c.status != "ran":
        return (c.problem, *[""] * 7)
    well = "" if c.reachable == c.fixed else " (well)"
    verdicts = ("yes" if c.weak else "no", "yes" if c.strong else "no")
    scores = (_spread(c.broken), _spread(c.reachable) + well, _spread(c.mended))
    return (
        f"{c.steps} of {c.own}",
        *scores,
        _share(c.gain),
        *verdicts,
        f"{c.trainings:.1f} ({c.trials:.1f})",
    )


def _spread(scores: Sequence[float]) -> str:
    return f"{fmean(scores):.3f} ±{pstdev(scores):.3f}" if scores else "-"


def _share(gain: float | None) -> str:
    return "-" if gain is None else f"{gain:.2f}"


def search_counts(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """On how many programs each recovers nearly all of the gain."""
    own = [c for c in comparisons if c.gain is not None]
    good = sum(c.gain is not None and c.gain >= GOOD for c in own)
    strong, weak = sum(c.strong for c in own), sum(c.weak for c in own)
    yield f"gain >= {GOOD:g}: gradmend {good} of {len(own)} that could be run (weak {weak}, strong {strong})"
    for name in (*(f"{tool}@{budget}" for tool in TOOLS for budget in BUDGETS), "autotrainer"):
        counts = []
        for of in (comparisons, own):
            gains = [gain for c in of if (gain := dict(c.published).get(name)) is not None]
            counts.append(f"{sum(gain >= GOOD for gain in gains)} of {len(gains)}")
        yield f"    {name}: {counts[0]}; of the same programs {counts[1]}"
