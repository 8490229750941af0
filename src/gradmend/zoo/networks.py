"""Fully connected networks, by the names of what they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final

from torch import Tensor, nn

from gradmend.errors import SetupError, suggest
from gradmend.layers import Residual
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
TAILORED: Final = "tailored"
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
    weight_variance: float | None = None,
    bias_variance: float | None = None,
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
        weight_variance: normal weights of this variance divided by n_in instead, with biases of 0: sigma_w
            squared of mean-field theory.
        bias_variance: normal biases of this variance instead.

    Raises:
        SetupError: for an unknown name, or a variance below 0.

    Source: Zhang, Botev, Martens, Deep learning without shortcuts: shaping the kernel with tailored
    rectifiers, 2022, https://arxiv.org/abs/2203.08120 (tailored); Schoenholz, Gilmer, Ganguli,
    Sohl-Dickstein, Deep information propagation, 2017, https://arxiv.org/abs/1611.01232 (variances)

    Examples:
        >>> mlp(4, 2, width=8, depth=1, activation="relu")
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    check_name("activation", activation, (*_ACTIVATIONS, TAILORED))
    check_name("init", init, (*_INITS, TAILORED))
    bend = _ACTIVATIONS.get(activation) or partial(nn.LeakyReLU, leaky_slope(max(1, depth), _COSINE))
    sizes = [inputs] + [width] * depth
    layers: list[nn.Module] = []
    for fan_in in sizes[:-1]:
        block = [nn.Linear(fan_in, width), *_norm(norm, width), bend()]
        layers += [Residual(nn.Sequential(*block))] if skip and fan_in == width else block
    model = nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))
    if weight_variance is not None:
        _initialize(model, partial(_draw, variance=weight_variance))
    elif init == TAILORED:
        _tailor(model)
    else:
        _initialize(model, _INITS[init])
    if bias_variance is not None:
        for layer in _linear_layers(model):
            nn.init.normal_(layer.bias, std=_deviation(bias_variance))
    return model


def check_name(what: str, name: str, possible: Iterable[str]) -> None:
    """Raise a SetupError, with what is possible, for a name that is not."""
    if name not in possible:
        raise SetupError(f"There is no {what} {name!r}. {suggest(name, possible)}")


def _norm(name: str | None, width: int) -> list[nn.Module]:
    if name is None:
        return []
    check_name("norm", name, _NORMS)
    return [_NORMS[name](width)]


def _initialize(model: nn.Module, fill: Callable[[Tensor], Tensor] | None) -> None:
    if fill is None:
        return
    for layer in _linear_layers(model):
        fill(layer.weight)
        nn.init.zeros_(layer.bias)


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def _draw(weight: Tensor, variance: float) -> Tensor:
    """Normal weights [n_out, n_in] of the variance divided by n_in, in place."""
    return nn.init.normal_(weight, std=_deviation(variance) / math.sqrt(weight.shape[1]))


def _deviation(variance: float) -> float:
    if not 0 <= variance < math.inf:
        raise SetupError(f"A variance is a number from 0 on, not {variance}.")
    return math.sqrt(variance)


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
