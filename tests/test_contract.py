"""Facts of outputs, targets and inputs, and of whole setups; nothing is disturbed."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradmend.contract import read_contract
from gradmend.contract.facts import range_of, read_columns, read_target, shortfall
from gradmend.contract.learnable import read_learnable
from gradmend.readings import Contract
from gradmend.setup import Setup
from helpers import ADAM, SGD, assert_same, blobs, plain, trace

# ---- facts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phi", "low", "high"),
    [
        (torch.sigmoid, 0, 1),
        (torch.tanh, -1, 1),
        (F.relu6, 0, 6),
        (F.softplus, 0, math.inf),
        (F.leaky_relu, -math.inf, math.inf),
        (F.logsigmoid, -math.inf, 0),
        (torch.sin, -1, 1),
    ],
)
def test_ranges_of_activations(phi: Any, low: float, high: float) -> None:
    assert range_of(phi) == pytest.approx((low, high), abs=1e-3)


def test_targets() -> None:
    y = read_target([F.one_hot(torch.tensor([0, 2, 2]), 3).float()])
    assert (y.one_hot, y.distributions, y.counts) == (1, 1, ((0.0, 1), (1.0, 0), (2.0, 2)))
    assert not read_target([torch.rand(8, 1)]).whole
    ordered = [torch.full((8,), i) for i in range(4)]
    assert read_target(ordered).sorted
    assert not read_target([torch.arange(8)] * 4).sorted


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), low=st.floats(-2, 0), high=st.floats(0.1, 2))
def test_what_bounds_leave_unexplained(seed: int, low: float, high: float) -> None:
    """No output within the bounds does better, whatever it knows of the targets."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    least = shortfall(y, (low, high), None)
    assert least is not None
    tried = (y + 0.3 * torch.randn(40, 3, generator=generator)).clamp(low, high)
    assert least <= float((tried - y).square().mean() / y.var(0, correction=0).mean()) + 1e-12
    best = float((y.clamp(low, high) - y).square().mean() / y.var(0, correction=0).mean())
    assert least == pytest.approx(best)


def test_what_a_softmax_leaves_unexplained() -> None:
    y = torch.tensor([[5.0, 5.0], [0.0, 0.0]])
    assert shortfall(y, (0.0, math.inf), 1) == pytest.approx((81 / 4 + 1 / 4) / 2 / 6.25)


def test_columns() -> None:
    x = torch.randn(64, 5)
    x[:, 1] = 1.7e9 + 60 * torch.arange(64)
    x[:, 2] = 1.0
    x[:, 3] = (7 + torch.randn(64)).exp().round()  # counts, large and all different
    found = read_columns([x[:32].double(), x[32:].double()])
    assert found is not None
    assert (found.constant, found.stray, found.same) == ((2,), (1,), False)
    x[:, 3] = torch.randn(64)
    assert read_columns([torch.cat([torch.arange(64.0)[:, None] * 1000, x[:, :1]], 1)]).stray == (0,)  # type: ignore[union-attr]
    assert read_columns([torch.ones(64, 3, 4, 4)]).same  # type: ignore[union-attr]


def test_labels_that_say_something() -> None:
    x, y = blobs(256)
    real = read_learnable(x, y, classes=True)
    mixed = read_learnable(
        x, y[torch.randperm(256, generator=torch.Generator().manual_seed(0))], classes=True
    )
    assert real is not None
    assert mixed is not None
    assert real.score > real.chance + 10 * real.spread
    assert mixed.score < mixed.chance + 3 * mixed.spread
    assert read_learnable(x[:50], y[:50], classes=True) is None


# ---- setups -----------------------------------------------------------------------------------------------


def contract(setup: Setup, *batches: Any) -> Contract:
    found = read_contract(setup, list(batches))
    assert found is not None
    return found


def test_the_last_function_is_found_behind_reshapes() -> None:
    x, y = blobs()
    ends = nn.Sequential(nn.Linear(8, 1), nn.Sigmoid(), nn.Flatten(0))
    found = contract(Setup(ends, nn.BCELoss()), (x, (y > 0).float())).output
    assert found is not None
    assert (found.function, found.site, found.bounds) == ("sigmoid", "1", (0.0, 1.0))


def test_a_step_of_the_users_own() -> None:
    """The model in it is replaced by one that puts out what the loss is asked about."""
    x, y = blobs()

    def step(model: nn.Module, batch: Any) -> Tensor:
        inputs, target = batch
        weights = sum(p.square().sum() for p in model.parameters())
        return -model(inputs).log_softmax(1).gather(1, target[:, None]).mean() + 0.01 * weights

    loss = contract(Setup(plain(1, nn.ReLU), step=step), (x, y)).loss
    assert loss is not None
    assert (loss.family, loss.wants) == ("cross entropy", "logits")


def test_a_model_that_returns_its_loss() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = plain(1, nn.ReLU)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.body(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    x, y = blobs()
    found = contract(Setup(Own()), {"x": x, "labels": y})
    assert found.loss is not None
    assert found.target is not None
    assert (found.loss.wants, found.target.high) == ("logits", 2.0)


@pytest.mark.parametrize(("maximize", "sign"), [(False, -1), (True, 1)])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_the_direction_of_a_step(maximize: bool, sign: int, name: str) -> None:
    optimizer = partial(getattr(torch.optim, name), lr=0.01, maximize=maximize)
    descent = contract(Setup(plain(2, nn.Tanh), nn.CrossEntropyLoss(), optimizer), blobs()).descent
    assert descent is not None
    assert sign * descent > 0.4


def test_reading_disturbs_nothing() -> None:
    """Weights, buffers, gradients, random states, train flags, hooks, and the loss's own state."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return F.cross_entropy(z, y)

    x, y = blobs()
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    loss = Counting()
    for optimizer in (SGD, ADAM(model.parameters())):
        setup = Setup(
            model, loss, optimizer, gradient_transform=partial(nn.utils.clip_grad_norm_, max_norm=1e-3)
        )
        before = trace(setup)
        read_contract(setup, [(x, y)])
        assert_same(before, trace(setup))
    assert loss.calls == 2  # one per step that was measured


def test_a_batch_that_does_not_fit_is_no_contract() -> None:
    assert (
        read_contract(Setup(plain(1, nn.ReLU), nn.CrossEntropyLoss()), [(torch.zeros(8, 3), torch.zeros(8))])
        is None
    )
