"""Small data sets of many kinds, with what guessing and what a well-set network reach on each.

A setup *trains* if, after `STEPS` steps, it closed at least half of the gap between the best constant guess
and a plain well-set network of the same data and steps. Counted is the share of right answers on the training
rows, or of the variance explained; not the loss: how low it gets depends on output layer and loss function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor

STEPS, ROWS, TOKENS, SIDE = 200, 800, 6, 8
"""Steps of training, most rows of a data set, how many tokens there are, the side of drawn images."""


@dataclass(frozen=True, eq=False)
class Task:
    """Rows [rows, features], images [rows, 1, side, side], or sequences: tokens [rows, steps] or numbers
    [rows, steps, features]; targets are class numbers [rows] or numbers [rows, targets]."""

    name: str
    x: Tensor
    y: Tensor

    @property
    def kind(self) -> str:
        if self.x.dtype == torch.long:
            return "tokens"
        return {2: "rows", 3: "sequences", 4: "images"}[self.x.dim()]

    @property
    def classes(self) -> int | None:
        return int(self.y.max()) + 1 if self.y.dtype == torch.long else None

    @property
    def guess(self) -> float:
        """The score of the best constant answer: the share of the largest class, or no variance at all."""
        return self.y.bincount().max().item() / len(self.y) if self.classes else 0.0


@cache
def task(name: str) -> Task:
    x, y = MAKERS[name]()
    order = np.random.default_rng(0).permutation(len(x))[:ROWS]
    x, y = np.asarray(x)[order], np.asarray(y)[order]
    inputs = torch.as_tensor(x, dtype=torch.long if x.dtype.kind == "i" else torch.float)
    if y.dtype.kind == "i":
        return Task(name, inputs, torch.as_tensor(y, dtype=torch.long))
    return Task(name, inputs, torch.as_tensor(y, dtype=torch.float).reshape(len(y), -1))


Arrays = tuple[np.ndarray, np.ndarray]


def bundled(load: Callable[..., Arrays]) -> Arrays:
    x, y = load(return_X_y=True)
    return x.astype(float), y


def digit_images() -> Arrays:
    x, y = bundled(datasets.load_digits)
    return x.reshape(-1, 1, 8, 8), y


def stripes() -> Arrays:
    """The direction of noisy stripes: four classes."""
    rng = np.random.default_rng(1)
    y = rng.integers(4, size=ROWS)
    row, column = np.mgrid[0:SIDE, 0:SIDE]
    angle, phase = y * np.pi / 4, rng.uniform(0, 2 * np.pi, ROWS)
    along = np.cos(angle)[:, None, None] * row + np.sin(angle)[:, None, None] * column
    x = np.sin(1.5 * along + phase[:, None, None]) + 0.5 * rng.standard_normal((ROWS, SIDE, SIDE))
    return x[:, None], y


def spots() -> Arrays:
    """Where a bright spot lies: two numbers."""
    rng = np.random.default_rng(2)
    y = rng.uniform(1, SIDE - 2, (ROWS, 2))
    row, column = np.mgrid[0:SIDE, 0:SIDE]
    far = (row - y[:, 0, None, None]) ** 2 + (column - y[:, 1, None, None]) ** 2
    return (np.exp(-far / 4) + 0.1 * rng.standard_normal(far.shape))[:, None], y


def shapes() -> Arrays:
    """A filled square, a frame or a cross, somewhere: three classes."""
    rng = np.random.default_rng(3)
    y, x = rng.integers(3, size=ROWS), 0.3 * rng.standard_normal((ROWS, 1, SIDE, SIDE))
    frame = np.pad(np.zeros((3, 3)), 1, constant_values=1.0)
    cross = np.maximum(np.eye(5), np.eye(5)[::-1])
    for image, kind, (i, j) in zip(x, y, rng.integers(SIDE - 4, size=(ROWS, 2)), strict=True):
        image[0, i : i + 5, j : j + 5] += (np.ones((5, 5)), frame, cross)[kind]
    return x, y


def tokens(steps: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(TOKENS, size=(ROWS, steps))


def recall() -> Arrays:
    """The first of eight tokens."""
    x = tokens(8, 4)
    return x, x[:, 0]


def majority() -> Arrays:
    """Which of the first three of six tokens is the most frequent of nine."""
    x = tokens(9, 5)
    return x, np.stack([(x == token).sum(1) for token in range(3)], 1).argmax(1)


def order() -> Arrays:
    """Whether token 0 comes before token 1 in a sequence that has each of them once."""
    x, rng = tokens(8, 6) % 4 + 2, np.random.default_rng(6)
    places = np.stack([rng.choice(8, 2, replace=False) for _ in range(ROWS)])
    np.put_along_axis(x, places, np.array([[0, 1]]), 1)
    return x, (places[:, 0] < places[:, 1]).astype(int)


def adding() -> Arrays:
    """The sum of the two marked among eight numbers (Hochreiter, Schmidhuber 1997)."""
    rng = np.random.default_rng(7)
    marks = np.zeros((ROWS, 8))
    np.put_along_axis(marks, np.stack([rng.choice(8, 2, replace=False) for _ in range(ROWS)]), 1.0, 1)
    values = rng.uniform(-1, 1, (ROWS, 8))
    return np.stack([values, marks], 2), (values * marks).sum(1)


def waves() -> Arrays:
    """The frequency of a noisy wave over twelve steps: three classes."""
    rng = np.random.default_rng(8)
    y, phase = rng.integers(3, size=ROWS), rng.uniform(0, 2 * np.pi, (ROWS, 1))
    x = np.sin((0.5 + 0.5 * y[:, None]) * np.arange(12) + phase) + 0.2 * rng.standard_normal((ROWS, 12))
    return x[..., None], y


def checkers() -> Arrays:
    """The colour of a square of a board of three by three."""
    x = np.random.default_rng(9).uniform(0, 3, (ROWS, 2))
    return x, x.astype(int).sum(1) % 2


def hastie() -> Arrays:
    x, y = datasets.make_hastie_10_2(ROWS, random_state=0)
    return x, (y > 0).astype(int)


def linear() -> Arrays:
    return datasets.make_regression(ROWS, 20, n_informative=10, n_targets=3, noise=10.0, random_state=0)


MAKERS: Mapping[str, Callable[[], Arrays]] = {
    "digits": lambda: bundled(datasets.load_digits),
    "wine": lambda: bundled(datasets.load_wine),
    "breast cancer": lambda: bundled(datasets.load_breast_cancer),
    "iris": lambda: bundled(datasets.load_iris),
    "diabetes": lambda: bundled(datasets.load_diabetes),
    "moons": lambda: datasets.make_moons(ROWS, noise=0.1, random_state=0),
    "circles": lambda: datasets.make_circles(ROWS, noise=0.1, factor=0.4, random_state=0),
    "blobs": lambda: datasets.make_blobs(ROWS, 10, centers=8, cluster_std=3.0, random_state=0),
    "clusters": lambda: datasets.make_classification(
        ROWS, 20, n_informative=8, n_classes=4, class_sep=1.5, random_state=0
    ),
    "quantiles": lambda: datasets.make_gaussian_quantiles(n_samples=ROWS, n_features=6, random_state=0),
    "hastie": hastie,
    "checkers": checkers,
    "friedman1": lambda: datasets.make_friedman1(ROWS, random_state=0),
    "friedman2": lambda: datasets.make_friedman2(ROWS, random_state=0),
    "linear": linear,
    "s curve": lambda: datasets.make_s_curve(ROWS, noise=0.05, random_state=0),
    "digit images": digit_images,
    "stripes": stripes,
    "shapes": shapes,
    "spots": spots,
    "recall": recall,
    "majority": majority,
    "order": order,
    "adding": adding,
    "waves": waves,
}
