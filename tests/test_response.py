"""How the loss answers to steps: against steps really taken."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gradmend as gm
from gradmend.readings import Response
from gradmend.readout import lower
from gradmend.response import Losses, Outlook, look_ahead, respond
from helpers import ADAM, SGD, assert_same, blobs, plain, setups, trace

KINDS = list(setups())
CE = nn.CrossEntropyLoss()


def really(setup: gm.Setup, batch: Any, steps: int) -> list[float]:
    """The losses of plain training on one batch, with the same noise in every step."""
    trial = setup.copy()
    trial.model.train()
    optimizer, losses = trial.build_optimizer(), []
    for _ in range(steps + 1):
        torch.manual_seed(0)
        optimizer.zero_grad()
        loss = trial.loss(batch)
        loss.backward()
        losses.append(loss.item())
        if trial.gradient_transform is not None:
            trial.gradient_transform(list(trial.model.parameters()))
        optimizer.step()
    return losses


def answer(setup: gm.Setup, batch: Any, steps: int = 10) -> Response:
    response = respond(setup, batch, steps)
    assert response is not None
    return response


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("optimizer", [SGD, ADAM, partial(torch.optim.SGD, lr=0.1, momentum=0.9)])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_training(kind: str, optimizer: Any, clip: float | None) -> None:
    setup, batch = setups()[kind]
    transform = partial(nn.utils.clip_grad_norm_, max_norm=clip) if clip else None
    setup = gm.Setup(setup.model, setup.loss_fn, optimizer, gradient_transform=transform)
    response = answer(setup, batch, steps=4)
    twin = really(setup, batch, 4)
    assert response.before == twin[0]
    assert list(response.losses[:4]) == pytest.approx(twin[1:], rel=1e-6)
    # the whole step along the line is the first step; float64 and float32 round it differently
    assert dict(response.line)[1.0] == pytest.approx(twin[1], rel=1e-4)


def test_the_line_is_a_parabola_in_a_quadratic_valley() -> None:
    """For a mean of squares of a linear model, L(t) = L(0) - t lr |g|^2 + t^2 ..., exactly."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 4), torch.randn(64, 1)
    setup = gm.Setup(nn.Linear(4, 1), nn.MSELoss(), partial(torch.optim.SGD, lr=0.05))
    response = answer(setup, (x, y))
    loss = setup.loss((x, y))
    gradients = torch.autograd.grad(loss, list(setup.model.parameters()))
    slope = 0.05 * sum(g.square().sum().item() for g in gradients)
    line = dict(response.line)
    curvature = line[1.0] - response.before + slope
    for t, value in response.line[:-2]:
        assert value == pytest.approx(response.before - t * slope + t * t * curvature, rel=1e-3, abs=1e-4)
    best = slope / (2 * curvature)
    assert best / 4 <= response.best_fraction <= 4 * best  # the line is looked at in steps of four


@pytest.mark.parametrize("rate", [1e-9, 1e-5, 1e-1, 1e2])
def test_the_best_length_does_not_depend_on_the_step(rate: float) -> None:
    """A step too small to change a float32 weight still points the way."""
    model, batch = plain(1, nn.Tanh), blobs()
    response = answer(gm.Setup(model, CE, partial(torch.optim.SGD, lr=rate)), batch)
    reference = answer(gm.Setup(model, CE, partial(torch.optim.SGD, lr=1.0)), batch)
    assert 1 / 4.1 < rate * response.best_fraction / reference.best_fraction < 4.1


def test_live_optimizers_go_on_from_their_state() -> None:
    model, batch = plain(1, nn.Tanh), blobs()
    live = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    setup = gm.Setup(model, CE, live)
    for _ in range(3):
        live.zero_grad()
        setup.loss(batch).backward()
        live.step()
    before = trace(setup)
    response = answer(setup, batch, 3)
    assert_same(before, trace(setup))
    assert list(response.losses[:3]) == pytest.approx(really(setup, batch, 3)[1:], rel=1e-6)


