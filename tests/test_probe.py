"""Each reading against a slow twin in plain autograd; nothing of the user's is touched; theory agrees."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradmend as gm
from gradmend import stats
from gradmend.harmless import undisturbed
from gradmend.readings import Reading
from helpers import SGD, Functional, assert_parameter, blobs, plain, setups

KINDS = list(setups())
CE = nn.CrossEntropyLoss()
Log = list[tuple[Tensor, Tensor | None, Tensor | None]]
"""Per site in order of execution: the output, the input of an activation, the weight."""


def twin_of_modules(setup: gm.Setup, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
    """The first output of every leaf module by forward hooks, with its gradient retained."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        outputs.setdefault(name, output).retain_grad()

    for name, module in setup.model.named_modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # or it would overwrite what the hook before it keeps
        if not list(module.children()):
            module.register_forward_hook(partial(keep, name))
    value = setup.loss(batch)
    value.backward()
    return outputs, value


def pairs_cosine(x: Tensor) -> float:
    """The mean of the matrix of cosines off its diagonal, over the samples that are looked at."""
    rows = stats.some_samples(x.flatten(1))
    rows = rows[rows.norm(dim=1) > 0]
    rows = rows / rows.norm(dim=1, keepdim=True)
    off = ~torch.eye(len(rows), dtype=torch.bool)
    return (rows @ rows.T)[off].mean().item()


def share_of_zeros(x: Tensor) -> float:
    return (stats.some_samples(x.flatten(1)) == 0).double().mean().item()


