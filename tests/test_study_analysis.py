"""What a study concludes: effects, interactions, ranks and the front, against slow twins and known truths."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gradmend.study.analysis import Results
from gradmend.study.effects import Interaction, estimate, intervals
from outcomes import arms, outcomes, results, trial

TWO = ("no", "yes")
NORM = {"norm": ("none", "batch")}
FACTORS = {"norm": ("none", "batch"), "depth": ("2", "8", "32"), "skip": TWO}


def truth(norm: str, depth: str, skip: str) -> float:
    """Skips help deep networks only."""
    lost = {"2": 0.0, "8": 0.1, "32": 0.3}[depth]
    return 0.6 + 0.1 * (norm == "batch") - lost * (skip == "no")


def arm_of(results: Results) -> dict[str, str]:
    assert results.recommendation.arm is not None
    return dict(results.recommendation.arm)


# ---- intervals


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_an_interval_has_the_standard_error_of_the_bootstrap(seeds: int) -> None:
    values = np.random.default_rng(seeds).standard_normal(seeds)
    resampled = stats.bootstrap(
        (values,), np.mean, n_resamples=40_000, method="percentile", rng=np.random.default_rng(0)
    )
    found = estimate(values, "test_loss")
    error = resampled.standard_error * math.sqrt(seeds / (seeds - 1))
    half = stats.t.ppf(0.975, seeds - 1) * error
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(
        half, rel=0.02
    )  # the error of so many resamples is 0.4 %
    assert found.value - found.low == pytest.approx(half, rel=0.02)


@pytest.mark.parametrize("seeds", [3, 5, 7, 10])
def test_intervals_hold_the_truth_as_often_as_they_promise(seeds: int) -> None:
    mean, half, _ = intervals(np.random.default_rng(1).normal(0.3, 2.0, (20_000, seeds)))
    assert np.mean(np.abs(mean - 0.3) <= half) == pytest.approx(0.95, abs=0.006)


@pytest.mark.parametrize("seeds", [5, 10])
def test_effects_and_interactions_of_whole_studies_hold_the_truth(seeds: int) -> None:
    """With noise that the arms share and noise that is skewed, as that of accuracies is."""
    rng = np.random.default_rng(seeds)
    held = []
    for _ in range(250):
        shared = rng.standard_normal(seeds)
        made = [
            trial(arm, s, test_loss=0.5 * (arm["a"] == "yes") + shared[s] + float(rng.gumbel()))
            for arm in arms({"a": TWO, "b": TWO})
            for s in range(seeds)
        ]
        found = results(made, measure="test_loss")
        real = {"a": 0.5, "b": 0.0}
        held += [e.average.low <= real[e.factor] <= e.average.high for e in found.effects]
        held += [i.change.low <= 0 <= i.change.high for i in found.interactions]
    assert 0.93 <= np.mean(held) <= 0.97


def test_missing_numbers_leave_the_interval_of_the_others() -> None:
    assert estimate(np.array([1.0, np.nan, 2.0, 4.0]), "test_loss") == estimate(
        np.array([1.0, 2.0, 4.0]), "test_loss"
    )


# ---- effects


def test_main_effects_are_those_of_least_squares() -> None:
    made = outcomes(FACTORS, truth)
    columns = [(f, label) for f, labels in FACTORS.items() for label in labels[1:]]
    design = np.array([[1.0, *(t.arm[f] == label for f, label in columns)] for t in made])
    fitted, *_ = np.linalg.lstsq(design, np.array([t.measures["test_accuracy"] for t in made]), rcond=None)
    found = results(made, FACTORS).effects
    assert [(e.factor, e.level) for e in found] == columns
    assert [e.average.value for e in found] == pytest.approx(fitted[1:].tolist())
    assert [e.contexts for e in found] == [6, 4, 4, 6]


def test_effects_are_told_from_nothing() -> None:
    found = {(e.factor, e.level): e for e in results(outcomes(FACTORS, truth), FACTORS).effects}
    assert found["norm", "batch"].verdict == 1
    assert found["depth", "32"].verdict == -1
    skip = found["skip", "yes"]
    assert skip.verdict == 1
    assert skip.alone is not None
    assert skip.alone.shown == 0  # at the base, of depth 2, skips do nothing


def test_an_effect_alone_is_the_difference_of_two_arms_seed_by_seed() -> None:
    made = outcomes(NORM, lambda norm: 0.5 + 0.2 * (norm == "batch"))
    with_it, without = (
        [t.measures["test_accuracy"] for t in made if t.arm["norm"] == n] for n in ("batch", "none")
    )
    paired = stats.ttest_rel(with_it, without).confidence_interval()
    (effect,) = results(made).effects
    assert effect.alone == effect.average
    assert (effect.average.low, effect.average.high) == pytest.approx((paired.low, paired.high))


def test_noise_that_arms_share_does_not_widen_effects() -> None:
    made = [
        trial({"norm": n}, s, test_accuracy=0.5 + 0.1 * s + 0.01 * (n == "batch"))
        for n in NORM["norm"]
        for s in range(4)
    ]
    (effect,) = results(made).effects
    assert effect.verdict == 1
    assert effect.average.high - effect.average.low < 1e-6


def test_an_interaction_is_a_difference_of_differences() -> None:
    made = outcomes(FACTORS, truth, noise=0.0)
    found = {(i.levels, i.factors): i for i in results(made, FACTORS).interactions}
    both: Interaction = found[("32", "yes"), ("depth", "skip")]
    assert both.change.value == pytest.approx(0.3)
    assert both.contexts == 2
    assert found[("batch", "yes"), ("norm", "skip")].change.shown == 0
    assert len(found) == 2 + 1 + 2


def test_times_and_sizes_are_compared_as_ratios() -> None:
    made = [
        trial({"norm": n}, s, test_accuracy=0.5, step_seconds=(1 + (n == "batch")) * (1 + 0.1 * s))
        for n in NORM["norm"]
        for s in range(3)
    ]
    (side,) = results(made).sides
    time = next(effect for effect in side if effect.measure == "step_seconds")
    assert time.average.value == pytest.approx(2.0)
    assert time.verdict == -1


HALF = [
    arm for arm in arms(dict.fromkeys("abcd", TWO)) if sum(label == "yes" for label in arm.values()) % 2 == 0
]


def test_a_fraction_of_a_design_is_fitted_as_a_sum() -> None:
    sizes = {"a": 0.1, "b": -0.05, "c": 0.0, "d": 0.02}
    made = [
        trial(arm, s, test_loss=1.0 + s + sum(sizes[f] for f, label in arm.items() if label == "yes"))
        for arm in HALF
        for s in range(3)
    ]
    found = results(made, dict.fromkeys("abcd", TWO), "test_loss")
    assert {e.factor: e.average.value for e in found.effects} == pytest.approx(sizes)
    assert {e.contexts for e in found.effects} == {0}
    assert not found.interactions
    assert "Fitted as a sum" in str(found)


def test_what_always_comes_together_is_not_told_apart() -> None:
    made = [trial({"a": x, "b": x}, s, test_accuracy=0.5 + 0.1 * (x == "yes")) for x in TWO for s in range(3)]
    found = results(made)
    assert not found.effects
    assert len([line for line in found.left_out if "cannot be told" in line]) == 2


def test_rounding_is_no_effect() -> None:
    made = [
        trial({"norm": n}, s, test_accuracy=a)
        for n, a in (("none", 0.3), ("batch", 0.1 + 0.2))
        for s in range(3)
    ]
    (effect,) = results(made).effects
    assert effect.average.value == 0
    assert effect.verdict == 0


# ---- what did not end well


def test_diverged_trials_count_as_accuracy_zero_and_are_counted() -> None:
    made = outcomes(NORM, lambda **_: 0.5)
    made[5:7] = [replace(t, status="diverged", measures={"test_accuracy": 0.9}) for t in made[5:7]]
    found = results(made)
    values = [0.0, 0.0, *(t.measures["test_accuracy"] for t in made[7:])]
    place = next(p for p in found.ranking if p.label == "batch")
    assert place.mean.value == pytest.approx(np.mean(values))
    assert place.mean.low == 0.0  # an interval of a share ends there
    assert (place.diverged, place.trials) == (2, 5)
    assert (found.effects[0].diverged, found.effects[0].trials) == (2, 5)
    assert "2 of 5" in str(found)


def test_an_arm_that_diverged_has_no_loss() -> None:
    made = outcomes({"norm": ("none", "batch", "layer")}, lambda **_: 1.0, measure="train_loss")
    made[5] = replace(made[5], status="diverged", measures={"train_loss": 0.1})
    found = results(made, measure="train_loss")
    assert [e.level for e in found.effects] == ["layer"]
    assert found.ranking[-1].label == "batch"
    assert found.ranking[-1].rank is None
    assert "Not compared, as they diverged with some seed: batch." in found.left_out


def test_an_arm_that_missed_its_target_once_has_no_steps_to_it() -> None:
    made = [
        trial(
            {"norm": n}, s, test_accuracy=0.9, **({"steps_to_target": 10.0} if (n, s) != ("batch", 1) else {})
        )
        for n in ("none", "batch", "layer")
        for s in range(3)
    ]
    found = results(made)
    told = {e.level for side in found.sides for e in side if e.measure == "steps_to_target"}
    assert told == {"layer"}
    assert any(line.startswith("1 of 3 arms did not reach 90 %") for line in found.left_out)


def test_not_applicable_and_failed_trials_are_listed_with_their_reason() -> None:
    made = outcomes({"norm": ("none", "batch", "layer")}, lambda **_: 0.5, seeds=3)
    made[3:6] = [trial(t.arm, t.seed, "not applicable", "There is no layer.") for t in made[3:6]]
    made[6] = trial(made[6].arm, 0, "failed", "Out of memory.")
    found = results(made)
    assert {place.label for place in found.ranking} == {"none", "layer"}
    assert "Not applicable: batch: There is no layer." in found.left_out
    assert "Failed: layer: Out of memory." in found.left_out
    (effect,) = found.effects
    assert (effect.level, effect.average.seeds, effect.average.bounded) == ("layer", 2, False)


def test_a_seed_counts_once_all_its_trials_are_there() -> None:
    made = [
        t
        for t in outcomes({"a": TWO, "b": TWO}, lambda **_: 0.5)
        if (t.arm["a"], t.arm["b"], t.seed) != ("yes", "no", 2)
    ]
    found = {e.factor: e for e in results(made).effects}
    assert found["a"].average.seeds == 4
    assert found["a"].contexts == 2


# ---- no claim without an interval


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_claim_nothing(seeds: int) -> None:
    made = outcomes(FACTORS, truth, seeds=seeds)
    found = results(made, FACTORS)
    assert {e.verdict for e in found.effects} == {0}
    assert {i.change.shown for i in found.interactions} == {0}
    assert {p.rank for p in found.ranking} == {None}
    assert found.recommendation.arm is None
    assert "at least 3" in found.recommendation.sentence
    assert not re.search("Helps|Hurts|worth its cost", str(found))


def test_a_time_that_was_copied_to_all_seeds_is_one_reading() -> None:
    made = [
        trial({"norm": n}, s, test_accuracy=0.5 + 0.01 * s, step_seconds=1.0 + (n == "batch"))
        for n in NORM["norm"]
        for s in range(5)
    ]
    time = next(e for e in results(made).sides[0] if e.measure == "step_seconds")
    assert (time.average.seeds, time.verdict) == (1, 0)


def test_sizes_are_exact_whatever_the_seeds() -> None:
    made = [
        trial({"norm": n}, 0, test_accuracy=0.5, parameters=10.0 * (1 + (n == "batch"))) for n in NORM["norm"]
    ]
    size = next(e for e in results(made).sides[0] if e.measure == "parameters")
    assert size.verdict == -1
    assert (size.average.value, size.average.seeds) == (pytest.approx(2.0), 1)
    assert size.average.exact
