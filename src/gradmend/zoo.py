"""Zoo: the reference networks, and the recipes that train them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LinearLR

from gradmend.data import Data, load
from gradmend.errors import SetupError, TargetError, suggest
from gradmend.layers import Residual
from gradmend.setup import OptimizerFactory, Setup
from gradmend.theory import leaky_slope
from gradmend.weights import absorb

_ACTIVATIONS: Final[Mapping[str, Callable[[], nn.Module]]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}
_TAILORED: Final = "tailored"
_COSINE: Final = 0.7
"""To which tailored layers bring two orthogonal samples, all together."""

_NORMS: Final[Mapping[str, Callable[[int], nn.Module]]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}

_INITS: Final[Mapping[str, Callable[[Tensor], Tensor] | None]] = {
    "default": None,
    "zero": nn.init.zeros_,
    "constant": partial(nn.init.constant_, val=0.1),
    "small": partial(nn.init.normal_, std=0.01),
    "large": partial(nn.init.normal_, std=1.0),
    "xavier": nn.init.xavier_normal_,
    "he": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "lecun": partial(nn.init.kaiming_normal_, nonlinearity="linear"),
    "orthogonal": nn.init.orthogonal_,
}


def mlp(
    inputs: int,
    outputs: int,
    *,
    width: int = 64,
    depth: int = 30,
    activation: str = "sigmoid",
    init: str = "default",
    norm: str | None = None,
    skip: bool = False,
) -> nn.Sequential:
    """A fully connected network: `depth` hidden layers of `width` units, and a linear output.

    Args:
        inputs: features per row; the network takes [rows, inputs].
        outputs: values per row; it returns [rows, outputs].
        activation: sigmoid, tanh, relu, leaky_relu, prelu, elu, selu, gelu, silu, softplus, or tailored: a
            leaky ReLU that is the straighter the deeper the network.
        init: the weights of every layer. default (torch's own, biases too), else with biases of 0:
            zero, constant (0.1), small (normal, deviation 0.01), large (normal, deviation 1), xavier
            (normal, variance 2 / (n_in + n_out)), he (2 / n_in), lecun (1 / n_in), orthogonal; or tailored:
            orthogonal, of a size that makes up for the rectifier before, whose mean the biases take out.
        norm: batch or layer normalization, between the linear layer and its activation.
        skip: a residual connection around each hidden layer that keeps the width.

    Raises:
        SetupError: for an unknown name.

    Source: Zhang, Botev, Martens, Deep learning without shortcuts: shaping the kernel with tailored
    rectifiers, 2022, https://arxiv.org/abs/2203.08120 (tailored)

    Example:
        >>> mlp(4, 2, width=8, depth=1, activation="relu")
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    _check("activation", activation, (*_ACTIVATIONS, _TAILORED))
    _check("init", init, (*_INITS, _TAILORED))
    bend = _ACTIVATIONS.get(activation) or partial(nn.LeakyReLU, leaky_slope(max(1, depth), _COSINE))
    sizes = [inputs] + [width] * depth
    layers: list[nn.Module] = []
    for fan_in in sizes[:-1]:
        block = [nn.Linear(fan_in, width), *_norm(norm, width), bend()]
        layers += [Residual(nn.Sequential(*block))] if skip and fan_in == width else block
    model = nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))
    if init == _TAILORED:
        _tailor(model)
    else:
        _initialize(model, _INITS[init])
    return model


def _check(what: str, name: str, possible: Iterable[str]) -> None:
    if name not in possible:
        raise SetupError(f"There is no {what} {name!r}. {suggest(name, possible)}")


def _norm(name: str | None, width: int) -> list[nn.Module]:
    if name is None:
        return []
    _check("norm", name, _NORMS)
    return [_NORMS[name](width)]


def _initialize(model: nn.Module, fill: Callable[[Tensor], Tensor] | None) -> None:
    if fill is None:
        return
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            fill(layer.weight)
            nn.init.zeros_(layer.bias)


def _tailor(model: nn.Module) -> None:
    """Orthogonal weights after which signals keep the length that they had before the rectifier."""
    slope: float | None = None
    for layer in model.modules():
        if isinstance(layer, (nn.ReLU, nn.LeakyReLU)):
            slope = getattr(layer, "negative_slope", 0.0)
        if isinstance(layer, nn.Linear):
            mean, square = (0.0, 1.0) if slope is None else _moments(slope)
            expansion = math.sqrt(max(1.0, layer.out_features / layer.in_features))
            nn.init.orthogonal_(layer.weight, expansion / math.sqrt(square - mean**2))
            nn.init.zeros_(layer.bias)
            absorb(layer, shift=-mean)


def _moments(slope: float) -> tuple[float, float]:
    """The mean and the mean square of a leaky ReLU of unit Gaussians."""
    return (1 - slope) / math.sqrt(2 * math.pi), (1 + slope**2) / 2


