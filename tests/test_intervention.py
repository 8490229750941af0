"""Of several suspects the one is blamed without which the symptoms are gone, and nothing is disturbed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmend as gm
from deep import BATCH, CE, HE, judged, mlp, profile, scaled
from gradmend.causes import Cause
from gradmend.diagnosis import Finding, Severity
from gradmend.diagnosis.changes import wanted
from gradmend.diagnosis.intervention import decide
from gradmend.diagnosis.rerun import Change, rerun
from gradmend.response import respond
from helpers import ADAM, SGD, Net, assert_same, setups, trace

XAVIER = nn.init.xavier_normal_


def decided(setup: gm.Setup, batch: Any = BATCH, others: tuple[Finding, ...] = ()) -> tuple[Finding, ...]:
    seen = profile(setup, batch)
    given = sorted((*others, *judged(seen).values()), key=lambda found: -found.severity)
    return decide(setup, batch, seen, given)


def unscaled(factor: float) -> Finding:
    return Finding(Cause.UNSCALED_INPUT, Severity.WARNING, f"times {factor}")


# ---- one fault among several suspects ---------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "width", "seed"), [(16, 32, 0), (16, 128, 1), (30, 64, 2)])
@pytest.mark.parametrize(
    ("phi", "init", "cause"),
    [
        (nn.Sigmoid, XAVIER, Cause.CONTRACTING_ACTIVATION),
        (nn.Sigmoid, None, Cause.CONTRACTING_ACTIVATION),
        (nn.ReLU, scaled(0.3), Cause.WEIGHTS_TOO_SMALL),
        (nn.GELU, scaled(0.3), Cause.WEIGHTS_TOO_SMALL),
        (nn.Tanh, scaled(0.1), Cause.WEIGHTS_TOO_SMALL),
        (nn.Tanh, scaled(60.0), Cause.WEIGHTS_TOO_LARGE),
    ],
    ids=["sigmoid, Xavier", "sigmoid", "small ReLU", "small GELU", "small tanh", "large tanh"],
)
def test_the_cause_comes_first(
    phi: Callable[[], nn.Module], init: Any, cause: Cause, depth: int, width: int, seed: int
) -> None:
    first, *_ = decided(gm.Setup(mlp(depth, phi, init, width=width, seed=seed), CE, SGD))
    assert (first.cause, first.severity) == (cause, Severity.ERROR)
    assert "goes from" in first.evidence[0]


@pytest.mark.parametrize("seed", range(3))
def test_exploding_weights_come_before_a_step_that_is_too_long(seed: int) -> None:
    """The step is too long because the gradient explodes: with other weights it would not be."""
    step = Finding(Cause.LEARNING_RATE_TOO_HIGH, Severity.ERROR, "too long")
    first, *others = decided(gm.Setup(mlp(40, nn.ReLU, scaled(4.0), seed=seed), CE, SGD), others=(step,))
    assert first.cause is Cause.WEIGHTS_TOO_LARGE
    assert {f.cause: f.severity for f in others}[Cause.LEARNING_RATE_TOO_HIGH] is Severity.WARNING


@pytest.mark.parametrize("factor", [300.0, 3000.0])
@pytest.mark.parametrize("depth", [3, 6])
def test_an_input_out_of_scale_saturates(depth: int, factor: float) -> None:
    x, y = BATCH
    setup = gm.Setup(mlp(depth, nn.Tanh, XAVIER), CE, SGD)
    first, *_ = decided(setup, (factor * x, y), (unscaled(factor),))
    assert (first.cause, first.severity) == (Cause.UNSCALED_INPUT, Severity.ERROR)
    assert first.evidence[0].startswith("With the input standardized, the share of flat values goes from")


def test_weights_are_not_to_blame_for_the_input() -> None:
    """The input saturates the first layer, whatever the weights."""
    x, y = BATCH
    found = decided(gm.Setup(mlp(4, nn.Tanh, scaled(1.5)), CE, SGD), (1000 * x, y), (unscaled(1000),))
    assert found[0].cause is Cause.UNSCALED_INPUT
    assert any(
        "With weights of variance" in sentence and "stays" in sentence for sentence in found[0].evidence
    )
    assert all(f.severity < Severity.ERROR for f in found if f.cause is Cause.WEIGHTS_TOO_LARGE)


@pytest.mark.parametrize("seed", range(2))
def test_symmetry_is_a_matter_of_weights(seed: int) -> None:
    model = mlp(6, nn.ReLU, lambda weight: nn.init.constant_(weight, 0.01), seed=seed)
    first, *_ = decided(gm.Setup(model, CE, SGD))
    assert first.cause is Cause.SYMMETRIC_WEIGHTS
    assert first.evidence


@pytest.mark.parametrize("seed", range(2))
def test_batch_normalization_is_to_blame(seed: int) -> None:
    model = mlp(50, nn.ReLU, extra=partial(nn.BatchNorm1d, 64), seed=seed)
    first, *_ = decided(gm.Setup(model, CE, SGD))
    assert first.cause is Cause.BATCH_NORM_EXPLOSION


def test_branches_are_to_blame() -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(F.relu(x))
        return self.out(x)

    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(40)])
    for layer in layers:
        scaled(3.0)(layer.weight)
    first, *_ = decided(gm.Setup(Net(forward, layers=layers, out=nn.Linear(64, 10)), CE, SGD))
    assert first.cause is Cause.RESIDUAL_GROWTH


def test_a_symptom_of_unknown_cause_says_what_helps() -> None:
    """Biases that silence the units: no rule names them, other weights and zero biases wake them."""
    model = mlp(3, nn.ReLU, HE)
    nn.init.constant_(model[2].bias, -50.0)
    found = decided(gm.Setup(model, CE, SGD))
    assert found[0].cause is Cause.DEAD_UNITS
    assert "the share of dead units goes from 1 to 0.0" in found[0].evidence[0]


def test_where_nothing_helps_the_step_is_looked_at() -> None:
    """A factor that only the gradient sees."""

    def forward(self: Net, x: Tensor) -> Tensor:
        for layer in self.layers:
            h = torch.relu(layer(x))
            x = h.detach() + 1e-4 * (h - h.detach())
        return self.out(x)

    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
    for layer in layers:
        HE(layer.weight)
    slow = partial(torch.optim.SGD, lr=1e-6)
    setup = gm.Setup(Net(forward, layers=layers, out=nn.Linear(64, 10)), CE, slow)
    step = Finding(Cause.LEARNING_RATE_TOO_LOW, Severity.ERROR, "too short")
    seen = replace(profile(setup), response=respond(setup, BATCH))
    first, *others = decide(setup, BATCH, seen, [*judged(seen).values(), step])
    assert first.cause is Cause.LEARNING_RATE_TOO_LOW
    assert "times as long lowers the loss by" in first.evidence[0]
    assert Cause.VANISHING_GRADIENT in {f.cause for f in others if f.severity is Severity.ERROR}


def test_an_image_out_of_scale_is_standardized_by_channels() -> None:
    torch.manual_seed(0)
    images = 1000 * torch.rand(64, 3, 8, 8) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(288, 10))
    found = decided(gm.Setup(model, CE, SGD), (images, torch.arange(64) % 10), (unscaled(1000.0),))
    assert (found[0].cause, bool(found[0].evidence)) == (Cause.UNSCALED_INPUT, True)


# ---- what is left alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "most"),
    [
        (mlp(20, nn.ReLU, HE), 0),
        (mlp(20, nn.ReLU), 2),
        (mlp(20, nn.Sigmoid), 2),
        (mlp(50, nn.ReLU, extra=partial(nn.BatchNorm1d, 64)), 4),
    ],
    ids=["healthy", "small weights", "sigmoid", "batch norm"],
)
def test_what_the_experiments_cost(model: nn.Module, most: int) -> None:
    """In forward passes, each with its backward pass."""
    setup = gm.Setup(model, CE, SGD)
    seen = profile(setup)
    found = list(judged(seen).values())
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    decide(setup, BATCH, seen, found)
    handle.remove()
    assert len(calls) <= most


def test_a_healthy_network_comes_back_as_it_went() -> None:
    setup = gm.Setup(mlp(10, nn.ReLU, HE), CE, SGD)
    warning = (unscaled(1.0),)
    assert decided(setup, others=warning) == warning


@pytest.mark.parametrize("name", ["ReLU", "sigmoid", "batch norm", "dropout"])
def test_nothing_is_disturbed(name: str) -> None:
    model = {
        "ReLU": lambda: mlp(20, nn.ReLU),
        "sigmoid": lambda: mlp(12, nn.Sigmoid),
        "batch norm": lambda: mlp(12, nn.Sigmoid, extra=partial(nn.BatchNorm1d, 64, eps=1e6)),
        "dropout": lambda: mlp(20, partial(nn.ReLU, inplace=True), extra=partial(nn.Dropout, 0.1)),
    }[name]()
    setup = gm.Setup(model, CE, torch.optim.SGD(model.parameters(), lr=0.1))
    setup.loss(BATCH).backward()
    seen = profile(setup)
    before = trace(setup)
    decide(setup, BATCH, seen, list(judged(seen).values()))
    assert_same(before, trace(setup))


@pytest.mark.parametrize("name", setups())
def test_reruns_without_a_change_see_what_was_measured(name: str) -> None:
    setup, batch = setups()[name]
    traces = rerun(setup, batch, Change())
    measured = gm.measure(setup, batch)
    assert traces is not None
    for reading in measured.weighted():
        seen = traces[reading.site.index]
        assert seen.site.name == reading.site.name
        if seen.rms is not None and "dropout" not in str(setup.model).lower():
            assert seen.rms == pytest.approx(reading.rms, rel=0.2)  # of 16 samples, not of all


def test_a_change_that_fails_is_no_evidence() -> None:
    class Broken(Change):
        def batch(self, batch: Any) -> Any:
            return batch[0][:, :3], batch[1]

    assert rerun(gm.Setup(mlp(2, nn.ReLU), CE), BATCH, Broken()) is None


@pytest.mark.parametrize(
    ("phi", "variance"), [(torch.relu, 2.0), (torch.tanh, 1.0), (torch.sigmoid, 1.0), (F.gelu, 1 / 0.425221)]
)
def test_weights_that_suit_an_activation(phi: Callable[[Tensor], Tensor], variance: float) -> None:
    assert wanted(phi) == pytest.approx(variance, rel=1e-3)


def test_diagnose_brings_the_evidence() -> None:
    found = gm.diagnose(gm.Setup(mlp(20, nn.Sigmoid), CE, ADAM), BATCH)
    blamed = next(f for f in found.findings if f.evidence)
    assert blamed.cause is Cause.CONTRACTING_ACTIVATION
    assert blamed.evidence[0] in " ".join(str(found).split())
