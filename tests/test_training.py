from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from gradmend.data import Data
from gradmend.errors import DataError, SetupError, TargetError
from gradmend.setup import Setup
from gradmend.training import History, train
from gradmend.zoo import recipe
from toys import assert_same, network, on_cpu, plain_network, setup, state, toy

# The loop


def by_hand(given: Setup, data: Data, steps: int, seed: int = 0) -> list[float]:
    """The loop as people write it."""
    torch.manual_seed(seed)
    optimizer = given.build_optimizer()
    schedule = given.schedule(optimizer) if given.schedule else None
    batches = data.batches(32, generator=torch.Generator().manual_seed(seed))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        parts = []
        for _ in range(given.accumulate):
            x, y = next(batches)
            loss = given.loss_fn(given.model(x), y) / given.accumulate
            loss.backward()
            parts.append(loss.detach())
        if given.gradient_transform is not None:
            given.gradient_transform(list(given.model.parameters()))
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(torch.stack(parts).sum().item())
    return losses


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"schedule": partial(StepLR, step_size=7, gamma=0.7)},
        {"gradient_transform": partial(clip_grad_norm_, max_norm=0.1)},
        {"accumulate": 3},
        {
            "schedule": partial(StepLR, step_size=5),
            "gradient_transform": partial(clip_grad_norm_, max_norm=1.0),
            "accumulate": 3,
        },
    ],
    ids=["plain", "schedule", "clipping", "accumulation", "all"],
)
def test_training_is_the_hand_written_loop_bit_for_bit(parts: dict[str, Any]) -> None:
    ours, theirs = (setup(partial(Adam, lr=0.01, fused=False), **parts) for _ in range(2))
    history = on_cpu(ours, toy(), steps=50, seed=3)
    assert list(history.loss) == by_hand(theirs, toy(), 50, seed=3)
    assert_same(state(ours.model), state(theirs.model))


def test_a_short_last_group_is_a_step_too() -> None:
    history = on_cpu(setup(accumulate=2), toy(96), epochs=2)
    assert (history.steps, history.epochs) == (4, 2)


@pytest.mark.parametrize(
    "factory",
    [Adam, AdamW, partial(SGD, lr=0.1, momentum=0.9, weight_decay=1e-3), partial(Adagrad, lr=0.05)],
    ids=["Adam", "AdamW", "SGD", "Adagrad"],
)
def test_fused_optimizers_agree_with_the_others(factory: Callable[..., Optimizer]) -> None:
    fused, plain = (
        Setup(plain_network(), nn.CrossEntropyLoss(), partial(factory, **kernel))
        for kernel in ({}, {"fused": False})
    )
    ours, theirs = (on_cpu(given, toy(), steps=20) for given in (fused, plain))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
    for one, other in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def built(made: list[Optimizer], kind: Callable[..., Optimizer]) -> Callable[[Any], Optimizer]:
    def factory(parameters: Any) -> Optimizer:
        made.append(kind(parameters))
        return made[-1]

    return factory


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        (Adam, True),
        (partial(Adam, fused=False), False),
        (partial(Adam, foreach=True), None),
        (partial(Adam, lr=torch.tensor(0.01)), True),
        (RMSprop, None),
    ],
)
def test_only_the_unchosen_kernel_of_a_factory_is_chosen(kind: Any, fused: bool | None) -> None:
    made: list[Optimizer] = []
    on_cpu(setup(built(made, kind)), toy(), steps=3)
    assert made[0].param_groups[0].get("fused") == fused


def test_sparse_gradients_are_trained_without_the_fused_kernel() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 2))
    given = Setup(model, nn.CrossEntropyLoss(), partial(SGD, lr=0.1))
    x, y = torch.randint(5, (16, 2)), torch.randint(2, (16,))
    assert on_cpu(given, (x, y), steps=4).steps == 4


def test_a_live_optimizer_is_used_and_left_as_it_was_made() -> None:
    model = network()
    optimizer = Adam(model.parameters())
    given = Setup(model, nn.CrossEntropyLoss(), optimizer)
    on_cpu(given, toy(), steps=5)
    on_cpu(given, toy(), steps=5)
    assert all(entry["step"] == 10 for entry in optimizer.state.values())
    assert optimizer.param_groups[0]["fused"] is None