@dataclass(frozen=True, eq=False)
class Recipe:
    """A setup with the data it is trained on, and for how long: its schedule, if it has one, ends then.

    Args:
        name: of the recipe.
        setup: network, loss and optimizer.
        data: training and test rows.
        batch_size: rows per batch.
        epochs: how many times through the data.
    """

    name: str
    setup: Setup
    data: Data
    batch_size: int
    epochs: int


@dataclass(frozen=True)
class _Plan:
    """A recipe before the data is loaded."""

    data: str
    network: Mapping[str, Any]
    optimizer: OptimizerFactory
    batch_size: int
    epochs: int
    falling: bool = False


def _by_depth(parameters: Sequence[nn.Parameter], lr: float) -> Optimizer:
    """Adam, slower between the first and the last layer: their steps add up, as they act alike."""
    ends, between = [*parameters[:2], *parameters[2:][-2:]], parameters[2:-2]
    factor = min(1.0, _SHALLOW / max(1, len(between) // 2))
    groups: list[dict[str, Any]] = [{"params": ends}, {"params": between, "lr": factor * lr}]
    return Adam(groups, lr=lr)


_SHALLOW: Final = 20
"""So many layers in a row may learn at the full rate."""

_PLANS: Final[Mapping[str, _Plan]] = {
    "mnist": _Plan(
        data="mnist",
        network={"width": 128, "depth": 2, "activation": "relu", "init": "xavier", "norm": "batch"},
        optimizer=partial(Adam, lr=1e-3),
        batch_size=32,
        epochs=10,
    ),
    "deep": _Plan(
        data="digits",
        network={},
        optimizer=partial(SGD, lr=0.1),
        batch_size=64,
        epochs=40,
    ),
    "very-deep": _Plan(
        data="digits",
        network={"depth": 1000, "activation": _TAILORED, "init": _TAILORED},
        optimizer=partial(_by_depth, lr=1e-3),
        batch_size=64,
        epochs=10,
        falling=True,
    ),
}

_SETTINGS: Final = ("width", "depth", "activation", "init", "norm", "skip")

RECIPES: Final[tuple[str, ...]] = tuple(_PLANS)
"""The names that `recipe` and `train` know."""


def recipe(
    name: str,
    *,
    data: Data | str | None = None,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
    **changes: Any,
) -> Recipe:
    """A shipped recipe; torch's global random state stays as it was.

    - `mnist`: 784-128-128-10 with batch normalization and ReLU, Xavier initialization, Adam at 1e-3.
    - `deep`: 30 hidden layers of 64 sigmoid units, torch's initialization, SGD at 0.1, on `digits`. It
      does not learn: its gradients vanish.
    - `very-deep`: 1,000 hidden layers of 64 units without skips or normalization, on `digits`. It learns:
      tailored rectifiers and weights, Adam at 1e-3 and slower between the first and the last layer, the
      rate falling to 0.

    All take the cross-entropy, or the mean squared error for data without classes.

    Args:
        name: one of `RECIPES`.
        data: what to train on instead: a `Data`, or what `load` takes.
        seed: of the initial weights.
        epochs: how many times through the data instead.
        batch_size: rows per batch instead.
        steps: of the optimizer until a falling rate is 0; None counts those of the epochs.
        changes: width, depth, activation, init, norm or skip, as in `mlp`.

    Raises:
        TargetError: for an unknown recipe.
        SetupError: for an unknown change.
        DataError: if the data cannot be loaded.

    Example:
        >>> recipe("deep", depth=10, activation="relu").data
        Data('digits', 1437 + 360 rows of [64], 10 classes)
    """
    if name not in _PLANS:
        raise TargetError(f"There is no recipe {name!r}. {suggest(name, RECIPES)}")
    plan = _PLANS[name]
    for change in changes:
        _check("network setting", change, _SETTINGS)
    rows = data if isinstance(data, Data) else load(data or plan.data)
    model = _network(rows, seed, {**plan.network, **changes})
    loss_fn = nn.MSELoss() if rows.classes is None else nn.CrossEntropyLoss()
    size, times = batch_size or plan.batch_size, epochs or plan.epochs
    total = steps or times * math.ceil(len(rows.x) / size)
    falling = partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=total)
    setup = Setup(model, loss_fn, plan.optimizer, falling if plan.falling else None)
    return Recipe(name, setup, rows, size, times)


def _network(data: Data, seed: int, settings: Mapping[str, Any]) -> nn.Sequential:
    outputs = data.y[0].numel() if data.classes is None else data.classes
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = mlp(data.x[0].numel(), outputs, **settings)
    return model if data.x.dim() == 2 else nn.Sequential(nn.Flatten(), *model)
