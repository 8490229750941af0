"""Small programs that train well, on data that need no download, as Keras or PyTorch programs write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from sklearn import datasets

Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Program:
    """All that makes a training, as facts that can be changed one by one.

    Args:
        name: of the sound program.
        data: a name of `DATA`.
        hidden: units of the hidden layers.
        last: activation of the last layer.
        loss: a name of `build.LOSSES`.
        filters: of convolutions in front, each followed by pooling; only for images.
        units: of the last layer; None for as many as the data ask for.
        bias: what biases begin with; None for layers without.
        scaling: of the input: "standardized", "unit" (0 to 1) or "raw".
        factor, offset: what the scaled input is multiplied by, then moved by.
        odd: a column more: row numbers ("numbers"), or one a thousand times as large ("large").
        amounts: scaling of targets that are amounts, likewise; `stretch` is what they are multiplied by.
        exchanged: the share of training rows whose targets are exchanged among each other.
        frozen: whether all but the last layer stay as drawn.
        uphill: whether the loss is maximized.
    """

    name: str
    data: str
    hidden: tuple[int, ...] = (32,)
    activation: str = "relu"
    last: str = "softmax"
    loss: str = "categorical_crossentropy"
    optimizer: str = "adam"
    rate: float = 1e-3
    batch: int = 32
    epochs: int = 20
    momentum: float = 0.0
    epsilon: float = 1e-7
    filters: tuple[int, ...] = ()
    units: int | None = None
    init: str = "glorot_uniform"
    bias: float | None = 0.0
    normalized: bool = False
    dropout: float = 0.0
    penalty: float = 0.0
    scaling: str = "standardized"
    factor: float = 1.0
    offset: float = 0.0
    odd: str = ""
    amounts: str = "standardized"
    stretch: float = 1.0
    exchanged: float = 0.0
    frozen: bool = False
    uphill: bool = False

    @property
    def task(self) -> str:
        """What is to be learnt: "classes", "binary" or "amounts"."""
        return DATA[self.data].task


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
        task: what is to be learnt from them.
        rows: draws or loads them.
    """

    task: str
    rows: Callable[[], Arrays]


def _friedman() -> Arrays:
    """Friedman, Multivariate adaptive regression splines, 1991: ten columns, of which five count."""
    return datasets.make_friedman1(600, noise=0.5, random_state=0)  # type: ignore[no-any-return]


def _houses() -> Arrays:
    """Prices of places with columns of very different size, as tables of houses have them."""
    random = np.random.default_rng(0)
    income, age = random.gamma(4.0, 1.0, 900), random.uniform(1, 52, 900)
    rooms, people = random.normal(5.4, 1.2, 900), random.gamma(2.0, 700.0, 900)
    north, east = random.uniform(32, 42, 900), random.uniform(-124, -114, 900)
    price = 0.45 * income + 0.8 * np.exp(-((north - 37) ** 2 + (east + 121) ** 2) / 8)
    price += 0.2 * np.tanh(rooms - 5) - 0.1 * np.log(people) + 0.004 * age + random.normal(0, 0.15, 900)
    return np.stack([income, age, rooms, people, north, east], 1), 100_000 * (price - price.min())


def _wave() -> Arrays:
    x = np.random.default_rng(1).uniform(-3, 3, (400, 1))
    return x, np.sin(2 * x[:, 0]) + 0.5 * x[:, 0]


def _parabola() -> Arrays:
    x = np.random.default_rng(2).uniform(-1, 1, (400, 2))
    return x, x[:, 0] ** 2 + 0.5 * x[:, 1]


def _plane() -> Arrays:
    return datasets.make_regression(  # type: ignore[no-any-return]
        400, n_features=8, n_informative=6, noise=5.0, random_state=0
    )


def _blobs() -> Arrays:
    return datasets.make_blobs(  # type: ignore[no-any-return]
        600, n_features=6, centers=5, cluster_std=2.5, random_state=0
    )


def _hills() -> Arrays:
    return datasets.make_gaussian_quantiles(  # type: ignore[no-any-return]
        n_samples=600, n_features=4, n_classes=3, random_state=0
    )


