"""What the course of a training says: short real trainings, and curves whose truth is known."""

from __future__ import annotations

import json
import math
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradmend as gm
from gradmend.causes import Cause
from gradmend.data import Data
from gradmend.diagnosis.course import dying_units, judge_course, read_course
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.training import History, train

SGD, ADAM = torch.optim.SGD, torch.optim.Adam
CE = nn.CrossEntropyLoss()


@cache
def digits(rows: int = 1400, guesses: bool = False) -> Data:
    """Standardized digits; with `guesses` each gets a label at random."""
    bunch = load_digits()
    x = torch.tensor(bunch.data, dtype=torch.float32) / 16
    x = (x - x.mean(0)) / (x.std(0) + 0.1)
    random = torch.randint(10, (len(x),), generator=torch.Generator().manual_seed(0))
    y = random if guesses else torch.tensor(bunch.target)
    return Data(x[:rows], y[:rows], x[1400:], y[1400:], "digits", 10)


def network(activation: type[nn.Module] = nn.ReLU, depth: int = 2, width: int = 32) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in in [64] + [width] * (depth - 1):
        layers += [nn.Linear(fan_in, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def trained(
    optimizer: Any,
    data: Any = None,
    steps: int = 300,
    seed: int = 0,
    model: nn.Module | None = None,
    loss: Any = CE,
) -> History:
    torch.manual_seed(seed)
    setup = gm.Setup(model or network(), loss, optimizer)
    return train(setup, data or digits(), steps=steps, seed=seed, device="cpu")


def causes(history: History) -> set[Cause]:
    return {finding.cause for finding in judge_course(history)}


def found(cause: Cause, history: History) -> Finding:
    return next(finding for finding in judge_course(history) if finding.cause is cause)


def course(losses: Any, **fields: Any) -> History:
    """A history with these losses."""
    values = tuple(map(float, losses))
    known: dict[str, Any] = {
        "accuracy": None, "test_loss": None, "test_accuracy": None, "epochs": 1, "steps": len(values),
        "seconds": 1.0, "step_seconds": 1e-3, "device": "cpu", "threads": 1, "offered": 1,
        "diverged": not all(map(math.isfinite, values)),
    }  # fmt: skip
    return History(loss=values, **(known | fields))


# ---- real trainings ---------------------------------------------------------------------------------------

GOOD = {
    "Adam": partial(ADAM, lr=1e-3),
    "SGD": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.05, momentum=0.9),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", GOOD)
def test_trainings_that_go_well(name: str, seed: int) -> None:
    assert not judge_course(trained(GOOD[name], seed=seed))


@pytest.mark.parametrize("seed", range(3))
def test_going_on_after_the_end_is_no_plateau(seed: int) -> None:
    torch.manual_seed(seed)
    setup = gm.Setup(network(), CE, partial(ADAM, lr=3e-3))
    train(setup, digits(), steps=400, device="cpu")
    history = train(setup, digits(), steps=250, device="cpu")
    assert not {Cause.PLATEAU, Cause.SLOW_CONVERGENCE, Cause.OSCILLATING_LOSS} & causes(history)


@pytest.mark.parametrize("seed", range(3))
def test_a_saddle_is_a_plateau(seed: int) -> None:
    history = trained(partial(SGD, lr=0.1), model=network(nn.Sigmoid, 8), seed=seed)
    assert causes(history) == {Cause.PLATEAU}
    assert found(Cause.PLATEAU, history).expected == pytest.approx(math.log(10), rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_a_low_rate_is_slow(seed: int) -> None:
    finding = found(Cause.SLOW_CONVERGENCE, trained(partial(SGD, lr=0.01), seed=seed))
    assert finding.severity is Severity.WARNING
    assert 0 < finding.measured < 1 / 3


@pytest.mark.parametrize("seed", range(3))
def test_a_rate_beyond_all_measure_diverges(seed: int) -> None:
    x = digits().x
    history = trained(
        partial(SGD, lr=3.0), (10 * x, x), model=nn.Linear(64, 64), loss=nn.MSELoss(), seed=seed
    )
    assert {Cause.DIVERGENCE, Cause.NON_FINITE} <= causes(history)
    assert found(Cause.DIVERGENCE, history).measured > 1e6


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_jumps_over_the_valley_oscillates(seed: int) -> None:
    """Of |w| the gradient never shrinks: plain steps jump from one side to the other for ever."""
    torch.manual_seed(seed)

    def step(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - 1.0).abs().mean()

    setup = gm.Setup(nn.Linear(1, 1, bias=False), step=step, optimizer=partial(SGD, lr=1.9))
    nn.init.constant_(setup.model.weight, 1.6)
    history = train(setup, [(torch.ones(1, 1),)], steps=200, device="cpu")
    assert Cause.OSCILLATING_LOSS in causes(history)


@pytest.mark.parametrize("seed", range(3))
def test_learning_by_heart(seed: int) -> None:
    few = trained(partial(ADAM, lr=3e-3), digits(60), seed=seed)
    assert found(Cause.OVERFITTING, few).severity is Severity.WARNING
    guesses = trained(partial(ADAM, lr=1e-2), digits(100, guesses=True), steps=400, seed=seed)
    assert found(Cause.OVERFITTING, guesses).severity is Severity.ERROR


def test_regression_overfits_by_its_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 30, generator=generator), torch.randn(80, 1, generator=generator)
    data = Data(x[:40], y[:40], x[40:], y[40:], "noise", None)
    model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 1))
    history = trained(partial(ADAM, lr=1e-2), data, model=model, loss=nn.MSELoss())
    assert found(Cause.OVERFITTING, history).measured == history.test_loss


