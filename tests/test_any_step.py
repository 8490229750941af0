"""Any training step: mixed precision, checkpoints, compiled and wrapped models, gradients of gradients."""

# lambdas that stand for a forward pass take what a forward pass takes

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import gradmend as gm
from gradmend.profile import Profile
from helpers import SGD, Net, assert_same, blobs, plain, trace

CE = nn.CrossEntropyLoss()
X, Y = blobs()


def rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def looked_at(setup: gm.Setup, batch: Any = (X, Y)) -> Profile:
    """A diagnosed profile that left no trace, with the gradients of a plain backward pass."""
    before = trace(setup)
    profile = gm.diagnose(setup, batch).profile
    assert_same(before, trace(setup))
    twin = setup.copy()
    twin.model.zero_grad()
    twin.loss(batch).backward()
    for reading, p in zip(profile.parameters, twin.model.parameters(), strict=True):
        assert reading.gradient == (None if p.grad is None else pytest.approx(rms(p.grad), rel=1e-4))
    return profile


def numbers(profile: Profile) -> list[tuple[Any, ...]]:
    return [(r.site.kind, r.rms, r.mean, r.gradient, r.weight_variance) for r in profile.sites]


def names(profile: Profile) -> list[str]:
    return [r.site.name for r in profile.sites]


# ---- train mode -------------------------------------------------------------------------------------------


def test_parts_that_the_user_set_to_eval_stay_in_eval() -> None:
    """`model.train()` and then `norm.eval()` is how a normalization is frozen: their step keeps it so."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 3))
    model[1].eval()
    model[2].eval()
    profile = looked_at(gm.Setup(model, CE, SGD))
    assert profile.sites[1].rms == pytest.approx(rms(model[1](model[0](X))), rel=1e-5)


def test_a_model_in_eval_mode_is_measured_as_it_trains() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    assert gm.measure(gm.Setup(model, CE), (X, Y)).sites[1].rms == pytest.approx(1, abs=1e-3)
    assert not any(module.training for module in model.modules())


# ---- checkpoints ------------------------------------------------------------------------------------------


def saving(net: Any, x: Tensor) -> Tensor:
    h = net.first(x)
    for block in (net.one, net.two):
        h = checkpoint(block, h, use_reentrant=net.reentrant) if net.checkpoints else block(h)
    return net.out(h)


def test_checkpoints_change_no_number() -> None:
    """Blocks with dropout, normalization, and an activation that no other test has: its first reading."""
    model = Net(
        saving,
        first=nn.Linear(8, 8),
        one=nn.Sequential(nn.Linear(8, 8), nn.CELU(0.37), nn.Dropout(0.3)),
        two=nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()),
        out=nn.Linear(8, 3),
        reentrant=False,
        checkpoints=True,
    )
    torch.manual_seed(0)
    with_them = looked_at(gm.Setup(model, CE, SGD))
    model.checkpoints = False
    torch.manual_seed(0)
    without = gm.measure(gm.Setup(model, CE, SGD), (X, Y))
    assert numbers(with_them) == numbers(without)
    assert names(with_them) == names(without)
    model.checkpoints = model.reentrant = True
    with pytest.raises(gm.GradmendError, match="use_reentrant=False"):
        gm.measure(gm.Setup(model, CE, SGD), (X, Y))


# ---- mixed precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scaled_loss_scales_the_gradients_and_an_unscaling_transform_undoes_it(dtype: torch.dtype) -> None:
    model = plain(2, nn.Tanh)

    def step(net: nn.Module, batch: Any, scale: float = 1.0) -> Tensor:
        with torch.autocast("cpu", dtype):
            return scale * CE(net(batch[0]), batch[1])

    def unscale(parameters: Any) -> None:
        for p in parameters:
            p.grad.div_(1024)

    one = looked_at(gm.Setup(model, step=step, optimizer=SGD))
    scaled = gm.Setup(model, step=partial(step, scale=1024.0), optimizer=SGD, gradient_transform=unscale)
    other = gm.measure(scaled, (X, Y))
    for a, b in zip(one.sites, other.sites, strict=True):  # half precision keeps 8 or 11 bits
        assert b.rms == a.rms
        assert b.gradient == pytest.approx(1024 * a.gradient, rel=0.01)
    for a, b in zip(one.parameters, other.parameters, strict=True):
        assert b.update_ratio == pytest.approx(a.update_ratio, rel=0.01)


# ---- compiled and wrapped models --------------------------------------------------------------------------


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("what", ["model", "in place", "part", "step"])
def test_compiled_models(what: str, called: bool) -> None:
    model = plain(2, nn.Tanh)
    plainly = looked_at(gm.Setup(model, CE, SGD))
    net: Any = torch.compile(model, backend="eager") if what == "model" else model
    if what == "in place":
        model.compile(backend="eager")
    if what == "part":
        model[0] = torch.compile(model[0], backend="eager")
    step = torch.compile(lambda m, b: CE(m(b[0]), b[1]), backend="eager") if what == "step" else None
    setup = gm.Setup(net, None if step else CE, SGD, step=step)
    if called:
        setup.loss((X, Y)).backward()
    assert numbers(gm.diagnose(setup, (X, Y)).profile) == numbers(plainly)
    loss = setup.loss((X, Y))
    assert loss.item() == pytest.approx(plainly.loss, rel=1e-6)
    loss.backward()


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_wrapped_models(wrap: Any) -> None:
    """Also between a forward pass and its backward pass, when gradients are about to be gathered."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    plainly = looked_at(gm.Setup(model, CE, SGD))
    setup = gm.Setup(wrap(model), CE, SGD)
    loss = setup.loss((X, Y))
    model.zero_grad()
    assert numbers(looked_at(setup)) == numbers(plainly)
    assert names(gm.measure(setup, (X, Y))) == [f"module.{name}" for name in names(plainly)]
    loss.backward()
    setup.loss((X, Y)).backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- functional models ------------------------------------------------------------------------------------