def assert_reads(reading: Reading, signal: Tensor, gradient: Tensor | None) -> None:
    """Signals of float32 agree to about 1e-6, shares are counted in float32; gradients sum more terms."""
    x = signal.detach().double()
    assert reading.mean == pytest.approx(x.mean().item(), rel=1e-5, abs=1e-7)
    assert reading.rms == pytest.approx(x.square().mean().sqrt().item(), rel=1e-5)
    active = reading.site.kind == "activation"
    if active:
        assert reading.zero == pytest.approx(share_of_zeros(x), abs=1e-6)
    else:
        assert reading.cosine == pytest.approx(pairs_cosine(x), abs=1e-6, nan_ok=True)
    if gradient is None:
        assert reading.gradient is None
        return
    g = gradient.double()
    assert reading.gradient == pytest.approx(g.square().mean().sqrt().item(), rel=1e-4)
    if not active:
        assert reading.gradient_zero == pytest.approx(share_of_zeros(g), abs=1e-6)
        assert reading.gradient_cosine == pytest.approx(pairs_cosine(g), abs=1e-4, nan_ok=True)
    assert reading.gradient_norm == pytest.approx(g.norm().item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_module_sites_against_hooks(kind: str) -> None:
    setup, batch = setups()[kind]
    with undisturbed(setup.model):  # the same random numbers for both, so that dropout agrees
        profile = gm.measure(setup, batch)
        outputs, loss = twin_of_modules(setup.copy(), batch)
    assert profile.loss == pytest.approx(loss.item(), rel=1e-6)
    readings = {r.site.name: r for r in profile.sites if r.site.name in outputs}
    assert readings
    for name, reading in readings.items():
        assert_reads(reading, outputs[name], outputs[name].grad)


def functional_twin(model: Functional, x: Tensor) -> tuple[Tensor, Log]:
    """What `Functional.forward` computes, with every intermediate tensor kept and nothing in place."""
    log: Log = []

    def note(output: Tensor, given: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        output.retain_grad()
        log.append((output, given, weight))
        return output

    a = note(model.inner(x), None, model.inner.weight)
    h = note(torch.tanh(a), a)
    b = note(model.twice(h), None, model.twice.weight)
    h = note(h + note(torch.relu(b), b))
    c = note(h @ model.weight, None, model.weight)
    d = c + model.bias
    h = note(F.leaky_relu(d, 0.2), d)
    e = note(model.twice(h), None, model.twice.weight)
    h = note(torch.relu(e), e)
    return note(model.out(h), None, model.out.weight), log


def test_function_sites_against_explicit_tensors() -> None:
    """Sums, bare weights, the second call of a layer, and an in-place ReLU that overwrites its input."""
    setup, (x, y) = setups()["functional"]
    profile = gm.measure(setup, (x, y))
    twin = copy.deepcopy(setup.model)
    output, log = functional_twin(twin, x)
    CE(output, y).backward()
    by_output = sorted(log, key=lambda entry: [id(o) for o, _, _ in log].index(id(entry[0])))
    assert len(profile.sites) == len(by_output)
    for reading, (signal, before, weight) in zip(profile.sites, by_output, strict=True):
        assert_reads(reading, signal, signal.grad)
        assert (reading.saturation is None) is (before is None)
        if before is not None and reading.site.function == "tanh":
            slope = 1 - torch.tanh(before.detach()) ** 2
            assert reading.saturation == pytest.approx((slope < 0.01).double().mean().item(), abs=1e-3)
        if weight is not None:
            variance = reading.site.fan_in * weight.detach().double().square().mean().item()
            assert reading.weight_variance == pytest.approx(variance, rel=1e-6)
        else:
            assert reading.weight_variance is None


def test_bias_variance_counts_bare_biases() -> None:
    setup, batch = setups()["functional"]
    nn.init.normal_(setup.model.bias)
    nn.init.normal_(setup.model.inner.bias)
    by = {r.site.name: r for r in gm.measure(setup, batch).sites}
    for name, bias in (("inner", setup.model.inner.bias), ("matmul", setup.model.bias)):
        assert by[name].bias_variance == pytest.approx(bias.detach().square().mean().item(), rel=1e-6)


# ---- random architectures ---------------------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "relu": (nn.ReLU, F.relu),
    "relu in place": (partial(nn.ReLU, inplace=True), F.relu),
    "tanh": (nn.Tanh, torch.tanh),
    "gelu": (nn.GELU, F.gelu),
    "elu": (partial(nn.ELU, 0.7), lambda h: F.elu(h, 0.7)),
    "sigmoid": (nn.Sigmoid, Tensor.sigmoid),
}
LAYERS = ("plain", "functional", "residual", "branches", "reused", "batch norm", "layer norm", "conv", "gru")
WIDTH = 6


class Random(nn.Module):
    """Blocks [B, 6] -> [B, 6]; `twin=True` runs them out of place and keeps every intermediate tensor."""

    def __init__(self, blocks: list[tuple[str, str]]) -> None:
        super().__init__()
        self.kinds = blocks
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in blocks])
        self.norms = nn.ModuleList([_norm(kind) for kind, _ in blocks])
        self.acts = nn.ModuleList([ACTIVATIONS[name][0]() for _, name in blocks])
        self.convs = nn.ModuleList([nn.Conv1d(2, 2, 3, padding=1) for _ in blocks])
        self.grus = nn.ModuleList([nn.GRU(3, 3, batch_first=True) for _ in blocks])
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, keep: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        note = keep or (lambda tensor: tensor)
        for i in range(len(self.kinds)):
            x = self.block(i, x, note, twin=keep is not None)
        return note(self.out(x))

    def block(self, i: int, x: Tensor, note: Callable[[Tensor], Tensor], twin: bool) -> Tensor:
        kind, name = self.kinds[i]
        act = ACTIVATIONS[name][1] if twin or kind == "functional" else self.acts[i]
        layer = self.shared if kind == "reused" else self.layers[i]
        if kind == "conv":
            return note(act(note(self.convs[i](x.view(-1, 2, 3))))).flatten(1)
        if kind == "gru":
            return note(self.grus[i](x.view(-1, 2, 3))[0]).reshape(-1, WIDTH)
        h = note(layer(x))
        if kind in ("batch norm", "layer norm"):
            h = note(self.norms[i](h))
        h = note(act(h))
        if kind == "branches":
            return note(torch.cat([h[:, :3], note(torch.tanh(note(self.shared(x))))[:, 3:]], dim=1))
        return note(x + h) if kind == "residual" and i else h


