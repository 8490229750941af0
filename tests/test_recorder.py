"""The anatomy as read: names, kinds, lines, who reads whom; and nothing is left behind."""

# ruff: noqa: ARG005  # lambdas that stand for a forward pass take what a forward pass takes

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import gradmend as gm
from gradmend.anatomy import INPUT, Anatomy, Site
from gradmend.lines import remember_lines
from gradmend.recorder import Recorder, read
from helpers import Functional, Net, assert_same, blobs, images, plain, setups, trace

KINDS = list(setups())


def anatomy(model: nn.Module, x: Any) -> Anatomy:
    return read(model, lambda: model(x), (x,))


def sites(forward: Callable[[Any, Tensor], Any], x: Tensor | None = None, **parts: Any) -> list[Site]:
    given = blobs()[0] if x is None else x
    return list(anatomy(Net(forward, **parts), given).sites)


def names(found: list[Site]) -> list[str]:
    return [site.name for site in found]


def test_a_plain_stack() -> None:
    found = anatomy(plain(2, nn.ReLU), blobs()[0]).sites
    assert [(s.name, s.kind, s.function) for s in found] == [
        ("0", "linear", "linear"),
        ("1", "activation", "relu"),
        ("2", "linear", "linear"),
        ("3", "activation", "relu"),
        ("4", "linear", "linear"),
    ]
    assert [s.inputs for s in found] == [s.direct for s in found] == [(INPUT,), (0,), (1,), (2,), (3,)]
    assert found[2].parameters == ("2.weight", "2.bias")
    assert [s.fan_in for s in found] == [8, None, 32, None, 32]


def test_functions_sums_reuse_and_bare_parameters() -> None:
    found = anatomy(Functional(), blobs()[0])
    assert names(list(found.sites)) == [
        *("inner", "tanh", "twice", "relu", "add", "matmul", "leaky_relu", "twice#2", "relu#2", "out"),
    ]
    by = {site.name: site for site in found.sites}
    assert by["add"].kind == "sum"
    assert by["add"].inputs == (by["tanh"].index, by["relu"].index)
    assert by["matmul"].parameters == ("weight", "bias")
    assert by["leaky_relu"].direct == (by["matmul"].index,)  # the bias between them is no other signal
    assert by["twice#2"].module == "twice"
    assert found.activation_after(by["matmul"]) is by["leaky_relu"]
    assert by["leaky_relu"].activation is not None
    assert by["leaky_relu"].activation(torch.tensor(-1.0)).item() == pytest.approx(-0.2)


def test_lines_are_those_of_the_users_forward() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return torch.sigmoid(net.linear(x))

    first = inspect.getsourcelines(forward)[1]
    assert [s.line for s in sites(forward, linear=nn.Linear(8, 4))] == [f"{__file__}:{first + 1}"] * 2


def test_remembered_lines_are_where_the_layer_was_made() -> None:
    original = nn.Module.__init__
    with remember_lines():
        model = nn.Sequential(
            nn.Linear(8, 4),
            nn.Tanh(),
        )
    here = inspect.currentframe()
    assert here is not None
    found = anatomy(model, blobs()[0]).sites
    assert [s.line for s in found] == [f"{__file__}:{here.f_code.co_firstlineno + n}" for n in (4, 5)]
    assert nn.Module.__init__ is original


def test_a_stack_of_layers_has_no_line_without_that() -> None:
    profile = gm.measure(gm.Setup(plain(1, nn.Tanh), nn.CrossEntropyLoss()), blobs())
    assert {site.line for site in profile.anatomy.sites} == {None}


