"""What a study recommends: ranks with ties, the front, the choice, its words, and any study at all."""

import json
import math
import random
import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradmend.errors import GradmendError, SetupError
from gradmend.study.advice import seeds_to_tell
from gradmend.study.analysis import Results
from gradmend.study.effects import estimate
from gradmend.study.outcome import MEASURES, Outcome
from outcomes import arms, outcomes, results, trial

TWO = ("no", "yes")
NORMS = {"norm": ("none", "batch", "layer", "group")}


def norms(none: float, batch: float, layer: float, group: float, seeds: int = 5) -> list[Outcome]:
    truths = {"none": none, "batch": batch, "layer": layer, "group": group}
    return outcomes(NORMS, lambda norm: truths[norm], seeds)


def chosen(found: Results) -> dict[str, str]:
    assert found.recommendation.arm is not None
    return dict(found.recommendation.arm)


# ---- ranks


def test_ranks_are_counts_of_paired_tests() -> None:
    made = norms(0.5, 0.505, 0.51, 0.6)
    table = {
        n: np.array([t.measures["test_accuracy"] for t in made if t.arm["norm"] == n]) for n in NORMS["norm"]
    }
    beaten: dict[str, int] = dict.fromkeys(table, 0)
    beats = dict(beaten)
    for a, b in combinations(table, 2):
        ends = stats.ttest_rel(table[a], table[b]).confidence_interval()
        if ends.low > 0 or ends.high < 0:
            winner, loser = (a, b) if ends.low > 0 else (b, a)
            beats[winner] += 1
            beaten[loser] += 1
    for place in results(made).ranking:
        assert (place.rank, place.last) == (1 + beaten[place.label], 4 - beats[place.label])


def test_arms_that_nothing_tells_apart_share_a_rank() -> None:
    found = results(norms(0.5, 0.9, 0.9, 0.7))
    assert [(p.rank, p.last) for p in found.ranking] == [(1, 2), (1, 2), (3, 3), (4, 4)]


def test_less_is_better_of_losses() -> None:
    made = [
        trial({"norm": n}, s, train_loss=v + 0.01 * s)
        for n, v in (("none", 2.0), ("batch", 1.0))
        for s in range(3)
    ]
    found = results(made, measure="train_loss")
    assert [p.label for p in found.ranking] == ["batch", "none"]
    assert chosen(found) == {"norm": "batch"}
    assert found.effects[0].verdict == 1


# ---- the front


def costly(times: dict[str, float], accuracies: dict[str, float]) -> list[Outcome]:
    rng = np.random.default_rng(0)
    return [
        trial(
            {"norm": n},
            s,
            test_accuracy=accuracies[n] + 0.001 * float(rng.standard_normal()),
            seconds=times[n] * math.exp(0.01 * float(rng.standard_normal())),
        )
        for n in times
        for s in range(4)
    ]


def test_the_front_holds_what_nothing_dominates() -> None:
    made = costly(
        {"none": 1, "batch": 2, "layer": 3, "group": 4},
        {"none": 0.5, "batch": 0.8, "layer": 0.7, "group": 0.9},
    )
    points = results(made).pareto["seconds"]
    assert [(p.label, p.front) for p in points] == [
        ("none", True),
        ("batch", True),
        ("layer", False),
        ("group", True),
    ]
    assert all(p.gives.bounded and p.costs.bounded for p in points)


def test_only_what_is_shown_dominates() -> None:
    """The means say that one arm is better and faster; three seeds do not."""
    made = [
        trial({"norm": n}, s, test_accuracy=0.5 + shift + noise, seconds=1.0 + noise - shift)
        for n, shift in (("none", 0.0), ("batch", 0.001))
        for s, noise in enumerate((0.1, 0.0, -0.1) if n == "none" else (-0.1, 0.0, 0.1))
    ]
    assert all(point.front for point in results(made).pareto["seconds"])


# ---- the recommendation


def test_the_best_is_recommended_with_its_gain() -> None:
    found = results(norms(0.5, 0.9, 0.7, 0.6)).recommendation
    assert found.gain is not None
    assert found.gain.low < 0.4 < found.gain.high
    assert re.fullmatch(
        r"Use batch: test accuracy \d\d\.\d % \[.*\]; against none \+\d\d\.\d \[.*\] points\.", found.sentence
    )