def test_a_loss_that_rises_is_watched_for_longer() -> None:
    x, _ = blobs()
    diverging = gm.Setup(nn.Linear(8, 8), nn.MSELoss(), partial(torch.optim.SGD, lr=30.0))
    assert len(answer(diverging, (x, x), steps=3).losses) == 40
    gentle = gm.Setup(plain(1, nn.Tanh), CE, SGD)
    assert len(answer(gentle, blobs(), steps=3).losses) == 3


@pytest.mark.parametrize("rate", [1e20, 1e30, 3e38])
def test_steps_beyond_all_numbers(rate: float) -> None:
    response = answer(gm.Setup(plain(2, nn.ReLU), CE, partial(torch.optim.SGD, lr=rate)), blobs())
    assert math.isfinite(response.before)
    assert response.best_fraction == 4.0**-6


def test_nothing_is_tried_where_it_would_touch_the_users_model() -> None:
    model = plain(1, nn.Tanh)
    held = gm.Setup(model, CE, lambda _: torch.optim.SGD(model.parameters(), lr=0.1))
    assert respond(held, blobs()) is None
    assert respond(gm.Setup(model, CE, torch.optim.LBFGS), blobs()) is None


def test_parameters_of_the_loss_are_trained_along() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return CE(self.scale * output, target)

    model, loss = plain(1, nn.Tanh), Scaled()
    live = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    setup = gm.Setup(model, loss, live)
    twin = really(setup, blobs(), 3)
    assert list(answer(setup, blobs(), 3).losses[:3]) == pytest.approx(twin[1:], rel=1e-6)
    assert loss.scale.item() == 1


def rows(count: int) -> list[Any]:
    x, y = blobs(32 * count)
    return [(x[k::count], y[k::count]) for k in range(count)]