def _norm(kind: str) -> nn.Module:
    return {"batch norm": nn.BatchNorm1d, "layer norm": nn.LayerNorm}.get(kind, nn.Identity)(WIDTH)


blocks = st.tuples(st.sampled_from(LAYERS), st.sampled_from(list(ACTIVATIONS)))
architectures = st.lists(blocks, min_size=1, max_size=5)


@given(architectures)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_architectures(blocks: list[tuple[str, str]]) -> None:
    torch.manual_seed(0)
    model = Random(blocks)
    x, y = blobs(24, WIDTH)
    setup = gm.Setup(model, CE, partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    profile = gm.measure(setup, (x, y))
    twin, log = copy.deepcopy(model), []

    def keep(tensor: Tensor) -> Tensor:
        tensor.retain_grad()
        log.append(tensor)
        return tensor

    CE(twin(x, keep), y).backward()
    assert len(profile.sites) == len(log)
    for reading, signal in zip(profile.sites, log, strict=True):
        assert_reads(reading, signal, signal.grad)
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    for p in profile.parameters:
        assert_parameter(p, gradients[p.name])


# ---- several batches --------------------------------------------------------------------------------------


def test_batches_are_averaged() -> None:
    setup, (x, y) = setups()["functional"]
    parts = [(x[:48], y[:48]), (x[48:], y[48:])]
    both = gm.measure(setup, parts)
    one, other = (gm.measure(setup, part) for part in parts)
    assert both.samples == 96
    assert both.loss == pytest.approx((one.loss + other.loss) / 2)
    for r, a, b in zip(both.sites, one.sites, other.sites, strict=True):
        assert r.rms == pytest.approx(math.sqrt((a.rms**2 + b.rms**2) / 2))
        assert r.mean == pytest.approx((a.mean + b.mean) / 2)
        assert r.cosine == pytest.approx((a.cosine + b.cosine) / 2, nan_ok=True)
        assert r.gradient == pytest.approx(math.sqrt(((a.gradient or 0) ** 2 + (b.gradient or 0) ** 2) / 2))
    for p, a, b in zip(both.parameters, one.parameters, other.parameters, strict=True):
        assert p.gradient == pytest.approx(math.sqrt(((a.gradient or 0) ** 2 + (b.gradient or 0) ** 2) / 2))
        assert p.update_ratio == a.update_ratio  # of the first batch's step


def test_dead_counts_units_that_are_zero_in_all_batches() -> None:
    """Unit 0 fires for positive inputs, unit 1 for negative ones, unit 2 never, unit 3 always."""
    layer = nn.Linear(1, 4)
    layer.weight.data = torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
    layer.bias.data = torch.tensor([0.0, 0.0, -1.0, 1.0])
    setup = gm.Setup(nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2)), CE)
    x, y = torch.rand(64, 1) + 0.1, torch.arange(64) % 2
    dead = [gm.measure(setup, batches).sites[1].dead for batches in ((x, y), (-x, y), [(x, y), (-x, y)])]
    assert dead == [0.5, 0.5, 0.25]


def test_dead_channels_of_images_are_dead_in_every_place() -> None:
    conv = nn.Conv2d(1, 4, 1)
    conv.bias.data[:3] = -100.0
    model = nn.Sequential(conv, nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    x, y = torch.randn(32, 1, 8, 8), torch.arange(32) % 2
    assert gm.measure(gm.Setup(model, CE), (x, y)).sites[2].dead == 0.75


def test_batches_that_take_another_way_are_left_out() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.shape[0] == 96 else self.b(x)

    x, y = blobs()
    profile = gm.measure(gm.Setup(Two(), CE), [(x, y), (x[:8], y[:8])])
    assert [r.site.name for r in profile.sites] == ["a"]
    assert profile.samples == 96


# ---- inputs, outputs, precision ---------------------------------------------------------------------------


def test_the_input_is_read_and_not_the_target() -> None:
    x, _ = blobs()
    columns = torch.cat([x * 3 + 1, torch.ones(96, 1)], dim=1)
    reading = gm.measure(gm.Setup(nn.Linear(9, 8), nn.MSELoss()), (columns, x)).inputs
    assert reading is not None
    assert reading.mean == pytest.approx(columns.mean().item(), rel=1e-5)
    assert reading.rms == pytest.approx(columns.square().mean().sqrt().item(), rel=1e-5)
    assert reading.cosine == pytest.approx(pairs_cosine(columns), abs=1e-6)
    assert reading.constant == 1
    tokens = torch.randint(10, (16, 7))
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(28, 1))
    assert gm.measure(gm.Setup(model, nn.MSELoss()), (tokens, torch.randn(16, 1))).inputs is None


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = torch.tanh(self.body(x))
        return {"hidden": (h,), "logits": self.head(h)}


