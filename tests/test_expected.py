"""What theory expects of real models, beside what is measured of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmend as gm
from gradmend.expected import expect
from gradmend.layers import Residual
from gradmend.profile import Profile
from gradmend.theory import finite_width_deviation
from gradmend.weights import absorb
from gradmend.zoo import mlp
from helpers import blobs, plain, setups

CE = nn.CrossEntropyLoss()
WIDTH, CHANNELS, ROWS = 256, 96, 24
IMAGE = (3, 12, 12)


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def conv(channels: int = CHANNELS, kernel: int = 3, **options: object) -> nn.Module:
    return nn.Conv2d(channels, CHANNELS, kernel, **options)  # type: ignore[arg-type]


def trained(model: nn.Module) -> nn.Module:
    """With gains and biases of normalizations other than 1 and 0."""
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, 1.0, 0.5)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias, 0.0, 0.3)
    return model


class Loop(nn.Module):
    """The same cell at every step, and an output from the last."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.carry, self.out = linear(), linear(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), WIDTH)
        for t in range(x.shape[1]):
            h = torch.tanh(self.read(x[:, t]) + self.carry(h))
        return self.out(h)


class PostActivation(nn.Module):
    """The block of the first residual networks: ReLU of a stream that is itself such a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(conv(padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU()),
            *(conv(padding=1), nn.BatchNorm2d(CHANNELS)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Difference(nn.Module):
    """A branch taken away, whose mean is not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.stream, self.branch, self.out = linear(), linear(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stream(x))
        return self.out(h - 0.7 * F.relu(self.branch(h)))


def residual(body: nn.Module, **options: float) -> nn.Module:
    return Residual(body, **options)  # type: ignore[arg-type]


def tied(model: nn.Sequential, shift: float) -> nn.Module:
    """With biases made of the weights behind each ReLU, as if a constant were added to what it gives."""
    for before, layer in pairwise(model):
        if (
            isinstance(before, nn.ReLU)
            and isinstance(layer, (nn.Linear, nn.Conv2d))
            and layer.bias is not None
        ):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
            absorb(layer, shift=shift)
    return model


