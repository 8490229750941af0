"""Rules on recurrent, attention, normalization and residual parts fire where they must, and not beside it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmend as gm
from deep import CE, HE, found, mlp
from gradmend.causes import Cause
from gradmend.diagnosis import Severity
from helpers import ADAM, SGD, Net

SEEDS = range(3)
BN = partial(nn.BatchNorm1d, 64)


# ---- normalization and residual connections ---------------------------------------------------------------


@pytest.mark.parametrize(("depth", "severity"), [(45, Severity.ERROR), (20, None)])
def test_batch_normalization_without_residual_connections(depth: int, severity: Severity | None) -> None:
    finding = found(gm.Setup(mlp(depth, nn.ReLU, extra=BN), CE, SGD)).get(Cause.BATCH_NORM_EXPLOSION)
    assert (finding.severity if finding else None) is severity
    assert finding is None or finding.expected == pytest.approx(40.8, abs=0.5)  # 16 / ln chi, 128 samples


class Stream(nn.Module):
    """x + scale f(x), with a normalization at the head of each branch or at the end."""

    def __init__(self, blocks: int, scale: float = 1.0, pre: bool = False, final: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(blocks)])
        self.norms = nn.ModuleList([nn.LayerNorm(64) if pre else nn.Identity() for _ in range(blocks)])
        self.end, self.out = nn.LayerNorm(64) if final else nn.Identity(), nn.Linear(64, 10)
        self.scale = scale
        for layer in self.layers:
            HE(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + self.scale * layer(F.relu(norm(x)))
        return self.out(self.end(x))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("stream", "severity"),
    [
        ({"blocks": 30}, Severity.ERROR),
        ({"blocks": 30, "final": True}, Severity.NOTE),
        ({"blocks": 30, "pre": True}, None),
        ({"blocks": 30, "scale": 30**-0.5}, None),
        ({"blocks": 8}, None),
    ],
    ids=["plain", "final norm", "pre-norm", "scaled", "short"],
)
def test_growing_streams(stream: dict[str, Any], severity: Severity | None, seed: int) -> None:
    torch.manual_seed(seed)
    finding = found(gm.Setup(Stream(**stream), CE, SGD)).get(Cause.RESIDUAL_GROWTH)
    assert (finding.severity if finding else None) is severity
    assert finding is None or finding.measured == pytest.approx(2.0, rel=0.15)  # He doubles the square


# ---- time -------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """A sequence read to its end, or with an output at each step."""

    def __init__(self, cell: nn.Module, every: bool = False) -> None:
        super().__init__()
        self.cell, self.every, self.out = cell, every, nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x)[0]
        return self.out(h).mean(1) if self.every else self.out(h[:, -1])


def sequences(steps: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, steps, 8, generator=generator), torch.arange(64) % 10


def recurrent(gain: float | None, seed: int, **options: Any) -> Rows:
    torch.manual_seed(seed)
    cell = nn.RNN(8, 32, batch_first=True, nonlinearity="relu" if (gain or 0) > 1 else "tanh")
    if gain is not None:
        nn.init.orthogonal_(cell.weight_hh_l0, gain)
    return Rows(cell, **options)


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_that_vanish_through_time(seed: int) -> None:
    finding = found(gm.Setup(recurrent(None, seed), CE, ADAM), sequences())[Cause.VANISHING_THROUGH_TIME]
    assert finding.severity is Severity.WARNING
    assert (finding.measured or 0) < -2


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_that_explode_through_time(seed: int) -> None:
    finding = found(gm.Setup(recurrent(2.5, seed), CE, ADAM), sequences())[Cause.EXPLODING_THROUGH_TIME]
    assert finding.severity is Severity.ERROR


def test_time_that_keeps_its_gradient() -> None:
    """Orthogonal weights of a linear range; a loss at every step; a few steps."""
    quiet = recurrent(1.0, 0)
    with torch.no_grad():
        quiet.cell.weight_ih_l0 *= 0.05
        quiet.cell.bias_ih_l0.zero_()
        quiet.cell.bias_hh_l0.zero_()
    for model, batch in (
        (quiet, sequences()),
        (recurrent(None, 0, every=True), sequences()),
        (recurrent(None, 0), sequences(4)),
    ):
        causes = found(gm.Setup(model, CE, ADAM), batch)
        assert not causes.keys() & {Cause.VANISHING_THROUGH_TIME, Cause.EXPLODING_THROUGH_TIME}


def test_a_loop_of_layers_is_time_not_depth() -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 32)
        for step in x.unbind(1):
            h = torch.tanh(self.enter(step) + self.again(h))
        return self.out(h)

    torch.manual_seed(0)
    model = Net(forward, enter=nn.Linear(8, 32), again=nn.Linear(32, 32), out=nn.Linear(32, 10))
    causes = found(gm.Setup(model, CE, SGD), sequences(30))
    assert Cause.VANISHING_THROUGH_TIME in causes
    assert Cause.VANISHING_GRADIENT not in causes


# ---- attention --------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Layers of attention over eight tokens, with or without a sum around them."""

    def __init__(self, layers: int, scale: float, residual: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 48) for _ in range(layers)])
        self.mix = nn.ModuleList([nn.Linear(16, 16) for _ in range(layers)])
        self.scale, self.residual, self.out = scale, residual, nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer, mix in zip(self.layers, self.mix, strict=True):
            q, k, v = (self.scale * layer(x)).chunk(3, dim=-1)
            h = mix(F.scaled_dot_product_attention(q, k, v))
            x = x + h if self.residual else h
        return self.out(x).mean(1)


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 8, 16, generator=generator), torch.arange(64) % 10


@pytest.mark.parametrize("seed", SEEDS)
def test_saturated_attention(seed: int) -> None:
    torch.manual_seed(seed)
    sharp = found(gm.Setup(Attention(2, 40.0, True), CE, ADAM), tokens())
    usual = found(gm.Setup(Attention(2, 1.0, True), CE, ADAM), tokens())
    assert sharp[Cause.ATTENTION_SATURATION].severity is Severity.WARNING
    assert Cause.ATTENTION_SATURATION not in usual


@pytest.mark.parametrize("seed", SEEDS)
def test_collapsed_attention(seed: int) -> None:
    torch.manual_seed(seed)
    bare = found(gm.Setup(Attention(6, 1.0, False), CE, ADAM), tokens())
    summed = found(gm.Setup(Attention(6, 1.0, True), CE, ADAM), tokens())
    assert bare[Cause.ATTENTION_COLLAPSE].severity is Severity.ERROR
    assert Cause.ATTENTION_COLLAPSE not in summed
