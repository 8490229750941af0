"""Recurrent layers against plain loops over time, autograd's Jacobians and gradients through time."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradmend import recurrence
from gradmend.cells import CELLS
from gradmend.recurrence import PathReading, TimeReading, factor_per_step

GATES = {"lstm": "ifgo", "gru": "rzn", "rnn_tanh": "h", "rnn_relu": "h"}
LAYERS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": lambda *args, **options: nn.RNN(*args, **options, nonlinearity="tanh"),
    "rnn_relu": lambda *args, **options: nn.RNN(*args, **options, nonlinearity="relu"),
}
kinds = pytest.mark.parametrize("kind", LAYERS)


class Seen(TorchFunctionMode):
    """The recurrent functions that are called inside, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Sequence[Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name.removesuffix("_cell") in LAYERS:
            self.calls.append((name, args))
        return func(*args, **(kwargs or {}))


def call_of(module: nn.Module, *inputs: Any) -> tuple[str, Sequence[Any]]:
    seen = Seen()
    with seen:
        module(*inputs)
    return seen.calls[0]


def observed(module: nn.Module, *inputs: Any) -> TimeReading:
    call = call_of(module, *inputs)
    return recurrence.read(recurrence.layout(*call), recurrence.observe(*call).tolist())


class Twin:
    """One direction of one layer, sample by sample and step by step."""

    def __init__(self, kind: str, module: nn.Module, suffix: str) -> None:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        parts = [getattr(module, name + suffix, None) for name in names]
        self.w, self.u, self.b, self.d, self.p = (None if p is None else p.detach() for p in parts)
        self.kind, self.gates = kind, []

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        given = self.w @ x + (0 if self.b is None else self.b)
        asked = self.u @ h + (0 if self.d is None else self.d)
        if self.kind == "lstm":
            i, f, g, o = (given + asked).chunk(4)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = f * c + i * g
            h = o * c.tanh()
            return (h if self.p is None else self.p @ h), c, (i, f, g, o, c.tanh())
        if self.kind == "gru":
            (gr, gz, gn), (ar, az, an) = given.chunk(3), asked.chunk(3)
            r, z = (gr + ar).sigmoid(), (gz + az).sigmoid()
            n = (gn + r * an).tanh()
            return (1 - z) * n + z * h, c, (r, z, n)
        h = (given + asked).tanh() if self.kind == "rnn_tanh" else (given + asked).relu()
        return h, c, (h,)

    def run(self, xs: Tensor, h: Tensor, c: Tensor) -> Tensor:
        outputs = []
        for x in xs:
            self.last = x, h, c
            h, c, gates = self.step(x, h, c)
            outputs.append(h)
            self.gates.append(torch.stack(gates))
        return torch.stack(outputs)

    def radius(self) -> float:
        x, h, c = self.last

        def state(before: Tensor) -> Tensor:
            h_after, c_after, _ = self.step(x, *before.split((len(h), len(c))))
            return torch.cat([h_after, c_after]) if self.kind == "lstm" else h_after

        before = torch.cat([h, c])
        jacobian = jacrev(state)(before)[:, : len(before) if self.kind == "lstm" else len(h)]
        return torch.linalg.eigvals(jacobian).abs().max().item()


def twins(kind: str, module: nn.Module, x: Tensor, states: Sequence[Tensor]) -> list[list[Twin]]:
    """Per path the twins of all samples; x is [steps, batch, features]."""
    directions = 2 if module.bidirectional else 1
    paths: list[list[Twin]] = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"_l{layer}" + "_reverse" * direction
            row = [Twin(kind, module, suffix) for _ in range(x.shape[1])]
            mine = [state[layer * directions + direction] for state in states]
            first = [(*(s[j] for s in mine), torch.zeros(0, dtype=x.dtype))[:2] for j in range(len(row))]
            inputs = x.flip(0) if direction else x
            ran = torch.stack([twin.run(inputs[:, j], *first[j]) for j, twin in enumerate(row)], dim=1)
            outputs.append(ran.flip(0) if direction else ran)
            paths.append(row)
        x = torch.cat(outputs, dim=2)
    return paths


def is_flat(gate: str, values: Tensor, relu: bool) -> Tensor:
    if gate in "ifoz" or gate == "r":
        return (values < 0.01) | (values > 0.99)
    return values == 0 if relu else 1 - values**2 < 0.01


def agrees(found: PathReading, kind: str, path: Sequence[Twin]) -> None:
    gates = torch.stack([torch.stack(twin.gates) for twin in path])  # [samples, steps, gates, units]
    names = GATES[kind] + ("c" if kind == "lstm" else "")
    for at, name in enumerate(names):
        share = is_flat(name, gates[:, :, at], kind == "rnn_relu").double().mean().item()
        assert found.saturation[name] == pytest.approx(share, abs=1e-9), name
    assert set(found.saturation) == set(names)
    memory = gates[:, :, 1].mean().item() if kind in ("lstm", "gru") else math.nan
    assert found.memory == pytest.approx(memory, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(LAYERS)),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    initial=st.booleans(),
    projected=st.booleans(),
    steps=st.integers(1, 5),
    batch=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_gates_agree_with_a_loop(
    kind: str,
    layers: int,
    bidirectional: bool,
    bias: bool,
    batch_first: bool,
    initial: bool,
    projected: bool,
    steps: int,
    batch: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    projection = {"proj_size": 2} if projected and kind == "lstm" else {}
    module = LAYERS[kind](3, 4, layers, **options, **projection, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=3)
    x = torch.randn(steps, batch, 3, dtype=torch.float64)
    sizes = [projection.get("proj_size", 4), 4][: 2 if kind == "lstm" else 1]
    states = [
        initial * torch.randn(layers * (1 + bidirectional), batch, n, dtype=torch.float64) for n in sizes
    ]
    hx = [tuple(states) if kind == "lstm" else states[0]] if initial else []
    found = observed(module, x.transpose(0, 1) if batch_first else x, *hx)
    plain = twins(kind, module, x, states)
    assert len(found.paths) == len(plain)
    for reading, path in zip(found.paths, plain, strict=True):
        agrees(reading, kind, path)


@kinds
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("layers", [1, 2])
def test_radius_agrees_with_the_eigenvalues_of_autograds_jacobian(kind: str, layers: int) -> None:
    options = {"proj_size": 24} if kind == "lstm" and layers == 2 else {}
    module = LAYERS[kind](16, 32, layers, bidirectional=layers == 2, **options)
    x = torch.randn(8, 4, 16)
    sizes = [options.get("proj_size", 32), 32][: 2 if kind == "lstm" else 1]
    plain = twins(kind, module, x, [torch.zeros(4, 4, n) for n in sizes])
    for reading, path in zip(observed(module, x).paths, plain, strict=True):
        expected = sum(twin.radius() for twin in path) / len(path)
        assert reading.radius == pytest.approx(expected, rel=0.06)  # what 24 power iterations can tell


@kinds
@pytest.mark.parametrize("projected", [False, True])
def test_going_back_one_step_agrees_with_autograd(kind: str, projected: bool) -> None:
    hidden = 3 if projected and kind == "lstm" else 5
    options = {"proj_size": hidden} if hidden < 5 else {}
    module = LAYERS[kind](2, 5, **options, dtype=torch.float64)
    state = tuple(torch.randn(1, 4, n, dtype=torch.float64) for n in (hidden, 5)[: 1 + (kind == "lstm")])
    x, sent = torch.randn(1, 4, 2, dtype=torch.float64), tuple(torch.randn_like(s) for s in state)
    asked = tuple(s.clone().requires_grad_() for s in state)
    after = module(x, asked if kind == "lstm" else asked[0])[1]
    expected = torch.autograd.grad(after if kind == "lstm" else (after,), asked, sent)
    weights = dict(module.named_parameters())
    given = x @ weights["weight_ih_l0"].T + weights["bias_ih_l0"]
    share = state[0] @ weights["weight_hh_l0"].T + weights["bias_hh_l0"]
    gates = CELLS[kind].gates(given[None], share[None], state[0][None], *state[1:])
    linear = CELLS[kind].linearise(*gates)
    one = type(linear)(*(part if part is None else part[:, 0] for part in linear))
    projection = weights["weight_hr_l0"][None] if options else None
    found = one.back(sent, weights["weight_hh_l0"][None], projection)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["gru", "rnn_tanh"])
@pytest.mark.parametrize("steps", [1, 2, 7, 24])
def test_growth_of_one_unit_is_a_product_of_slopes(kind: str, steps: int) -> None:
    module = LAYERS[kind](3, 1, dtype=torch.float64)
    x = torch.randn(steps, 4, 3, dtype=torch.float64)
    states = [torch.zeros(1, 1, dtype=torch.float64).requires_grad_()]
    squares = []
    for sample in range(4):
        h = states[0]
        for t in range(steps - steps // 2):  # the half that the gradients reach last
            h = module(x[t : t + 1, sample], h)[1]
        squares.append(torch.autograd.grad(h.sum(), states[0])[0].item() ** 2)
    expected = (sum(squares) / 4) ** (0.5 / (steps - steps // 2))
    assert observed(module, x).paths[0].growth == pytest.approx(expected)


def orthogonal(gain: float, units: int = 16) -> nn.RNN:
    module = nn.RNN(units, units, bias=False)
    nn.init.orthogonal_(module.weight_hh_l0, gain)
    return module


@pytest.mark.parametrize("gain", [1e-8, 0.5, 1.0, 1.5, 1e8])
def test_linear_orthogonal_recurrence(gain: float) -> None:
    path = observed(orthogonal(gain), torch.zeros(40, 2, 16)).paths[0]
    assert (path.growth, path.radius) == pytest.approx((gain, gain), rel=1e-4)
    assert path.saturation == {"h": 0.0}


def test_forget_gate_sets_memory_and_growth() -> None:
    module = nn.LSTM(4, 8)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(module.bias_ih_l0[8:16], 1.5)
    nn.init.constant_(module.bias_hh_l0[8:16], 0.5)
    path = observed(module, torch.randn(30, 3, 4)).paths[0]
    forget = torch.sigmoid(torch.tensor(2.0)).item()
    assert (path.memory, path.growth, path.radius) == pytest.approx((forget,) * 3, rel=1e-5)
    assert path.time_constant == pytest.approx(7.9, abs=0.05)
    nn.init.constant_(module.bias_hh_l0[8:16], 5.0)
    assert observed(module, torch.randn(30, 3, 4)).paths[0].saturation == {
        **dict.fromkeys("igoc", 0.0),
        "f": 1.0,
    }


@kinds
def test_growth_agrees_with_the_gradient_through_a_long_sequence(kind: str) -> None:
    module, x = LAYERS[kind](32, 64), torch.randn(100, 16, 32, requires_grad=True)
    call = call_of(module, x)
    output = module(x)[0][-1]
    (output * torch.randn_like(output)).sum().backward()
    layout = recurrence.layout(*call)
    gradient = recurrence.observe_gradient(x.grad, layout).tolist()
    found = recurrence.read(layout, recurrence.observe(*call).tolist(), gradient)
    assert found.paths[0].growth == pytest.approx(found.gradient_factors[0], rel=0.05)  # 4 of 16 samples


def gradient_of(module: nn.Module, x: Any, losses: Any) -> TimeReading:
    """Measure a call whose loss is a sum of what `losses` picks of the output."""
    call = call_of(module, x)
    layout = recurrence.layout(*call)
    data = x if isinstance(x, Tensor) else x.data
    (gradient,) = torch.autograd.grad(losses(module(x)), data)
    numbers = recurrence.observe_gradient(gradient, layout)
    return recurrence.read(layout, recurrence.observe(*call).tolist(), numbers.tolist())


@pytest.mark.parametrize("batch_first", [False, True])
def test_gradient_of_each_step(batch_first: bool) -> None:
    module, x = nn.GRU(3, 4, batch_first=batch_first), torch.randn(6, 6, 3, requires_grad=True)
    found = gradient_of(module, x, lambda out: out[1].sum())
    (gradient,) = torch.autograd.grad(module(x)[1].sum(), x)
    per_step = gradient.square().mean(dim=(0 if batch_first else 1, 2)).sqrt().flip(0)
    assert [step for step, _ in found.gradients[0]] == list(range(6))
    assert [rms for _, rms in found.gradients[0]] == pytest.approx(per_step.tolist())


def test_a_vanishing_gradient_does_not_underflow() -> None:
    module, x = orthogonal(0.2), torch.zeros(50, 2, 16, requires_grad=True)
    found = gradient_of(module, x, lambda out: out[1].sum())
    assert 0 < found.gradients[0][-1][1] < 1e-30
    assert found.gradient_factors == pytest.approx((0.2,), rel=1e-3)


def test_both_directions_are_judged_near_their_own_end() -> None:
    module, x = nn.RNN(16, 16, bias=False, bidirectional=True), torch.zeros(41, 2, 16, requires_grad=True)
    nn.init.orthogonal_(module.weight_hh_l0, 0.8)
    nn.init.orthogonal_(module.weight_hh_l0_reverse, 0.6)
    found = gradient_of(module, x, lambda out: out[1].sum())
    assert found.gradient_factors == pytest.approx((0.8, 0.6), rel=0.05)  # the other one leaks in
    assert [path.growth for path in found.paths] == pytest.approx([0.8, 0.6], rel=1e-4)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences_count_from_their_own_end(bidirectional: bool) -> None:
    module = nn.RNN(16, 16, bias=False, bidirectional=bidirectional)
    for name, weight in module.named_parameters():
        if "_hh" in name:
            nn.init.orthogonal_(weight, 0.7)
    packed = pack_sequence([torch.zeros(n, 16) for n in (30, 26, 21, 15)])
    packed.data.requires_grad_()
    found = gradient_of(module, packed, lambda out: out[1].sum())
    assert found.gradient_factors == pytest.approx((0.7,) * len(found.gradients), rel=0.05)
    assert len(found.gradients[0]) == 30
    (gradient,) = torch.autograd.grad(module(packed)[1].sum(), packed.data)
    padded, lengths = pad_packed_sequence(PackedSequence(gradient, packed.batch_sizes))
    for back in (0, 14, 15, 29):
        alive = [padded[n - 1 - back, j] for j, n in enumerate(lengths.tolist()) if n > back]
        rms = torch.stack(alive).square().mean().sqrt().item()
        assert found.gradients[0][back] == (back, pytest.approx(rms))


def test_packed_sequences_run_those_that_last() -> None:
    module, long = nn.GRU(3, 4), torch.randn(3, 30, 3)
    short = torch.randn(2, 5, 3)
    alone = observed(module, long.transpose(0, 1))
    packed = observed(module, pack_sequence([*long, *short]))
    assert packed.paths[0].memory == pytest.approx(alone.paths[0].memory)
    unsorted = pack_sequence([short[0], *long, short[1]], enforce_sorted=False)
    assert observed(module, unsorted).paths[0].memory == pytest.approx(alone.paths[0].memory)


@pytest.mark.parametrize(
    "cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda *n: nn.RNNCell(*n, False, "relu")]
)
def test_cells_are_one_step_of_their_layers(cell: Any) -> None:
    module, x, h = cell(3, 4), torch.randn(4, 3), torch.randn(4, 4)
    lstm = isinstance(module, nn.LSTMCell)
    name, _ = call = call_of(module, x, (h, 2 * h) if lstm else h)
    layer = LAYERS[name.removesuffix("_cell")](3, 4, bias=module.bias)
    layer.load_state_dict({f"{k}_l0": v for k, v in module.state_dict().items()})
    found = recurrence.read(recurrence.layout(*call), recurrence.observe(*call).tolist())
    assert repr(found) == repr(observed(layer, x[None], (h[None], 2 * h[None]) if lstm else h[None]))
    one = call_of(module, x[0], (h[0], 2 * h[0]) if lstm else h[0])
    assert recurrence.observe(*one).shape == recurrence.observe(*call).shape


def test_dropout_between_layers_is_left_out() -> None:
    module, x = nn.GRU(3, 4, 2, dropout=0.9), torch.randn(6, 3, 3)
    assert observed(module, x) == observed(module.eval(), x)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(kind: str, dtype: torch.dtype) -> None:
    module, x = LAYERS[kind](3, 4, 2, dtype=dtype), torch.randn(6, 3, 3, dtype=dtype)
    half = observed(module, x).paths
    full = observed(module.float(), x.float()).paths
    assert [p.growth for p in half] == pytest.approx([p.growth for p in full], rel=1e-5)
    with torch.autocast("cpu"):
        auto = observed(module, x.float()).paths
    assert repr(auto) == repr(full)


def test_diverged_weights_show() -> None:
    module = nn.GRU(3, 4, 2)
    nn.init.constant_(module.weight_hh_l1, math.nan)
    below, above = observed(module, torch.randn(6, 2, 3)).paths
    assert math.isfinite(below.growth)
    assert math.isnan(above.growth)
    assert math.isnan(above.radius)


def test_a_dead_relu_layer_has_no_growth() -> None:
    module = nn.RNN(3, 4, nonlinearity="relu")
    nn.init.constant_(module.bias_ih_l0, -100)
    path = observed(module, torch.randn(6, 2, 3)).paths[0]
    assert (path.growth, path.radius, path.saturation["h"]) == (0, 0, 1)
    assert math.isnan(path.time_constant)


class NoFetch(TorchDispatchMode):
    """Fails as soon as a number is fetched from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func)
        return func(*args, **(kwargs or {}))


@kinds
def test_nothing_is_fetched_nor_disturbed(kind: str) -> None:
    module, x = LAYERS[kind](3, 4, 2, bidirectional=True, dropout=0.5), torch.randn(40, 9, 3)
    call = call_of(module, x)
    layout = recurrence.layout(*call)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state, seen = torch.get_rng_state(), x.clone()
    with NoFetch():
        numbers = recurrence.observe(*call)
        gradient = recurrence.observe_gradient(x, layout)
    assert not numbers.requires_grad
    assert (numbers.dtype, gradient.dtype) == (torch.float64, torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, seen)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.backends.cudnn.enabled
    assert repr(numbers.tolist()) == repr(recurrence.observe(*call).tolist())


@given(st.floats(0.01, 3), st.integers(2, 64), st.integers(0, 10))
def test_factor_of_a_geometric_series(factor: float, count: int, odd: int) -> None:
    points = [(step, 5 * factor**step) for step in range(count)]
    points[odd % count] = (odd % count, 0.0)
    expected = factor if count > 2 else (0.0 if odd % count else math.nan)
    assert factor_per_step(points) == pytest.approx(expected, nan_ok=True)


def test_factor_is_robust() -> None:
    points = [(step, 0.5**step) for step in range(20)]
    points[3], points[11], points[17] = (3, 100.0), (11, math.nan), (17, math.inf)
    assert factor_per_step(points) == pytest.approx(0.5, rel=0.01)
    assert math.isnan(factor_per_step([]))
    assert math.isnan(factor_per_step([(0, 0.0), (1, 0.0)]))
    assert factor_per_step([(0, 0.0), (1, 4.0), (2, 0.0)]) == 0
    assert PathReading({}, memory=1.0, growth=1.0, radius=1.0).time_constant == math.inf
    assert PathReading({}, memory=0.0, growth=1.0, radius=1.0).time_constant == 0


def test_long_sequences_show_both_ends() -> None:
    layout = recurrence.Layout("gru", 1, True, 1000)
    gradient = torch.arange(1000.0)[None, :, None].expand(2, 1000, 3)
    found = recurrence.observe_gradient(gradient, layout).tolist()
    shown = recurrence.read(layout, [0.5, 1.0, 1.0, 0.0, 0.0, 0.0], found).gradients[0]
    assert len(shown) == 64
    assert (shown[0], shown[-1]) == ((0, 999.0), (999, 0.0))
    assert [rms for _, rms in shown] == pytest.approx([999 - step for step, _ in shown])