HEAD = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 3)]
VECTORS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: trained(mlp(WIDTH, 3, width=WIDTH, depth=4, activation="tanh", norm="batch")),
    "layer norm": lambda: trained(mlp(WIDTH, 3, width=WIDTH, depth=4, activation="gelu", norm="layer")),
    "rms norm after": lambda: trained(nn.Sequential(*[linear(), nn.ReLU(), nn.RMSNorm(WIDTH)] * 2, linear())),
    "residual": lambda: mlp(WIDTH, 3, width=WIDTH, depth=5, activation="relu", init="he", skip=True),
    "pre-norm": lambda: nn.Sequential(
        linear(),
        *(
            residual(nn.Sequential(nn.LayerNorm(WIDTH), linear(), nn.SiLU(), linear()), scale=0.5)
            for _ in range(2)
        ),
        nn.Linear(WIDTH, 3),
    ),
    "dropout": lambda: nn.Sequential(*[linear(), nn.ReLU(), nn.Dropout(0.3)] * 3, nn.Linear(WIDTH, 3)),
    "difference": Difference,
    "softmax": lambda: nn.Sequential(plain(3, nn.ELU, WIDTH, WIDTH), nn.Softmax(dim=-1)),
}
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "padding": lambda: nn.Sequential(conv(3, padding=1), nn.Tanh(), *[conv(padding=1), nn.Tanh()] * 3, *HEAD),
    "around": lambda: nn.Sequential(
        conv(3, padding=1), nn.ReLU(), *[conv(padding=1, padding_mode="circular"), nn.ReLU()] * 2, *HEAD
    ),
    "strides": lambda: nn.Sequential(
        *(conv(3, 5, stride=2), nn.ReLU(), conv(padding="same", dilation=2), nn.ReLU()),
        *(nn.ConvTranspose2d(CHANNELS, CHANNELS, 4, 2, 1), nn.GELU(), conv(groups=2), nn.GELU(), *HEAD),
    ),
    "flattened": lambda: nn.Sequential(
        *(conv(3, padding=1), nn.Flatten(), nn.BatchNorm1d(144 * CHANNELS), nn.ReLU()),
        *(nn.Linear(144 * CHANNELS, CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, 3)),
    ),
    "norms": lambda: trained(
        nn.Sequential(
            *(conv(3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.MaxPool2d(2)),
            *(conv(padding=1), nn.GroupNorm(4, CHANNELS), nn.SiLU(), conv(), nn.GELU(), *HEAD),
        )
    ),
    "residual network": lambda: nn.Sequential(
        conv(3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU(), PostActivation(), PostActivation(), *HEAD
    ),
}


def measured(model: nn.Module, *shape: int) -> Profile:
    x = torch.randn(ROWS, *shape)
    return gm.measure(gm.Setup(model, CE), (x, torch.arange(ROWS) % 3))


def assert_agrees(profile: Profile, width: int) -> None:
    """Within four deviations of one network of this width, and 5 %: the batch is one of few samples."""
    assert profile.unpredictable is None
    layers = profile.weighted()
    slack = 4 * finite_width_deviation(len(layers), width) + 0.1
    for reading in layers[:-1]:  # the last has three units, too few for any mean
        expected = profile.expected[reading.site.index]
        assert reading.gradient_norm
        assert abs(2 * math.log(reading.gradient_norm / expected.gradient_norm)) < slack, reading.site.name
        assert abs(2 * math.log(reading.rms / expected.rms)) < slack, reading.site.name


@pytest.mark.parametrize("name", VECTORS)
def test_theory_agrees_with_networks_of_vectors(name: str) -> None:
    assert_agrees(measured(VECTORS[name](), WIDTH), WIDTH)


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda: plain(6, nn.ReLU, WIDTH, WIDTH), (WIDTH,)),
        (
            lambda: nn.Sequential(conv(3, padding=1), nn.ReLU(), *[conv(padding=1), nn.ReLU()] * 4, *HEAD),
            IMAGE,
        ),
    ],
    ids=["vectors", "images"],
)
def test_biases_made_of_weights_are_no_random_ones(
    network: Callable[[], nn.Sequential], shape: tuple[int, ...]
) -> None:
    """Taken for random they would make lengths twice as large and samples alike."""
    profile = measured(tied(network(), -0.5), *shape)
    for reading in profile.weighted()[:-1]:
        expected = profile.expected[reading.site.index]
        assert reading.rms == pytest.approx(expected.rms, rel=0.15), reading.site.name
        assert reading.cosine == pytest.approx(expected.cosine, abs=0.15), reading.site.name


@pytest.mark.parametrize("name", IMAGES)
def test_theory_agrees_with_networks_of_images(name: str) -> None:
    assert_agrees(measured(IMAGES[name](), *IMAGE), CHANNELS)


def test_theory_agrees_with_a_loop_over_a_cell() -> None:
    assert_agrees(measured(Loop(), 8, WIDTH), WIDTH)


# -- where theory ends --------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Two signals multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.middle, self.out = linear(), linear(), linear(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.middle(self.value(x) * torch.sigmoid(self.gate(x)))))


