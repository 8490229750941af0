"""Measuring touches nothing that the user has, also when it fails, and training goes on bit by bit."""

# ruff: noqa: ARG005  # lambdas that stand for hooks and forward passes take what these take

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals
from torch.nn.utils import parametrizations
from torch.optim import optimizer as optimizer_globals
from torch.utils.data import DataLoader, TensorDataset

import gradmend as gm
from helpers import ADAM, SGD, Net, assert_same, blobs, plain

CE = nn.CrossEntropyLoss()
LOOKS = [gm.measure, gm.diagnose]
Forward = Callable[[Any, Tensor], Any]


def belongings(model: nn.Module, *others: Any) -> dict[str, Any]:
    """All that a user could look at of a model, an optimizer, schedules, and torch itself."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    named = dict(model.named_modules())
    return {
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "tensors": {name: (id(t), t.requires_grad, t._version) for name, t in tensors.items()},
        "grad": {
            name: (id(t.grad), None if t.grad is None else t.grad.clone()) for name, t in tensors.items()
        },
        "tensor hooks": {name: _hooks(t) for name, t in tensors.items()},
        "modules": {name: (id(m), m.training, _hooks(m)) for name, m in named.items()},
        "attributes": {name: _attributes(m) for name, m in named.items()},
        "others": [_state(other) for other in others],
        "torch": _torch(),
    }


def _hooks(holder: Any) -> dict[str, list[int]]:
    found = {key: getattr(holder, key) for key in dir(holder) if "hooks" in key and key.startswith("_")}
    return {key: list(map(id, value.values())) for key, value in found.items() if isinstance(value, dict)}


def _attributes(module: nn.Module) -> dict[str, Any]:
    own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    return {key: _frozen(value) for key, value in own.items()}


def _frozen(value: Any) -> Any:
    """A copy that a later change does not reach."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value


def _state(other: Any) -> Any:
    if isinstance(other, Tensor):
        grad = other.grad if other.is_leaf else None
        return id(other), other.detach().clone(), other._version, other.requires_grad, grad
    if isinstance(other, torch.Generator):
        return other.get_state()
    state = other.state_dict()
    if not isinstance(other, torch.optim.Optimizer):
        return _frozen(state)
    held = [[id(p) for p in group["params"]] for group in other.param_groups]
    memory = [{k: _frozen(v) for k, v in part.items()} for part in state["state"].values()]
    return held, _frozen(state["param_groups"]), memory, _hooks(other), getattr(other, "_opt_called", None)


