"""What trains in a process is noticed by itself, and nothing is left behind."""

import gc
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules import module
from torch.optim import Optimizer, optimizer

from gradmend.attach.trainings import Trainings, widest

X = torch.ones(4, 3)


@pytest.fixture
def trainings() -> Iterator[Trainings]:
    """Everything that trains inside the test; all is as before when it ends."""
    before = replaced()
    trainings = Trainings(None)
    yield trainings
    trainings.end()
    assert replaced() == before
    assert hooks() == 0


def replaced() -> tuple[object, ...]:
    """Whatever something could have been put in the place of."""
    classes = (nn.Module.__init__, Optimizer.__init__, GradScaler.scale)
    return (*classes, torch.compile, torch.autograd.backward, torch.autograd.graph.Node)


def hooks() -> int:
    """How many global hooks there are."""
    tables = (
        module._global_forward_pre_hooks,
        module._global_forward_hooks,
        module._global_backward_hooks,
        optimizer._global_optimizer_pre_hooks,
        optimizer._global_optimizer_post_hooks,
    )
    return sum(map(len, tables))


def step(model: nn.Module, optimizer: Optimizer, times: int = 1) -> None:
    for _ in range(times):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def seen(trainings: Trainings) -> dict[str, int]:
    return {name: watch.step for name, watch in trainings.watches.items()}


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def test_the_outermost_module_that_is_called(trainings: Trainings) -> None:
    holder = nn.ModuleDict({"whole": Whole()})
    step(holder["whole"], torch.optim.SGD(holder.parameters(), lr=0.1), 3)
    assert seen(trainings) == {"Whole": 3}


def test_a_forward_before_there_is_an_optimizer(trainings: Trainings) -> None:
    """As to find out shapes: neither it nor the part that it called is what trains."""
    model = Whole()
    with torch.no_grad():
        model.part(X)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    assert seen(trainings) == {"Whole": 2}


def test_a_frozen_teacher_is_not_watched(trainings: Trainings) -> None:
    teacher, model = nn.Linear(3, 3), Whole()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(X) - teacher(X).detach()).square().mean().backward()
        optimizer.step()
    assert seen(trainings) == {"Whole": 2}


def test_two_models_and_a_third_later(trainings: Trainings) -> None:
    first, second = nn.Linear(3, 1), nn.Linear(3, 2)
    optimizers = [torch.optim.Adam(model.parameters()) for model in (first, second)]
    for _ in range(3):
        for model, stepped in zip((first, second), optimizers, strict=True):
            step(model, stepped)
    third = Whole()
    step(third, torch.optim.SGD(third.parameters(), lr=0.1), 2)
    assert seen(trainings) == {"Linear": 3, "Linear 2": 3, "Whole": 2}


def test_two_optimizers_of_one_model_are_one_watch(trainings: Trainings) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    for _ in range(3):
        model(X).square().mean().backward()
        for stepped in optimizers:
            stepped.step()
    assert seen(trainings) == {"Sequential": 3}


def test_weights_that_are_changed_by_hand(trainings: Trainings) -> None:
    model = Whole()
    for _ in range(5):
        model(X).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    assert seen(trainings) == {"Whole": 4}
    assert next(iter(trainings.watches.values())).loss is not None


def test_gradients_without_a_step_are_no_training(trainings: Trainings) -> None:
    """As of a saliency map."""
    model = Whole()
    for _ in range(3):
        model(X).sum().backward()
    assert seen(trainings) == {}


def test_calls_are_looked_at_no_longer_than_needed(trainings: Trainings) -> None:
    model, weight = Whole(), torch.ones(3, requires_grad=True)
    bare = torch.optim.SGD([weight], lr=0.1)
    for _ in range(3):
        weight.square().sum().backward()
        bare.step()
    assert not module._global_forward_pre_hooks
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    assert seen(trainings) == {"Whole": 2}


def test_no_hook_on_modules_once_something_is_compiled(trainings: Trainings) -> None:
    first, second = Whole(), nn.Linear(3, 1)
    step(first, torch.optim.SGD(first.parameters(), lr=0.1))
    torch.compile(lambda x: x, backend="eager")
    assert not module._global_forward_pre_hooks
    step(second, torch.optim.SGD(second.parameters(), lr=0.1), 2)
    step(first, torch.optim.SGD(first.parameters(), lr=0.1), 2)
    assert not module._global_forward_pre_hooks
    assert seen(trainings)["Linear"] == 2


def test_models_and_optimizers_are_not_kept_alive(trainings: Trainings) -> None:
    def train() -> list[weakref.ref[object]]:
        model = Whole()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step(model, optimizer, 3)
        return [weakref.ref(model), weakref.ref(optimizer)]

    references = train()
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    again = Whole()
    step(again, torch.optim.SGD(again.parameters(), lr=0.1), 2)
    assert list(seen(trainings).values())[1] == 2


class Odd(nn.Linear):
    """What nobody would expect of a module: a hash of its own, and parameters not shown to everyone."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.key = 7

    def __hash__(self) -> int:
        return self.key

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        if looked_at():
            raise RuntimeError("not for you")
        return super().parameters(recurse)


def looked_at() -> bool:
    """Whether gradmend asks."""
    frame = sys._getframe(2)
    return "gradmend" in frame.f_code.co_filename or "gradmend" in frame.f_back.f_code.co_filename


def test_an_error_of_ours_leaves_the_training_alone(
    trainings: Trainings, capfd: pytest.CaptureFixture[str]
) -> None:
    model, ordinary = Odd(), Whole()
    step(ordinary, torch.optim.SGD(ordinary.parameters(), lr=0.1), 2)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    step(ordinary, torch.optim.SGD(ordinary.parameters(), lr=0.1), 2)
    assert capfd.readouterr().err.count("gradmend: cannot watch what trains: RuntimeError: not for you") == 1
    assert seen(trainings)["Whole"] >= 2


def test_widest() -> None:
    whole = Whole()
    other = nn.Linear(3, 1)
    tied = nn.Sequential(whole.part)
    frozen = nn.Linear(3, 9).requires_grad_(False)
    assert widest([whole.part, other, whole, tied, frozen, nn.ReLU()]) in (
        [whole, other],
        [whole.part, other],
    )
