"""The shipped studies: each can be read, built at every level, and trained."""

import math
from functools import cache
from itertools import combinations

import pytest
import torch

from gradmend.remedies.schedule import SCHEDULES
from gradmend.study.design import Study
from gradmend.study.file import load_study, shipped
from gradmend.theory import trainable_depth
from gradmend.training import train

NAMES = (
    "activations",
    "clipping",
    "depth",
    "five-remedies",
    "fully-connected-recipe",
    "initializations",
    "neuron",
    "normalization",
    "optimizers",
    "recurrent",
    "residual",
    "schedules",
    "trainable-depth",
    "two-class",
)


@cache
def study(name: str) -> Study:
    return load_study(name)


def test_these_are_shipped() -> None:
    assert tuple(shipped()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_level_can_be_built(name: str) -> None:
    study(name).check()


@pytest.mark.parametrize("name", NAMES)
def test_the_first_arm_takes_steps(name: str) -> None:
    made = study(name)
    arm = made.arms()[0]
    first, again = (made.build(arm, 0) for _ in range(2))
    losses = [
        train(one.setup, one.data, steps=2, batch_size=one.batch_size, device="cpu").loss
        for one in (first, again)
    ]
    assert losses[0] == losses[1]
    assert all(map(math.isfinite, losses[0]))


@pytest.mark.parametrize("name", NAMES)
def test_each_asks_a_question_with_enough_seeds(name: str) -> None:
    made = study(name)
    assert made.question.endswith("?")
    assert made.name == name
    assert len(made.seeds) >= 3
    assert made.trials <= 200


def test_the_five_remedies_come_alone_in_pairs_and_together() -> None:
    arms = [
        frozenset(n for n, label in arm.levels.items() if label == "yes")
        for arm in study("five-remedies").arms()
    ]
    names = ["activation", "residual", "regularization", "decay", "depth"]
    assert list(study("five-remedies").levels) == names
    assert set(arms) == {frozenset(part) for n in range(6) for part in combinations(names, n)}
    assert len(arms) == 32


def test_each_part_of_the_recipe_is_taken_away() -> None:
    arms = [tuple(arm.levels.values()) for arm in study("fully-connected-recipe").arms()]
    assert {arm.count("yes") for arm in arms} == {0, 1, 4, 5}
    assert [arm.count("yes") for arm in arms].count(4) == 5


def test_all_schedules_are_compared() -> None:
    assert set(study("schedules").levels["schedule"]) == set(SCHEDULES)


def test_the_predicted_depth_is_drawn_in() -> None:
    made = study("trainable-depth")
    variances = [float(label) for label in made.levels["weight_variance"]]
    points = made.predicted
    assert [points[0][0], points[-1][0]] == [min(variances), max(variances)]
    assert all(depth == trainable_depth(torch.tanh, v, 0.05) for v, depth in points[::20])
