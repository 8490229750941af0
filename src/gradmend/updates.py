"""Updates: what the optimizer's next step would do, found by a copy of it on copies of the parameters."""

from __future__ import annotations

import copy
import inspect
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend import stats
from gradmend.setup import Setup, named_parameters

_CHUNK = 1_000_000
"""How many parameter values are stepped at a time, so that the copies stay small."""


def updates(setup: Setup, optimizer: Optimizer, gradients: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Rms of what the optimizer's next step would add to each parameter that it holds.

    The step is taken by a copy of the optimizer on copies of the parameters, a chunk at a time. Optimizers
    whose step wants a closure (LBFGS) are left out.
    """
    if wants_closure(optimizer):
        return {}
    names = {id(p): name for name, p in named_parameters(setup.model)}
    held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in names]
    stand_ins = {id(p): p.detach().requires_grad_() for p in held}
    for p in held:
        stand_ins[id(p)].grad = gradients[names[id(p)]]
    if setup.gradient_transform is not None:
        transform = copy.deepcopy(setup.gradient_transform)
        transform(cast(list[nn.Parameter], list(stand_ins.values())))
    wanted = {id(p): stand_ins[id(p)].grad for p in held}
    return {
        names[id(p)]: stats.norm(change) / math.sqrt(change.numel())
        for p, change in changes(optimizer, held, wanted)
    }


def wants_closure(optimizer: Optimizer) -> bool:
    """Whether a step cannot be taken without a closure, as with LBFGS."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def changes(
    optimizer: Optimizer,
    held: Sequence[Tensor],
    gradients: dict[int, Tensor | None],
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What one step of a copy of the optimizer changes in copies of the parameters that it holds.

    Args:
        held: parameters of the optimizer.
        gradients: by the `id` of the parameter.
        dtype: to compute in; by default the parameters' own, so that what is lost to rounding is lost.
    """
    for chunk in _chunks(held):
        yield from _changes(optimizer, chunk, gradients, dtype)


def _changes(
    optimizer: Optimizer,
    chunk: Sequence[Tensor],
    gradients: dict[int, Tensor | None],
    dtype: torch.dtype | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    twins = {id(p): _as(p.detach().clone(), dtype).requires_grad_() for p in chunk}
    for p in chunk:
        gradient = gradients[id(p)]
        twins[id(p)].grad = gradient if gradient is None else _as(gradient, dtype)
    copied = copy.copy(optimizer)
    copied.state = defaultdict(dict, {twins[id(p)]: _state(optimizer, p, dtype) for p in chunk})
    copied.param_groups = [
        {**group, "params": [twins[id(p)] for p in group["params"] if id(p) in twins]}
        for group in optimizer.param_groups
    ]
    type(copied).step(copied)
    return ((p, twins[id(p)].detach() - p.detach()) for p in chunk)


def _state(optimizer: Optimizer, p: Tensor, dtype: torch.dtype | None) -> dict[str, Any]:
    """A copy of what the optimizer remembers of a parameter."""
    state: dict[str, Any] = copy.deepcopy(optimizer.state.get(p, {}))
    of_its_size = (item for item in state.items() if isinstance(item[1], Tensor) and item[1].shape == p.shape)
    return {**state, **{key: _as(value, dtype) for key, value in of_its_size}}


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _chunks(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    chunk: list[Tensor] = []
    for parameter in parameters:
        chunk.append(parameter)
        if sum(p.numel() for p in chunk) >= _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
