"""What does not fit: an error that says what to type, or a finding; never a traceback of torch's own."""

# ruff: noqa: ARG005  # lambdas that stand for a forward pass, a loss or a step take what these take

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gradmend as gm
import helpers
from gradmend.causes import Cause
from gradmend.errors import BatchError, DataError, SetupError
from helpers import SGD, assert_same, blobs, plain, trace

CE, BCE = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()
X, Y = XY = blobs()
LOOKS = [gm.measure, gm.diagnose]


class Net(helpers.Net):
    """A forward pass given as a function of the module and the input, over these parts and others."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        usual = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "out": nn.Linear(8, 3)}
        super().__init__(forward, **usual | parts)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(8, 8, 3)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.layer(x, other)


class NoForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)


def linear(loss: Any = CE, optimizer: Any = SGD, **others: Any) -> gm.Setup:
    return gm.Setup(nn.Linear(8, 3), loss, optimizer, **others)


def returning(value: Callable[[Tensor], Any]) -> gm.Setup:
    return gm.Setup(Net(lambda m, x: value(m.out(x))), CE, SGD)


def stepping(step: Any) -> gm.Setup:
    return linear(None, step=step)


def on_meta(name: str) -> gm.Setup:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3))
    model.get_submodule(name).to("meta")
    return gm.Setup(model, CE, SGD)


def sparse(optimizer: Any) -> gm.Setup:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(28, 3))
    return gm.Setup(model, CE, lambda parameters: optimizer(parameters[:1]))


def words(numbers: Any = 3) -> tuple[Tensor, Tensor]:
    return torch.full((8, 7), numbers), Y[:8]


def doubled(batch: Any) -> Any:
    return tuple(t.double() if t.is_floating_point() else t for t in batch)


def lazily_normed() -> gm.Setup:
    return gm.Setup(
        nn.Sequential(nn.Linear(8, 8), nn.LazyBatchNorm1d(affine=False), nn.Linear(8, 3)), CE, SGD
    )


MISFITS: dict[str, tuple[Callable[[], gm.Setup], Any, type[Exception], str]] = {
    # what is given as a batch
    "nothing": (linear, None, DataError, "neither a batch nor an iterable"),
    "object": (linear, object(), DataError, "of a class of your own goes into a list"),
    "array": (linear, X.numpy(), DataError, r"torch\.as_tensor"),
    "arrays": (linear, (X.numpy(), Y.numpy()), BatchError, r"torch\.as_tensor\(x\)"),
    "lists": (linear, (X.tolist(), Y.tolist()), BatchError, r"torch\.as_tensor\(x\)"),
    "text": (linear, (["a", "b"], Y[:2]), BatchError, "turn it into numbers"),
    "target as text": (linear, (X[:2], ["a", "b"]), BatchError, "turn it into numbers"),
    "empty dict": (partial(linear, None), {}, BatchError, "cannot take the input {}"),
    "dict with a loss": (
        linear,
        {"input": X, "y": Y},
        BatchError,
        "returns its `.loss`, leave out `loss_fn`",
    ),
    "no columns": (linear, (X[:, :0], Y), DataError, r"have no values: shape \[96, 0\]"),
    "second batch empty": (linear, [XY, (X[:0], Y[:0])], DataError, "no rows"),
    "meta batch": (linear, (X.to("meta"), Y), DataError, "inputs of this batch are on the meta device"),
    "meta target": (linear, (X, Y.to("meta")), DataError, "targets of this batch are on the meta device"),
    "sparse NaN": (linear, ((X * torch.nan).to_sparse(), Y), DataError, "768 values that are NaN"),
    "float64": (linear, doubled(XY), BatchError, r"torch\.float64.*x\.to\(torch\.float32\)"),
    "float64 images": (
        lambda: gm.Setup(nn.Sequential(nn.Conv1d(1, 3, 8), nn.Flatten()), CE),
        (X[:, None].double(), Y),
        *(BatchError, r"x\.to\(torch\.float32\)"),
    ),
    "float words": (
        partial(sparse, torch.optim.SGD),
        words(1.0),
        BatchError,
        r"integers: type `x\.long\(\)`",
    ),
    # what the model takes and returns
    "one input too few": (lambda: gm.Setup(TwoInputs(), CE), XY, BatchError, r"forward takes \(x, other\)"),
    "one input too many": (
        lambda: gm.Setup(TwoInputs(), CE),
        (X, X, X, Y),
        BatchError,
        r"takes \(x, other\)",
    ),
    "unknown name": (lambda: gm.Setup(TwoInputs()), {"x": X, "z": X}, BatchError, "each entry by its name"),
    "no forward": (lambda: gm.Setup(NoForward(), CE), XY, BatchError, "Write its `forward`"),
    "a list of layers": (
        lambda: gm.Setup(nn.ModuleList([nn.Linear(8, 3)]), CE),
        XY,
        BatchError,
        "Sequential",
    ),
    "returns None": (partial(returning, lambda o: None), XY, BatchError, "needs a `return`"),
    "returns a tuple": (partial(returning, lambda o: (o, o)), XY, BatchError, r"output\[0\]"),
    "returns a dict": (
        partial(returning, lambda o: {"logits": o}),
        XY,
        BatchError,
        "Pick what the loss takes",
    ),
    "meta layer": (
        partial(on_meta, "2"),
        XY,
        SetupError,
        "2 are on the meta device, the first is `2.weight`",
    ),
    "meta buffers": (partial(on_meta, "1"), XY, SetupError, "the first is `1.running_mean`"),
    "lazy buffers": (lazily_normed, XY, SetupError, "lazy layers"),
    # the target
    "float classes": (linear, (X, Y.float()), BatchError, r"y\.long\(\)"),
    "classes from 1": (linear, (X, Y + 1), BatchError, "from 0 to 2 here; the target holds 1 to 3"),
    "int64 for BCE": (partial(linear, BCE), (X, F.one_hot(Y)), BatchError, r"y\.float\(\)"),
    "no probabilities": (
        partial(linear, nn.BCELoss()),
        (X, F.one_hot(Y).float()),
        BatchError,
        "between 0 and 1",
    ),
    # the loss
    "loss None": (partial(linear, lambda o, t: None), XY, BatchError, "not NoneType. Return the loss alone"),
    "loss complex": (
        partial(linear, lambda o, t: CE(o, t) * 1j),
        XY,
        BatchError,
        r"real number.*`\.abs\(\)`",
    ),
    "loss counts": (
        partial(linear, lambda o, t: (o.argmax(1) != t).sum()),
        XY,
        BatchError,
        "has no gradient",
    ),
    "loss of none": (partial(linear, lambda o, t: o[:0]), XY, BatchError, r"not float32 \[0, 3\]"),
    # the step
    "step with one argument": (
        partial(stepping, lambda b: 0),
        XY,
        BatchError,
        r"`step\(model, batch\)` fails",
    ),
    "step misfits": (partial(stepping, lambda m, b: m(b)), XY, BatchError, r"fails on the batch \(float32"),
    "step runs backward": (
        partial(stepping, lambda m, b: (loss := CE(m(b[0]), b[1])).backward() or loss),
        XY,
        *(BatchError, r"`backward\(\)`"),
    ),
    # the optimizer
    "factory fails": (
        partial(linear, CE, partial(torch.optim.SGD, lr=-1)),
        XY,
        SetupError,
        "learning rate: -1",
    ),
    "factory takes none": (partial(linear, CE, lambda: None), XY, SetupError, "a function of the parameters"),
    "transform fails": (
        lambda: linear(gradient_transform=lambda p: p[0].grad.view(7)),
        XY,
        *(SetupError, "`gradient_transform` fails"),
    ),
    "Adam and sparse": (partial(sparse, torch.optim.Adam), words(), SetupError, "Adam cannot step: .*sparse"),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("name", MISFITS)
def test_misfits_say_what_to_type(name: str, look: Any) -> None:
    make, batch, error, says = MISFITS[name]
    setup = make()
    state = None if "meta" in name or "lazy" in name else trace(setup)
    with pytest.raises(error, match=f"(?s){says}"):
        look(setup, batch)
    if state:
        assert_same(state, trace(setup))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"loss_fn": "ce"}, "such as `nn.CrossEntropyLoss"),
        ({"loss_fn": nn.CrossEntropyLoss}, r"type `CrossEntropyLoss\(\)`"),
        ({"optimizer": "sgd"}, r"partial\(torch\.optim\.SGD, lr=0\.1\)`, not 'sgd'"),
        ({"schedule": 3}, "`schedule` is a function, not 3"),
        ({"gradient_transform": 1.0}, "`gradient_transform` is a function, not 1.0"),
        ({"step": "loss"}, "`step` is a function"),
    ],
)
def test_parts_of_a_setup_that_are_none(arguments: dict[str, Any], says: str) -> None:
    setup = gm.Setup(nn.Linear(8, 3))
    for name, value in arguments.items():  # past the type checks of the tests, which users do not have
        object.__setattr__(setup, name, value)
    with pytest.raises(SetupError, match=says):
        setup.__post_init__()


def test_a_step_that_trains_is_stopped_before_it_does() -> None:
    model = nn.Linear(8, 3)
    live = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(net: nn.Module, batch: Any) -> Tensor:
        loss = CE(net(batch[0]), batch[1])
        loss.backward()
        live.step()
        return loss

    setup = gm.Setup(model, step=step, optimizer=live)
    before = trace(setup)
    with pytest.raises(gm.GradmendError, match=r"optimizer\.step\(\)"):
        gm.measure(setup, (X, Y))
    assert_same(before, trace(setup))


# ---- loaders ----------------------------------------------------------------------------------------------


def test_a_generator_can_be_used_once() -> None:
    batches, setup = iter([(X, Y), (X, Y)]), linear()
    assert gm.measure(setup, batches).samples == 192
    with pytest.raises(DataError, match="a generator was not used up before"):
        gm.measure(setup, batches)
    assert gm.diagnose(setup, repeat((X, Y))).profile.samples == 2 * 96  # without end: the first few


@pytest.mark.parametrize("rows", [[torch.zeros(8), torch.zeros(9)], [object(), object()]])
def test_rows_that_make_no_batch(rows: list[Any]) -> None:
    with pytest.raises(DataError, match=r"(?s)gives no batch: .*collate_fn"):
        gm.measure(linear(), DataLoader(rows, batch_size=2))


def test_a_loader_that_fails_of_itself() -> None:
    def failing() -> Iterator[Any]:
        yield X, Y
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        gm.measure(linear(), failing())


# ---- numbers that are none --------------------------------------------------------------------------------


def overflow(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x)).sign() * 3e38
    return net.out(torch.relu(net.b(h)))


def divided(net: Any, x: Tensor) -> Tensor:
    h = torch.relu(net.a(x)) * torch.inf
    return net.out(torch.relu(net.b(h)))


def nothing_left(net: Any, x: Tensor) -> Tensor:
    h = net.a(x).masked_fill(x > -torch.inf, -torch.inf)
    return net.out(net.b(torch.softmax(h, dim=1)))


def normalized(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    h = F.batch_norm(h, torch.zeros(8), -torch.ones(8))
    return net.out(torch.relu(h))


def steep(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    h = torch.tanh(h)
    return net.out(net.b((h - h.detach()).sqrt()))


def wild(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x))
    return net.out(F.gelu(net.b(h)) + 0 * (h - h).sqrt())


@pytest.mark.parametrize(
    ("forward", "site", "line", "way"),
    [
        (overflow, "b", 2, "output"),
        (divided, "mul", 1, "output"),
        (nothing_left, "softmax", 2, "output"),
        (normalized, "batch_norm", 2, "output"),
        (steep, "sub", 3, "gradient"),
        (wild, "sub", 2, "gradient"),
    ],
)
def test_the_first_site_that_is_not_finite_is_named(forward: Any, site: str, line: int, way: str) -> None:
    """And no other finding is made of numbers that are none."""
    model = Net(forward)
    with torch.no_grad():
        model.b.weight.copy_(model.b.weight.abs() + 1)
    found = gm.diagnose(gm.Setup(model, CE, SGD), (X, Y))
    finding = found.findings[0]
    assert finding.cause is Cause.NON_FINITE
    assert finding.sites == (site,)
    assert finding.where == (f"{__file__}:{inspect.getsourcelines(forward)[1] + line}",)
    assert f"The first {way}" in finding.sentence
    assert not found.causes & {Cause.DEAD_UNITS, Cause.SATURATED_UNITS, Cause.INFORMATION_COLLAPSE}
    assert str(found)


def test_weights_that_are_not_finite() -> None:
    model = plain(3, nn.ReLU)
    model[2].bias.data[3] = torch.nan
    found = gm.diagnose(gm.Setup(model, CE, SGD), (X, Y))
    assert found.findings[0].sites == ("2",)
    assert found.causes == {Cause.NON_FINITE}
    lost = [r for r in found.profile.sites if r.site.index > 3]
    assert all(not r.zero or math.isnan(r.zero) for r in lost)  # what is no number is not zero


@pytest.mark.parametrize(
    "loss",
    [lambda o, t: CE(o, t) * torch.nan, lambda o, t: CE(o, t) / 0.0, lambda o, t: CE(o, t.fill_(-100))],
    ids=["NaN", "infinite", "all ignored"],
)
def test_a_loss_that_is_not_finite_is_named_itself(loss: Any) -> None:
    found = gm.diagnose(gm.Setup(plain(2, nn.Tanh), loss, SGD), (X, Y.clone()))
    assert found.findings[0].cause is Cause.NON_FINITE
    assert found.findings[0].sites == ()
    assert "the loss" in found.findings[0].sentence


def test_a_transform_that_refuses_what_is_not_finite_leaves_the_finding() -> None:
    clip = partial(nn.utils.clip_grad_norm_, max_norm=1.0, error_if_nonfinite=True)
    setup = gm.Setup(Net(steep), CE, SGD, gradient_transform=clip)
    found = gm.diagnose(setup, (X, Y))
    assert found.causes == {Cause.NON_FINITE}
    assert {p.update for p in found.profile.parameters} == {None}


def test_an_infinity_that_reaches_neither_loss_nor_parameters_is_no_illness() -> None:
    """Minus infinity in a mask before softmax; the slope of a root at zeros that a ReLU cuts off."""

    def attend(net: Any, x: Tensor, mask: Tensor) -> Tensor:
        scores = net.a(x) @ x.T / 3 + mask  # both carry the signal of the batch
        return net.out(torch.softmax(scores, dim=1) @ net.b(x))

    def rooted(net: Any, x: Tensor) -> Tensor:
        return net.out(torch.relu(net.a(x)).sqrt())

    mask = torch.zeros(96, 96).masked_fill(torch.ones(96, 96).triu(1).bool(), -torch.inf)
    masked = gm.diagnose(gm.Setup(Net(attend), CE, SGD), (X, mask, Y))
    assert Cause.NON_FINITE not in {finding.cause for finding in masked.findings}
    assert Cause.NON_FINITE not in gm.diagnose(gm.Setup(Net(rooted), CE, SGD), (X, Y)).causes


@pytest.mark.parametrize("loss", [lambda o, t: CE(o, t) * 0, lambda o, t: (o[:0] - 1).sum() + 1])
def test_a_loss_without_any_gradient_is_not_healthy(loss: Any) -> None:
    assert not gm.diagnose(gm.Setup(plain(2, nn.Tanh), loss, SGD), (X, Y)).healthy


# ---- what looks bad and is not ----------------------------------------------------------------------------

GOOD: dict[str, tuple[Callable[[], gm.Setup], Any]] = {
    "several steps of time first": (
        lambda: gm.Setup(Net(lambda m, x: m.out(x).mean(dim=0)), CE),
        (X.view(12, 8, 8), Y[:8]),
    ),
    "one target per place": (
        lambda: gm.Setup(Net(lambda m, x: m.out(x).flatten(0, 1)), CE),
        (X.view(12, 8, 8), Y),
    ),
    "two sets for a step": (lambda: stepping(lambda m, b: m(b[0]).mean() - m(b[1]).mean()), (X, X[:7])),
    "nothing found in a picture": (
        lambda: stepping(lambda m, b: m(b[0]).sum() + b[1]["boxes"].sum()),
        (X, {"boxes": torch.zeros(0, 4)}),
    ),
    "a column of numpy": (
        lambda: stepping(lambda m, b: CE(m(b["x"]), b["y"])),
        {"x": X, "y": Y, "id": np.arange(96)},
    ),
    "a scalar in the batch": (lambda: stepping(lambda m, b: b[1] * CE(m(b[0]), Y)), (X, torch.tensor(0.5))),
}


@pytest.mark.parametrize("name", GOOD)
def test_unusual_batches_are_measured(name: str) -> None:
    make, batch = GOOD[name]
    setup = make()
    loss = setup.loss(batch).item()
    assert gm.diagnose(setup, batch).profile.loss == pytest.approx(loss, rel=1e-6)


def test_one_hook_registered_twice_runs_twice() -> None:
    model, seen = plain(1, nn.Tanh), []

    def hook(*_: Any) -> None:
        seen.append(1)

    handles = [model[0].register_forward_hook(hook), model[0].register_forward_hook(hook)]
    gm.measure(gm.Setup(model, CE), (X, Y))
    assert len(seen) == len(model[0]._forward_hooks) == len(handles)
