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
from torch.optim import Optimizer

import ill
from gradmend import remedies
from gradmend.anatomy import Anatomy
from gradmend.causes import Cause
from gradmend.errors import NoEffectWarning, SetupError
from gradmend.layers import definitions
from gradmend.remedies import (
    REMEDIES,
    SEED,
    AddSkips,
    Change,
    ClipValue,
    Critical,
    LearningRate,
    Remedy,
    ScaleBranches,
    SwapActivation,
    Tailor,
    UseOptimizer,
    UseSchedule,
    WeightDecay,
    anatomy_of,
)
from gradmend.remedies.initialization import Initialization
from gradmend.remedies.schedule import SCHEDULES
from gradmend.setup import Batch, Setup
from gradmend.training.loop import Stepper
from helpers import SGD, assert_same, plain, trace
from various import GENERAL, LOSS, Case, x, y

VARIANTS: tuple[Remedy, ...] = (
    AddSkips(scale=0.0, learned=True),
    AddSkips(scale=1.0),
    ScaleBranches(scale=0.0, learned=True),
    ScaleBranches(per_unit=True),
    SwapActivation("SELU"),
    Tailor("GELU"),
    Critical(0.1),
    UseOptimizer("SGD", lr=0.1, momentum=0.9),
    UseOptimizer("RMSprop"),
    LearningRate(0.05),
    WeightDecay(0.01),
    ClipValue(0.1),
    *(UseSchedule(name, steps=20) for name in SCHEDULES if name != "cosine"),
)
ALL = {repr(remedy): remedy for remedy in (*REMEDIES, *VARIANTS)}
CASES: dict[str, Callable[[], Case]] = {
    **GENERAL,
    **ill.cases(),
    "AddSkips": GENERAL["cone"],
    "ScaleBranches": GENERAL["residual"],
    "DepthRates": lambda: (Setup(plain(23, nn.Tanh, width=8), LOSS, SGD), (x, y)),
}
"""Those named as a remedy are for it alone."""

OUTSIDE = ("optimization", "schedule", "rates", "gradient", "losses")
"""The groups of remedies that leave the model as it is, for which its kind matters little."""

FEW = ("plain", "functional", "live")
"""The cases for remedies of a kind of which another one takes all cases."""

COSTLY = "LearningRate(lr=None, by='range')"


def cases_of(remedy: Remedy) -> tuple[str, ...]:
    alike = [other for name, other in ALL.items() if type(other) is type(remedy) and name != COSTLY]
    first = alike[0] if alike else remedy
    own, group = type(remedy).__name__, type(remedy).__module__.rpartition(".")[-1]
    few = FEW if remedy is not first else (*FEW, "parametrized", "double", "step")
    return (*(few if remedy is not first or group in OUTSIDE else GENERAL), *([own] if own in CASES else []))


@cache
def case(name: str) -> Case:
    torch.manual_seed(0)
    return CASES[name]()


@cache
def anatomy(name: str) -> Anatomy:
    return anatomy_of(*case(name))


@cache
def before(name: str) -> dict[str, Any]:
    return lasting(case(name)[0])


def lasting(setup: Setup) -> dict[str, Any]:
    """The trace of a setup, without that of random numbers."""
    return {key: value for key, value in trace(setup).items() if key not in ("torch", "numpy")}


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


# What holds for each remedy on each setup that it changes

Check = Callable[[Remedy, Change, Setup, Batch], None]


def shares_nothing_with_what_was_given(remedy: Remedy, made: Change, setup: Setup, batch: Batch) -> None:
    held = {id(tensor) for tensor in chain(setup.model.parameters(), setup.model.buffers())}
    assert held.isdisjoint(map(id, chain(made.setup.model.parameters(), made.setup.model.buffers())))


