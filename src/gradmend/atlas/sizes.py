"""Sizes: how much the atlas measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the rest of a page follows from it.

    Args:
        seed: of all weights and batches.
        rows: of data in a batch.
        width: units per layer.
        depths: hidden layers, ascending.
        activations: names of `zoo.mlp`, the first shown first.
        inits: names of `zoo.mlp`.
        variances: fan_in x Var(W), ascending.
        steps: of each training.
        seeds: of each training.
        points: of each curve along a number.
        lengths: of sequences, ascending.
        rates: how many learning rates are tried, at most.
    """

    seed: int = 0
    rows: int = 64
    width: int = 128
    depths: tuple[int, ...] = (10, 30, 50, 100)
    activations: tuple[str, ...] = (
        "sigmoid", "tanh", "relu", "leaky_relu", "prelu", "elu", "selu", "gelu", "silu", "softplus",
    )  # fmt: skip
    inits: tuple[str, ...] = (
        "default", "zero", "constant", "small", "large", "xavier", "he", "lecun", "orthogonal", "tailored",
    )  # fmt: skip
    variances: tuple[float, ...] = (0.33, 1.0, 1.5, 2.0, 3.0)
    steps: int = 300
    seeds: int = 3
    points: int = 121
    lengths: tuple[int, ...] = (20, 60)
    rates: int = 6


FULL: Final = Sizes()
"""What `gradmend atlas` builds, in about two minutes on one core."""

QUICK: Final = Sizes(
    rows=64,
    width=16,
    depths=(2, 4),
    activations=("sigmoid", "relu"),
    inits=("default", "he"),
    variances=(1.0, 2.0, 3.0),
    steps=12,
    seeds=2,
    points=31,
    lengths=(6, 10),
    rates=2,
)
"""Everything once, and small."""