def _torch() -> dict[str, Any]:
    return {
        "hooks": _hooks(module_globals),
        "optimizer hooks": _hooks(optimizer_globals),
        "random": (torch.get_rng_state(), np.random.get_state()[1].copy()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "cache": torch.is_autocast_cache_enabled(),
        "dtype": (torch.get_default_dtype(), torch.get_default_device()),
        "exact": (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        "threads": torch.get_num_threads(),
        "warnings": list(warnings.filters),
        "modes": len(torch.overrides._get_current_function_mode_stack()),
        "init": id(nn.Module.__init__),
    }


# ---- models of every sort ---------------------------------------------------------------------------------


def normed() -> nn.Module:
    """In the midst of things: a part in eval mode, a frozen part, hooks of all kinds."""
    model = nn.Sequential(
        *(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 8)),
        *(nn.BatchNorm1d(8), nn.Linear(8, 3)),
    )
    model[5].eval()
    model[5].requires_grad_(False)
    model[3].register_forward_pre_hook(lambda *_: None)
    model[3].register_forward_hook(lambda *_: None)
    model[4].register_full_backward_pre_hook(lambda *_: None)
    model[4].register_full_backward_hook(lambda *_: None)
    model[4].weight.register_hook(lambda g: None)
    model[4].weight.register_post_accumulate_grad_hook(lambda p: None)
    return model


def spectral() -> nn.Module:
    parts = [parametrizations.spectral_norm(nn.Linear(8, 8)) for _ in range(2)]
    return nn.Sequential(parts[0], nn.Tanh(), parts[1], nn.Linear(8, 3))


def old_norms() -> nn.Module:
    """They recompute a plain attribute, the weight, in a hook before each forward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        first = torch.nn.utils.weight_norm(nn.Linear(8, 8))
    return nn.Sequential(first, nn.Tanh(), torch.nn.utils.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 3))


def remembering() -> nn.Module:
    """Keeps its state between passes in plain attributes: a number, a tensor, a list."""

    def forward(net: Any, x: Tensor) -> Tensor:
        net.calls += 1
        h = torch.tanh(net.inner(x) + net.state)
        net.log.append(net.calls)
        net.last = h
        net.state = h.detach().mean(dim=0) / net.calls
        net.sums.add_(h.detach().sum())
        return net.out(h)

    attributes = {"calls": 0, "log": [], "last": None, "state": torch.zeros(8), "sums": torch.zeros(())}
    return Net(forward, inner=nn.Linear(8, 8), out=nn.Linear(8, 3), **attributes)


def shortened() -> nn.Module:
    """An embedding that shortens its own weights in forward."""
    return Net(
        lambda m, x: m.out(x + m.table(x.argmax(dim=1))),
        table=nn.Embedding(8, 8, max_norm=0.1),
        out=nn.Linear(8, 3),
    )


def noisy() -> nn.Module:
    """Draws from numpy and from torch."""
    return Net(
        lambda m, x: m.out(torch.tanh(m.inner(x * float(np.random.normal(1, 0.1)) + torch.randn_like(x)))),
        inner=nn.Linear(8, 8),
        out=nn.Linear(8, 3),
    )


def writing() -> nn.Module:
    """Replaces a buffer, writes to another, and multiplies by a third."""

    def forward(net: Any, x: Tensor) -> Tensor:
        net.count = net.count + 1
        net.mean.lerp_(x.mean(dim=0), 0.1)
        return net.out(net.inner(x - net.mean) * net.scale)

    model = Net(forward, inner=nn.Linear(8, 8), out=nn.Linear(8, 3))
    model.register_buffer("count", torch.zeros(()))
    model.register_buffer("mean", torch.zeros(8))
    model.register_buffer("scale", torch.ones(8))
    return model


def compiled() -> nn.Module:
    return torch.compile(plain(2, nn.Tanh), backend="eager")  # type: ignore[return-value]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "normed": normed,
    "spectral": spectral,
    "old norms": old_norms,
    "remembering": remembering,
    "shortened": shortened,
    "noisy": noisy,
    "writing": writing,
    "compiled": compiled,
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("kind", MODELS)
def test_nothing_changes(kind: str, look: Any) -> None:
    model, (x, y) = MODELS[kind](), blobs()
    live = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    live.register_step_post_hook(lambda *_: None)
    schedule = torch.optim.lr_scheduler.StepLR(live, 1)
    for _ in range(2):
        CE(model(x), y).backward()
        live.step()
        schedule.step()
    held = model(x)  # with its graph, as users hold the loss of the step that they are in
    mine = (live, schedule, x, y, held)
    before = belongings(model, *mine)
    look(gm.Setup(model, CE, live), (x, y))
    assert_same(before, belongings(model, *mine))


# ---- failures ---------------------------------------------------------------------------------------------


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stop: Callable[..., Any]) -> Tensor:
        ctx.stop = stop
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]  # noqa: ARG004
        return ctx.stop()


class BrokenOptimizer(torch.optim.SGD):
    stop: Callable[..., Any]

    def step(self, closure: Any = None) -> Any:
        return self.stop()


def broken(place: str, stop: Callable[..., Any]) -> gm.Setup:
    """A setup that calls `stop` in one place of a training step."""
    passes: list[int] = []

    def forward(net: Any, x: Tensor) -> Tensor:
        passes.append(1)
        if place == "own line" or (place == "third pass" and len(passes) >= 3):
            stop()
        h = net.body(x)
        if place == "tensor hook":
            h.register_hook(stop)
        return net.out(Broken.apply(h, stop) if place == "backward" else h)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return stop() if place == "loss" else CE(output, target)

    bad = Net(lambda m, x: stop())
    good = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8)]
    at = {"first module": 0, "middle module": 2, "last module": 4}.get(place)
    body = nn.Sequential(*good) if at is None else nn.Sequential(*good[:at], bad, *good[at:])
    model = Net(forward, body=body, out=nn.Linear(8, 3))
    if place in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        getattr(body[3], f"register_{place}")(stop)
    if place == "parameter hook":
        body[0].weight.register_hook(stop)
    kind = BrokenOptimizer if place == "optimizer" else torch.optim.SGD
    live = kind(model.parameters(), lr=0.1, momentum=0.9)
    live.stop = stop  # type: ignore[union-attr]
    for p in model.parameters():
        live.state[p]["momentum_buffer"] = torch.ones_like(p)
        p.grad = torch.ones_like(p)
    transform = stop if place == "transform" else None
    return gm.Setup(model, loss, stop if place == "factory" else live, gradient_transform=transform)


PLACES = (
    *("first module", "middle module", "last module", "own line", "third pass", "loss"),
    *("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"),
    *("tensor hook", "parameter hook", "backward", "transform", "optimizer", "factory"),
)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", PLACES)
def test_nothing_changes_by_a_failure(place: str, error: type[BaseException], look: Any) -> None:
    def stop(*_: Any) -> Any:
        raise error("on purpose")

    setup, (x, y) = broken(place, stop), blobs()
    mine = [x, y] if place == "factory" else [x, y, setup.optimizer]
    before = belongings(setup.model, *mine)
    expected = gm.GradmendError if error is RuntimeError else error
    with pytest.raises(expected, match="on purpose"):
        look(setup, [(x, y)] * 3)
    assert_same(before, belongings(setup.model, *mine))


# ---- settings of torch ------------------------------------------------------------------------------------

SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "anomaly": partial(torch.autograd.detect_anomaly, check_nan=False),
    "device": partial(torch.device, "cpu"),
    "function mode": torch.overrides.BaseTorchFunctionMode,
    "saved tensors": partial(torch.autograd.graph.saved_tensors_hooks, lambda t: t, lambda t: t),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_stay_and_are_respected(name: str) -> None:
    model, (x, y) = plain(2, nn.Tanh), blobs()
    setup = gm.Setup(model, CE, SGD)
    plainly = gm.measure(setup, (x, y))
    with SETTINGS[name]():
        before = belongings(model, x)
        found = gm.diagnose(setup, (x.clone(), y)).profile
        assert_same(before, belongings(model, x))
    slack = 0.05 if name == "autocast" else 1e-6  # bfloat16 keeps 8 bits
    for a, b in zip(plainly.sites, found.sites, strict=True):
        assert (a.rms, a.gradient) == pytest.approx((b.rms, b.gradient), rel=slack)


@pytest.fixture
def _other_defaults() -> Any:
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_other_defaults")
def test_other_defaults_stay() -> None:
    model, (x, y) = plain(2, nn.ReLU), blobs()
    before = belongings(model)
    assert gm.diagnose(gm.Setup(model, CE, SGD), (x.double(), y)).profile.loss > 0
    assert_same(before, belongings(model))


def test_hooks_of_the_user_see_the_measured_pass_once() -> None:
    """They may change the signal, so they run; what they count in a variable of theirs counts on."""
    model, batch, seen = plain(2, nn.Tanh), blobs(), []
    model[2].register_forward_hook(lambda *_: seen.append("forward"))
    model[2].register_full_backward_hook(lambda *_: seen.append("backward"))
    model[2].weight.register_hook(lambda g: seen.append("gradient"))
    model[2].weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    everywhere = [
        module_globals.register_module_forward_hook(lambda m, *_: seen.append("all") if m is model else None),
        optimizer_globals.register_optimizer_step_pre_hook(lambda *_: seen.append("step")),
    ]
    gm.measure(gm.Setup(model, CE, ADAM), batch)
    for handle in everywhere:
        handle.remove()
    assert sorted(seen) == ["all", "backward", "forward", "gradient"]


def test_hooks_that_change_the_signal_are_part_of_the_model() -> None:
    model, (x, y) = plain(2, nn.Tanh), blobs()
    model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    model[2].weight.register_hook(lambda g: 5 * g)
    profile = gm.measure(gm.Setup(model, CE), (x, y))
    CE(model(x), y).backward()
    for reading, p in zip(profile.parameters, model.parameters(), strict=True):
        assert reading.gradient == pytest.approx(p.grad.double().square().mean().sqrt().item(), rel=1e-4)


# ---- the batch and its loader -----------------------------------------------------------------------------


def test_a_batch_that_forward_overwrites() -> None:
    """As `x.sub_(mean)` or an in-place ReLU in front does: every pass starts from the user's numbers."""
    model, (x, y) = nn.Sequential(nn.ReLU(inplace=True), plain(1, nn.Tanh)), blobs()
    setup = gm.Setup(Net(lambda m, x: m.net(x.mul_(3)), net=model), CE, SGD)
    before = x.clone()
    loss = CE(model(3 * x), y).item()
    for look in LOOKS:
        assert getattr(look(setup, (x, y)), "profile", gm.measure(setup, (x, y))).loss == pytest.approx(loss)
        assert torch.equal(x, before)


class Augmented(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.randn(8) + float(np.random.normal()), row % 3


@pytest.mark.parametrize("look", LOOKS)
def test_loaders_give_the_same_batches_afterwards(look: Any) -> None:
    setup, own = gm.Setup(plain(1, nn.Tanh), CE, SGD), torch.Generator().manual_seed(3)
    loader = DataLoader(Augmented(), batch_size=16, shuffle=True, generator=own)
    before = own.get_state(), torch.get_rng_state(), np.random.get_state()[1].copy()
    look(setup, loader)
    assert_same(before, (own.get_state(), torch.get_rng_state(), np.random.get_state()[1]))


# ---- training goes on -------------------------------------------------------------------------------------

MOMENTS = ("before forward", "before backward", "before step")


def trained(kind: str, moment: str | None, mixed: bool = False) -> Any:
    """Losses and final state of a short training, with a look in each step at one of its moments."""
    torch.manual_seed(0)
    np.random.seed(0)
    model = MODELS[kind]()
    live = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(live, 0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=mixed, init_scale=64.0)

    def step(net: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return CE(net(batch[0]), batch[1])

    setup, losses = gm.Setup(model, step=step, optimizer=live), []
    loader = DataLoader(TensorDataset(*blobs()), batch_size=32, shuffle=True)
    for batch in loader:
        _look_at(moment, "before forward", setup, batch)
        loss = setup.loss(batch)
        _look_at(moment, "before backward", setup, batch)
        scaler.scale(loss).backward()
        _look_at(moment, "before step", setup, batch)
        scaler.step(live)  # gradients accumulate: `.grad` is never cleared
        scaler.update()
        schedule.step()
        losses.append(loss.detach())
    return losses, model.state_dict(), live.state_dict(), schedule.state_dict(), torch.get_rng_state()


def _look_at(moment: str | None, now: str, setup: gm.Setup, batch: Any) -> None:
    if moment == now:
        gm.diagnose(setup, batch)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", MODELS)
def test_training_goes_on_bit_by_bit(kind: str, moment: str, mixed: bool) -> None:
    assert_same(trained(kind, None, mixed), trained(kind, moment, mixed))
