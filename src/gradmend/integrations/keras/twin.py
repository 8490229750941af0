"""Twin: a chain of Keras layers as a `torch.nn.Sequential` that computes the same, and can be operated on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "mish": nn.Mish,
    "hard_sigmoid": nn.Hardsigmoid,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "softmax": lambda: nn.Softmax(dim=-1),
}
_Parts = list[tuple[str, nn.Module]]


class Untold(Exception):
    """A layer that has no counterpart here."""


class ChannelsFirst(nn.Module):
    """From Keras's order of axes, channels last, to torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, ..., channels] to [batch, channels, ...]."""
        return x.movedim(-1, 1)


class ChannelsLast(nn.Module):
    """From torch's order of axes, channels first, to Keras's."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, ...] to [batch, ..., channels]."""
        return x.movedim(1, -1)


def twin(model: Any) -> nn.Sequential | None:
    """A Keras model as plain torch, with the same weights, and named after its layers.

    Args:
        model: built, and on torch.

    Returns:
        A copy, in training mode; None where the layers are no chain, one of them has no counterpart, or the
        outputs differ.

    Examples:
        >>> from gradmend.integrations.keras.backend import import_keras
        >>> keras = import_keras()
        >>> model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(3, "relu", name="first")])
        >>> twin(model)
        Sequential(
          (first): Linear(in_features=4, out_features=3, bias=True)
          (first_relu): ReLU()
        )
    """
    try:
        parts = [part for layer in _chain(model) for part in _translated(layer)]
    except Untold:
        return None
    made = nn.Sequential()
    for name, module in _without_detours(parts):
        made.add_module(name.replace(".", "_"), module)
    return made if _same(model, made) else None


def _same(model: Any, other: nn.Module) -> bool:
    """Whether both compute the same of an input that is drawn for it."""
    shape = model.input_shape[1:]
    if None in shape:
        return False
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = other.eval()(x), model(x, training=False)
    other.train()
    return torch.allclose(*found, rtol=1e-4, atol=1e-5)


def _chain(model: Any) -> list[Any]:
    """The layers, if each takes the output of the one before, and is called once."""
    layers = [layer for layer in getattr(model, "layers", ()) if type(layer).__name__ != "InputLayer"]
    outputs = [model.inputs[0] if len(model.inputs or ()) == 1 else None]
    for layer in layers:
        nodes = layer._inbound_nodes
        taken = nodes[-1].input_tensors if nodes else []
        if len(taken) != 1 or taken[0] is not outputs[-1]:
            raise Untold
        outputs.append(nodes[-1].output_tensors[0])
    return layers


def _translated(layer: Any) -> _Parts:
    kind = type(layer).__name__
    if kind not in _LAYERS or not type(layer).__module__.startswith("keras."):
        raise Untold
    return _LAYERS[kind](layer)


def _dense(layer: Any) -> _Parts:
    if len(layer.input.shape) != 2 or layer.lora_enabled:
        raise Untold
    linear = nn.Linear(layer.kernel.shape[0], layer.units, bias=layer.use_bias)
    _copy(linear.weight, layer.kernel.value.t())
    if layer.use_bias:
        _copy(linear.bias, layer.bias.value)
    return [(layer.name, _kept(layer, linear)), *_activation(layer)]


def _convolution(layer: Any) -> _Parts:
    """Channels come first inside; where a `same` padding is not even, its zeros are a layer of their own."""
    if layer.data_format != "channels_last" or layer.padding not in ("valid", "same"):
        raise Untold
    strides, size = tuple(layer.strides), tuple(layer.kernel_size)
    convolution = nn.Conv2d(
        layer.input.shape[-1],
        layer.filters,
        size,
        strides,
        0,
        tuple(layer.dilation_rate),
        layer.groups,
        layer.use_bias,
    )
    _copy(convolution.weight, layer.kernel.value.permute(3, 2, 0, 1))
    if layer.use_bias:
        _copy(convolution.bias, layer.bias.value)
    before: _Parts = []
    if layer.padding == "same":
        before = _padded(layer, convolution)
    first, last = (f"{layer.name}_in", ChannelsFirst()), (f"{layer.name}_out", ChannelsLast())
    return [first, *before, (layer.name, _kept(layer, convolution)), last, *_activation(layer)]