# Seeds and what must not be disturbed


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    first, again, other = (on_cpu(setup(), toy(), epochs=3, seed=seed).loss for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_random_state_modes_and_threads_return() -> None:
    given = setup()
    given.model[1].eval()
    modes = [module.training for module in given.model.modules()]
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    on_cpu(given, toy(), steps=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in given.model.modules()] == modes
    assert torch.get_num_threads() == threads


def test_parts_in_eval_mode_stay_frozen_in_a_model_that_trains() -> None:
    """That is how a batch normalization is frozen; a model wholly in eval mode trains wholly."""
    frozen, resting = setup(), setup()
    frozen.model[1].eval()
    resting.model.eval()
    means = [given.model[1].running_mean.clone() for given in (frozen, resting)]
    for given in (frozen, resting):
        on_cpu(given, toy(), steps=5)
    assert torch.equal(frozen.model[1].running_mean, means[0])
    assert not torch.equal(resting.model[1].running_mean, means[1])
    assert [m.training for m in frozen.model] == [True, False, True, True, True]
    assert not any(m.training for m in resting.model.modules())


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_threads_are_chosen_on_a_copy() -> None:
    long, short = (on_cpu(setup(), toy(), steps=steps) for steps in (201, 20))
    assert short.loss == pytest.approx(long.loss[:20], rel=1e-3)
    assert short.threads == torch.get_num_threads() == 2
    assert long.threads in (1, 2)


@pytest.mark.usefixtures("two_threads")
def test_threads_return_after_an_error() -> None:
    class Uncopied(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = SimpleNamespace(output=super().forward(x))
            return self.kept.output

    model = Uncopied(8, 3)
    model(torch.zeros(2, 8))
    given = Setup(model, nn.CrossEntropyLoss(), SGD)
    assert on_cpu(given, toy(), steps=201).threads == 2
    with pytest.raises(DataError):
        on_cpu(setup(), iter([toy().head(8)] * 150), epochs=2)
    assert torch.get_num_threads() == 2


# Outcomes


def test_classes_are_learnt_and_counted() -> None:
    given = setup()
    data = toy(400, 150)
    history = on_cpu(given, data, epochs=30)
    assert len(history.accuracy) == 30
    assert history.accuracy[-1] > history.accuracy[0]
    with torch.no_grad():
        output = given.model.eval()(data.x_test)
    assert history.test_accuracy == pytest.approx((output.argmax(1) == data.y_test).float().mean().item())
    loss = nn.functional.cross_entropy(output, data.y_test).item()
    assert history.test_loss == pytest.approx(loss, rel=1e-5)
    assert history.test_accuracy > 0.8


def test_accuracy_is_of_the_outputs_seen_while_training() -> None:
    data = toy()
    frozen = Setup(network(), nn.CrossEntropyLoss(), partial(SGD, lr=0.0))
    batch = (data.x, data.y)
    right = (frozen.model(data.x).argmax(1) == data.y).float().mean().item()
    assert on_cpu(frozen, [batch], epochs=2).accuracy == pytest.approx((right, right))


@pytest.mark.parametrize(
    ("loss_fn", "last"),
    [
        (nn.BCEWithLogitsLoss(), nn.Identity()),
        (nn.functional.binary_cross_entropy_with_logits, nn.Identity()),
        (partial(nn.functional.binary_cross_entropy_with_logits, reduction="mean"), nn.Identity()),
        (nn.BCELoss(), nn.Sigmoid()),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_one_output_unit_tells_two_classes_apart(loss_fn: Any, last: nn.Module, flat: bool) -> None:
    shape = nn.Flatten(0) if flat else nn.Identity()
    linear = nn.Linear(1, 1)
    nn.init.ones_(linear.weight)
    nn.init.zeros_(linear.bias)
    given = Setup(nn.Sequential(linear, last, shape), loss_fn, partial(SGD, lr=0.0))
    x, y = torch.tensor([[-1.0], [-0.1], [0.1], [2.0]]), torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    y = y.flatten() if flat else y
    history = on_cpu(given, [(x, y)], (x, y), epochs=1)
    assert history.accuracy == (0.75,)
    assert history.test_accuracy == 0.75


def test_regression_has_no_accuracy() -> None:
    given = Setup(network(), nn.MSELoss(), partial(Adam, lr=0.01))
    history = on_cpu(given, toy(classes=None), epochs=20)
    assert history.accuracy is None
    assert history.test_accuracy is None
    assert history.test_loss < 10


def test_divergence_ends_a_training() -> None:
    given = Setup(network(), nn.CrossEntropyLoss(), partial(SGD, lr=1e30))
    history = on_cpu(given, toy(), steps=1000)
    assert history.diverged
    assert history.steps <= 50
    assert "diverged" in str(history)


def test_a_history_prints_itself_and_becomes_a_dict() -> None:
    history = on_cpu(setup(), toy(), epochs=2)
    assert isinstance(history, History)
    assert "test accuracy" in str(history)
    assert history.to_dict()["steps"] == len(history.loss) == 6
    assert history.to_dict()["device"] == "cpu"
    assert history.seconds > history.step_seconds > 0


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = on_cpu(setup(), toy(), epochs=2)
    assert capsys.readouterr() == ("", "")
    shown = on_cpu(setup(), toy(), epochs=2, progress=True)
    assert shown.loss == quiet.loss
    out, err = capsys.readouterr()
    assert not out
    assert "epoch" in err


# Recipes and refusals


def test_recipes_bring_their_data_and_settings() -> None:
    history = on_cpu("deep", steps=4)
    assert history.test_accuracy < 0.2
    assert on_cpu(recipe("deep", depth=1), steps=4).epochs == 1
    assert on_cpu("deep", toy(), steps=4).test_accuracy is not None
    made = recipe("deep", depth=1, activation="relu")
    assert on_cpu(made.setup, "digits", epochs=1).steps == math.ceil(1437 / 32)
    assert on_cpu(replace(made, epochs=2)).steps == 2 * math.ceil(1437 / 64)


def test_a_shallow_network_learns_the_digits() -> None:
    assert on_cpu(recipe("deep", depth=2, activation="relu"), epochs=10).test_accuracy > 0.9


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: train(setup(), toy(), epochs=1, steps=1), SetupError, "not both"),
        (lambda: train(setup(), toy(), epochs=0), SetupError, "one epoch or step"),
        (lambda: train(setup(), toy(), steps=-1), SetupError, "one epoch or step"),
        (lambda: train(setup(None), toy()), SetupError, "no optimizer"),
        (lambda: train(setup(schedule=ReduceLROnPlateau), toy()), SetupError, "ReduceLROnPlateau"),
        (lambda: train("deeep"), TargetError, "Did you mean 'deep'"),
        (lambda: train(setup(), toy(), [], steps=1), DataError, "empty"),
        (lambda: train(setup(), toy(), iter([]), steps=1), DataError, "no batch to evaluate"),
    ],
)
def test_refusals(call: Callable[[], History], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
