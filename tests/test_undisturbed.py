"""Measuring and diagnosing leave everything of the user's as it was, also when something fails."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradmend as gm
from gradmend.recorder import Recorder
from helpers import SGD, assert_same, blobs, plain, setups, trace, warm

KINDS = list(setups())
CE = nn.CrossEntropyLoss()


def _lived_in(kind: str) -> tuple[gm.Setup, Any]:
    """A setup as users have it in the middle of things: state, `.grad`, hooks, parts in eval mode."""
    setup, batch = setups()[kind]
    live = torch.optim.Adam(setup.model.parameters(), lr=1e-3)
    setup = gm.Setup(setup.model, setup.loss_fn, live)
    setup.model.register_forward_hook(lambda *_: None)
    next(iter(setup.model.children())).register_forward_pre_hook(lambda *_: None)
    warm(setup, batch)
    next(iter(setup.model.children())).eval()
    return setup, batch


@pytest.mark.parametrize("look", [gm.measure, gm.diagnose])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_disturbed(kind: str, look: Any) -> None:
    setup, batch = _lived_in(kind)
    before = trace(setup)
    look(setup, batch)
    assert_same(before, trace(setup))


def test_nothing_is_disturbed_as_users_run_it() -> None:
    """Without the type checks of these tests, so that Python's random numbers can be compared as well."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import random, torch, gradmend as gm\n"
        "from helpers import assert_same, fingerprint, setups\n"
        "gm.measure, gm.diagnose  # imports may draw random numbers, measuring must not\n"
        "for setup, batch in setups().values():\n"
        "    setup.model.register_forward_pre_hook(lambda *_: random.seed(3))\n"
        "    before = fingerprint(setup)\n"
        "    gm.measure(setup, batch); gm.diagnose(setup, batch)\n"
        "    assert_same(before, fingerprint(setup))\n"
    )
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code, here], check=True)


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]  # noqa: ARG004
        raise ZeroDivisionError("on purpose")


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError("on purpose")


class RaisesBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Breaks.apply(x)


def _bad_loss(output: Tensor, target: Tensor) -> Tensor:
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("look", [gm.measure, gm.diagnose])
@pytest.mark.parametrize("place", ["first", "middle", "loss", "backward", "transform"])
def test_nothing_is_disturbed_by_a_failure(place: str, look: Any) -> None:
    bad = {"first": Raises(), "middle": Raises(), "backward": RaisesBackward()}.get(place, nn.Identity())
    good = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)]
    layers = [bad, *good] if place == "first" else [*good, bad]
    model = nn.Sequential(*layers, nn.Linear(8, 3))
    model[1].eval()
    live = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    live.step()
    loss = _bad_loss if place == "loss" else CE
    setup = gm.Setup(model, loss, live, gradient_transform=_transform if place == "transform" else None)
    before = trace(setup)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        look(setup, blobs())
    assert_same(before, trace(setup))


def _transform(parameters: object) -> None:
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_measuring_where_gradients_are_off(kind: str, around: Any) -> None:
    setup, batch = setups()[kind]
    plainly = gm.diagnose(setup, batch)
    with around():
        assert gm.diagnose(setup, batch).profile.loss == plainly.profile.loss


def test_what_is_captured_stays_as_it_is() -> None:
    """Steps, losses, transforms and factories that reach for the model and not for what they are given."""
    model = plain(1, nn.Tanh)
    x, y = blobs()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    setups_ = [
        gm.Setup(model, step=lambda _, b: CE(model(b[0]), b[1]), optimizer=SGD),
        gm.Setup(model, lambda o, t: CE(o, t) + sum(p.square().sum() for p in model.parameters()), SGD),
        gm.Setup(model, CE, lambda _: torch.optim.SGD(model.parameters(), lr=0.1)),
        gm.Setup(
            model, CE, SGD, gradient_transform=lambda _: nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        ),
    ]
    for setup in setups_:
        before = trace(setup)
        gm.diagnose(setup, (x, y))
        assert_same(before, trace(setup))


class Writes(nn.Module):
    """Replaces a buffer, makes one, and holds one that repeats its values without storing them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("later", None)
        self.register_buffer("wide", torch.arange(4.0)[:, None].expand(4, 5))
        self.embedding = nn.Embedding(3, 8, max_norm=0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.later = torch.ones(2)
        self.wide[:, :1].add_(1)
        return self.linear(x + self.embedding(torch.arange(96) % 3))


def test_buffers_of_every_sort() -> None:
    setup = gm.Setup(Writes(), CE, SGD)
    before, wide = trace(setup), setup.model.wide.clone()
    gm.measure(setup, blobs())
    assert_same(before, trace(setup))
    assert setup.model.later is None
    assert torch.equal(setup.model.wide, wide)


def test_no_tensor_is_kept() -> None:
    model, (x, _) = plain(1, nn.Tanh), blobs()
    watching = Recorder(model)
    with watching.watching((x,)):
        model(x)
    assert not [v for v in vars(watching).values() if isinstance(v, Tensor)]
    assert not watching._origins
