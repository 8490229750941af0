"""Readout: pulls against what they are by hand, left-out predictions against really leaving out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradmend.readout import centered, cosine, last_input, pulls, readable
from gradmend.zoo import mlp

SEEDS = st.integers(0, 10**6)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.HuberLoss(delta=100.0), nn.BCEWithLogitsLoss()])
@given(seed=SEEDS)
def test_losses_of_numbers_pull_to_the_target(loss: nn.Module, seed: int) -> None:
    output, target = normal(seed, 8, 3), normal(seed + 1, 8, 3)
    pulled = pulls(loss, output, target)
    assert pulled is not None
    assert cosine(pulled, centered(target)) == pytest.approx(1.0)


@given(SEEDS)
def test_the_absolute_error_pulls_up_or_down_however_far_the_output_is(seed: int) -> None:
    target = normal(seed, 8, 1)
    pulled = pulls(nn.L1Loss(), normal(seed + 1, 8, 1) + 1e6, target)
    assert pulled is not None
    assert cosine(pulled, centered(centered(target).sign())) == pytest.approx(1.0)


@given(SEEDS)
def test_cross_entropy_pulls_to_the_class(seed: int) -> None:
    classes = torch.arange(9) % 4
    pulled = pulls(nn.CrossEntropyLoss(), normal(seed, 9, 4), classes)
    assert pulled is not None
    assert cosine(pulled, centered(nn.functional.one_hot(classes))) == pytest.approx(1.0)


def test_what_has_no_pull_gives_none() -> None:
    def refuses(output: Tensor, target: Tensor) -> Tensor:
        raise ValueError("all outputs are the same")

    x, y = normal(0, 4, 2), torch.zeros(4, 2)
    assert pulls(refuses, x, y) is None
    assert pulls(lambda _output, target: target.sum(), x, y) is None
    assert pulls(nn.MSELoss(), (x, x), y) is None
    assert pulls(nn.MSELoss(), x.long(), y) is None


@given(SEEDS, st.integers(2, 12))
def test_leaving_out_is_really_leaving_out(seed: int, features: int) -> None:
    """Each sample predicted by a ridge regression with an intercept, fitted anew to all others."""
    x, y = normal(seed, 10, features), normal(seed + 1, 10, 2)
    x, y = centered(x), centered(y)
    penalty = 0.1 * x.square().sum(1).mean()
    errors = []
    for k in range(len(x)):
        rest = torch.arange(len(x)) != k
        a, b = x[rest] - x[rest].mean(0), y[rest] - y[rest].mean(0)
        weights = torch.linalg.solve(a.mT @ a + penalty * torch.eye(features, dtype=x.dtype), a.mT @ b)
        errors.append(y[k] - y[rest].mean(0) - (x[k] - x[rest].mean(0)) @ weights)
    share = 1 - (torch.stack(errors).square().sum() / y.square().sum()).item()
    assert readable([(x[:5], y[:5]), (x[5:], y[5:])]) == pytest.approx(max(-1.0, share))


def test_what_cannot_be_read_is_below_zero_or_nothing() -> None:
    noise = [(normal(k, 16, 4), normal(k + 9, 16, 2)) for k in range(4)]
    assert readable(noise) < 0.1
    x, y = noise[0]
    assert readable([(torch.zeros_like(x), y)]) == 0
    assert readable([(x * math.inf, y)]) == -1
    assert math.isnan(readable([]))
    assert math.isnan(readable([(x, y), (None, y)]))
    assert math.isnan(readable([(x, y), (x[:, :2], y)]))
    assert math.isnan(readable([(x, y[:7])]))


def test_the_last_input_is_that_of_the_last_layer() -> None:
    model = mlp(3, 2, width=5, depth=2)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with last_input(model) as met:
        model(torch.ones(4, 3))
        assert met[0].shape == (4, layers[-1].in_features)
        torch.testing.assert_close(layers[-1](met[0]), model(torch.ones(4, 3)))
    met.clear()
    model(torch.ones(4, 3))
    assert not met


def test_cosine_is_within_its_bounds() -> None:
    x = normal(0, 6, 3)
    assert cosine(x, 3 * x) == pytest.approx(1.0)
    assert cosine(x, 0 * x) == 0
    assert cosine(x, x * math.nan) == -1
    assert np.isclose(cosine(x, -x), -1)