@pytest.mark.parametrize(
    ("forward", "fan_in"),
    [
        (lambda m, x: m.l(x), 8),
        (lambda m, x: F.linear(x, m.w.T), 8),
        (lambda m, x: F.linear(weight=m.w.T, input=x), 8),
        (lambda m, x: x @ m.w, 8),
        (lambda m, x: torch.matmul(x, m.w), 8),
        (lambda m, x: (m.w.T @ x.T).T, 8),
        (lambda m, x: torch.mm(x, m.w), 8),
        (lambda m, x: torch.addmm(m.b, x, m.w), 8),
        (lambda m, x: torch.bmm(x[None], m.w[None])[0], 8),
        (lambda m, x: torch.einsum("bi,io->bo", x, m.w), 8),
        (lambda m, x: torch.einsum("oi,bi->bo", m.w.T, x), 8),
        (lambda m, x: torch.einsum("...i,ihd->...hd", x, m.w.view(8, 2, 2)), 8),
        (lambda m, x: m.c(x.view(-1, 2, 4)), 6),
        (lambda m, x: m.g(x.view(-1, 4, 2)), 2),
    ],
)
def test_products_and_their_fan_in(forward: Any, fan_in: int) -> None:
    parts = {
        "l": nn.Linear(8, 4),
        "c": nn.Conv1d(2, 5, 3),
        "g": nn.Conv1d(4, 4, 1, groups=2),
        "w": nn.Parameter(torch.randn(8, 4)),
        "b": nn.Parameter(torch.randn(4)),
    }
    (site,) = sites(forward, **parts)
    assert site.weighted
    assert site.fan_in == fan_in


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x + 1,  # a shift
        lambda m, x: x.abs().log1p(),
        lambda m, x: F.dropout(x, training=False),
    ],
)
def test_what_is_no_site(forward: Any) -> None:
    assert sites(forward, w=nn.Parameter(torch.randn(8, 8))) == []


@pytest.mark.parametrize(
    ("forward", "direct"),
    [
        (lambda m, h: h.view(-1, 2, 4).flatten(1).T.mT.contiguous(), True),
        (lambda m, h: (h + m.b).float().unsqueeze(0).squeeze(0), True),
        (lambda m, h: h.double(), True),
        (lambda m, h: F.dropout(h, 0.5, training=False), True),
        (lambda m, h: F.pad(h, (1, 1), mode="circular"), True),
        (lambda m, h: F.pad(h, (1, 1)), False),
        (lambda m, h: h - h.std(), False),
        (lambda m, h: h.clamp_(0), False),
        (lambda m, h: _written(h.clone()), False),
    ],
)
def test_direct_is_unchanged_but_for_the_shape(forward: Any, direct: bool) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return torch.tanh(forward(net, net.l(x)))

    linear, tanh = sites(run, l=nn.Linear(8, 8), b=nn.Parameter(torch.zeros(8)))
    assert tanh.inputs == (linear.index,)
    assert tanh.direct == ((linear.index,) if direct else ())


@pytest.mark.parametrize(
    ("forward", "kind", "numbers"),
    [
        (lambda m, x: x * 2, "scale", {"factor": 2.0}),
        (lambda m, x: x.div_(4), "scale", {"factor": 0.25}),
        (lambda m, x: x * torch.full((8,), 3.0), "scale", {"factor": 3.0}),
        (lambda m, x: x * m.w[0], "scale", {"factor": 1.0}),
        (lambda m, x: x * x.abs(), "product", {}),
        (lambda m, x: x @ x.T, "product", {}),
        (lambda m, x: x - x.abs(), "sum", {}),
        (lambda m, x: F.dropout(x, 0.3), "dropout", {"p": 0.3}),
        (lambda m, x: torch.cat([x, x]), "concat", {}),
        (lambda m, x: x.mean(1), "pool", {}),
        (lambda m, x: F.layer_norm(x, (8,), eps=1e-3), "normalization", {"eps": 1e-3, "groups": 1}),
        (
            lambda m, x: F.conv1d(x[:, None], torch.ones(1, 1, 3), padding=1, stride=2),
            "convolution",
            {"kernel": (3,), "stride": (2,), "padding": (1,), "dilation": (1,), "groups": 1},
        ),
    ],
)
def test_what_a_call_says_of_itself(forward: Any, kind: str, numbers: dict[str, Any]) -> None:
    (site,) = sites(forward, w=nn.Parameter(torch.ones(8, 8)))
    assert site.kind == kind
    assert site.settings == numbers


