"""Trials: what only slows a training is a warning, and what keeps one from learning is named."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmend as gm
from gradmend.causes import Cause
from gradmend.diagnosis import Finding, Severity
from helpers import blobs

ERROR, WARNING = Severity.ERROR, Severity.WARNING
CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
ADAM, SGD = (partial(torch.optim.Adam, lr=1e-3), partial(torch.optim.SGD, lr=0.1))
X, Y = blobs(256)


def net(units: int = 3, *between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), *between, nn.Linear(32, units))


def penalized(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return CE(model(x), y) + 1e-4 * sum(p.square().sum() for p in model.parameters())


def found(
    model: nn.Module,
    optimizer: Callable[..., Any],
    x: Tensor = X,
    y: Tensor = Y,
    loss: Any = CE,
    rows: int = 64,
    steps: int | None = None,
    **setup: Any,
) -> dict[Cause, Finding]:
    """The findings, the first one first."""
    batches = list(zip(x.split(rows), y.split(rows), strict=True))
    setup = setup or {"loss_fn": loss}
    given = gm.Setup(model, optimizer=optimizer, **setup)
    return {f.cause: f for f in gm.diagnose(given, batches, steps=steps).findings}


def first(findings: dict[Cause, Finding]) -> tuple[Cause, Severity]:
    finding = next(iter(findings.values()))
    return finding.cause, finding.severity


def test_an_input_out_of_scale_is_a_warning_where_the_network_learns_all_the_same() -> None:
    raw = 100 * X
    learnt = found(net(), ADAM, raw)[Cause.UNSCALED_INPUT]
    assert learnt.severity is WARNING
    assert "learns all the same" in learnt.evidence[-1]


def test_it_is_an_error_where_the_network_does_not_learn() -> None:
    raw = 1e-4 * X
    findings = found(net(), partial(torch.optim.SGD, lr=0.01), raw, steps=100)
    assert first(findings) == (Cause.UNSCALED_INPUT, ERROR)
    assert "with the input standardized" in findings[Cause.UNSCALED_INPUT].evidence[-1]


def test_constant_columns_do_not_hide_that_the_input_is_out_of_scale() -> None:
    raw = 1e-4 * X
    raw[:, 0] = 3.3e-5
    findings = found(net(), partial(torch.optim.SGD, lr=0.01), raw, steps=100)
    assert first(findings) == (Cause.UNSCALED_INPUT, ERROR)
    assert "with the input standardized" in findings[Cause.UNSCALED_INPUT].evidence[-1]


@pytest.mark.parametrize("setup", [{"loss_fn": CE}, {"step": penalized}])
def test_steps_that_are_too_short_for_the_time_planned(setup: dict[str, Any]) -> None:
    crawling = partial(torch.optim.SGD, lr=1e-4)
    causes = {Cause.LEARNING_RATE_TOO_LOW, Cause.TOO_FEW_STEPS}
    cause, severity = first(found(net(), crawling, steps=300, **setup))
    assert (cause in causes, severity) == (True, ERROR)
    long = found(net(), crawling, steps=300_000, **setup)
    assert not [f for f in long.values() if f.severity is ERROR]


def test_weights_too_small_to_learn_from() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e-3)
    cause, severity = first(found(model, SGD, step=penalized))
    assert (cause, severity) == (Cause.WEIGHTS_TOO_SMALL, ERROR)


def test_permuted_labels_are_an_error_where_the_network_learns_them_by_heart() -> None:
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    shuffled = found(net(), partial(torch.optim.Adam, lr=1e-2), y=Y[order])
    assert shuffled[Cause.SHUFFLED_LABELS].severity is ERROR
    assert Cause.SHUFFLED_LABELS not in found(net(), ADAM)


def test_dropout_behind_the_last_weights() -> None:
    model = nn.Sequential(*net(), nn.Dropout(0.5))
    assert found(model, ADAM)[Cause.TOO_MUCH_DROPOUT].severity is WARNING  # blobs are learnt all the same
    assert found(model, partial(torch.optim.Adam, lr=1e-5))[Cause.TOO_MUCH_DROPOUT].severity is ERROR
    assert Cause.TOO_MUCH_DROPOUT not in found(net(3, nn.Dropout(0.5)), ADAM)


def test_single_rows_are_tried_together() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    y = x.amax(1, keepdim=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    loss = F.binary_cross_entropy_with_logits
    assert not found(model, partial(torch.optim.SGD, lr=0.5), x, y, loss, rows=1, steps=4000)
    slow = found(model, partial(torch.optim.SGD, lr=1e-5), x, y, loss, rows=1, steps=400)
    assert first(slow)[1] is ERROR


def test_a_trial_leaves_everything_as_it_was() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-7)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    drawn = torch.random.get_rng_state()
    batches = list(zip(X.split(64), Y.split(64), strict=True))
    findings = gm.diagnose(gm.Setup(model, CE, optimizer), batches).findings
    assert findings[0].evidence
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(value, before[0][key]) for key, value in model.state_dict().items())
    assert optimizer.state_dict() == before[1]
    assert all(p.grad is None for p in model.parameters())


class Own(nn.Module):
    """Returns its loss, from a batch given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor, **targets: Tensor) -> dict[str, Tensor]:
        (target,) = targets.values()
        return {"loss": CE(self.body(x), target)}


def named(name: str, optimizer: Any) -> gm.Diagnosis:
    """The diagnosis of a model whose batches give the target by this name."""
    batches = [{name: y, "x": x} for x, y in zip(X.split(64), Y.split(64), strict=True)]
    return gm.diagnose(gm.Setup(Own(), optimizer=optimizer), batches)


@pytest.mark.parametrize(("rate", "cause"), [(1e-3, None), (1e-8, Cause.LEARNING_RATE_TOO_LOW)])
@pytest.mark.parametrize("name", ["labels", "y"])
def test_batches_by_name_are_tried_where_the_target_is_known(
    name: str, rate: float, cause: Cause | None
) -> None:
    findings = named(name, partial(torch.optim.AdamW, lr=rate)).findings
    assert [f.cause for f in findings if f.severity is ERROR] == ([] if cause is None else [cause])


def test_what_cannot_be_exchanged_is_not_tried() -> None:
    diagnosis = named("answers", partial(torch.optim.Adam, lr=1e-8))
    assert not any("fit the batches" in text for f in diagnosis.findings for text in f.evidence)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam])
@pytest.mark.parametrize("rate", [1e-9, 3.0])
def test_what_is_adam_is_not_told_to_be_adam(make: Callable[..., torch.optim.Optimizer], rate: float) -> None:
    assert Cause.UNFIT_OPTIMIZER not in found(net(), partial(make, lr=rate))