def test_a_model_may_return_anything_that_step_understands() -> None:
    setup = gm.Setup(Many(), step=lambda m, b: CE(m(b[0])["logits"], b[1]))
    assert [r.site.name for r in gm.measure(setup, blobs()).sites] == ["body", "tanh", "head"]


def test_dict_batches_with_a_loss_inside() -> None:
    class Own(Many):
        def forward(self, x: Tensor, labels: Tensor, scale: Tensor) -> dict[str, Any]:
            logits = super().forward(x)["logits"]
            return {"loss": scale * CE(logits, labels), "logits": logits}

    x, y = blobs()
    profile = gm.measure(gm.Setup(Own()), {"scale": torch.tensor(2.0), "x": x, "labels": y})
    assert profile.samples == 96
    assert profile.anatomy.sites[0].inputs == (-1,)


def test_a_tensor_alone_may_be_the_batch() -> None:
    x, _ = blobs()
    setup = gm.Setup(nn.Linear(8, 8), step=lambda m, b: F.mse_loss(m(b), b), optimizer=SGD)
    assert gm.measure(setup, x).samples == gm.diagnose(setup, x).profile.samples == 96


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    """bfloat16 keeps 8 bits: readings agree to about a hundredth."""
    x, y = blobs()
    model = plain(2, nn.ReLU)
    wide = gm.measure(gm.Setup(model, CE, SGD), (x, y))
    narrow = gm.measure(gm.Setup(copy.deepcopy(model).to(dtype), CE, SGD), (x.to(dtype), y))
    for a, b in zip(wide.sites, narrow.sites, strict=True):
        assert (b.rms, b.gradient) == pytest.approx((a.rms, a.gradient), rel=0.05)


def test_autocast() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return CE(model(batch[0]), batch[1])

    model = plain(2, nn.ReLU)
    wide = gm.measure(gm.Setup(model, CE), blobs())
    mixed = gm.measure(gm.Setup(model, step=step, optimizer=SGD), blobs())
    for a, b in zip(wide.sites, mixed.sites, strict=True):
        assert (b.rms, b.gradient) == pytest.approx((a.rms, a.gradient), rel=0.05)
        assert b.weight_variance == a.weight_variance


def test_sparse_gradients() -> None:
    tokens, y = torch.randint(10, (16, 7)), torch.arange(16) % 3
    twins = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 4, sparse=sparse), nn.Flatten(), nn.Linear(28, 3))
        twins.append(gm.measure(gm.Setup(model, CE, SGD), (tokens, y)).parameters[0])
    assert twins[0].gradient == pytest.approx(twins[1].gradient)
    # a - b of float32 numbers keeps about 7 digits of a, and rows that occur twice are added twice
    assert twins[0].update_ratio == pytest.approx(twins[1].update_ratio, rel=1e-4)


def test_a_compiled_model() -> None:
    model = plain(2, nn.Tanh)
    plainly = gm.measure(gm.Setup(model, CE), blobs())
    compiled = gm.measure(gm.Setup(torch.compile(model, backend="eager"), CE), blobs())
    assert [r.gradient for r in compiled.sites] == pytest.approx([r.gradient for r in plainly.sites])
