"""Predicted against measured log10(|d_1| / |d_L|) of random networks 512 units wide, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean, median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.timing import Row
from gradmend.layers import Residual
from gradmend.ratio import gradient_ratio
from gradmend.setup import Setup
from gradmend.zoo import mlp

WIDTH, CLASSES, ROWS, SEEDS = 512, 10, 32, 3
CHANNELS, SIDE = 64, 8
MEDIAN, WORST = 0.05, 1.0
"""Decades that a prediction may be off."""

Phi = Callable[[], nn.Module]
Network = Callable[[], nn.Module]


class Off(NamedTuple):
    """Predicted less measured, in decades, and by how many decades one network should be off."""

    predicted: float
    from_input: float
    deviation: float


Errors = dict[str, list[Off]]
"""By network, one per seed."""


PHIS: tuple[Phi, ...] = (nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU)
INITS = ("small", "large", "default", "xavier", "he", "orthogonal")
VARIANCES: Mapping[Phi, float] = {nn.ReLU: 2.0, nn.Tanh: 1.0}
"""fan_in x Var(W) of the networks that are not plain, by activation."""


def run() -> Iterator[str | Row]:
    torch.set_num_threads(1)
    yield "|d_1| / |d_L|, predicted: decades off the measured one"
    every: Errors = {}
    for depth in (50, 100):
        every |= (errors := plain_errors(depth))
        yield from summary(f"plain, depth {depth}", of("predicted", errors))
    for name, (shape, networks) in companions(depth=50).items():
        errors = {key: [off_by(net, shape, seed) for seed in range(SEEDS)] for key, net in networks.items()}
        every |= errors
        yield from summary(name, of("predicted", errors))
    told = {
        name: seeds for name, seeds in every.items() if math.isfinite(sum(one.from_input for one in seeds))
    }
    yield from summary("all, from the input alone", of("from_input", told))
    yield from summary("all", of("predicted", every), MEDIAN, WORST)
    scaled = [one.predicted / one.deviation for seeds in every.values() for one in seeds]
    yield Row("all: root mean square, in deviations", math.sqrt(fmean(x**2 for x in scaled)))


def of(which: str, errors: Errors) -> dict[str, list[float]]:
    return {name: [getattr(one, which) for one in seeds] for name, seeds in errors.items()}


def summary(
    name: str, errors: Mapping[str, list[float]], middle: float | None = None, end: float | None = None
) -> Iterator[Row]:
    """Median over networks: of single ones, and of the means over seeds; and the worst single one."""
    worst = max(errors, key=lambda key: max(map(abs, errors[key])))
    single = [abs(e) for seeds in errors.values() for e in seeds]
    means = [abs(fmean(seeds)) for seeds in errors.values()]
    yield Row(f"{name}: median", median(single), middle)
    yield Row(f"{name}: median, {SEEDS} seeds", median(means), middle)
    yield Row(f"{name}: worst, {worst}", max(single), end)


def plain_errors(depth: int) -> Errors:
    """The activations share each seed's weights, for drawing them takes longer than anything else."""
    errors: Errors = {}
    for init in INITS:
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            model = mlp(WIDTH, CLASSES, width=WIDTH, depth=depth, activation="relu", init=init)
            for phi in PHIS:
                found = off_by(partial(activated, model, phi), (ROWS, WIDTH), seed)
                errors.setdefault(f"{phi.__name__} {init} {depth}", []).append(found)
    return errors


def activated(model: nn.Sequential, phi: Phi) -> nn.Module:
    return nn.Sequential(*(phi() if isinstance(layer, nn.ReLU) else layer for layer in model))


def off_by(network: Network, shape: Sequence[int], seed: int) -> Off:
    """Infinitely far where nothing is predicted."""
    torch.manual_seed(seed)
    model, x = network().double(), torch.randn(*shape).double()
    ratio = gradient_ratio(Setup(model, nn.CrossEntropyLoss()), (x, torch.randint(CLASSES, (len(x),))))
    found = (math.inf if x is None else x - ratio.measured for x in (ratio.predicted, ratio.from_input))
    return Off(*found, ratio.deviation)


