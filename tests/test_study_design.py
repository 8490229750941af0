"""Studies: their arms, what they build, what names a trial, and what is refused."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradmend.data import Data, load
from gradmend.errors import GradmendError, NotApplicableError, SetupError, TargetError
from gradmend.remedies import AddSkips, BatchNorm, ClipNorm, He
from gradmend.setup import Setup
from gradmend.study.combine import COMBINE, combinations_of
from gradmend.study.design import Study
from gradmend.study.file import load_study
from gradmend.study.levels import parse_remedy, written
from gradmend.theory import trainable_depth
from gradmend.training import train
from gradmend.zoo import Recipe
from helpers import SGD, blobs

SHALLOW = {"depth": 2, "width": 8}


def rows() -> Data:
    x, y = blobs(64)
    return Data(x[:48], y[:48], x[48:], y[48:], "blobs", 3)


def study(**plan: Any) -> Study:
    return Study("deep", **{"settings": SHALLOW, "data": rows(), "steps": 20, "batch_size": 16, **plan})


def only(**plan: Any) -> Recipe:
    """The first trial of a study."""
    made = study(**plan)
    return made.build(made.arms()[0], 0)


def weights(recipe: Recipe) -> list[torch.Tensor]:
    return [p.detach() for p in recipe.setup.model.parameters()]


def same(one: Recipe, other: Recipe) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def net(seed: int) -> Setup:
    return Setup(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), nn.CrossEntropyLoss(), SGD)


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(2, 4), max_size=3),
    remedies=st.integers(0, 4),
    combine=st.sampled_from(sorted(COMBINE)),
)
def test_arms_are_all_that_was_asked_for_once_each(counts: list[int], remedies: int, combine: str) -> None:
    factors = {f"f{i}": {f"l{j}": {} for j in range(count)} for i, count in enumerate(counts)}
    cures: dict[str, dict[str, Any]] = {f"r{i}": {} for i in range(remedies)}
    made = study(factors=factors, remedies=cures, combine=combine)
    levels = [tuple(arm.levels.values()) for arm in made.arms()]
    assert len(levels) == len(set(levels)) == prod(counts) * len(combinations_of(list(cures), combine))
    assert all(list(arm.levels) == list(made.levels) == [*factors, *cures] for arm in made.arms())
    assert all(label in made.levels[name] for arm in made.arms() for name, label in arm.levels.items())
    assert levels[0] == tuple(labels[0] for labels in made.levels.values())
    assert made.trials == 5 * len(levels)


@pytest.mark.parametrize(("fraction", "arms"), [(0.5, 16), ("1/4", 8), (16, 16)])
def test_a_fraction_is_taken_of_setups_factors_and_remedies(fraction: Any, arms: int) -> None:
    made = Study(
        ["deep", "mnist"],
        factors={"depth": [2, 4], "learning_rate": [0.1, 0.01]},
        remedies=["BatchNorm()", "AddSkips()"],
        combine="full",
        fraction=fraction,
    )
    assert len(made.arms()) == len({tuple(arm.levels.values()) for arm in made.arms()}) == arms
    for name, labels in made.levels.items():
        seen = [arm.levels[name] for arm in made.arms()]
        assert {seen.count(label) for label in labels} == {arms // 2}
    assert " ".join(made.resolution.split()) in " ".join(str(made).split())


def test_levels_change_settings_and_remedies_in_order() -> None:
    made = study(
        factors={"norm": {"none": {}, "both": {"norm": "batch", "remedies": ["He()", "ClipNorm(0.5)"]}}},
        remedies={"skips": AddSkips(scale=1.0), "fast": {"learning_rate": 0.5}},
        combine="all",
    )
    last = made.arms()[-1]
    assert dict(last.levels) == {"norm": "both", "skips": "yes", "fast": "yes"}
    changed = {"norm": "batch", "learning_rate": 0.5}
    assert {key: last.changes[key] for key in changed} == changed
    assert last.remedies == ("He()", "ClipNorm(max_norm=0.5)", "AddSkips(scale=1.0)")
    assert made.arms()[0].remedies == ()


def test_remedies_are_read_as_they_are_written() -> None:
    for remedy in (BatchNorm(), AddSkips(scale=0.0, learned=True), ClipNorm(0.25)):
        assert parse_remedy(written(remedy)) == parse_remedy(repr(remedy)) == remedy


def test_settings_of_all_arms_give_way_to_those_of_a_base_and_these_to_levels() -> None:
    bases = {"a": {"recipe": "deep", "width": 4}, "b": {"recipe": "deep", "width": 5, "depth": 3}}
    made = Study(bases, settings={"depth": 2, "width": 9}, factors={"depth": [1, 6]})
    changes = {tuple(arm.levels.values()): dict(arm.changes) for arm in made.arms()}
    assert changes[("b", "6")] == {"depth": 6, "width": 5}
    assert made.arms()[0].base == "a"
    assert list(made.levels) == ["setup", "depth"]


def test_a_trial_trains_what_its_settings_say() -> None:
    made = only(
        settings={
            **SHALLOW,
            "optimizer": "SGD:0.5",
            "momentum": 0.9,
            "weight_decay": 0.01,
            "schedule": "linear",
        }
    )
    optimizer = made.setup.build_optimizer()
    group = optimizer.param_groups[0]
    assert type(optimizer) is torch.optim.SGD
    assert made.batch_size == 16
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.9, 0.01)
    assert made.setup.schedule is not None
    schedule = made.setup.schedule(optimizer)
    for _ in range(20):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [0]
    assert (
        only(settings={**SHALLOW, "learning_rate": 0.3}).setup.build_optimizer().param_groups[0]["lr"] == 0.3
    )


def test_a_schedule_of_epochs_ends_with_them() -> None:
    made = only(settings={**SHALLOW, "schedule": "linear"}, epochs=4, steps=None)
    optimizer = made.setup.build_optimizer()
    assert made.setup.schedule is not None
    schedule = made.setup.schedule(optimizer)
    history = train(made.setup, made.data, epochs=4, batch_size=16, device="cpu")
    for _ in range(history.steps):
        assert schedule.get_last_lr()[0] > 0
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [0]


@pytest.mark.parametrize("remedies", [[], ["He()"], ["AddSkips()", "He()"]])
def test_seeds_draw_everything_and_disturb_nothing(remedies: list[str]) -> None:
    made = study(remedies=remedies, combine="all")
    arm, before = made.arms()[-1], torch.get_rng_state()
    first, again, other = (made.build(arm, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert same(first, again)
    assert not same(first, other)


def test_a_remedy_draws_by_the_seed() -> None:
    setup, batch = net(0), rows().head(16)
    drawn = [He().apply(setup, batch, seed=seed).setup.model.state_dict()["0.weight"] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0], He().apply(setup, batch).setup.model.state_dict()["0.weight"])


def test_remedies_are_applied_to_what_the_settings_give() -> None:
    made = study(settings={**SHALLOW, "norm": "batch"}, remedies=["DropBatchNorm()"])
    assert any(isinstance(m, nn.BatchNorm1d) for m in made.build(made.arms()[0], 0).setup.model.modules())
    kinds = {type(m) for m in made.build(made.arms()[1], 0).setup.model.modules()}
    assert nn.LayerNorm in kinds
    assert nn.BatchNorm1d not in kinds


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"remedies": ["ForgetBias()"]}, r"ForgetBias\(\) finds nothing to change"),
        ({"remedies": {"m": {"optimizer": "Adam", "momentum": 0.9}}}, "Adam has no momentum"),
        (
            {"remedies": {"deeper": {"depth": 9}}, "own": True},
            "'setup' has no setting 'depth'. It is a setup of",
        ),
        ({"remedies": ["DenseConnections()"], "settings": {"depth": 1, "width": 8}}, "DenseConnections"),
    ],
)
def test_what_does_not_apply_is_said_and_stops_nothing(plan: dict[str, Any], reason: str) -> None:
    own = plan.pop("own", False)
    bases: Any = {"setup": net, "deep": "deep"} if own else "deep"
    made = Study(bases, **{"data": rows(), **plan})
    arm = made.arms()[1]
    with pytest.raises(NotApplicableError, match=reason):
        made.build(arm, 0)
    made.check()


def test_a_setup_of_ones_own_is_the_same_for_all_seeds_and_stays_as_it_is() -> None:
    own = net(0)
    before = [p.clone() for p in own.model.parameters()]
    made = Study({"mine": own}, data=rows(), remedies=[He()])
    one, other = (made.build(made.arms()[0], seed) for seed in (0, 1))
    assert same(one, other)
    train(one.setup, one.data, steps=3, batch_size=8, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(own.model.parameters(), before, strict=True))
    assert not same(made.build(made.arms()[1], 0), made.build(made.arms()[1], 1))


def test_a_function_of_the_seed_draws_new_weights() -> None:
    made = Study({"mine": net}, data=rows(), batch_size=8)
    assert not same(made.build(made.arms()[0], 0), made.build(made.arms()[0], 1))
    assert same(made.build(made.arms()[0], 0), made.build(made.arms()[0], 0))
    made = Study(lambda seed: Recipe("mine", net(seed), rows(), 8, 7))
    assert (made.build(made.arms()[0], 0).batch_size, made.build(made.arms()[0], 0).epochs) == (8, 7)


def test_keys_tell_trials_apart() -> None:
    made = study(factors={"depth": [1, 2], "learning_rate": [0.1, 0.2]}, remedies=["He()", "BatchNorm()"])
    keys = [made.key(arm, seed) for arm in made.arms() for seed in made.seeds]
    assert len(set(keys)) == len(keys) == made.trials


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {**SHALLOW, "width": 9}},
        {"settings": {**SHALLOW, "schedule": "cosine"}},
        {"steps": 21},
        {"steps": None, "epochs": 20},
        {"batch_size": 8},
        {"data": replace(rows(), x=rows().x + 1)},
        {"setups": "mnist"},
    ],
)
def test_a_key_changes_with_whatever_decides_the_outcome(change: dict[str, Any]) -> None:
    one, other = study(), replace(study(), **change)
    assert one.key(one.arms()[0], 0) != other.key(other.arms()[0], 0)


def test_a_key_does_not_change_with_names() -> None:
    one = study(factors={"norm": {"none": {}, "batch": {"norm": "batch"}}})
    plan = {"name": "n", "question": "q", "measure": "test_loss", "target": 0.5, "seeds": [4, 0]}
    other = study(factors={"b": {"-": {}, "with": {"norm": "batch"}}, "depth": [2, 3]}, **plan)
    assert [one.key(arm, 0) for arm in one.arms()] == [other.key(arm, 0) for arm in other.arms()[::2]]


def test_a_file_of_data_counts_by_what_it_holds(own_folder: None) -> None:
    keys = []
    for name, value in (("a.csv", 1), ("b.csv", 1), ("c.csv", 2)):
        Path(name).write_text("x,y\n" + "".join(f"{i * value},{i % 2}\n" for i in range(20)))
        made = study(data=name)
        keys.append(made.key(made.arms()[0], 0))
    assert keys[0] == keys[1] != keys[2]


def test_own_setups_count_by_weights_and_code() -> None:
    own = net(0)
    one, same_again, other = (Study({"m": setup}, data=rows()) for setup in (own, own.copy(), net(0)))
    keys = [made.key(made.arms()[0], 0) for made in (one, same_again, other)]
    assert keys[0] == keys[1] != keys[2]
    slower = Study({"m": replace(own, optimizer=partial(torch.optim.SGD, lr=0.2))}, data=rows())
    assert slower.key(slower.arms()[0], 0) != keys[0]
    clipped = replace(own, gradient_transform=partial(nn.utils.clip_grad_norm_, max_norm=1.0))
    made = Study({"m": clipped}, data=rows())
    assert made.key(made.arms()[0], 0) != keys[0]


def test_keys_are_the_same_in_other_processes() -> None:
    code = (
        "from gradmend.study.file import load_study\n"
        "study = load_study('clipping')\n"
        "print(*[study.key(arm, 3) for arm in study.arms()])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    made = load_study("clipping")
    assert printed.stdout.split() == [made.key(arm, 3) for arm in made.arms()]


def test_theory_foretells_the_depth_where_depth_and_weights_vary() -> None:
    factors: dict[str, Any] = {"depth": [5, 10], "weight_variance": [1.0, 2.0, 4.0]}
    tanh = {"activation": "tanh", "bias_variance": 0.05}
    points = study(factors=factors, settings=tanh).predicted
    variances = [variance for variance, _ in points]
    assert (variances[0], variances[-1], len(points)) == (1, 4, 60)
    assert all(depth == trainable_depth(torch.tanh, v, 0.05) for v, depth in points[::20])
    for settings_ in ({"activation": "tailored"}, {**tanh, "skip": True}):
        assert study(factors=factors, settings=settings_).predicted == ()
    assert study(factors={"depth": [5, 10]}, settings=tanh).predicted == ()


def test_a_factor_whose_base_is_the_recipes_own_keeps_the_keys() -> None:
    one = study()
    other = study(factors={"init": ["default", "he"], "skip": [False, True]})
    assert other.key(other.arms()[0], 0) == one.key(one.arms()[0], 0)
    assert other.key(other.arms()[1], 0) != one.key(one.arms()[0], 0)


def test_a_study_says_what_it_is() -> None:
    made = study(name="mine", question="Does it help?", remedies=["BatchNorm()"], factors={"depth": [1, 2]})
    text = " ".join(str(made).split())
    for part in (
        "mine",
        "Does it help?",
        "BatchNorm() no · yes",
        "depth 1 · 2",
        "20: 4 arms x 5 seeds",
        "blobs",
    ):
        assert part in text
    assert made.to_dict() == made.definition()
    assert made.definition()["factors"]["BatchNorm()"]["yes"] == {"remedies": ["BatchNorm()"]}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"settings": {"depht": 2}}, "no setting 'depht'. Did you mean 'depth'"),
        ({"factors": {"depht": [2, 3]}}, "no setting 'depht'. Did you mean 'depth'"),
        ({"remedies": {"x": {"leraning_rate": 1}}}, "Did you mean 'learning_rate'"),
        ({"factors": {"depth": [2]}}, "'depth' has 1 levels: it takes two or more"),
        ({"factors": {"depth": 2}}, "'depth' is 2. Give a list of values, or a table"),
        ({"factors": {"depth": [2, 2]}}, "'depth' has the level '2' twice"),
        ({"remedies": ["BatchNrom()"]}, "no remedy 'BatchNrom'. Did you mean 'BatchNorm'"),
        (
            {"remedies": ["BatchNorm(3)"]},
            r"'BatchNorm\(3\)' cannot be made: .* Type: gradmend explain BatchNorm",
        ),
        ({"remedies": ["BatchNorm("]}, r"'BatchNorm\(' is no remedy. Write it as a call"),
        ({"remedies": ["ClipNorm(open('x'))"]}, "is no remedy. Write it as a call"),
        ({"remedies": ["UseOptimizer('Adan')"]}, "torch has no optimizer 'Adan'"),
        ({"remedies": {"r": 3}}, "3 is no remedy"),
        ({"remedies": {"depth": {}}, "factors": {"depth": [1, 2]}}, "'depth' is varied twice"),
        (
            {"remedies": {"a": {"depth": 1}, "b": {"depth": 2}}, "combine": "pairs"},
            "'a' and 'b' cannot come tog",
        ),
        (
            {"factors": {"depth": [1, 2]}, "remedies": {"b": {"depth": 3}}},
            "'depth' and 'b' cannot come together",
        ),
        ({"remedies": ["He()"], "fraction": 0.5}, "combine = .full."),
        ({"factors": {"depth": [1, 2], "width": [1, 2]}, "fraction": 2}, "has 3 arms or more"),
        ({"factors": {"depth": [1, 2], "width": [1, 2]}, "fraction": "half"}, "share of all arms"),
        ({"measure": "accuracy"}, "Did you mean 'test_accuracy'"),
        ({"epochs": 3}, "`epochs` or `steps`, not both"),
        ({"steps": 0}, "1 or more"),
        ({"target": 90.0}, "an accuracy above 0, up to 1"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"factors": {"data": ["digits", "mnist"]}}, "differ in their data"),
        (
            {"factors": {f"f{i}": {str(j): {} for j in range(5)} for i in range(6)}},
            "15625 arms, more than 10000",
        ),
    ],
)
def test_plans_that_cannot_be_are_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        study(**plan)


@pytest.mark.parametrize(
    ("setups", "message"),
    [
        ("dep", "no recipe 'dep'. Did you mean 'deep'"),
        ({"x": {"width": 3}}, "'x' says no recipe"),
        ({"x": 3}, "3 is no setup"),
        ({"x": nn.Linear(1, 1)}, "A model alone is no setup"),
        ([net(0), net(1)], "need names"),
    ],
)
def test_setups_that_are_none_are_refused(setups: Any, message: str) -> None:
    with pytest.raises((SetupError, TargetError), match=message):
        Study(setups)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"factors": {"activation": ["relu", "rellu"]}}, "Did you mean 'relu'"),
        ({"factors": {"optimizer": ["SGD", "Sgdd"]}}, "torch has no optimizer 'Sgdd'"),
        ({"factors": {"optimizer": ["SGD", "SGD:fast"]}}, "'fast' is no learning_rate"),
        ({"factors": {"learning_rate": [0.1, -1.0]}}, "-1.0 is no lr"),
        ({"factors": {"schedule": ["linear", "cosin"]}}, "Did you mean 'cosine'"),
        ({"data": "digit"}, "Did you mean 'digits'"),
    ],
)
def test_the_check_finds_impossible_values_before_anything_trains(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(GradmendError, match=message):
        study(**plan).check()


def test_a_setup_without_data_is_refused() -> None:
    with pytest.raises(SetupError, match="'mine' brings no data"):
        Study({"mine": net}).check()


def test_data_is_loaded_once() -> None:
    made = study(data="digits", factors={"depth": [1, 2]})
    first, second = (made.build(arm, seed) for arm, seed in zip(made.arms(), (0, 1), strict=True))
    assert first.data is second.data
    assert torch.equal(first.data.x, load("digits").x)