# ---- where NaN is born ------------------------------------------------------------------------------------


class Root(nn.Module):
    """A network whose output goes through a root: its slope at zero is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)).square().sum(1, keepdim=True).sqrt().expand(-1, 8))


def rooted(poison: int, steps: int, optimizer: Any = SGD) -> tuple[gm.Setup, History, list[Any]]:
    """A training in which one batch holds a row of zeros, where the root's slope is infinite."""
    torch.manual_seed(0)
    model = Root()
    nn.init.zeros_(model.first.bias)
    batches = [(torch.rand(16, 8) + 0.1, torch.rand(16, 1)) for _ in range(steps)]
    batches[poison][0][0] = 0.0
    model.first.bias.requires_grad_(False)
    setup = gm.Setup(model, nn.MSELoss(), partial(optimizer, lr=1e-3))
    return setup, train(setup, batches, epochs=1, device="cpu"), batches


@pytest.mark.parametrize("optimizer", [SGD, ADAM])
@pytest.mark.parametrize("poison", [0, 49, 50, 77])
def test_the_birth_of_nan_is_found_in_the_step_before_the_loss(poison: int, optimizer: Any) -> None:
    _, history, _ = rooted(poison, 100, optimizer)
    assert next(i for i, loss in enumerate(history.loss) if math.isnan(loss)) == poison + 1
    assert history.wreck is not None
    assert math.isfinite(history.wreck.loss)
    assert history.wreck.loss == pytest.approx(history.loss[poison], rel=1e-5)
    finding = found(Cause.NON_FINITE, history)
    assert f"step {poison + 2} is nan" in finding.sentence
    assert "gradient" in finding.sentence
    assert finding.sites


def test_all_is_left_as_the_training_left_it() -> None:
    setup, history, batches = rooted(77, 100)
    assert history.diverged
    assert all(p.isnan().any() for p in setup.model.parameters() if p.requires_grad)
    torch.manual_seed(0)
    twin = gm.Setup(Root(), nn.MSELoss(), partial(SGD, lr=1e-3))
    nn.init.zeros_(twin.model.first.bias)
    twin.model.first.bias.requires_grad_(False)
    before = train(twin, batches[:77], epochs=1, device="cpu")
    assert before.loss == history.loss[:77]


def test_an_overflow_is_found_forward() -> None:
    history = trained(partial(SGD, lr=1e30), steps=100)
    finding = found(Cause.NON_FINITE, history)
    assert finding.sites == ("2",)
    assert "step 2 is nan" in finding.sentence
    assert Cause.DIVERGENCE not in causes(history)  # it broke at once; nothing grew


def test_a_wreck_becomes_json() -> None:
    history = trained(partial(SGD, lr=1e30), steps=60)
    assert json.dumps(history.to_dict(), allow_nan=False)


# ---- threads and units ------------------------------------------------------------------------------------