def test_of_ties_the_one_with_the_fewest_departures_is_recommended() -> None:
    factors = {"norm": TWO, "skip": TWO}
    found = results(
        outcomes(factors, lambda norm, skip: 0.5 + 0.3 * (skip == "yes") - 0.01 * (norm == "yes"))
    )
    assert chosen(found) == {"norm": "no", "skip": "yes"}
    assert any(
        line.startswith("Not told apart from it by 5 seeds: norm + skip")
        for line in found.recommendation.evidence
    )


def test_of_equally_simple_ties_the_faster_is_recommended() -> None:
    slow = {"none": 1.0, "batch": 3.0, "layer": 2.0, "group": 4.0}
    made = [
        trial(t.arm, t.seed, **t.measures, step_seconds=slow[t.arm["norm"]] + 0.01 * t.seed)
        for t in norms(0.5, 0.9, 0.9, 0.9)
    ]
    found = results(made)
    assert chosen(found) == {"norm": "layer"}
    assert found.recommendation.costs is not None
    assert found.recommendation.costs["step_seconds"].value == pytest.approx(2.0, rel=0.02)


def test_the_base_is_kept_where_nothing_is_shown_to_be_better() -> None:
    found = results(norms(0.9, 0.9, 0.8, 0.9))
    assert chosen(found) == {"norm": "none"}
    assert found.recommendation.sentence.startswith("Keep none")
    assert found.recommendation.gain is None


def test_what_diverged_is_not_recommended_where_something_else_is_as_good() -> None:
    def truth(norm: str, skip: str) -> float:
        return 0.1 + 0.8 * (skip == "yes") - 0.01 * (norm == "yes")

    made = outcomes({"norm": TWO, "skip": TWO}, truth, seeds=10)
    only = {"norm": "no", "skip": "yes"}
    made = [trial(t.arm, t.seed, "diverged") if t.arm == only and t.seed == 0 else t for t in made]
    found = results(made)
    lost = next(place for place in found.ranking if place.diverged)
    assert (lost.label, lost.rank) == ("skip", 1)  # one in ten is no proof that it is worse
    assert chosen(found) == {"norm": "yes", "skip": "yes"}
    assert any("skip (1 of 10)" in line for line in found.recommendation.evidence)


def test_a_base_that_diverged_is_said() -> None:
    made = [
        trial(t.arm, t.seed, "diverged") if t.arm["norm"] == "none" else t for t in norms(0, 0.9, 0.5, 0.5)
    ]
    assert "5 of 5 trials of none diverged" in results(made).recommendation.sentence
    losses = [
        trial(t.arm, t.seed, t.status, train_loss=1 - t.measures.get("test_accuracy", 0.0)) for t in made
    ]
    found = results(losses, measure="train_loss")
    assert found.recommendation.sentence.endswith("; 5 of 5 trials of none diverged.")


def test_without_a_base_no_gain_is_told() -> None:
    made = [
        t
        for t in outcomes({"a": TWO, "b": TWO}, lambda a, b: 0.5 + 0.2 * (a == b))
        if "yes" in t.arm.values()
    ]
    found = results(made, {"a": TWO, "b": TWO}).recommendation
    assert found.gain is None
    assert "no base" in found.sentence


def test_arms_on_other_data_are_no_rivals() -> None:
    factors = {"data": ("easy", "hard"), "skip": TWO}

    def truth(data: str, skip: str) -> float:
        return 0.9 if data == "easy" else 0.3 + 0.2 * (skip == "yes")

    found = results(outcomes(factors, truth), factors)
    assert (
        "On easy: Keep the base" not in found.recommendation.sentence
    )  # one factor is left: its level has a name
    assert found.recommendation.sentence.startswith("On easy: Keep no skip")
    assert "On hard: Use skip" in found.recommendation.sentence
    assert [p.rank for p in found.ranking] == [1, 1, 1, 2]
    assert {effect.factor for side in found.sides for effect in side} == {"skip"}
    assert "arm on hard" in str(found)


def test_findings_of_the_base_and_the_choice_are_told() -> None:
    made = [
        Outcome(
            t.arm,
            t.seed,
            t.status,
            "",
            t.measures,
            (),
            (),
            ("VANISHING_GRADIENT",) * (t.arm["norm"] == "none"),
        )
        for t in norms(0.1, 0.9, 0.5, 0.5)
    ]
    assert (
        "Found at the start: none: vanishing gradient; batch: nothing."
        in results(made).recommendation.evidence
    )