def _padded(layer: Any, convolution: nn.Conv2d) -> _Parts:
    sizes = layer.input.shape[1:3]
    if None in sizes:
        raise Untold
    reach = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation_rate, strict=True)]
    needed = [
        max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(sizes, layer.strides, reach, strict=True)
    ]
    if all(total % 2 == 0 for total in needed):
        convolution.padding = (needed[0] // 2, needed[1] // 2)
        return []
    (top, left), (height, width) = (total // 2 for total in needed), needed
    zeros = nn.ZeroPad2d((left, width - left, top, height - top))
    return [(f"{layer.name}_padding", zeros)]


def _normalization(layer: Any) -> _Parts:
    shape = layer.input.shape
    if layer.axis not in (-1, len(shape) - 1) or len(shape) not in (2, 4):
        raise Untold
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    made = kind(shape[-1], layer.epsilon, 1 - layer.momentum, affine=layer.scale and layer.center)
    if layer.scale != layer.center:
        raise Untold
    if layer.scale:
        _copy(made.weight, layer.gamma.value)
        _copy(made.bias, layer.beta.value)
    _copy(made.running_mean, layer.moving_mean.value)
    _copy(made.running_var, layer.moving_variance.value)
    part = [(layer.name, _kept(layer, made))]
    if len(shape) == 2:
        return part
    return [(f"{layer.name}_in", ChannelsFirst()), *part, (f"{layer.name}_out", ChannelsLast())]


def _layer_normalization(layer: Any) -> _Parts:
    shape = layer.input.shape
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    if axes not in ([-1], [len(shape) - 1]) or not (layer.scale and layer.center):
        raise Untold
    made = nn.LayerNorm(shape[-1], layer.epsilon)
    _copy(made.weight, layer.gamma.value)
    _copy(made.bias, layer.beta.value)
    return [(layer.name, _kept(layer, made))]


def _pool(make: Callable[..., nn.Module]) -> Callable[[Any], _Parts]:
    def translated(layer: Any) -> _Parts:
        if layer.data_format != "channels_last" or layer.padding != "valid":
            raise Untold
        pool = make(tuple(layer.pool_size), tuple(layer.strides))
        names = (f"{layer.name}_in", layer.name, f"{layer.name}_out")
        return list(zip(names, (ChannelsFirst(), pool, ChannelsLast()), strict=True))

    return translated


def _global_pool(layer: Any) -> _Parts:
    if layer.data_format != "channels_last" or layer.keepdims:
        raise Untold
    parts = (ChannelsFirst(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    names = (f"{layer.name}_in", layer.name, f"{layer.name}_flat")
    return list(zip(names, parts, strict=True))


def _activation(layer: Any) -> _Parts:
    """What a layer does at its end, as a layer of its own."""
    name = getattr(layer.activation, "__name__", "")
    if name == "linear":
        return []
    if name not in _ACTIVATIONS or not layer.activation.__module__.startswith("keras."):
        raise Untold
    return [(f"{layer.name}_{name}", _ACTIVATIONS[name]())]


def _plain(make: Callable[[Any], nn.Module]) -> Callable[[Any], _Parts]:
    return lambda layer: [(layer.name, make(layer))]


def _relu(layer: Any) -> nn.Module:
    if layer.max_value is not None or layer.threshold:
        raise Untold
    return nn.LeakyReLU(float(layer.negative_slope)) if layer.negative_slope else nn.ReLU()


_LAYERS: dict[str, Callable[[Any], _Parts]] = {
    "Dense": _dense,
    "Conv2D": _convolution,
    "BatchNormalization": _normalization,
    "LayerNormalization": _layer_normalization,
    "MaxPooling2D": _pool(nn.MaxPool2d),
    "AveragePooling2D": _pool(nn.AvgPool2d),
    "GlobalAveragePooling2D": _global_pool,
    "Activation": _activation,
    "Dropout": _plain(lambda layer: nn.Dropout(layer.rate)),
    "Flatten": _plain(lambda _: nn.Flatten()),
    "ReLU": _plain(_relu),
    "LeakyReLU": _plain(lambda layer: nn.LeakyReLU(float(layer.negative_slope))),
    "ELU": _plain(lambda layer: nn.ELU(float(layer.alpha))),
    "Softmax": _plain(lambda _: nn.Softmax(dim=-1)),
}


def _copy(to: Tensor | None, weights: Tensor) -> None:
    assert to is not None
    with torch.no_grad():
        to.copy_(weights)


def _kept(layer: Any, module: nn.Module) -> nn.Module:
    """A frozen layer stays frozen."""
    return module.requires_grad_(layer.trainable)


def _without_detours(parts: Iterable[tuple[str, nn.Module]]) -> _Parts:
    """Without axes that are moved to and fro; what works value by value lets them pass."""
    kept: _Parts = []
    for part in parts:
        if isinstance(part[1], ChannelsFirst):
            place = len(kept)
            while place and isinstance(kept[place - 1][1], _POINTWISE):
                place -= 1
            if place and isinstance(kept[place - 1][1], ChannelsLast):
                del kept[place - 1]
                continue
        kept.append(part)
    return kept


_POINTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardsigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Dropout,
)
"""Layers for which the order of the axes is all one."""