def test_arithmetic_of_a_loss_makes_no_sites() -> None:
    model = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    recorder = Recorder(model)
    with recorder.watching((x, x)):
        ((model(x) - x) * 2).square().mean()
    assert [site.kind for site in recorder.anatomy().sites] == ["linear"]


def _written(h: Tensor) -> Tensor:
    h[:, 0] = 0
    return h


def test_branches_and_joins() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        a, b = net.a(x), torch.relu(net.b(x))
        a += b
        return net.c(torch.cat([a, x], dim=1))

    a, b, relu, add, cat, c = sites(forward, a=nn.Linear(8, 4), b=nn.Linear(8, 4), c=nn.Linear(12, 3))
    assert (a.inputs, b.inputs, relu.inputs) == ((INPUT,), (INPUT,), (b.index,))
    assert (add.kind, add.inputs) == ("sum", (a.index, relu.index))
    assert (cat.kind, cat.inputs, cat.direct) == ("concat", (INPUT, add.index), (INPUT, add.index))
    assert (c.inputs, c.direct) == ((cat.index,), (cat.index,))


def test_containers_and_shared_layers() -> None:
    shared = nn.Linear(8, 8)
    parts = nn.ModuleDict({"ab": nn.ModuleList([shared, nn.ReLU(), shared])})

    def forward(net: Any, x: Tensor) -> Tensor:
        for layer in net.parts["ab"]:
            x = layer(x)
        return x

    assert names(sites(forward, parts=parts)) == ["parts.ab.0", "parts.ab.1", "parts.ab.0#2"]


def test_tied_weights_are_named_once_each() -> None:
    setup, (x, _) = setups()["tied"]
    encoder, _, decoder = anatomy(setup.model, x).sites
    assert encoder.parameters == ("encoder.weight", "encoder.bias")
    assert (decoder.function, decoder.fan_in, decoder.parameters) == ("linear", 4, ("bias",))


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_layers_are_one_site(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(wrap(nn.Linear(8, 8)), nn.Tanh(), wrap(nn.Conv1d(1, 2, 3)))
    found = sites(lambda m, x: m.net[2](m.net[:2](x)[:, None]), net=model)
    assert names(found) == ["net.0", "net.1", "net.2"]
    assert [s.fan_in for s in found] == [8, None, 3]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_old_weight_norm_too() -> None:
    (site,) = sites(lambda m, x: m.net(x), net=torch.nn.utils.weight_norm(nn.Linear(8, 4)))
    assert (site.name, site.fan_in) == ("net", 8)


def test_keyword_inputs_and_options() -> None:
    found = sites(
        lambda m, x: (
            F.relu(input=x, inplace=False),
            torch.sigmoid(input=x),
            F.leaky_relu(negative_slope=0.3, input=x),
            F.prelu(weight=m.w, input=x),
            F.gelu(x, approximate="tanh"),
            torch.special.expit(x),
            F.rrelu(x),
        ),
        w=nn.Parameter(torch.tensor([0.4])),
    )
    grid = torch.tensor([-2.0, 0.5])
    twins = [F.relu, torch.sigmoid, nn.LeakyReLU(0.3), nn.LeakyReLU(0.4), nn.GELU("tanh"), torch.sigmoid]
    assert [s.kind for s in found] == ["activation"] * 7
    for site, twin in zip(found, twins, strict=False):
        assert site.activation is not None
        torch.testing.assert_close(site.activation(grid), twin(grid))
    assert found[-1].activation is None  # its slope is random


def test_in_place_activations_are_remembered_out_of_place() -> None:
    for forward in (lambda m, x: F.relu_(x.clone()), lambda m, x: F.elu(x.clone(), 0.5, inplace=True)):
        (site,) = sites(forward)
        grid = torch.tensor([-1.0, 1.0])
        assert site.activation is not None
        site.activation(grid)
        assert grid.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("layer", "shape", "kind", "unit_dim"),
    [
        (nn.Conv2d(3, 4, 3), (2, 3, 8, 8), "convolution", 1),
        (nn.ConvTranspose2d(3, 4, 3), (2, 3, 8, 8), "convolution", 1),
        (nn.BatchNorm2d(3), (2, 3, 8, 8), "normalization", 1),
        (nn.GroupNorm(1, 3), (2, 3, 8, 8), "normalization", 1),
        (nn.InstanceNorm1d(3), (2, 3, 8), "normalization", 1),
        (nn.LayerNorm(8), (2, 3, 8), "normalization", 2),
        (nn.RMSNorm(8), (2, 3, 8), "normalization", 2),
        (nn.Linear(8, 5), (2, 3, 8), "linear", 2),
        (nn.GRU(8, 5), (2, 3, 8), "recurrent", 2),
        (nn.LSTM(8, 5, 2, bidirectional=True), (2, 3, 8), "recurrent", 2),
        (nn.RNN(8, 5, nonlinearity="relu"), (2, 3, 8), "recurrent", 2),
        (nn.GRUCell(8, 5), (3, 8), "recurrent", 1),
        (nn.LSTMCell(8, 5), (3, 8), "recurrent", 1),
        (nn.RNNCell(8, 5), (3, 8), "recurrent", 1),
        (nn.Softmax(dim=-1), (2, 3, 8), "softmax", 2),
    ],
)
def test_layers_of_torch(layer: nn.Module, shape: tuple[int, ...], kind: str, unit_dim: int) -> None:
    (site,) = anatomy(nn.Sequential(layer), torch.randn(shape)).sites
    assert (site.name, site.kind, site.unit_dim) == ("0", kind, unit_dim)


