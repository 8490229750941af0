"""Reach: trainings of copies tell whether the planned steps suffice, and what would let them."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradmend as gm
from gradmend.causes import Cause
from gradmend.diagnosis import Finding, Severity

ERROR = Severity.ERROR
ADAM, SGD = partial(torch.optim.Adam, lr=3e-3), partial(torch.optim.SGD, lr=0.1)
X = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
CLASSES = X[:, :3].argmax(1)
AMOUNTS = (X[:, :1] * X[:, 1:2] + X[:, 2:3].sin()) / 1.2


def net(units: int = 3, bend: Callable[[], nn.Module] = nn.ReLU, *more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), bend(), *more, nn.Linear(32, units))


def found(
    model: nn.Module, optimizer: Any = ADAM, x: Tensor = X, y: Tensor = CLASSES, steps: int | None = 200
) -> dict[Cause, Finding]:
    loss = nn.MSELoss() if y.is_floating_point() else nn.CrossEntropyLoss()
    batches = list(zip(x.split(32), y.split(32), strict=True))
    return {f.cause: f for f in gm.diagnose(gm.Setup(model, loss, optimizer), batches, steps=steps).findings}


def errors(findings: dict[Cause, Finding]) -> list[Cause]:
    return [cause for cause, finding in findings.items() if finding.severity is ERROR]


@pytest.mark.parametrize(("units", "y"), [(3, CLASSES), (1, AMOUNTS)])
def test_what_gets_far_has_no_error(units: int, y: Tensor) -> None:
    assert errors(found(net(units), y=y, steps=300)) == []


def test_a_slow_training_is_no_fault_where_nobody_says_how_long_it_is() -> None:
    slow = partial(torch.optim.Adagrad, lr=1e-3)
    told = found(net(), slow, steps=200)
    assert errors(told)[0] is Cause.LEARNING_RATE_TOO_LOW
    assert "with longer steps by" in told[Cause.LEARNING_RATE_TOO_LOW].evidence[-1]
    assert errors(found(net(), slow, steps=None)) == []


def frozen() -> nn.Module:
    model = net(1)
    model[0].requires_grad_(False).weight.mul_(0.3)
    return model


@pytest.mark.parametrize(
    ("model", "optimizer", "x", "y", "cause"),
    [
        (frozen(), ADAM, X, AMOUNTS, Cause.FROZEN_PARAMETERS),
        (net(1, nn.ReLU, nn.Dropout(0.8)), ADAM, X, AMOUNTS, Cause.TOO_MUCH_DROPOUT),
        (net(1, nn.Identity), ADAM, X, AMOUNTS, Cause.TOO_LITTLE_CAPACITY),
        (net(1), partial(ADAM, weight_decay=1.0), X, AMOUNTS, Cause.TOO_MUCH_WEIGHT_DECAY),
        (net(1), ADAM, X, 30 * AMOUNTS, Cause.UNSCALED_TARGETS),
        (net(1), ADAM, X / 30, AMOUNTS, Cause.UNSCALED_INPUT),
    ],
    ids=["frozen", "dropout", "affine", "decay", "targets", "input"],
)
def test_what_would_let_it_get_further_is_to_blame(
    model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, cause: Cause
) -> None:
    findings = found(model, optimizer, x, y, steps=300)
    blamed = [f.cause for f in findings.values() if f.severity > Severity.NOTE][:3]
    assert errors(findings)
    assert cause in blamed
    told = re.match(r"(\d+) steps fit held-back samples", findings[cause].evidence[-1])
    assert told
    assert 100 < int(told[1]) <= 300  # all 300, but where another job slows this one down so far


def test_too_few_steps_are_told_where_nothing_else_helps() -> None:
    bent = partial(torch.optim.SGD, lr=0.05)
    findings = found(net(), bent, steps=4)
    assert Cause.TOO_FEW_STEPS in errors(findings)


def test_targets_of_other_rows_are_an_error_where_usual_settings_learn_nothing_either() -> None:
    order = torch.randperm(512, generator=torch.Generator().manual_seed(1))
    findings = found(net(), y=CLASSES[order], steps=100)
    assert findings[Cause.SHUFFLED_LABELS].severity is ERROR


def test_a_model_is_left_as_it_was() -> None:
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    assert errors(found(model, partial(torch.optim.SGD, lr=1e-4)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert not any(module._forward_hooks for module in model.modules())


def test_without_seconds_there_are_no_trainings() -> None:
    batches = list(zip(X.split(32), CLASSES.split(32), strict=True))
    setup = gm.Setup(net(), nn.CrossEntropyLoss(), partial(torch.optim.Adagrad, lr=1e-3))
    findings = gm.diagnose(setup, batches, steps=200, seconds=0.0).findings
    assert not any("held-back" in text for f in findings for text in f.evidence)


def test_rows_that_come_again_and_again_tell_nothing() -> None:
    """Noise is learnt by heart, faster with other settings, which is no fault of these."""
    x, y = X[:40].repeat(8, 1), torch.randn(40, 1, generator=torch.Generator().manual_seed(2)).repeat(8, 1)
    findings = found(net(1), partial(torch.optim.SGD, lr=0.02), x, y, steps=200)
    assert not any("held-back" in text for f in findings.values() for text in f.evidence)