def companions(depth: int) -> dict[str, tuple[tuple[int, ...], dict[str, Network]]]:
    """By name: the shape of a batch, and networks by their names."""
    norms = by_phi({name: partial(normalized, depth, *norm) for name, norm in NORMS.items()})
    blocks = by_phi({name: partial(residual, depth, block) for name, block in blocks_of(depth).items()})
    maps = by_phi({mode: partial(convolutional, depth, mode) for mode in ("circular", "zeros")})
    return {
        f"normalization, depth {depth}": ((ROWS, WIDTH), norms),
        f"residual, depth {depth}": ((ROWS, WIDTH), blocks),
        f"convolution {SIDE}x{SIDE}, depth {depth}": ((ROWS // 4, CHANNELS, SIDE, SIDE), maps),
        f"recurrent, {depth} steps": ((ROWS, depth, WIDTH), by_phi({"loop": Loop})),
    }


def by_phi(networks: Mapping[str, Callable[[Phi], nn.Module]]) -> dict[str, Network]:
    return {
        f"{name} {phi.__name__}": partial(net, phi) for name, net in networks.items() for phi in VARIANCES
    }


def linear(phi: Phi, outputs: int = WIDTH) -> nn.Module:
    return drawn(nn.Linear(WIDTH, outputs), VARIANCES[phi])


def drawn(layer: nn.Linear | nn.Conv2d, variance: float) -> nn.Module:
    nn.init.normal_(layer.weight, std=math.sqrt(variance / layer.weight[0].numel()))
    nn.init.zeros_(layer.bias)
    return layer


NORMS: Mapping[str, tuple[Callable[[int], nn.Module], bool]] = {
    "batch norm": (nn.BatchNorm1d, False),
    "layer norm": (nn.LayerNorm, False),
    "layer norm after": (nn.LayerNorm, True),
    "rms norm": (nn.RMSNorm, False),
    "rms norm after": (nn.RMSNorm, True),
}
"""Normalizations, and whether they come after the activation."""


def normalized(depth: int, norm: Callable[[int], nn.Module], after: bool, phi: Phi) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [linear(phi), phi(), norm(WIDTH)] if after else [linear(phi), norm(WIDTH), phi()]
    return nn.Sequential(*layers, linear(phi, CLASSES))


def blocks_of(depth: int) -> dict[str, Callable[[Phi], nn.Module]]:
    def plain(scale: float, phi: Phi) -> nn.Module:
        return Residual(nn.Sequential(phi(), linear(phi)), scale)

    def pre(phi: Phi) -> nn.Module:
        return Residual(nn.Sequential(nn.LayerNorm(WIDTH), phi(), linear(phi)))

    def post(phi: Phi) -> nn.Module:
        return nn.Sequential(plain(1.0, phi), nn.LayerNorm(WIDTH))

    scaled = {f"scale {scale:.2g}": partial(plain, scale) for scale in (1.0, depth**-0.5, 0.0)}
    return {**scaled, "pre-norm": pre, "post-norm": post}


def residual(depth: int, block: Callable[[Phi], nn.Module], phi: Phi) -> nn.Module:
    return nn.Sequential(linear(phi), *(block(phi) for _ in range(depth)), linear(phi, CLASSES))


def convolutional(depth: int, mode: str, phi: Phi) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode=mode)
        layers += [drawn(layer, VARIANCES[phi]), phi()]
    head = drawn(nn.Linear(CHANNELS * SIDE**2, CLASSES), 1.0)
    return nn.Sequential(*layers, nn.Flatten(), head)


class Loop(nn.Module):
    """A recurrent network as people write it: a Python loop over a cell."""

    def __init__(self, phi: Phi) -> None:
        super().__init__()
        self.read, self.carry, self.out = linear(phi), linear(phi), linear(phi, CLASSES)
        self.phi = phi()

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), WIDTH)
        for t in range(x.shape[1]):
            h = self.phi(self.read(x[:, t]) + self.carry(h))
        return self.out(h)
