"""What edits do to weights, in plain torch: the code of an edit carries these definitions along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def set_weight(
    layer: nn.Module,
    init: Callable[[Tensor], object],
    name: str = "weight",
    bias: Callable[[Tensor], object] = nn.init.zeros_,
) -> None:
    """Run `init` on a weight and `bias` on its bias, in float32 at least; parameters stay the same objects.

    >>> layer = nn.Linear(2, 2)
    >>> set_weight(layer, nn.init.eye_)
    >>> layer(torch.ones(1, 2))
    tensor([[1., 1.]], grad_fn=<AddmmBackward0>)
    """
    for key, function in ((name, init), (name.replace("weight", "bias"), bias)):
        tensor = getattr(layer, key, None)
        if isinstance(tensor, Tensor):
            value = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            function(value)
            if parametrize.is_parametrized(layer, key):
                setattr(layer, key, value.to(tensor.dtype))
            else:
                tensor.detach().copy_(value)


def delta_orthogonal_(weight: Tensor, gain: float = 1.0) -> Tensor:
    """Orthogonal over channels at the centre of a kernel, zero elsewhere; of a matrix, orthogonal.

    Args:
        weight: [out, in, ...], sides of the kernel odd.
        gain: of the orthogonal matrix.

    Source: Xiao et al., Dynamical isometry and a mean field theory of CNNs, 2018,
    https://arxiv.org/abs/1806.05393

    >>> weight = delta_orthogonal_(torch.empty(4, 4, 3, 3))
    >>> weight[:, :, 0, 0].any().item(), weight[:, :, 1, 1].any().item()
    (False, True)
    """
    matrix = nn.init.orthogonal_(weight.new_empty(weight.shape[:2]), gain)
    with torch.no_grad():
        centre = weight.zero_()
        for side in reversed(weight.shape[2:]):
            centre = centre.select(-1, side // 2)
        centre.copy_(matrix)
    return weight


def looks_linear_(weight: Tensor, gain: float = 1.0, reads: bool = True, writes: bool = True) -> Tensor:
    """A small orthogonal matrix w as [[w, -w], [-w, w]]: a rectifier between two such layers is an identity.

    Args:
        weight: [out, in, ...]; of a kernel, w sits at the centre.
        gain: of the orthogonal matrix.
        reads: whether the second half of the inputs mirrors the first, else [[w], [-w]].
        writes: whether the second half of the outputs is to mirror the first, else [[w, -w]].

    Source: Balduzzi et al., The shattered gradients problem, 2017, https://arxiv.org/abs/1702.08591

    >>> a, b = looks_linear_(torch.empty(4, 2), reads=False), looks_linear_(torch.empty(2, 4), writes=False)
    >>> product = b @ torch.relu(a @ torch.eye(2))
    >>> torch.allclose(product @ product.T, torch.eye(2), atol=1e-6)
    True
    """
    rows, columns = weight.shape[0] // (1 + writes), weight.shape[1] // (1 + reads)
    part = delta_orthogonal_(weight.new_empty(rows, columns, *weight.shape[2:]), gain)
    wide = torch.cat((part, -part), 1) if reads else part
    with torch.no_grad():
        return weight.copy_(torch.cat((wide, -wide)) if writes else wide)


def widen(layer: nn.Module, inputs: int) -> None:
    """Give a linear or convolutional layer more inputs, with weights of zero, behind those that it has.

    >>> layer = nn.Linear(2, 1)
    >>> widen(layer, 5)
    >>> layer
    Linear(in_features=5, out_features=1, bias=True)
    """
    old = layer.get_parameter("weight")
    new = old.new_zeros(old.shape[0], inputs - old.shape[1], *old.shape[2:])
    layer.weight = nn.Parameter(torch.cat((old.detach(), new), 1), old.requires_grad)
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", inputs)


def absorb(layer: nn.Module, before: float = 1.0, shift: float = 0.0, after: float = 1.0) -> None:
    """Change the weights of a layer so that `layer(x)` is what `after * layer(before * x + shift)` was.

    >>> layer = nn.Linear(1, 1)
    >>> wanted = 2 * layer(torch.tensor([3.0]))
    >>> absorb(layer, after=2.0)
    >>> torch.allclose(layer(torch.tensor([3.0])), wanted)
    True
    """
    weight: Any = layer.weight
    bias: Any = layer.bias
    with torch.no_grad():
        if bias is not None:
            bias.add_(shift * weight.flatten(1).sum(1)).mul_(after)
        if parametrize.is_parametrized(layer, "weight"):
            layer.weight = before * after * weight
        else:
            weight.mul_(before * after)


def scale_queries_and_keys(layer: nn.Module, factor: float) -> None:
    """Multiply what makes queries and keys in an `nn.MultiheadAttention` with one projection for all three.

    >>> layer = nn.MultiheadAttention(4, 2)
    >>> before = layer.in_proj_weight.detach().clone()
    >>> scale_queries_and_keys(layer, 0.5)
    >>> ratio = layer.in_proj_weight / before
    >>> ratio[0, 0].item(), ratio[7, 0].item(), ratio[8, 0].item()
    (0.5, 0.5, 1.0)
    """
    with torch.no_grad():
        for name in ("in_proj_weight", "in_proj_bias"):
            parameter = getattr(layer, name)
            if parameter is not None:
                parameter[: 2 * parameter.shape[0] // 3].mul_(factor)


def inherit(new: nn.Module, old: nn.Module) -> nn.Module:
    """Give a module the parameters of another, the same objects, where names and shapes agree.

    >>> old = nn.BatchNorm1d(2)
    >>> inherit(nn.LayerNorm(2), old).weight is old.weight
    True
    """
    for name, parameter in old.named_parameters(recurse=False):
        if name in new._parameters and new.get_parameter(name).shape == parameter.shape:
            setattr(new, name, parameter)
    return new