def stateless(m: nn.Module, batch: Any) -> Tensor:
    return CE(functional_call(m, dict(m.named_parameters()), (batch[0],)), batch[1])


def computed_weights(m: nn.Module, batch: Any) -> Tensor:
    """Weights that are functions of the parameters, as in meta-learning."""
    return CE(functional_call(m, {k: p * 1.0 for k, p in m.named_parameters()}, (batch[0],)), batch[1])


@pytest.mark.parametrize("step", [stateless, computed_weights])
def test_functional_call(step: Any) -> None:
    model = plain(2, nn.Tanh)
    plainly, called = (
        looked_at(gm.Setup(model, CE, SGD)),
        looked_at(gm.Setup(model, step=step, optimizer=SGD)),
    )
    for a, b in zip(plainly.sites, called.sites, strict=True):
        assert (a.site.name, a.rms, a.gradient) == (b.site.name, b.rms, pytest.approx(b.gradient))
        assert a.weight_variance == (a.weight_variance and pytest.approx(b.weight_variance, rel=1e-6))


def test_transforms_of_torch_func() -> None:
    """Sites inside of `vmap` see one sample at a time and are left out; the parameters are measured."""

    def step(m: nn.Module, batch: Any) -> Tensor:
        slopes = vmap(jacrev(lambda x: m(x)[0]))(batch[0])
        return CE(m(batch[0]), batch[1]) + slopes.square().mean()

    model = plain(2, partial(nn.Softplus, 0.73))  # an activation that no other test has: its first reading
    assert len(looked_at(gm.Setup(model, step=step, optimizer=SGD)).sites) == 5
    assert not looked_at(gm.Setup(model, step=lambda m, b: CE(vmap(m)(b[0]), b[1]))).sites
    series = nn.Sequential(nn.Linear(8, 8), nn.CELU(0.73), nn.Flatten(0), nn.Linear(16, 3))
    setup = gm.Setup(series, step=lambda m, b: CE(vmap(m)(b[0]), b[1]), optimizer=SGD)
    assert not looked_at(setup, (X.view(48, 2, 8), Y[:48])).sites


# ---- gradients of one's own -------------------------------------------------------------------------------


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return g @ weight.T, x.T @ g


def test_a_custom_function() -> None:
    """Inside of it autograd is off, so a gradient may be missing there; none is wrong."""
    model = Net(
        lambda m, x: m.out(torch.tanh(Product.apply(x, m.w))),
        w=nn.Parameter(torch.randn(8, 8) / 3),
        out=nn.Linear(8, 3),
    )
    profile = looked_at(gm.Setup(model, CE, SGD))
    hidden = (X @ model.w).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(CE(model.out(torch.tanh(hidden)), Y), hidden)
    assert profile.sites[0].rms == pytest.approx(rms(hidden), rel=1e-5)
    assert profile.sites[0].gradient in (None, pytest.approx(rms(gradient), rel=1e-4))