def _mixture() -> Arrays:
    return datasets.make_classification(  # type: ignore[no-any-return]
        600, n_features=12, n_informative=6, class_sep=1.5, random_state=3
    )


def _bundled(load: Callable[..., Arrays]) -> Callable[[], Arrays]:
    return lambda: load(return_X_y=True)


DATA: Mapping[str, Source] = {
    "digits": Source("classes", _bundled(datasets.load_digits)),
    "iris": Source("classes", _bundled(datasets.load_iris)),
    "wine": Source("classes", _bundled(datasets.load_wine)),
    "blobs": Source("classes", _blobs),
    "hills": Source("classes", _hills),
    "cancer": Source("binary", _bundled(datasets.load_breast_cancer)),
    "moons": Source("binary", lambda: datasets.make_moons(500, noise=0.15, random_state=0)),
    "circles": Source("binary", lambda: datasets.make_circles(500, noise=0.08, factor=0.5, random_state=0)),
    "mixture": Source("binary", _mixture),
    "diabetes": Source("amounts", _bundled(datasets.load_diabetes)),
    "friedman": Source("amounts", _friedman),
    "houses": Source("amounts", _houses),
    "wave": Source("amounts", _wave),
    "parabola": Source("amounts", _parabola),
    "plane": Source("amounts", _plane),
}

_BINARY = {"last": "sigmoid", "loss": "binary_crossentropy"}
_AMOUNTS = {"last": "linear", "loss": "mse"}


def _of(name: str, data: str, **facts: object) -> Program:
    usual = {"classes": {}, "binary": _BINARY, "amounts": _AMOUNTS}[DATA[data].task]
    return Program(name, data, **{**usual, **facts})  # type: ignore[arg-type]


TUNE: tuple[Program, ...] = (
    _of("digits dense", "digits", hidden=(64,), scaling="unit", epochs=15),
    _of("digits deep", "digits", hidden=(64, 64, 64), last="linear", loss="logits", scaling="unit"),
    _of("iris tanh", "iris", hidden=(16,), activation="tanh", rate=0.01, batch=16, epochs=60),
    _of("blobs sgd", "blobs", hidden=(16,), optimizer="sgd", rate=0.1, epochs=40),
    _of("cancer", "cancer", hidden=(16,), epochs=40),
    _of("moons", "moons", hidden=(16, 16), optimizer="sgd", rate=0.2, batch=16, epochs=80),
    _of("friedman", "friedman", hidden=(32, 32), rate=3e-3, epochs=40),
    _of("plane sgd", "plane", hidden=(32,), optimizer="sgd", rate=0.01, epochs=60),
    _of("parabola", "parabola", hidden=(16,), activation="tanh", rate=0.01, epochs=80),
    _of("houses", "houses", hidden=(32,), optimizer="rmsprop", rate=2e-3, epochs=40),
)
"""Rules and remedies were made better by mutants of these."""

HOLD_OUT: tuple[Program, ...] = (
    _of("digits filters", "digits", filters=(8,), hidden=(32,), scaling="unit", rate=2e-3, epochs=12),
    _of("digits sgd", "digits", hidden=(32,), activation="tanh", optimizer="sgd", rate=0.1, epochs=30),
    _of("wine", "wine", hidden=(32,), rate=3e-3, batch=16, epochs=50),
    _of("hills", "hills", hidden=(32, 32), rate=5e-3, epochs=40, last="linear", loss="logits"),
    _of("mixture", "mixture", hidden=(32,), activation="elu", rate=2e-3, epochs=40),
    _of("circles", "circles", hidden=(24,), rate=0.01, batch=25, epochs=50),
    _of("diabetes", "diabetes", hidden=(16,), optimizer="sgd", rate=0.01, epochs=60),
    _of("wave", "wave", hidden=(32, 32), rate=5e-3, epochs=80),
    _of("friedman sgd", "friedman", hidden=(24,), optimizer="sgd", rate=0.03, batch=16, epochs=60),
    _of("houses deep", "houses", hidden=(32, 16), normalized=False, rate=3e-3, epochs=40),
)
"""These were only reported on."""