def test_as_many_seeds_as_are_called_for_tell() -> None:
    values = np.array([0.1, 0.3, -0.1, 0.2, 0.0])
    needed = seeds_to_tell(estimate(values, "test_loss"))
    assert needed is not None
    spread = values.std(ddof=1)
    ends = [values.mean() - stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) for n in (needed - 1, needed)]
    assert ends[0] <= 0 < ends[1]


# ---- any study


PLANS = st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(0, 10**6))
"""How many levels each factor has, and the seed of all that happens."""

Plan = tuple[list[int], int]


def study(plan: Plan) -> tuple[list[Outcome], dict[str, tuple[str, ...]]]:
    """Any factors, with holes, lost trials and few seeds."""
    levels = {f"f{i}": tuple(f"{level}" for level in range(size)) for i, size in enumerate(plan[0])}
    rng = np.random.default_rng(plan[1])
    statuses = ["done"] * 12 + ["diverged", "not applicable", "failed"]
    made = []
    for arm in arms(levels):
        for seed in range(rng.integers(6)):
            status = statuses[rng.integers(len(statuses))]
            ran = status in ("done", "diverged")
            known = {name: float(rng.uniform(0.1, 0.9)) for name in MEASURES if ran and rng.random() < 0.9}
            made.append(trial(arm, seed, status, "" if ran else "It does not fit.", **known))
    return made, levels


def claims(found: Results) -> dict[str, object]:
    return {key: value for key, value in found.to_dict().items() if key != "trials"}


@settings(max_examples=15, deadline=None)
@given(PLANS, st.randoms(use_true_random=False), st.sampled_from(["test_accuracy", "train_loss"]))
def test_any_study_prints_and_its_order_does_not_matter(
    plan: Plan, order: random.Random, measure: str
) -> None:
    made, levels = study(plan)
    found = results(made, levels, measure)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"\b(nan|inf)\b", text)
    json.dumps(found.to_dict(), allow_nan=False)
    mixed = order.sample(made, len(made))
    assert claims(results(mixed, levels, measure)) == claims(found)


@settings(max_examples=40, deadline=None)
@given(PLANS, st.floats(-100, 100))
def test_a_constant_moves_no_comparison(plan: Plan, shift: float) -> None:
    made, levels = study(plan)
    moved = [
        Outcome(t.arm, t.seed, t.status, t.reason, {k: v + shift for k, v in t.measures.items()}, (), ())
        for t in made
    ]
    one, other = (results(held, levels, "test_loss") for held in (made, moved))
    for a, b in zip(one.effects, other.effects, strict=True):
        assert (a.average.value, a.average.low) == pytest.approx(
            (b.average.value, b.average.low), abs=1e-9, nan_ok=True
        )
    for c, d in zip(one.interactions, other.interactions, strict=True):
        assert c.change.high == pytest.approx(d.change.high, abs=1e-9, nan_ok=True)
    assert [p.rank for p in one.ranking] == [p.rank for p in other.ranking]


@settings(max_examples=40, deadline=None)
@given(PLANS)
def test_the_best_mean_is_never_ranked_below_first_and_always_on_the_front(
    plan: Plan,
) -> None:
    found = results(*study(plan))
    ranked = [place for place in found.ranking if place.rank is not None]
    assert not ranked or max(ranked, key=lambda place: place.mean.value).rank == 1
    for points in found.pareto.values():
        assert not points or any(point.front for point in points)
        assert not points or max(points, key=lambda p: (p.gives.value, -p.costs.value)).front


# ---- bad input


def test_a_measure_must_have_a_better_side() -> None:
    with pytest.raises(SetupError, match=r"'test_acuracy'. Did you mean 'test_accuracy'"):
        results([], measure="test_acuracy")
    with pytest.raises(SetupError, match="gradient_ratio"):
        results([], measure="gradient_ratio")


def test_contradictions_are_refused() -> None:
    with pytest.raises(GradmendError, match="seed 0 is there twice"):
        results([trial({"a": "x"}, 0), trial({"a": "x"}, 0)])
    with pytest.raises(GradmendError, match="factors"):
        results([trial({"a": "x"}, 0), trial({"b": "x"}, 0)])
    with pytest.raises(GradmendError, match="no level 'z'"):
        results([trial({"a": "z"}, 0)], {"a": ("x", "y")})


def test_nothing_yet_prints() -> None:
    found = results([])
    assert "No trials yet." in str(found)
    assert found.recommendation.arm is None
    assert not found.figures()