def penalty(m: nn.Module, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_()
    output = m(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return CE(output, batch[1]) + ((slope.norm(dim=1) - 1) ** 2).mean()


def balanced(m: Any, batch: Any) -> Tensor:
    """The loss is divided by the norm of its own gradient, taken before the measured backward pass."""
    loss = CE(m(batch[0]), batch[1])
    (g,) = torch.autograd.grad(loss, m[4].weight, retain_graph=True)
    return loss / g.norm()


def equation(m: nn.Module, batch: Any) -> Tensor:
    """A differential equation: the network's derivative by its input, at two calls of it."""
    x = batch[0].detach().requires_grad_()
    (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    return (slope + m(x)[:, :1]).square().mean() + (m(torch.zeros(1, 8)) - 1).square().mean()


@pytest.mark.parametrize("step", [penalty, balanced, equation])
def test_losses_with_gradients_inside(step: Any) -> None:
    """The gradient at a site is that of the loss, and not that of a backward pass on the way to it."""
    model = plain(2, nn.Tanh)
    setup = gm.Setup(model, step=step, optimizer=SGD)
    profile = looked_at(setup)
    twin, kept = setup.copy(), {}

    def keep(name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.setdefault(name, output)

    for name, module in twin.model.named_children():
        module.register_forward_hook(partial(keep, name))
    loss = twin.loss((X, Y))
    for output in kept.values():
        output.grad = None
    loss.backward()
    for name, output in kept.items():
        reading = next(r for r in profile.sites if r.site.name == name)
        assert reading.rms == pytest.approx(rms(output), rel=1e-5)
        expected = None if output.grad is None else pytest.approx(rms(output.grad), rel=1e-4)
        assert reading.gradient == expected


def test_a_batch_that_wants_gradients_gets_none() -> None:
    setup, x = gm.Setup(plain(2, nn.Tanh), CE, SGD), X.clone().requires_grad_()
    signal = (x * 2).tanh()  # of another model of the user's, which still wants its backward pass
    gm.diagnose(setup, [(x, Y), (signal, Y)])
    assert x.grad is None
    signal.sum().backward()
    torch.testing.assert_close(x.grad, 2 - 2 * (x * 2).tanh() ** 2)


# ---- optimizers -------------------------------------------------------------------------------------------


def test_two_summed_parameters_are_clipped_once_each() -> None:
    """Autograd hands out one tensor as the gradient of both."""
    shapes = {"w": (8, 8), "b": (8,), "c": (8,)}
    parts = {name: nn.Parameter(torch.randn(shape) / 3) for name, shape in shapes.items()}
    model = Net(lambda m, x: m.out(torch.tanh(x @ m.w + (m.b + m.c))), out=nn.Linear(8, 3), **parts)
    clip = partial(nn.utils.clip_grad_norm_, max_norm=0.1)
    profile = gm.measure(gm.Setup(model, CE, SGD, gradient_transform=clip), (X, Y))
    CE(model(X), Y).backward()
    clip(model.parameters())
    for reading, p in zip(profile.parameters, model.parameters(), strict=True):
        assert reading.update == pytest.approx(0.1 * rms(p.grad), rel=1e-3)


class Halving(torch.optim.SGD):
    """With attributes of its own, as many optimizers have that are not torch's."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.factor, self.steps = 0.5, [0]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.steps[0] += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(self.factor)  # in place, which must not reach anybody else
                p.sub_(group["lr"] * p.grad)


def test_optimizers_with_attributes_of_their_own() -> None:
    model = plain(2, nn.Tanh)
    live = Halving(model.parameters())
    for reading in looked_at(gm.Setup(model, CE, live)).parameters:
        assert reading.update == pytest.approx(0.05 * reading.gradient, rel=1e-3)
    assert live.steps == [0]
    assert gm.Setup(model, CE, live).copy().build_optimizer().factor == 0.5


# ---- other kinds of numbers -------------------------------------------------------------------------------


def test_complex_signals_are_no_sites_and_what_follows_is() -> None:
    """The input that is read is that of the first layer, and nobody's if that one is complex."""
    model = Net(
        lambda m, x: m.out((x.to(torch.complex64) @ m.w).abs()),
        w=nn.Parameter(torch.randn(8, 8, dtype=torch.complex64)),
        out=nn.Linear(8, 3),
    )
    profile = gm.diagnose(gm.Setup(model, CE, SGD), (100 * X, Y)).profile
    assert names(profile) == ["out"]
    assert profile.inputs is None


def test_only_complex_parameters_say_so() -> None:
    weight = nn.Parameter(torch.randn(8, 3, dtype=torch.complex64))
    model = Net(lambda m, x: (x.to(torch.complex64) @ m.w).abs(), w=weight)
    with pytest.raises(gm.GradmendError, match="complex"):
        gm.measure(gm.Setup(model, CE), (X, Y))


def test_complex_and_sparse_input() -> None:
    turned = Net(lambda m, x: m.out(torch.cat([x.real, x.imag], dim=1)), out=nn.Linear(16, 3))
    assert looked_at(gm.Setup(turned, CE, SGD), (torch.complex(X, X), Y)).sites[-1].site.fan_in == 16
    weight = nn.Parameter(torch.randn(8, 3) / 3)
    sparse = Net(lambda m, x: torch.sparse.mm(x, m.w), w=weight)
    assert looked_at(gm.Setup(sparse, CE, SGD), (X.relu().to_sparse(), Y)).parameters[0].gradient


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_ragged_batches(layout: torch.layout) -> None:
    """Sites with ragged signals are left out; loss and parameters are measured."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    ragged = torch.nested.nested_tensor([X[:3], X[3:8]], layout=layout)
    setup = gm.Setup(model, step=lambda m, b: torch.cat(m(b[0]).unbind()).square().mean(), optimizer=SGD)
    profile = looked_at(setup, (ragged,))
    assert profile.loss == pytest.approx(rms(model(X[:8])) ** 2, rel=1e-5)
    assert gm.diagnose(setup, (ragged,)).healthy
