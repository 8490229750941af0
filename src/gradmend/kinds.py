"""Kinds: what the functions of torch do to a signal, and what each call says about itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmend.anatomy import Activation

_KINDS = {
    "linear": "linear matmul __matmul__ __rmatmul__ mm addmm bmm baddbmm einsum",
    "convolution": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    "embedding": "embedding embedding_bag",
    "activation": (
        "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish sigmoid tanh softplus softsign "
        "hardtanh hardswish hardsigmoid logsigmoid tanhshrink hardshrink softshrink threshold erf sin expit"
    ),
    "softmax": "softmax log_softmax softmin",
    "normalization": "batch_norm layer_norm rms_norm group_norm instance_norm",
    "recurrent": "gru lstm rnn_tanh rnn_relu gru_cell lstm_cell rnn_tanh_cell rnn_relu_cell",
    "attention": "scaled_dot_product_attention multi_head_attention_forward",
    "sum": "add __add__ __radd__ __iadd__ sub __sub__ __rsub__ __isub__",
    "product": "mul __mul__ __rmul__ __imul__ multiply div __truediv__ __itruediv__ divide",
    "dropout": ("dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout"),
    "pool": (
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d lp_pool1d lp_pool2d mean amax"
    ),
    "concat": "cat concat concatenate stack hstack vstack",
    "loss": (
        "cross_entropy nll_loss binary_cross_entropy binary_cross_entropy_with_logits mse_loss l1_loss "
        "smooth_l1_loss huber_loss kl_div poisson_nll_loss gaussian_nll_loss hinge_embedding_loss "
        "soft_margin_loss multi_margin_loss multilabel_soft_margin_loss"
    ),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}

_RESHAPES = (
    "view reshape flatten unflatten squeeze unsqueeze transpose permute t movedim view_as T mT reshape_as "
    "expand contiguous clone to float double half"
)
RESHAPES = frozenset(_RESHAPES.split())
"""What leaves the values as they are."""


@lru_cache(maxsize=1024)
def identify(func: Any) -> tuple[str, str | None]:
    """The name of a torch function and the kind of site that it makes, if any.

    `relu_` is `relu`, `special_expit` is `expit`, `__add__` stays; an attribute such as `x.T` is `T`.

    >>> identify(torch.relu_)
    ('relu', 'activation')
    """
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(func.__self__, "__name__", name)
    if not name.startswith("__"):
        name = name.removesuffix("_").removeprefix("special_")
    return name, _KIND_OF.get(name)


def elementwise(name: str) -> bool:
    """Whether a product of two signals is one value by one value, rather than of matrices.

    >>> elementwise("__rmul__"), elementwise("matmul")
    (True, False)
    """
    return _KIND_OF[name] == "product"


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        for item in value:
            yield from tensors_in(item)


def rows_in(batch: Any) -> int:
    """How many samples a batch holds, by its first tensor; 0 without any.

    >>> rows_in({"x": torch.zeros(3, 2)})
    3
    """
    return next((tensor.size(0) for tensor in tensors_in(batch) if tensor.dim()), 0)


def fan_in(name: str, place: int, weight: Tensor, arguments: Sequence[Any]) -> int:
    """How many values each unit of a product or convolution sums.

    Args:
        name: of the function.
        place: which factor the weight is.
        weight: the weight itself.
        arguments: of the call.
    """
    if name.startswith("conv"):
        return (weight[:, 0] if "transpose" in name else weight[0]).numel()
    if name == "einsum":
        return _einsum_fan_in(arguments, weight)
    return weight.shape[-1 if name == "linear" or place == 0 else -2]


def _einsum_fan_in(arguments: Sequence[Any], weight: Tensor) -> int:
    """The product of the weight's dimensions that are summed over."""
    equation = next((a for a in arguments if isinstance(a, str)), "")
    terms, _, result = equation.replace(" ", "").partition("->")
    place = next(i for i, factor in enumerate(tensors_in(arguments)) if factor is weight)
    letters = terms.split(",")[place].replace("...", "") if equation else ""
    sizes = zip(reversed(letters), reversed(weight.shape), strict=False)  # what `...` stands for is in front
    return math.prod(size for letter, size in sizes if letter not in result) or 1