def test_threads() -> None:
    finding = found(Cause.TOO_MANY_THREADS, course(np.linspace(2, 0, 60), threads=1, offered=8))
    assert (finding.severity, finding.measured) == (Severity.NOTE, 8)
    assert not judge_course(course(np.linspace(2, 0, 60), threads=8, offered=8))


@pytest.mark.parametrize("seed", range(3))
def test_units_that_die(seed: int) -> None:
    data = digits()
    batch = (data.x[:128], data.y[:128])
    for rate, dies in ((1e-3, False), (0.3, True)):
        torch.manual_seed(seed)
        setup = gm.Setup(network(), CE, partial(ADAM, lr=rate))
        before = gm.measure(setup, batch)
        history = train(setup, data, steps=30, device="cpu")
        after = gm.measure(setup, batch)
        finding = dying_units(before, after)
        assert (finding is not None) == dies
        assert (Cause.DYING_UNITS in {f.cause for f in judge_course(history, before, after)}) == dies
    assert finding is not None
    assert finding.measured > finding.expected + 0.2


# ---- curves of known truth --------------------------------------------------------------------------------

noise = st.sampled_from(["normal", "uniform", "laplace", "lognormal"])


def draw(kind: str, seed: int, n: int) -> Any:
    """Independent noise of mean zero and about unit size."""
    generator = np.random.default_rng(seed)
    draws = {
        "normal": generator.normal(size=n),
        "uniform": generator.uniform(-1.7, 1.7, n),
        "laplace": generator.laplace(scale=0.7, size=n),
        "lognormal": generator.lognormal(size=n) - math.exp(0.5),
    }
    return draws[kind]


@given(kind=noise, seed=st.integers(0, 10**6), n=st.integers(1, 600), size=st.floats(1e-6, 0.5))
@example(kind="laplace", seed=355, n=353, size=0.5)
@settings(max_examples=80, deadline=None)
def test_noise_alone_is_a_plateau_or_nothing(kind: str, seed: int, n: int, size: float) -> None:
    assert causes(course(3.0 + size * draw(kind, seed, n))) <= {Cause.PLATEAU}


@given(kind=noise, seed=st.integers(0, 10**6), n=st.integers(60, 600), scale=st.floats(1e-6, 1e6))
@settings(max_examples=50, deadline=None)
def test_a_fall_to_a_tenth_is_sound(kind: str, seed: int, n: int, scale: float) -> None:
    time = np.arange(n) / n
    losses = scale * (0.1 + np.exp(-6 * time) + 0.02 * draw(kind, seed, n))
    assert not causes(course(losses))


@given(kind=noise, seed=st.integers(0, 10**6), n=st.integers(100, 600), share=st.floats(0.1, 0.3))
@settings(max_examples=50, deadline=None)
def test_a_straight_slow_fall_is_slow(kind: str, seed: int, n: int, share: float) -> None:
    time = np.arange(n) / n
    losses = 2.0 * (1 - share * time) + 0.01 * draw(kind, seed, n)
    assert causes(course(losses)) == {Cause.SLOW_CONVERGENCE}


@given(kind=noise, seed=st.integers(0, 10**6), n=st.integers(60, 600), growth=st.floats(1.0, 50.0))
@settings(max_examples=50, deadline=None)
def test_a_lasting_rise_diverges(kind: str, seed: int, n: int, growth: float) -> None:
    losses = 1.0 + growth * np.arange(n) / n + 0.02 * draw(kind, seed, n)
    assert Cause.DIVERGENCE in causes(course(losses))


@given(seed=st.integers(0, 10**6), n=st.integers(100, 600), period=st.sampled_from([2, 3, 7]))
@settings(max_examples=50, deadline=None)
def test_regular_swings_oscillate(seed: int, n: int, period: int) -> None:
    swings = np.cos(2 * math.pi * np.arange(n) / period)
    losses = 2.0 + swings + 0.1 * draw("normal", seed, n)
    assert Cause.OSCILLATING_LOSS in causes(course(losses))


@given(values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_losses_can_be_judged(values: list[float]) -> None:
    history = course(values)
    judge_course(history)
    assert (Cause.NON_FINITE in causes(history)) == (not all(map(math.isfinite, values)))


def test_few_steps_say_nothing() -> None:
    assert read_course([1.0] * 39) is None
    assert not judge_course(course([2.3] * 39))
