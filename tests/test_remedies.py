"""Every remedy keeps the same promises, on every kind of setup; one table drives them all."""

import copy
import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import Optimizer

from gradmend import remedies
from gradmend.causes import Cause
from gradmend.errors import NoEffectWarning, SetupError
from gradmend.layers import definitions
from gradmend.remedies import (
    REMEDIES,
    SEED,
    AddSkips,
    Change,
    ClipValue,
    LearningRate,
    Remedy,
    UseOptimizer,
    UseSchedule,
    WeightDecay,
    anatomy_of,
)
from gradmend.remedies.optimization import SCHEDULES
from gradmend.setup import Batch, Setup
from gradmend.training.loop import Stepper
from helpers import ADAM, SGD, Convolutional, Functional, Tied, assert_same, blobs, images, plain, trace

VARIANTS: tuple[Remedy, ...] = (
    AddSkips(scale=0.0, learned=True),
    AddSkips(scale=1.0),
    UseOptimizer("SGD", lr=0.1, momentum=0.9),
    UseOptimizer("RMSprop"),
    LearningRate(0.05),
    WeightDecay(0.01),
    ClipValue(0.1),
    *(UseSchedule(name, steps=20) for name in SCHEDULES if name != "cosine"),
)
ALL = {repr(remedy): remedy for remedy in (*REMEDIES, *VARIANTS)}
LOSS = nn.CrossEntropyLoss()
Case = tuple[Setup, Batch]


class Shared(nn.Module):
    """One activation module, called after every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.middle, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.act = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.middle(self.act(self.inner(x)))))


def own_step(model: nn.Module, batch: Batch) -> Tensor:
    return LOSS(model(batch[0]), batch[1])


def partly_evaluating() -> nn.Sequential:
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16).eval(), nn.Tanh(), nn.Dropout(0.5).eval()]
    return nn.Sequential(*layers, nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))


def trained() -> Setup:
    """A live optimizer of two groups, with state."""
    model = plain(3, nn.Tanh, width=16)
    groups = [{"params": model[:2].parameters()}, {"params": model[2:].parameters(), "lr": 3e-3}]
    setup = Setup(model, LOSS, torch.optim.Adam(groups, lr=1e-3))
    step = Stepper(setup)
    for _ in range(3):
        step([blobs()])
    return setup


def normed() -> nn.Module:
    model = plain(2, nn.ReLU, width=16)
    for layer in (model[0], model[2]):
        weight_norm(layer)
    return model


x, y = blobs()
CASES: dict[str, Callable[[], Case]] = {
    "plain": lambda: (Setup(plain(4, nn.Sigmoid, width=16), LOSS, SGD), (x, y)),
    "convolutional": lambda: (Setup(Convolutional(), LOSS, SGD), images()),
    "functional": lambda: (Setup(Functional(), LOSS, ADAM), (x, y)),
    "tied": lambda: (Setup(Tied(), nn.MSELoss(), SGD), (x, x)),
    "shared": lambda: (Setup(Shared(), LOSS, SGD), (x, y)),
    "parametrized": lambda: (Setup(normed(), LOSS, SGD), (x, y)),
    "live": lambda: (trained(), (x, y)),
    "double": lambda: (Setup(plain(2, nn.ReLU, width=16).double(), LOSS, SGD), (x.double(), y)),
    "evaluating": lambda: (Setup(partly_evaluating(), LOSS, ADAM), (x, y)),
    "step": lambda: (Setup(plain(2, nn.Tanh, width=16), None, SGD, step=own_step), (x, y)),
}


@cache
def case(name: str) -> Case:
    torch.manual_seed(0)
    return CASES[name]()


@cache
def change(remedy: str, name: str) -> Change:
    """The change, made once for all tests, which only look at it or copy it."""
    return quietly(ALL[remedy], *case(name))


def quietly(remedy: Remedy, setup: Setup, batch: Batch) -> Change:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        return remedy.apply(setup, batch)


def output(model: nn.Module, batch: Batch) -> Tensor:
    torch.manual_seed(1)
    return copy.deepcopy(model)(batch[0])


def structure(setup: Setup) -> list[tuple[str, str]]:
    return [(path, str(module)) for path, module in setup.model.named_modules()]


def options(setup: Setup) -> list[dict[str, Any]]:
    """What the optimizer's groups say, but for the parameters."""
    groups = setup.copy().build_optimizer().param_groups
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def assert_equal(a: Setup, b: Setup) -> None:
    assert structure(a) == structure(b)
    assert_same(a.model.state_dict(), b.model.state_dict())
    assert options(a) == options(b)
    assert repr(a.schedule) == repr(b.schedule)
    assert repr(a.gradient_transform) == repr(b.gradient_transform)


REFUSED = [("BatchNorm()", "tied"), ("LayerNorm()", "tied")]
PAIRS = [(remedy, name) for remedy in ALL for name in CASES if (remedy, name) not in REFUSED]
every_remedy = pytest.mark.parametrize("remedy", ALL)
every_pair = pytest.mark.parametrize(("remedy", "name"), PAIRS)