def activation(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Activation | None:
    """The activation of a call as a function of one tensor, without in-place effects."""
    if name == "rrelu":
        return None
    if name == "prelu":
        slope = args[1] if len(args) > 1 else kwargs["weight"]
        return _activation("leaky_relu", (("negative_slope", float(slope.detach().mean())),))
    options = tuple(item for item in kwargs.items() if item[0] != "input")
    return _bound_activation(name, tuple(args[1:]), options)


@lru_cache(maxsize=256)
def _bound_activation(name: str, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> Activation:
    try:
        given = bound(name, (None, *args), dict(kwargs))
    except (TypeError, ValueError):  # a builtin has no signature, and none of them works in place
        return _activation(name, kwargs, args)
    options = {key: value for key, value in given.items() if key not in ("input", "inplace", "training")}
    return _activation(name, tuple(options.items()))


def bound(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    return _signature(_function(name)).bind(*args, **kwargs).arguments


_signature = lru_cache(maxsize=256)(inspect.signature)


@lru_cache(maxsize=256)
def _activation(
    name: str, options: tuple[tuple[str, Any], ...], positional: tuple[Any, ...] = ()
) -> Activation:
    """One object per activation and options, so that what is computed of it can be remembered."""
    function = _function(name)
    if positional:
        return lambda x: function(x, *positional, **dict(options))
    return partial(function, **dict(options)) if options else function


def _function(name: str) -> Any:
    return next(getattr(home, name) for home in (F, torch, torch.special) if hasattr(home, name))


def steps_first(name: str, args: Sequence[Any]) -> bool:
    """Whether a recurrent or attention function that puts out three dimensions puts the steps first."""
    if name in ("gru", "lstm", "rnn_tanh", "rnn_relu"):
        return args[-1] is False
    return name == "multi_head_attention_forward"


def settings(name: str, kind: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that a call was made with, as far as they decide what it does to a signal.

    convolution: kernel, stride, padding, dilation, groups. normalization: eps, groups. dropout: p.
    avg_pool: kernel, stride. product with a constant: factor, the constant's rms.
    """
    if kind == "convolution":
        return _convolution(name, args, kwargs)
    if name.startswith("avg_pool"):
        return _windows(name, args, kwargs)
    if kind not in ("normalization", "dropout"):
        return {}
    found = {"p": 0.5, "eps": 1e-5}
    with suppress(TypeError, ValueError, StopIteration):  # such as `torch.batch_norm`, a builtin
        found |= bound(name, args, kwargs)
    if kind == "dropout":
        return {"p": float(found["p"])} if found.get("training", True) else {"p": 0.0}
    return {"eps": found["eps"] or 0.0, "groups": found.get("num_groups", 1)}


def _convolution(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    order = ["input", "weight", "bias", "stride", "padding"]
    order += ["output_padding", "groups", "dilation"] if "transpose" in name else ["dilation", "groups"]
    usual = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given = {**usual, **dict(zip(order, args, strict=False)), **kwargs}
    kernel = tuple(given["weight"].shape[2:])
    spread = {key: _per_axis(given[key], len(kernel)) for key in ("stride", "dilation")}
    padding = given["padding"]
    if isinstance(padding, str):
        wide = [d * (k - 1) // 2 for d, k in zip(spread["dilation"], kernel, strict=True)]
        padding = tuple(wide) if padding == "same" else 0
    return {"kernel": kernel, **spread, "padding": _per_axis(padding, len(kernel)), "groups": given["groups"]}


def _windows(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    given = {**dict(zip(("input", "kernel_size", "stride"), args, strict=False)), **kwargs}
    kernel = _per_axis(given["kernel_size"], int(name[-2]))
    return {"kernel": kernel, "stride": _per_axis(given.get("stride") or kernel, len(kernel))}


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values
