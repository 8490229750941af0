"""Readout: how well outputs follow the targets, and whether what the last layer gets tells the targets.

What a target is depends on the loss: here it is where the loss pulls a constant output to, which is the
one-hot class for cross entropy and the target itself for the mean square, less what all samples share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def pulls(loss_fn: Callable[[Any, Any], Tensor], output: Any, target: Any) -> Tensor | None:
    """Where the loss pulls each output to, seen from one constant output: minus its gradient there.

    The constant is the mean of the targets, if they have the shape of the output, else that of the outputs:
    far away from the targets, the absolute error pulls all of them alike.

    Returns:
        [samples, numbers], less their mean; None for a loss or an output that has no such gradient.

    Examples:
        >>> pulls(nn.L1Loss(reduction="sum"), torch.zeros(2, 1), torch.tensor([[4.0], [7.0]])).tolist()
        [[-1.0], [1.0]]
    """
    if not (isinstance(output, Tensor) and output.is_floating_point() and output.dim()):
        return None
    alike = isinstance(target, Tensor) and target.is_floating_point() and target.shape == output.shape
    mean = (target if alike else output).detach().mean(0, keepdim=True).to(output)
    constant = mean.expand_as(output).clone().requires_grad_()
    try:
        with torch.enable_grad():
            return -centered(torch.autograd.grad(loss_fn(constant, target), constant)[0])
    except Exception:  # of the user's loss, which may refuse outputs that are all the same
        return None


def centered(values: Tensor) -> Tensor:
    """[samples, numbers] in float64, less the mean over the samples."""
    rows = values.detach().double().reshape(len(values), -1)
    return rows - rows.mean(0)


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two tensors in float64 as vectors; 0 if one is zero, -1 if one holds numbers that are none.

    >>> cosine(torch.tensor([3.0, 4.0]).double(), torch.tensor([4.0, 3.0]).double())
    0.96
    """
    found = ((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-300)).item()
    return found if math.isfinite(found) else -1.0


@contextmanager
def last_input(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the last module with a weight matrix got, once the model was called inside: one tensor or none.

    >>> with last_input(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))) as met:
    ...     pass
    >>> met
    []
    """
    met: list[Tensor] = []

    def see(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        met[:] = [x for x in arguments[:1] if isinstance(x, Tensor) and x.is_floating_point() and x.dim()]

    weighted = (m for m in model.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False)))
    hooks = [module.register_forward_pre_hook(see) for module in weighted]
    try:
        yield met
    finally:
        for hook in hooks:
            hook.remove()


_RIDGE = 0.1
"""Of the mean square of what the linear map reads: how strongly it is held back."""


def readable(pairs: Sequence[tuple[Tensor | None, Tensor | None]]) -> float:
    """How well a linear map of the last layer's input predicts the pulls of samples it was not fitted to.

    By ridge regression, of which leaving out one sample at a time has a closed form (Allen 1974,
    https://doi.org/10.1080/00401706.1974.10489157), on what a layer gets (Alain, Bengio 2016,
    https://arxiv.org/abs/1610.01644).

    Args:
        pairs: of each batch the layer's input and the pulls, both [samples, numbers].

    Returns:
        The share of the variance predicted, at most 1; below 0, but not below -1, where the mean predicts
        better. NaN where a layer or loss hides its numbers, or batches do not fit each other.

    Examples:
        >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
        >>> readable([(x, x[:, :2])]) > 0.9
        True
        >>> readable([(x, None)])
        nan
    """
    known = [(x, y) for x, y in pairs if x is not None and y is not None and len(x) == len(y)]
    shapes = {(x.shape[1], y.shape[1]) for x, y in known}
    if not known or len(known) < len(pairs) or len(shapes) > 1:
        return math.nan
    x, y = (torch.cat(parts) for parts in zip(*known, strict=True))
    return _predicted(x - x.mean(0), y - y.mean(0))


def _predicted(x: Tensor, y: Tensor) -> float:
    kernel = x @ x.mT
    size, total = kernel.diagonal().mean(), y.square().sum()
    if not (size.isfinite() and total.isfinite()):
        return -1.0
    if size < 1e-300 or not total:  # as good as zero: its inverse would overflow
        return 0.0
    kernel.diagonal().add_(_RIDGE * size)
    rest = _RIDGE * size * torch.cholesky_inverse(torch.linalg.cholesky(kernel))
    left_out = (rest @ y) / (rest.diagonal() - 1 / len(x)).clamp_min(1e-3)[:, None]
    return max(-1.0, 1 - (left_out.square().sum() / total).item())


def lower(loss: float, than: float) -> float:
    """By how much a loss is lower than another, as a share of their sum: from -1 to 1.

    >>> lower(1.0, 3.0), lower(3.0, 1.0), lower(math.nan, 1.0)
    (0.5, -0.5, -1.0)
    """
    if not (math.isfinite(loss) and math.isfinite(than)):
        return -1.0
    return (than / 2 - loss / 2) / (abs(than) / 2 + abs(loss) / 2 or 1.0)  # halves do not overflow