def keeps_shape_dtype_and_modes(remedy: Remedy, made: Change, setup: Setup, batch: Batch) -> None:
    old, new = output(setup.model, batch), output(made.setup.model, batch)
    assert new.shape == old.shape or type(remedy).__name__ in {"OutputShape", "OutputUnits"}
    assert (new.dtype, new.device) == (old.dtype, old.device)
    assert {p.dtype for p in made.setup.model.parameters()} == {old.dtype}
    kept = (nn.Linear, nn.Conv2d, nn.BatchNorm1d)
    modes = [
        Counter((type(m), m.training) for m in s.model.modules() if type(m) in kept)
        for s in (setup, made.setup)
    ]
    assert modes[0] <= modes[1] or type(remedy).__name__ in {
        "DropBatchNorm",
        "WeightNorm",
        "OutputUnits",
        "TrainMode",
    }
    assert made.setup.model.training == setup.model.training


def does_nothing_the_second_time(remedy: Remedy, made: Change, setup: Setup, batch: Batch) -> None:
    for again in {repr(remedy): remedy, repr(made.remedy): made.remedy}.values():
        second = quietly(again, made.setup, batch)
        assert_equal(second.setup, made.setup)
        assert second.remedy == made.remedy


def can_be_saved_and_copied(remedy: Remedy, made: Change, setup: Setup, batch: Batch) -> None:
    model, wanted = made.setup.model, output(made.setup.model, batch)
    copies = [copy.deepcopy(model), made.setup.copy().model]
    if not any(hasattr(module, "parametrizations") for module in model.modules()):  # torch refuses to
        copies.append(pickle.loads(pickle.dumps(made.setup)).model)
    blank = copy.deepcopy(model)
    for value in chain(blank.parameters(), blank.buffers()):
        value.data.zero_()
    blank.load_state_dict(model.state_dict())
    for other in (*copies, blank):
        assert torch.equal(output(other, batch), wanted)


def keeps_the_optimizer_paired_with_its_parameters(
    remedy: Remedy, made: Change, setup: Setup, batch: Batch
) -> None:
    optimizer = made.setup.copy()
    held = [p for group in optimizer.build_optimizer().param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in optimizer.model.parameters() if p.requires_grad}
    assert len(held) == len({id(p) for p in held})


def is_made_by_its_code(remedy: Remedy, made: Change, setup: Setup, batch: Batch) -> None:
    own = setup.copy()
    names: dict[str, Any] = {"model": own.model, "loss_fn": own.loss_fn, "optimizer": own.build_optimizer()}
    text = "\n".join(edit.code for edit in made.edits)
    assert "gradmend" not in definitions(text) + text
    torch.manual_seed(SEED)
    exec(f"{definitions(text)}\n{text}", names)
    assert torch.equal(output(names["model"], batch), output(made.setup.model, batch))
    assert_same(names["model"].state_dict(), made.setup.model.state_dict())
    if made.setup.schedule is None:
        assert _settings(names["optimizer"]) == _settings(made.setup.copy().build_optimizer())


def _settings(optimizer: Optimizer) -> tuple[type, list[tuple[float, float]]]:
    return type(optimizer), [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]


def trains_and_is_taken_back_by_what_was_given(
    remedy: Remedy, made: Change, setup: Setup, batch: Batch
) -> None:
    """The last check: it trains the change itself, of which the setup given must feel nothing."""
    step, losses = Stepper(made.setup), []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(step([batch]).item())
    assert torch.tensor(losses).isfinite().all()
    assert losses[0] != losses[1]


CHECKS: tuple[Check, ...] = (
    shares_nothing_with_what_was_given,
    keeps_shape_dtype_and_modes,
    does_nothing_the_second_time,
    can_be_saved_and_copied,
    keeps_the_optimizer_paired_with_its_parameters,
    is_made_by_its_code,
    trains_and_is_taken_back_by_what_was_given,
)

REFUSED = [(f"{norm}()", "tied") for norm in ("BatchNorm", "LayerNorm", "RMSNorm")] + [
    ("GroupNorm(groups=8)", "tied")
]
PAIRS = [(r, name) for r in ALL for name in cases_of(ALL[r]) if (r, name) not in REFUSED]
every_remedy = pytest.mark.parametrize("remedy", ALL)