def watched(setup: gm.Setup, batch: Any) -> tuple[float, float]:
    """The loss with its own targets and, on the average, with those moved on by fifths of the batch."""
    x, y = batch
    shifts = [len(y) * k // 5 for k in range(1, 5)]
    others = [setup.loss((x, torch.cat([y[-shift:], y[:-shift]]))).item() for shift in shifts]
    return setup.loss(batch).item(), sum(others) / 4


def means(losses: list[tuple[float, float]]) -> tuple[float, float]:
    own, others = zip(*losses, strict=True)
    return sum(own) / len(losses), sum(others) / len(losses)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("optimizer", [SGD, ADAM, partial(torch.optim.SGD, lr=0.1, momentum=0.9)])
def test_the_outlook_is_that_of_training(optimizer: Any, count: int, clip: float | None) -> None:
    transform = partial(nn.utils.clip_grad_norm_, max_norm=clip) if clip else None
    setup = gm.Setup(plain(2, nn.Tanh), CE, optimizer, gradient_transform=transform)
    batches = rows(count)
    before = trace(setup)
    outlook = look_ahead(setup, batches)
    assert_same(before, trace(setup))
    assert isinstance(outlook, Outlook)

    met, unseen = [], batches[-1]
    live, parameters = setup.build_optimizer(), list(setup.model.parameters())
    values = [nn.utils.parameters_to_vector(parameters).detach()]
    assert losses_of(outlook.before) == pytest.approx(watched(setup, unseen), rel=1e-5)
    for step in range(6):
        batch = (batches[:-1] or batches)[step % max(count - 1, 1)]
        met.append(watched(setup, batch))
        live.zero_grad()
        setup.loss(batch).backward()
        if transform is not None:
            transform(parameters)
        live.step()
        values.append(nn.utils.parameters_to_vector(parameters).detach())
    assert losses_of(outlook.first) == pytest.approx(means(met[:3]), rel=1e-5)
    assert losses_of(outlook.second) == pytest.approx(means(met[3:]), rel=1e-5)
    assert losses_of(outlook.after) == pytest.approx(watched(setup, unseen), rel=1e-5)
    everywhere = means([watched(setup, batch) for batch in batches])
    assert losses_of(outlook.everywhere) == pytest.approx(everywhere, rel=1e-5)
    moved = ((values[6] - values[0]).norm() / values[0].norm()).item()
    assert outlook.moved == pytest.approx(moved, rel=1e-4)
    assert outlook.after.alignment == pytest.approx(follows(setup, unseen), rel=1e-4)
    nn.utils.vector_to_parameters(values[6] + 32 * (values[6] - values[3]), parameters)
    assert losses_of(outlook.ahead) == pytest.approx(watched(setup, unseen), rel=1e-4)


def losses_of(losses: Losses) -> tuple[float, float]:
    return losses.own, losses.others


def follows(setup: gm.Setup, batch: Any) -> float:
    """Cosine of outputs and one-hot classes, each less its mean."""
    torch.manual_seed(0)
    output, classes = setup.model(batch[0]).detach(), nn.functional.one_hot(batch[1]).float()
    a, b = (values - values.mean(0) for values in (output, classes))
    return nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def test_a_network_that_ignores_its_input_tells_nothing_apart() -> None:
    """Only its last bias learns; with the weights, it does tell them apart."""
    model = plain(2, nn.Tanh)
    nn.init.zeros_(model[-1].weight)
    learnt = look_ahead(gm.Setup(model, CE, SGD), rows(4))
    model.requires_grad_(False)
    model[-1].bias.requires_grad_(True)
    blind = look_ahead(gm.Setup(model, CE, SGD), rows(4))
    assert isinstance(learnt, Outlook)
    assert isinstance(blind, Outlook)
    assert learnt.ahead.told_apart > 0.1
    for losses in (blind.first, blind.second, blind.after, blind.ahead):
        assert losses.told_apart == pytest.approx(0, abs=0.01)  # classes come 32 = 3 x 11 - 1 times


def test_noise_does_not_tell_targets_apart() -> None:
    """Dropout is the same for a batch with its own targets and with others."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))
    nn.init.zeros_(model[1].weight)
    still = gm.Setup(model, CE, partial(torch.optim.SGD, lr=0.0))
    outlook = look_ahead(still, rows(4))
    assert outlook == look_ahead(still, rows(4))
    assert isinstance(outlook, Outlook)
    assert outlook.after.told_apart == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"optimizer": None}, "there is no optimizer"),
        ({"optimizer": torch.optim.LBFGS}, "wants a closure"),
        (
            {"loss_fn": None, "step": lambda model, batch: CE(model(batch[0]), batch[1])},
            "cannot be exchanged",
        ),
    ],
    ids=["no optimizer", "closure", "step"],
)
def test_without_an_outlook_the_reason_is_given(changes: dict[str, Any], reason: str) -> None:
    given = {"loss_fn": CE, "optimizer": SGD} | changes
    found = look_ahead(gm.Setup(plain(1, nn.Tanh), **given), rows(4))
    assert isinstance(found, str)
    assert reason in found


def test_without_other_samples_there_is_no_outlook() -> None:
    single = [(x[:1], y[:1]) for x, y in rows(2)]
    assert isinstance(look_ahead(gm.Setup(plain(1, nn.Tanh), CE, SGD), single), str)


def test_a_factory_that_holds_the_users_parameters_has_no_outlook() -> None:
    model = plain(1, nn.Tanh)
    held = gm.Setup(model, CE, lambda _: torch.optim.SGD(model.parameters(), lr=0.1))
    before = trace(held)
    assert isinstance(look_ahead(held, rows(4)), str)
    assert_same(before, trace(held))


@given(a=st.floats(allow_nan=True), b=st.floats(allow_nan=True))
def test_how_much_lower_a_loss_is(a: float, b: float) -> None:
    share = lower(a, b)
    assert -1 <= share <= 1
    if math.isfinite(a) and math.isfinite(b):
        assert share == -lower(b, a)
        assert (share > 0) == (a < b) or abs(a - b) < 1e-300
    else:
        assert share == -1
    assert Losses(a, b).told_apart == share
