"""Initial weights: each remedy draws new weights for all linear and convolutional layers, biases zero.

Frozen layers keep theirs; else learned weights are lost, so these are for setups that have not trained yet.
Variances are given for a layer with `fan_in` inputs per unit.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from gradmend import surgery
from gradmend.anatomy import Anatomy, Site
from gradmend.causes import Cause
from gradmend.layers import set_weight
from gradmend.remedies.base import SIGNAL, Remedy, weighted_layers
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit

Init: TypeAlias = "partial[Tensor]"

_RECTIFIERS = ("relu", "leaky_relu", "prelu", "rrelu", "relu6", "gelu", "silu", "mish")


class Initialization(Remedy):
    """What all initializations share: where they draw. Each says what it draws."""

    treats: ClassVar[frozenset[Cause]] = SIGNAL | {Cause.SYMMETRIC_WEIGHTS}
    intrusion: ClassVar[int] = 3

    @abstractmethod
    def init(self, site: Site, after: Site | None) -> Init:
        """What draws one layer's weight in place; `after` is the activation that follows the layer."""

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is a layer with weights that are not frozen."""
        return bool(_learning_layers(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Draw new weights, layer by layer in the order of execution."""
        edits = []
        for site, after in _learning_layers(setup, anatomy):
            init = self.init(site, after)
            edits.append(surgery.fill(setup.model, site.module, init, _code(init)))
        return setup, self, edits


@dataclass(frozen=True)
class Xavier(Initialization):
    """Variance 2/(fan_in + fan_out): for tanh, softsign and linear layers.

    Source: Glorot, Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010,
    https://proceedings.mlr.press/v9/glorot10a.html
    """

    summary: ClassVar[str] = "Xavier initialization"

    def init(self, site: Site, after: Site | None) -> Init:
        """What draws one layer's weight."""
        return partial(nn.init.xavier_normal_)


@dataclass(frozen=True)
class He(Initialization):
    """Variance 2/fan_in before a rectifier (2/(1 + slope^2)/fan_in if leaky), 1/fan_in elsewhere.

    Source: He, Zhang, Ren, Sun, Delving deep into rectifiers, 2015, https://arxiv.org/abs/1502.01852
    """

    summary: ClassVar[str] = "He initialization"

    def init(self, site: Site, after: Site | None) -> Init:
        """What draws one layer's weight."""
        if after is None or after.function not in _RECTIFIERS:
            return partial(nn.init.kaiming_normal_, nonlinearity="linear")
        return partial(nn.init.kaiming_normal_, a=_slope(after), nonlinearity="leaky_relu")


@dataclass(frozen=True)
class LeCun(Initialization):
    """Variance 1/fan_in: for SELU, tanh and linear layers.

    Source: LeCun, Bottou, Orr, Müller, Efficient BackProp, 1998, https://doi.org/10.1007/3-540-49430-8_2
    """

    summary: ClassVar[str] = "LeCun initialization"

    def init(self, site: Site, after: Site | None) -> Init:
        """What draws one layer's weight."""
        return partial(nn.init.kaiming_normal_, nonlinearity="linear")


@dataclass(frozen=True)
class Orthogonal(Initialization):
    """Orthogonal weights with gain sqrt(2/(1 + slope^2)) before a rectifier, 1 elsewhere.

    torch's `orthogonal_` shrinks the signal where a layer has more outputs than inputs; here the gain makes
    up for it by sqrt(fan_out/fan_in).

    Source: Saxe, McClelland, Ganguli, Exact solutions to the nonlinear dynamics of learning in deep linear
    neural networks, 2014, https://arxiv.org/abs/1312.6120
    """

    summary: ClassVar[str] = "orthogonal initialization"

    def init(self, site: Site, after: Site | None) -> Init:
        """What draws one layer's weight."""
        rectified = after is not None and after.function in _RECTIFIERS
        gain = math.sqrt(2 / (1 + _slope(after) ** 2)) if rectified and after else 1.0
        expansion = math.sqrt(max(1.0, site.units / (site.fan_in or site.units)))
        return partial(nn.init.orthogonal_, gain=gain * expansion)


@dataclass(frozen=True)
class LSUV(Remedy):
    """Orthogonal weights, then scaled layer by layer until each output has unit variance on a batch.

    Because biases are zero, one forward pass scales all layers exactly. Unit variance keeps the gradient's
    size for ReLU-like activations; smooth ones drift by a few percent a layer.

    Source: Mishkin, Matas, All you need is a good init, 2016, https://arxiv.org/abs/1511.06422
    """

    treats: ClassVar[frozenset[Cause]] = Initialization.treats
    intrusion: ClassVar[int] = 3
    summary: ClassVar[str] = "LSUV initialization"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is a layer with weights that are not frozen."""
        return bool(_learning_layers(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Draw orthogonal weights, then measure and scale them in one forward pass."""
        _, _, edits = Orthogonal().edit(setup, anatomy, batches)
        paths = [edit.where for edit in edits]
        with torch.no_grad():
            scale_to_unit_variance(setup.model, paths, lambda: setup.loss(batches[0]))
        code = (
            f"{inspect.getsource(scale_to_unit_variance)}\n"
            f"scale_to_unit_variance(model, {paths!r}, lambda: model(x))  # x: one batch of inputs"
        )
        return setup, self, [*edits, Edit("", code, "every layer scaled to unit variance on a batch")]


def scale_to_unit_variance(model: nn.Module, paths: list[str], forward: Callable[[], Any]) -> None:
    """Scale the weights at `paths` so that each layer's output has unit variance in `forward()`."""
    done = set[nn.Module]()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def scale(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        if layer in done or not output.std() > 0:
            return output
        done.add(layer)
        factor = 1 / output.std()
        set_weight(layer, lambda weight: weight.mul_(factor))
        return output * factor

    handles = [model.get_submodule(path).register_forward_hook(scale) for path in paths]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
        for buffer, before in buffers:
            buffer.copy_(before)


def _learning_layers(setup: Setup, anatomy: Anatomy) -> list[tuple[Site, Site | None]]:
    """The layers whose weights are not frozen: frozen ones usually hold what another training learned."""
    return [pair for pair in weighted_layers(setup, anatomy) if _learns(setup.model, pair[0].module)]


def _learns(model: nn.Module, path: str) -> bool:
    named = model.get_submodule(path).named_parameters()
    return any(p.requires_grad for name, p in named if name != "bias")


def _slope(after: Site) -> float:
    """The slope of a rectifier on its negative side."""
    if after.function not in ("leaky_relu", "prelu") or after.activation is None:
        return 0.0
    return -after.activation(torch.tensor(-1.0, dtype=torch.float64)).item()


def _code(init: Init) -> str:
    options = "".join(f", {key}={value!r}" for key, value in init.keywords.items())
    name = f"nn.init.{init.func.__name__}"
    return f"partial({name}{options})" if options else name