def test_channels_stay_units_past_pooling_and_activation() -> None:
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(125, 3))
    conv, pool, relu, linear = anatomy(model, images()[0]).sites
    assert (conv.units, pool.units, relu.units, linear.units) == (5, 5, 5, 3)
    assert (pool.inputs, relu.inputs) == ((conv.index,), (pool.index,))


def test_embeddings() -> None:
    tokens = torch.randint(10, (4, 6))
    (site,) = anatomy(nn.Sequential(nn.Embedding(10, 8)), tokens).sites
    assert (site.kind, site.inputs, site.units) == ("embedding", (INPUT,), 8)
    (bag,) = anatomy(nn.Sequential(nn.EmbeddingBag(10, 8)), tokens).sites
    assert (bag.kind, bag.shape) == ("embedding", (4, 8))


def test_attention() -> None:
    x = torch.randn(4, 5, 8)
    found = sites(lambda m, x: m.a(x, x, x, need_weights=False)[0], x, a=nn.MultiheadAttention(8, 2))
    assert [(s.name, s.kind) for s in found] == [("a.multi_head_attention_forward", "attention")]
    (fused,) = sites(lambda m, x: F.scaled_dot_product_attention(x, x, x), x)
    assert (fused.kind, fused.shape) == ("attention", (4, 5, 8))


def test_checkpoints_add_no_sites() -> None:
    block = plain(2, nn.Tanh)
    plainly = Net(lambda m, x: m.block(x), block=block)
    saving = Net(lambda m, x: checkpoint(m.block, x, use_reentrant=False), block=block)
    a, b = (gm.measure(gm.Setup(model, nn.CrossEntropyLoss()), blobs()) for model in (plainly, saving))
    assert names(list(a.anatomy.sites)) == names(list(b.anatomy.sites))
    assert [r.gradient for r in a.sites] == [r.gradient for r in b.sites]


def test_the_reentrant_kind_says_what_to_type() -> None:
    model = Net(lambda m, x: checkpoint(m.block, m.first(x), use_reentrant=True), first=nn.Linear(8, 8))
    model.block = plain(1, nn.Tanh)
    with pytest.raises(gm.GradmendError, match="use_reentrant=False"):
        gm.measure(gm.Setup(model, nn.CrossEntropyLoss()), blobs())


