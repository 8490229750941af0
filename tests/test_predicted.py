"""What theory predicts, beside what is measured in deep networks."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradmend as gm
from gradmend.theory import finite_width_deviation
from helpers import SGD, blobs, plain

CE = nn.CrossEntropyLoss()


DEPTH, UNITS = 30, 256
PHIS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "selu": nn.SELU,
    "elu": nn.ELU,
    "leaky": partial(nn.LeakyReLU, 0.1),  # type: ignore[dict-item]
}
INITS: dict[str, Callable[[Tensor], Any] | None] = {
    "default": None,
    "xavier": nn.init.xavier_normal_,
    "he": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
}


def _deep(phi: type[nn.Module], init: Callable[[Tensor], Any] | None, depth: int) -> nn.Sequential:
    model = plain(depth, phi, features=64, width=UNITS)
    for layer in model:
        if isinstance(layer, nn.Linear) and init:
            init(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("phi", PHIS)
def test_theory_agrees_with_measurement(phi: str, init: str) -> None:
    """One network of finite width strays from the mean by sqrt(5 L / N) in ln |d|^2 (Hanin, Nica 2018): at
    L = 30, N = 256 that is 0.77. Four of these deviations are allowed, and eight for GELU with He's weights:
    they are next to a repelling fixed point, where each layer enlarges the deviation of the one before, so
    that nothing can be said of its cosine.
    """
    torch.manual_seed(1)
    x, y = torch.randn(128, 64), torch.arange(128) % 3
    profile = gm.measure(gm.Setup(_deep(PHIS[phi], INITS[init], DEPTH), CE), (x, y))
    assert profile.unpredictable is None
    repelling = (phi, init) == ("gelu", "he")
    slack = (8 if repelling else 4) * finite_width_deviation(DEPTH, UNITS)
    for reading in profile.weighted()[:-1]:  # the last has three units, too few for any mean
        expected = profile.expected[reading.site.index]
        assert reading.gradient_norm
        assert abs(2 * math.log(reading.gradient_norm / expected.gradient_norm)) < slack
        assert abs(2 * math.log(reading.rms / expected.rms)) < slack
        # one network strays by up to 0.08 at width 512, so by sqrt(2) of that here
        assert repelling or reading.cosine == pytest.approx(expected.cosine, abs=0.12)


def test_a_vanished_gradient_is_still_predicted() -> None:
    """Fifty sigmoid layers: below about 1e-45 float32 has only zero, while the prediction goes on in logs."""
    x, y = torch.randn(64, 64), torch.arange(64) % 3
    profile = gm.measure(gm.Setup(_deep(nn.Sigmoid, None, 50), CE, SGD), (x, y))
    first = profile.weighted()[0]
    assert first.gradient == 0
    assert 1e-60 < profile.expected[0].gradient_norm < 1e-35
    for reading in profile.sites:
        assert reading.finite
        assert math.isfinite(reading.cosine) or reading.site.kind == "activation"
    assert all(math.isfinite(p.rms) and math.isfinite(p.gradient or 0) for p in profile.parameters)


def test_bare_biases_are_predicted_too() -> None:
    """`x @ W + b` is the same map as `nn.Linear`, so theory says the same of it."""

    class Bare(nn.Module):
        def __init__(self, layers: nn.Sequential) -> None:
            super().__init__()
            linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
            self.w = nn.ParameterList([layer.weight.detach().T.clone() for layer in linear])
            self.b = nn.ParameterList([layer.bias.detach().clone() for layer in linear])

        def forward(self, x: Tensor) -> Tensor:
            for w, b in zip(list(self.w)[:-1], self.b, strict=False):
                x = torch.tanh(x @ w + b)
            return x @ self.w[-1] + self.b[-1]

    model, batch = plain(4, nn.Tanh), blobs()
    twins = [gm.measure(gm.Setup(m, CE), batch) for m in (model, Bare(model))]
    for a, b in zip(*(list(t.expected.values()) for t in twins), strict=True):
        assert (a.rms, a.cosine) == pytest.approx((b.rms, b.cosine), rel=1e-4)
