"""What the optimizer would do: each update against the step that it really makes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import gradmend as gm
from gradmend.harmless import undisturbed
from helpers import ADAM, assert_parameter, blobs, plain, setups, warm

CE = nn.CrossEntropyLoss()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": partial(torch.optim.Adam, lr=1e-3),
    "adamw": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1, amsgrad=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-2),
    "adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["functional", "convolutional", "recurrent"])
def test_updates_are_those_that_the_optimizer_really_makes(kind: str, name: str, clip: float | None) -> None:
    setup, batch = setups()[kind]
    live = OPTIMIZERS[name](setup.model.parameters())
    transform = partial(nn.utils.clip_grad_norm_, max_norm=clip) if clip else None
    setup = gm.Setup(setup.model, setup.loss_fn, live, gradient_transform=transform)
    warm(setup, batch)
    with undisturbed(setup.model):
        profile = gm.measure(setup, batch)
        twin = setup.copy()
        twin.model.zero_grad()
        twin.loss(batch).backward()
    gradients = {n: p.grad.clone() for n, p in twin.model.named_parameters() if p.grad is not None}
    if transform:
        transform(list(twin.model.parameters()))
    twin.build_optimizer().step()
    pairs = zip(setup.model.named_parameters(), twin.model.parameters(), strict=True)
    change = {n: (b - a).detach().double() for (n, a), b in pairs}
    for reading, p in zip(profile.parameters, setup.model.parameters(), strict=True):
        assert_parameter(reading, gradients[reading.name])
        size = p.detach().double().square().mean().sqrt().item()
        assert reading.rms == pytest.approx(size, rel=1e-6)
        ratio = change[reading.name].square().mean().sqrt().item() / size
        # a - b of float32 numbers keeps about 7 digits of a: 1e-7 of the weight
        assert reading.update_ratio == pytest.approx(ratio, rel=1e-3, abs=2e-7)


def test_what_the_optimizer_holds_and_what_is_frozen() -> None:
    model = plain(2, nn.Tanh)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    by = {p.name: p for p in gm.measure(gm.Setup(model, CE, optimizer), blobs()).parameters}
    assert (by["0.weight"].frozen, by["0.weight"].gradient, by["0.weight"].trained) == (True, None, False)
    assert (by["2.weight"].frozen, by["2.weight"].trained) == (False, False)
    assert by["2.weight"].gradient
    assert by["2.weight"].update_ratio is None
    assert by["4.weight"].trained is True
    assert by["4.weight"].update_ratio
    unheld = gm.measure(gm.Setup(model, CE), blobs()).parameters
    assert {p.trained for p in unheld} == {None}
    assert {p.update_ratio for p in unheld} == {None}


class Stepping(torch.optim.Optimizer):
    """A user's own optimizer: its `step` takes no closure."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.5})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad


def test_unusual_optimizers() -> None:
    own = gm.Setup(plain(1, nn.Tanh), CE, Stepping)
    for reading in gm.measure(own, blobs()).parameters:
        assert reading.update_ratio == pytest.approx(0.5 * (reading.gradient or 0) / reading.rms, rel=1e-4)
    assert gm.diagnose(own, blobs()).profile.response is not None
    closing = gm.Setup(plain(1, nn.Tanh), CE, torch.optim.LBFGS)
    assert {p.update_ratio for p in gm.measure(closing, blobs()).parameters} == {None}
    assert gm.diagnose(closing, blobs()).profile.response is None


def test_schedulers_and_hooks_of_the_optimizer_do_not_notice() -> None:
    model = plain(1, nn.Tanh)
    live = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(live, 1)
    calls: list[object] = []
    live.register_step_pre_hook(lambda *_: calls.append(1))
    warm(gm.Setup(model, CE, live), blobs())
    steps = schedule.last_epoch, live._opt_called, len(calls)
    gm.diagnose(gm.Setup(model, CE, live), blobs())
    assert steps == (schedule.last_epoch, live._opt_called, len(calls))


def test_adam_state_is_used_and_not_changed() -> None:
    setup, batch = setups()["plain"]
    fresh = gm.measure(gm.Setup(setup.model, CE, ADAM), batch).parameters[0].update_ratio
    live = torch.optim.Adam(setup.model.parameters(), lr=1e-3)
    warm(gm.Setup(setup.model, CE, live), batch, steps=5)
    lived = gm.measure(gm.Setup(setup.model, CE, live), batch).parameters[0].update_ratio
    assert fresh != lived