class Sliced(nn.Module):
    """Reads every second unit only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = linear(), nn.Linear(WIDTH // 2, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(F.relu(self.first(x))[:, ::2])))


class Twice(nn.Module):
    """A sum whose summands end in the same weights: gains of a normalization are no others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = linear(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.out(h + self.norm(h))


def test_a_signal_without_a_formula_is_taken_as_measured() -> None:
    profile = measured(Gated(), WIDTH)
    product, middle = profile.sites[3], profile.sites[4]
    assert profile.unpredictable == "no formula for mul at mul"
    assert list(profile.expected) == [3, 4, 5, 6]
    assert profile.expected[3].rms == pytest.approx(product.rms)
    assert middle.weight_variance is not None
    wanted = middle.weight_variance * product.rms**2 + (middle.bias_variance or 0)
    assert profile.expected[4].rms ** 2 == pytest.approx(wanted)


def test_a_measured_factor_leads_gradients_through() -> None:
    profile = measured(Gated(), WIDTH)
    gate = profile.sites[2].rms  # the value is multiplied by the gate, and the gate by the value
    factors = {(3, 0): gate**2, (3, 2): profile.sites[0].rms ** 2}
    found, reason = expect(profile.anatomy, profile.sites, profile.inputs, profile.parameters, factors)
    assert reason is None
    assert list(found) == list(range(7))
    assert found[0].gradient_norm == pytest.approx(gate * found[3].gradient_norm)
    first = profile.sites[0].gradient_norm
    assert first is not None
    assert found[0].gradient_norm == pytest.approx(first, rel=0.2)


@pytest.mark.parametrize(
    ("network", "reason", "found"),
    [
        (Sliced, "second reads what comes before it through operations without a formula", [2, 3, 4]),
        (Twice, "no formula for add at add: its summands come from the same weights", [2, 3]),
        (
            lambda: nn.Sequential(linear(), nn.ReLU(), nn.Tanh(), linear(), nn.ReLU(), linear()),
            "no formula for tanh at 2: its input is not Gaussian",
            [2, 3, 4, 5],
        ),
        (
            lambda: nn.Sequential(linear(), nn.RReLU(), linear(), linear()),
            "no formula for rrelu at 1",
            [1, 2, 3],
        ),
    ],
)
def test_it_says_where_theory_ends(network: Callable[[], nn.Module], reason: str, found: list[int]) -> None:
    profile = measured(network(), WIDTH)
    assert profile.unpredictable == reason
    assert list(profile.expected) == found


@pytest.mark.parametrize("head", [[nn.AdaptiveAvgPool2d(1)], []], ids=["alike", "independent"])
def test_windows_of_a_mean_may_overlap(head: list[nn.Module]) -> None:
    """Whether the gradients of neighbours are alike, as behind a mean over all places, or independent."""
    end = nn.Linear(CHANNELS * (1 if head else 36), 3)
    layers = [conv(3), nn.ReLU(), nn.AvgPool2d(3, stride=1), conv(), nn.ReLU(), *head, nn.Flatten(), end]
    profile = measured(nn.Sequential(*layers), 3, 12, 12)
    sites = list(profile.anatomy.sites)
    sites[2] = replace(sites[2], settings={"kernel": (3, 3), "stride": (1, 1)})
    found, reason = expect(replace(profile.anatomy, sites=tuple(sites)), profile.sites, profile.inputs)
    assert reason is None
    assert found[0].gradient_norm == pytest.approx(profile.sites[0].gradient_norm, rel=0.15)


def test_theory_begins_before_the_gap_if_nothing_lies_behind_it() -> None:
    body = [conv(3), nn.ReLU(), conv(), nn.InstanceNorm2d(CHANNELS), nn.ReLU(), nn.Flatten()]
    profile = measured(nn.Sequential(*body, nn.Linear(64 * CHANNELS, 3)), 3, 12, 12)
    assert profile.unpredictable == "no formula for instance_norm at 3"
    assert list(profile.expected) == [0, 1, 3, 4, 5]
    assert profile.expected[0].gradient_norm == pytest.approx(profile.sites[0].gradient_norm, rel=0.2)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("recurrent", "no formula for gru at gru"),
        ("attention", "no formula for multi_head_attention_forward"),
    ],
)
def test_theory_has_nothing_to_say_of_whole_cells(kind: str, reason: str) -> None:
    setup, batch = setups()[kind]
    assert (gm.measure(setup, batch).unpredictable or "").startswith(reason)


def test_words_are_no_vectors_but_what_they_stand_for_is() -> None:
    model = nn.Sequential(nn.Embedding(10, 64), nn.Flatten(), nn.Linear(320, WIDTH), nn.Tanh(), linear())
    profile = gm.measure(gm.Setup(model, CE), (torch.randint(10, (ROWS, 5)), torch.arange(ROWS) % 3))
    assert profile.unpredictable is None
    assert profile.expected[0].rms == pytest.approx(profile.sites[0].rms)
    assert profile.expected[1].rms == pytest.approx(profile.sites[1].rms, rel=0.1)


def test_one_sample_has_no_angles() -> None:
    x, y = blobs()
    profile = gm.measure(gm.Setup(plain(3, nn.ReLU), CE), (x[:1], y[:1]))
    assert profile.expected == {}
    assert profile.unpredictable == "the input is not a batch of real vectors"


def test_values_that_are_no_numbers() -> None:
    profile = measured(plain(2, nn.ReLU, WIDTH), WIDTH)
    sites = [replace(reading, rms=math.inf) for reading in profile.sites]
    assert expect(profile.anatomy, sites, profile.inputs) == ({}, "values are not finite")


def test_a_model_without_weights() -> None:
    profile = measured(nn.Sequential(nn.LayerNorm(WIDTH), nn.Tanh()), WIDTH)
    assert profile.expected == {}
    assert profile.unpredictable == "no layer with weights"
