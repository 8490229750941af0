"""A watched training is to the last bit the training that nobody watches, whatever it is made of."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from benchmarks.workloads import GPT, SequenceClassifier, resnet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint

from gradmend.watch import Notice, Watch

STEPS = 40


def quiet(_notice: Notice) -> None:
    """What is found does not matter here."""


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(20, 32), nn.Linear(32, 5)
        self.middle = nn.Sequential(
            nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 32), nn.Tanh()
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant)
        return self.last(h)


class Twice(nn.Module):
    """One layer used twice, functions only, and an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(20, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.layer(F.relu_(self.layer(x)))))


class Bare(nn.Module):
    """No modules inside."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(20, 32) / 5), nn.Parameter(torch.randn(32, 5) / 6)

    def forward(self, *, x: Tensor) -> Tensor:
        return torch.relu(x @ self.w) @ self.v


def rows() -> Tensor:
    return torch.randn(16, 20)


def in_place() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 32), nn.ReLU(inplace=True), nn.Linear(32, 32), nn.ReLU(True), nn.Linear(32, 5)
    )


def with_dropout() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(32, 32),
        nn.GELU(),
        nn.Linear(32, 5),
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(20, 4, 32, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(60, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "dropout and batch norm": (with_dropout, rows),
    "in-place ReLU": (in_place, rows),
    "reentrant checkpoint": (partial(Checkpointed, True), rows),
    "checkpoint": (partial(Checkpointed, False), rows),
    "a module used twice": (Twice, rows),
    "no modules": (Bare, rows),
    "encoder layer": (encoder, lambda: torch.randn(16, 3, 20)),
    "GRU": (lambda: SequenceClassifier(6, 16), lambda: torch.randn(16, 9, 6)),
    "ResNet": (lambda: resnet()[0], lambda: torch.randn(4, 3, 8, 8)),
    "transformer": (lambda: GPT(2, 32, 8, 16), lambda: torch.randint(16, (8, 8))),
}


def call(model: nn.Module, x: Tensor) -> Tensor:
    return model(x=x) if isinstance(model, Bare) else model(x)


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    out = call(model, x)
    loss = F.cross_entropy(out, torch.arange(out.numel() // out.shape[1]).reshape(out[:, 0].shape) % 5)
    loss.backward()
    optimizer.step()
    return loss.detach()


def scaled(
    scaler: torch.amp.GradScaler, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor
) -> Tensor:
    """Mixed precision with accumulation and clipping; the scale overflows at first."""
    optimizer.zero_grad()
    total = torch.zeros(())
    for half in x.chunk(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(call(model, half), torch.arange(len(half)) % 5) / 2
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    scaler.step(optimizer)
    scaler.update()
    return total


def course(
    build: Callable[[], nn.Module],
    draw: Callable[[], Tensor],
    step: Callable[..., Tensor],
    watched: Mapping[str, Any] | None,
    steps: int = STEPS,
) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """Losses, what was learnt, and the random state at the end."""
    torch.manual_seed(1)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch = None if watched is None else Watch(model, optimizer, report=quiet, **watched).attach()
    losses = [step(model, optimizer, draw()) for _ in range(steps)]
    if watch is not None:
        assert watch.step > 0
        assert watch.loss is not None
        assert watch._session.on
        watch.detach()
    return losses, model.state_dict(), torch.get_rng_state()


def same(one: Any, other: Any) -> bool:
    losses, weights, state = one
    return (
        all(torch.equal(a, b) for a, b in zip(losses, other[0], strict=True))
        and all(torch.equal(weights[key], other[1][key]) for key in weights)
        and torch.equal(state, other[2])
    )


def global_hooks() -> list[int]:
    dicts = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    return [len(hooks) for hooks in dicts]


@pytest.mark.parametrize("options", [{"every": 2}, {"budget": 20.0}], ids=["every=2", "all the time"])
@pytest.mark.parametrize("name", MODELS)
def test_results_are_the_same_to_the_last_bit(name: str, options: dict[str, Any]) -> None:
    before = global_hooks(), torch.autograd.backward, torch.amp.GradScaler.scale
    bare = course(*MODELS[name], plain, None)
    assert same(bare, course(*MODELS[name], plain, options))
    assert (global_hooks(), torch.autograd.backward, torch.amp.GradScaler.scale) == before


@pytest.mark.parametrize("options", [{"every": 2}, {"budget": 20.0}], ids=["every=2", "all the time"])
def test_so_they_are_with_a_scaler_accumulation_and_clipping(options: dict[str, Any]) -> None:
    results = []
    for watched in (None, options):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        results.append(course(with_dropout, rows, partial(scaled, scaler), watched))
    assert same(*results)


def test_two_hundred_steps_of_the_default_watch() -> None:
    results = [course(with_dropout, rows, plain, watched, steps=200) for watched in (None, {})]
    assert same(*results)


def test_hooks_of_others_stay_in_their_order() -> None:
    seen: list[str] = []
    model = in_place()
    for name in ("first", "second"):
        model[0].register_forward_hook(lambda *_, name=name: seen.append(name))
        model[0].weight.register_hook(lambda _, name=name: seen.append(f"{name} gradient"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append("step"))
    with Watch(model, optimizer, every=1, report=quiet):
        for _ in range(3):
            plain(model, optimizer, rows())
    assert seen == ["first", "second", "first gradient", "second gradient", "step"] * 3


def test_a_watched_model_can_be_copied_pickled_and_saved() -> None:
    model = in_place()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, every=1, report=quiet):
        plain(model, optimizer, rows())
        twin = copy.deepcopy(model)
        pickle.dumps((model, optimizer))
        torch.save(model, io.BytesIO())
        assert not twin[0]._forward_hooks
        plain(model, optimizer, rows())


def test_a_deleted_model_leaks_nothing() -> None:
    model = in_place()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = Watch(model, optimizer, every=1, report=quiet).attach()
    for _ in range(4):
        plain(model, optimizer, rows())
    gone = [weakref.ref(x) for x in (model, model[0], model[0].weight, optimizer)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4
    assert watch.step == 4
    watch.detach()