def test_weights_are_known_even_where_the_signal_cannot_be_traced() -> None:
    """As in a batch of the user's own class, which gradmend cannot look into."""

    class Own:
        def __init__(self) -> None:
            self.x, self.y = blobs()

    setup = gm.Setup(plain(2, nn.ReLU), step=lambda model, batch: F.cross_entropy(model(batch.x), batch.y))
    profile = gm.measure(setup, [Own()])
    assert [r.site.kind for r in profile.sites] == ["linear", "activation"] * 2 + ["linear"]
    assert profile.sites[-1].site.inputs == (3,)


def test_complex_and_integer_tensors_pass() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(net.l(x)) * net.filter
        ranks = F.relu(x.argsort(dim=1))
        return net.l(torch.fft.irfft(torch.tanh(spectrum), n=8)) + ranks.float()

    model = Net(forward, l=nn.Linear(8, 8), filter=nn.Parameter(torch.randn(5, dtype=torch.complex64)))
    x, _ = blobs()
    profile = gm.measure(gm.Setup(model, nn.MSELoss(), torch.optim.Adam(model.parameters())), (x, x))
    assert [r.site.name for r in profile.sites] == ["l", "l#2", "add"]
    assert [p.name for p in profile.parameters] == ["l.weight", "l.bias"]


def test_losses_are_noted_with_what_feeds_them() -> None:
    x, y = blobs()
    profile = gm.measure(gm.Setup(plain(1, nn.Tanh), nn.CrossEntropyLoss()), (x, y))
    (loss,) = profile.anatomy.losses
    assert (loss.function, loss.direct, loss.output, loss.target) == ("cross_entropy", (2,), (96, 3), (96,))
    assert loss.target_dtype == "int64"


@pytest.mark.parametrize("kind", KINDS)
def test_reading_leaves_results_alone(kind: str) -> None:
    setup, batch = setups()[kind]
    setup.model.eval()  # no randomness, so that both results must be the same to the last bit
    before, plainly = trace(setup), setup.loss(batch)
    watched: list[Tensor] = []
    read(setup.model, lambda: watched.append(setup.loss(batch)), batch)
    assert torch.equal(watched[0], plainly)
    assert_same(before, trace(setup))


@contextmanager
def nothing_left(model: nn.Module) -> Iterator[None]:
    setup, original = gm.Setup(model), nn.Module.__init__
    before = trace(setup)
    yield
    assert_same(before, trace(setup))
    assert nn.Module.__init__ is original


def _raise(_module: Any = None, _x: Any = None) -> Any:
    raise KeyError("on purpose")


@pytest.mark.parametrize("place", ["first", "middle", "hook", "own line"])
def test_nothing_is_left_when_forward_raises(place: str) -> None:
    parts = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)]
    if place in ("first", "middle"):
        parts[0 if place == "first" else 1] = Net(_raise)
    if place == "hook":
        parts[1].register_forward_pre_hook(_raise)
    model = Net(lambda m, x: _raise() if place == "own line" else m.net(x), net=nn.Sequential(*parts))
    with nothing_left(model):
        with pytest.raises(KeyError, match="on purpose"):
            anatomy(model, blobs()[0])
        with pytest.raises(KeyError, match="on purpose"), remember_lines():
            model(blobs()[0])


def test_the_stack_of_modules_survives_an_exception_that_the_user_catches() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        try:
            return net.bad(x)
        except KeyError:
            return torch.tanh(net.good(x))

    found = sites(forward, bad=nn.Sequential(nn.Identity(), Net(_raise)), good=nn.Linear(8, 4))
    assert [(s.name, s.module) for s in found] == [("good", "good"), ("tanh", "")]


def test_other_models_inside_are_under_the_name_of_their_caller() -> None:
    teacher = nn.Linear(8, 8)  # kept out of the module's parts
    found = sites(lambda m, x: m.l(x) + m.teacher[0](x), l=nn.Linear(8, 8), teacher=[teacher])
    assert names(found) == ["l", "linear", "add"]
    assert found[1].parameters == ()


def test_recorders_nest() -> None:
    model, (x, _) = plain(1, nn.Tanh), blobs()
    outer = Recorder(model)
    with outer.watching((x,)):
        inner = anatomy(model, x)
    assert names(outer.sites) == names(list(inner.sites)) == ["0", "1", "2"]
