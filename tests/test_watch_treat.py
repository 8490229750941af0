"""A watch that treats: trainings that fail by themselves come through, and sound ones are not touched."""

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from gradmend.causes import Cause
from gradmend.journal import Journal
from gradmend.recorded import read_recorded
from gradmend.watch import Watch
from helpers import Book
from running import script, watched
from test_watch import faster, kill, network
from test_watch_undisturbed import MODELS, course, plain, quiet, same

FAULT = 61
Fault = Callable[[nn.Sequential, Optimizer, Tensor], object]


def nothing(_model: nn.Module, _optimizer: Optimizer, _x: Tensor) -> None:
    """No fault."""


def train(
    model: nn.Module,
    optimizer: Optimizer,
    fault: Fault = nothing,
    *,
    steps: int = 250,
    after: Callable[[int], object] = lambda _: None,
    **options: Any,
) -> tuple[Watch, list[float]]:
    """Train on five classes, with the fault before step 61."""
    torch.manual_seed(1)
    directions, losses = torch.randn(20, 5), []
    with Watch(model, optimizer, every=10, report=quiet, **options) as watch:
        for step in range(1, steps + 1):
            x = torch.randn(64, 20)
            y = (x @ directions).argmax(1)
            if step == FAULT:
                fault(model, optimizer, x)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            after(step)
    return watch, losses


def squashed(depth: int = 12, scale: float = 0.3) -> nn.Sequential:
    """Tanh layers whose weights are so small that nothing comes through."""
    hidden = [m for _ in range(depth) for m in (nn.Linear(20, 20), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(20, 5))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=scale / math.sqrt(20))
            nn.init.zeros_(layer.bias)
    return model


ILLNESSES: dict[str, tuple[Callable[[], nn.Sequential], float, Fault, Cause]] = {
    "the rate is raised a hundredfold": (network, 0.02, faster, Cause.LEARNING_RATE_TOO_HIGH),
    "the rate is too high from the start": (network, 5.0, nothing, Cause.NON_FINITE),
    "a layer dies": (network, 0.02, kill, Cause.DEAD_UNITS),
    "signals vanish at the start": (squashed, 0.05, nothing, Cause.WEIGHTS_TOO_SMALL),
}


@pytest.mark.parametrize("name", ILLNESSES)
def test_a_training_that_fails_comes_through(name: str, tmp_path: Path) -> None:
    build, rate, fault, cause = ILLNESSES[name]
    ends = []
    for treat in (False, True):
        torch.manual_seed(0)
        model = build()
        optimizer = SGD(model.parameters(), lr=rate)
        watch, losses = train(model, optimizer, fault, treat=treat, journal=tmp_path / f"{treat}.gradmend")
        ends.append(fmean(losses[-20:]))
        assert bool(watch.acts) == treat
    assert not ends[0] < 1.5  # guessing among five is 1.61
    assert ends[1] < 1.0
    assert {act.cause for act in watch.acts} == {cause}
    (found,) = read_recorded(Journal(tmp_path / "True.gradmend")).runs[0].models
    assert found.acts == watch.acts


def test_the_rate_goes_back_to_what_it_was_before_it_was_raised() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.02)
    watch, _ = train(model, optimizer, faster, treat=True)
    (act,) = watch.acts
    assert (act.step, act.before, act.after, act.unit) == (
        FAULT + 1,
        2.0,
        pytest.approx(0.02),
        "learning rate",
    )
    assert optimizer.param_groups[0]["lr"] == 2.0  # as the user has set it


def test_a_spoilt_batch_is_left_out_as_if_it_had_never_come() -> None:
    ends = []
    for treat in (True, False):
        torch.manual_seed(0)
        model = network()
        optimizer = Adam(model.parameters(), lr=1e-3)
        with Watch(model, optimizer, report=quiet, treat=treat) as watch:
            for step in range(80):
                x, y = torch.randn(64, 20), torch.randint(5, (64,))
                if step in (20, 50):
                    x[3, 4] = torch.nan
                    if not treat:  # the twin skips it by hand
                        continue
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        assert len(watch.acts) == 2 * treat
        state = optimizer.state_dict()["state"].values()
        ends.append([*model.parameters(), *(memory["exp_avg_sq"] for memory in state)])
    assert all(map(torch.equal, *ends))


def test_it_goes_back_to_weights_buffers_and_memory_of_the_last_good_state() -> None:
    model = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = Adam(model.parameters(), lr=1e-3)
    states: dict[int, list[Tensor]] = {}

    def keep(step: int) -> None:
        memory = (value for p in model.parameters() for value in optimizer.state[p].values())
        states[step] = [x.detach().clone() for x in (*model.state_dict().values(), *memory)]
        if step == 139:
            nn.init.constant_(model[3].weight, torch.inf)

    watch, losses = train(model, optimizer, steps=140, after=keep, treat=True)
    assert math.isnan(losses[-1])
    assert [(act.step, act.cause) for act in watch.acts] == [(140, Cause.NON_FINITE)]
    assert "back to the state of step 50" in watch.acts[0].text  # that of step 100 has not proved good yet
    assert all(map(torch.equal, states[140], states[50]))


