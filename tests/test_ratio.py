"""The ratio of the first gradient to the last, measured and predicted."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import gradmend as gm
from gradmend.errors import SetupError
from gradmend.ratio import gradient_ratio
from gradmend.theory import finite_width_deviation
from gradmend.zoo import mlp
from helpers import blobs

CE = nn.CrossEntropyLoss()


@pytest.mark.parametrize(
    ("activation", "init", "decades"),
    [("relu", "default", -19), ("tanh", "default", -12), ("selu", "lecun", 1)],
)
def test_deep_networks(activation: str, init: str, decades: float) -> None:
    """The gradient norms of torch's defaults fall by so many decades over 50 layers."""
    model = mlp(64, 3, width=128, depth=50, activation=activation, init=init).double()
    x, y = torch.randn(16, 64).double(), torch.arange(16) % 3
    ratio = gradient_ratio(gm.Setup(model, CE), (x, y))
    assert (ratio.first, ratio.last, ratio.reason) == ("0", "100", None)
    assert ratio.predicted == pytest.approx(decades, abs=1.5)
    assert ratio.predicted == pytest.approx(ratio.measured, abs=4 * ratio.deviation)
    if activation == "relu":
        assert ratio.deviation == pytest.approx(finite_width_deviation(50, 128) / math.log(100))


@pytest.mark.parametrize("seed", range(3))
def test_lengths_that_repel(seed: int) -> None:
    """With GELU and He weights no input tells which samples keep their length, and their gradient with it."""
    torch.manual_seed(seed)
    model = mlp(256, 3, width=256, depth=40, activation="gelu", init="he").double()
    ratio = gradient_ratio(gm.Setup(model, CE), (torch.randn(32, 256).double(), torch.arange(32) % 3))
    assert ratio.predicted == pytest.approx(ratio.measured, abs=4 * ratio.deviation)
    assert ratio.from_input is not None
    assert ratio.measured - ratio.from_input > 4 * ratio.deviation


def test_a_gradient_below_the_range_of_float32() -> None:
    setup = gm.Setup(mlp(8, 3, width=16, depth=100), CE)
    ratio = gradient_ratio(setup, blobs())
    assert ratio.measured == -math.inf
    assert ratio.predicted is not None
    assert ratio.predicted < -80


def test_blocks_without_a_formula_are_let_through() -> None:
    layers = [nn.Linear(64, 256), nn.RReLU(), nn.TransformerEncoderLayer(256, 4, 256), nn.Linear(256, 3)]
    x, y = torch.randn(16, 64), torch.arange(16) % 3
    ratio = gradient_ratio(gm.Setup(nn.Sequential(*layers), CE), (x, y))
    assert ratio.reason is None
    assert ratio.predicted == pytest.approx(ratio.measured, abs=4 * ratio.deviation)


def test_it_says_why_nothing_is_predicted() -> None:
    x, y = blobs()
    ratio = gradient_ratio(gm.Setup(mlp(8, 3, depth=3), CE), (x[:1], y[:1]))
    assert (ratio.predicted, ratio.reason) == (None, "the input is not a batch of real vectors")


def test_one_layer_has_no_ratio() -> None:
    with pytest.raises(SetupError, match="two layers with weights"):
        gradient_ratio(
            gm.Setup(nn.Sequential(nn.Linear(8, 3)), CE, partial(torch.optim.SGD, lr=0.1)), blobs()
        )