@every_pair
def test_works_on_a_copy_and_says_when_there_is_nothing_to_do(remedy: str, name: str) -> None:
    setup, batch = case(name)
    before = trace(setup)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = ALL[remedy].apply(setup, batch)
    assert_same(trace(setup), before)
    assert not {id(p) for p in setup.model.parameters()} & {id(p) for p in made.setup.model.parameters()}
    assert [w.category for w in caught] == [] if made.edits else [NoEffectWarning]
    if not ALL[remedy].applies_to(setup, anatomy_of(setup, batch)):
        assert made.edits == ()
    if not made.edits:
        assert_equal(made.setup, setup)


@every_pair
def test_keeps_shape_dtype_and_modes(remedy: str, name: str) -> None:
    (setup, batch), made = case(name), change(remedy, name).setup
    before, after = output(setup.model, batch), output(made.model, batch)
    assert (after.shape, after.dtype, after.device) == (before.shape, before.dtype, before.device)
    assert {p.dtype for p in made.model.parameters()} == {before.dtype}
    kept = (nn.Linear, nn.Conv2d, nn.Dropout, nn.BatchNorm2d)
    modes = [
        Counter((type(m), m.training) for m in s.model.modules() if type(m) in kept) for s in (setup, made)
    ]
    assert modes[0] <= modes[1]
    assert made.model.training == setup.model.training


@every_pair
def test_the_result_trains(remedy: str, name: str) -> None:
    (_, batch), made = case(name), change(remedy, name).setup.copy()
    losses = []
    step = Stepper(made)
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(step([batch]).item())
    assert torch.tensor(losses).isfinite().all()
    assert losses[0] != losses[1]


@every_pair
def test_does_nothing_the_second_time(remedy: str, name: str) -> None:
    first = change(remedy, name)
    for again in (ALL[remedy], first.remedy):
        second = quietly(again, first.setup, case(name)[1])
        assert_equal(second.setup, first.setup)
        assert second.remedy == first.remedy


@every_pair
def test_the_result_can_be_saved_and_copied(remedy: str, name: str) -> None:
    (_, batch), made = case(name), change(remedy, name).setup
    copies = [copy.deepcopy(made.model), made.copy().model]
    if name != "parametrized":  # torch refuses to pickle parametrized modules
        copies.append(pickle.loads(pickle.dumps(made)).model)
    blank = copy.deepcopy(made.model)
    for value in chain(blank.parameters(), blank.buffers()):
        value.data.zero_()
    blank.load_state_dict(made.model.state_dict())
    for model in (*copies, blank):
        assert torch.equal(output(model, batch), output(made.model, batch))


@pytest.mark.parametrize(("remedy", "name"), REFUSED)
def test_refuses_to_break_a_model_that_uses_the_weights_of_a_layer(remedy: str, name: str) -> None:
    setup, batch = case(name)
    before = trace(setup)
    with pytest.raises(SetupError, match="'After' object has no attribute 'weight'"):
        ALL[remedy].apply(setup, batch)
    assert_same(trace(setup), before)


@every_remedy
def test_its_repr_rebuilds_it(remedy: str) -> None:
    assert eval(remedy, vars(remedies)) == ALL[remedy]
    found = change(remedy, "plain").remedy
    assert eval(repr(found), vars(remedies)) == found


@every_remedy
def test_keeps_the_optimizer_paired_with_its_parameters(remedy: str) -> None:
    (setup, _), made = case("live"), change(remedy, "live").setup.copy()
    held = [p for group in made.build_optimizer().param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in made.model.parameters()}
    assert len(held) == len({id(p) for p in held})
    if not isinstance(made.optimizer, Optimizer):
        return
    assert isinstance(setup.optimizer, Optimizer)
    before = [setup.optimizer.state[p] for p in setup.model.parameters()]
    after = [made.optimizer.state[p] for p in made.model.parameters() if p in made.optimizer.state]
    assert_same(after, before)


@every_pair
def test_its_code_does_the_same(remedy: str, name: str) -> None:
    (setup, batch), made = case(name), change(remedy, name)
    own = setup.copy()
    names: dict[str, Any] = {"model": own.model, "x": batch[0], "optimizer": own.build_optimizer()}
    text = "\n".join(edit.code for edit in made.edits)
    torch.manual_seed(SEED)
    exec(f"{definitions(text)}\n{text}", names)
    assert torch.equal(output(names["model"], batch), output(made.setup.model, batch))
    assert_same(names["model"].state_dict(), made.setup.model.state_dict())
    if made.setup.schedule is None:
        assert _settings(names["optimizer"]) == _settings(made.setup.copy().build_optimizer())


def _settings(optimizer: Optimizer) -> tuple[type, list[tuple[float, float]]]:
    return type(optimizer), [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]


@every_remedy
def test_says_what_it_treats_what_it_does_and_who_says_so(remedy: str) -> None:
    given = ALL[remedy]
    assert given.treats <= set(Cause)
    assert "{" not in given.title
    assert given.title == given.title.strip() != ""
    assert 1 <= given.intrusion <= 7
    assert "Source: " in (type(given).__doc__ or "")
    assert given.__dataclass_params__.frozen  # type: ignore[attr-defined]


@every_remedy
def test_the_change_prints_in_a_line_and_becomes_json(remedy: str) -> None:
    made = change(remedy, "plain")
    assert len(str(made).splitlines()) == 1
    assert str(made) == made.text