def spiky(size: float, treat: bool) -> tuple[Watch, list[float], list[float]]:
    """Regression in which now and then a target is so large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
    direction, losses, norms = torch.randn(8, 1), [], []
    with Watch(model, optimizer, every=10, report=quiet, treat=treat) as watch:
        for step in range(1, 401):
            x = torch.randn(64, 8)
            y = torch.sin(x @ direction)
            if step > 150 and step % 40 == 0:
                y[3] = size
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            norms.append(math.hypot(*(p.grad.norm().item() for p in model.parameters())))
    return watch, losses, norms


def test_gradients_that_explode_are_clipped_at_twice_the_usual_norm() -> None:
    assert not median(spiky(1e4, False)[1][-40:]) < 1.0
    watch, losses, norms = spiky(1e4, True)
    assert median(losses[-40:]) < 0.6
    (act,) = watch.acts
    assert act.cause is Cause.DIVERGENCE
    # of the last 64 healthy steps a few are not the last 64 before the spike: those above all losses so far
    assert act.after == pytest.approx(2 * median(norms[95:159]), rel=0.1)
    assert max(norms[act.step :]) == pytest.approx(act.after, rel=1e-3)
    assert max(norms[: act.step]) > 1e3 * act.after


def test_so_they_are_where_they_have_brought_numbers_that_are_not_finite() -> None:
    assert not median(spiky(1e6, False)[1][-40:]) < 1.0
    watch, losses, _ = spiky(1e6, True)
    assert median(losses[-40:]) < 0.6
    (act,) = watch.acts
    assert (act.cause, act.before, act.after) == (Cause.NON_FINITE, 0.02, 0.01)
    assert "gradient clipping to norm" in act.text


def bouncing(treat: bool) -> tuple[Watch, float]:
    """Of |w - 1| the slope never shrinks: steps jump from one side to the other for ever."""
    weight = nn.Linear(1, 1, bias=False)
    nn.init.constant_(weight.weight, 1.6)
    optimizer = SGD(weight.parameters(), lr=1.9)
    losses = []
    with Watch(weight, optimizer, report=quiet, treat=treat) as watch:
        for _ in range(800):
            optimizer.zero_grad()
            loss = (weight(torch.ones(1, 1)) - 1).abs().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return watch, fmean(losses[-20:])


def test_the_rate_is_halved_until_the_loss_does_not_oscillate_or_five_times() -> None:
    assert bouncing(False)[1] > 0.9
    watch, end = bouncing(True)
    assert end < 0.05
    assert [act.after / act.before for act in watch.acts] == [0.5] * 5
    assert {act.cause for act in watch.acts} == {Cause.OSCILLATING_LOSS}


def mostly_dead(treat: bool) -> tuple[Watch, dict[int, list[Tensor]]]:
    """At a rate of zero nothing but an act moves the weights. Weights and memory of layer 4, step by step."""
    torch.manual_seed(0)
    model = network()
    optimizer = SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=0.1)
    seen: dict[int, list[Tensor]] = {}

    def die(_model: nn.Module, _optimizer: Optimizer, _x: Tensor) -> None:
        nn.init.constant_(model[4].bias[:60], -1000.0)

    def keep(step: int) -> None:
        memory = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        seen[step] = [x.detach().clone() for x in (*model.parameters(), *memory)]

    watch, _ = train(model, optimizer, die, steps=100, after=keep, treat=treat, budget=20.0)
    return watch, seen


def test_only_dead_units_are_drawn_again_and_forgotten() -> None:
    watch, treated = mostly_dead(True)
    (act,) = watch.acts
    assert (act.cause, act.before, act.after, act.unit) == (Cause.DEAD_UNITS, 60.0, 0.0, "dead units")
    bare = mostly_dead(False)[1][act.step]
    changed = [
        i for i, pair in enumerate(zip(treated[act.step], bare, strict=True)) if not torch.equal(*pair)
    ]
    weight, bias = 4, 5  # third of six layers; their memory comes 12 later
    assert changed == [weight, bias, weight + 12, bias + 12]
    for place in changed:
        assert torch.equal(treated[act.step][place][60:], bare[place][60:])
    weights = treated[act.step][weight][:60]
    # He: variance 2 / fan-in; of 3,840 values within five standard errors
    assert weights.var().item() == pytest.approx(2 / 64, rel=5 * math.sqrt(2 / 3840))
    assert not any(treated[act.step][place][:60].any() for place in changed[1:])


@pytest.mark.parametrize(
    "name", ["dropout and batch norm", "a module used twice", "no modules", "GRU", "transformer"]
)
def test_a_training_in_which_nothing_is_found_is_the_same_to_the_last_bit(name: str) -> None:
    assert same(course(*MODELS[name], plain, None), course(*MODELS[name], plain, {"treat": True}))


def test_a_long_sound_training_is_left_alone() -> None:
    results = []
    for options in ({}, {"treat": True}):
        torch.manual_seed(0)
        model = network()
        watch, losses = train(model, SGD(model.parameters(), lr=0.02, momentum=0.9), steps=300, **options)
        assert watch.acts == ()
        results.append((losses, torch.get_rng_state(), [*model.parameters()]))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert all(map(torch.equal, results[0][2], results[1][2]))


def test_where_other_weights_would_not_help_it_says_so_and_changes_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = []
    for treat in (False, True):
        torch.manual_seed(0)
        hidden = [m for _ in range(40) for m in (nn.Linear(20, 20), nn.Sigmoid())]
        model = nn.Sequential(*hidden, nn.Linear(20, 5))
        watch, losses = train(model, SGD(model.parameters(), lr=0.02), steps=5, treat=treat)
        assert Cause.VANISHING_GRADIENT in {notice.finding.cause for notice in watch.findings}
        assert watch.acts == ()
        results.append((losses, torch.get_rng_state().tolist()))
    assert results[0] == results[1]
    assert capsys.readouterr().err.count("weights drawn again would not help") == 1


def test_one_episode_is_treated_once() -> None:
    """The loss is NaN whatever the weights are, and stays so."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.02)
    with Watch(model, optimizer, report=quiet, treat=True) as watch:
        for step in range(60):
            optimizer.zero_grad()
            loss = model(torch.randn(64, 20)).square().mean()
            (loss if step < 20 else loss * torch.nan).backward()
            optimizer.step()
    assert [act.step for act in watch.acts] == [21]