@pytest.mark.parametrize(("remedy", "name"), PAIRS)
def test_keeps_its_promises(remedy: str, name: str) -> None:
    (setup, batch), wanted = case(name), before(name)
    untouched = trace(setup)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = ALL[remedy].apply(setup, batch)
    assert_same(trace(setup), untouched)
    assert [w.category for w in caught] == [] if made.edits else [NoEffectWarning]
    if not ALL[remedy].applies_to(setup, anatomy(name)):
        assert made.edits == ()
    if made.edits:
        for check in CHECKS:
            check(ALL[remedy], made, setup, batch)
    else:
        assert_equal(made.setup, setup)
    assert_same(lasting(setup), wanted)


@pytest.mark.parametrize(("remedy", "name"), REFUSED)
def test_refuses_to_break_a_model_that_uses_the_weights_of_a_layer(remedy: str, name: str) -> None:
    setup, batch = case(name)
    with pytest.raises(SetupError, match="'After' object has no attribute 'weight'"):
        ALL[remedy].apply(setup, batch)
    assert_same(lasting(setup), before(name))


# What holds for each remedy


def changed(remedy: str) -> tuple[str, Change]:
    """The first case that it changes."""
    return next((n, made) for n in cases_of(ALL[remedy]) if (made := change(remedy, n)).edits)


@pytest.mark.slow
@every_remedy
def test_changes_something_and_compiles(remedy: str) -> None:
    name, made = changed(remedy)
    if _foreign(made.setup) <= _foreign(case(name)[0]):
        return  # it put nothing but torch's own layers into the model
    model, batch = copy.deepcopy(made.setup.model).eval(), case(name)[1]
    torch._dynamo.reset()
    with warnings.catch_warnings(action="ignore"):  # what dynamo says of parametrizations and hooks
        compiled = torch.compile(model, backend="eager")(batch[0])
    torch.testing.assert_close(compiled, model(batch[0]))


def _foreign(setup: Setup) -> set[type[nn.Module]]:
    """The kinds of modules that are not torch's."""
    return {type(m) for m in setup.model.modules() if not type(m).__module__.startswith("torch.nn.modules")}


@every_remedy
def test_keeps_the_optimizer_state_of_what_it_leaves(remedy: str) -> None:
    (setup, _), made = case("live"), change(remedy, "live").setup
    if not isinstance(made.optimizer, Optimizer):
        return
    assert isinstance(setup.optimizer, Optimizer)
    old, new = (
        {name: s.optimizer.state[p] for name, p in s.model.named_parameters() if p in s.optimizer.state}  # type: ignore[union-attr]
        for s in (setup, made)
    )
    for name in old.keys() & new.keys():
        assert_same(new[name], old[name])
    assert new


DRAWS = (Initialization, remedies.LSUV, remedies.SelfNormalizing, Tailor)
PRESERVE = ("SigmoidAsTanh", "WeightNorm", "DenseConnections")
GATES = ("ForgetBias", "Chrono", "OrthogonalRecurrence", "IdentityRecurrence", "Gated")
RESCALE = ("CalmAttention", "OutputUnits", *GATES)


@every_remedy
def test_keeps_learned_weights_unless_it_draws_new_ones(remedy: str) -> None:
    name, made = changed(remedy)
    setup, batch = case(name)
    kind = type(ALL[remedy])
    if kind.__name__ in PRESERVE:
        torch.testing.assert_close(output(made.setup.model, batch), output(setup.model, batch))
    elif not issubclass(kind, DRAWS) and kind.__name__ not in RESCALE:
        held = [p.detach() for p in made.setup.model.parameters()]
        assert all(any(torch.equal(p, other) for other in held) for p in setup.model.parameters())
    else:
        assert "Learned weights are lost" in _card(kind) or "learned" in _card(kind)


def _card(kind: type[Remedy]) -> str:
    return (kind.__doc__ or "") + (remedies.initialization.__doc__ or "")


@every_remedy
def test_its_repr_rebuilds_it(remedy: str) -> None:
    assert eval(remedy, vars(remedies)) == ALL[remedy]
    found = change(remedy, "plain").remedy
    assert eval(repr(found), vars(remedies)) == found


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