def test_it_gives_up_after_five_acts_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=1e-4)

    def spoil(step: int) -> None:
        if step % 5 == 0:
            nn.init.constant_(model[0].weight, torch.inf)

    watch, _ = train(model, optimizer, steps=60, after=spoil, treat=True)
    assert len(watch.acts) == 5
    rates = [act.after / act.before for act in watch.acts]
    assert rates == pytest.approx([1 / 2, 1 / 2, 1 / 4, 1 / 16, 1 / 256])
    said = capsys.readouterr().err
    assert said.count("there again after 5 treatments, and left to you") == 1
    assert all(act.text in said for act in watch.acts)


def test_schedules_and_what_the_user_sees_of_the_rate_are_as_without() -> None:
    model = nn.Linear(4, 1)
    optimizer = SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    book, rates = Book(), []
    with Watch(model, optimizer, report=quiet, treat=True, journal=book) as watch:
        for step in range(20):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).mean() * 0
            (loss * torch.nan if step == 5 else loss).backward()
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.9 ** (step + 1) for step in range(20)])
    used = [values["rate"] for _, values in book.of("step")]
    assert used == pytest.approx([0.9**step / (1 + (step > 5)) for step in range(20)])
    assert len(watch.acts) == 1


def test_each_act_is_written_with_what_was_before_and_after(tmp_path: Path) -> None:
    model, book = network(), Book()
    watch, _ = train(model, SGD(model.parameters(), lr=0.02), faster, journal=book, treat=True)
    (act,) = watch.acts
    ((step, values),) = book.of("act")
    assert (step, values) == (act.step, {**asdict(act), "cause": act.cause.value})
    path = tmp_path / "run.gradmend"
    model = network()
    train(model, SGD(model.parameters(), lr=0.02), faster, journal=path, treat=True)
    (row,) = Journal(path).acts(1)
    assert row == {**values, "model": row["model"]}


def test_what_steps_without_a_rate_is_watched_but_not_treated(capsys: pytest.CaptureFixture[str]) -> None:
    class Own(Optimizer):
        def step(self, closure: None = None) -> None:
            """Leave all as it is."""

    model = network()
    watch, _ = train(model, Own(model.parameters(), {}), nothing, steps=5, treat=True)
    assert watch.acts == ()
    assert capsys.readouterr().err.count("watched, but not treated") == 1


def test_a_treated_model_is_not_kept_alive() -> None:
    model = network()
    optimizer = Adam(model.parameters(), lr=1e-3)
    watch = Watch(model, optimizer, report=quiet, treat=True).attach()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
    gone = [weakref.ref(x) for x in (model, model[0].weight, optimizer)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    watch.detach()


SCRIPT = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
directions = torch.randn(20, 5)
for step in range(200):
    x = torch.randn(64, 20)
    if step == 100:
        optimizer.param_groups[0]["lr"] = 1e4
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), (x @ directions).argmax(1))
    loss.backward()
    optimizer.step()
print(loss.item())
"""


def test_run_treats_when_told_to(tmp_path: Path) -> None:
    file = script(tmp_path, SCRIPT)
    seen, treated = watched([file]), watched(["--treat", file])
    assert not float(seen.stdout) < 1.6
    assert float(treated.stdout) < 1.0
    assert "treatments" not in seen.stderr
    assert ", 1 treatments" in treated.stderr
    assert "learning rate 1e+04 -> 0.05" in treated.stderr
