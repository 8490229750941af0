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
from gradmend.errors import SetupError
from gradmend.setup import Setup, copy_attributes, named_parameters

_CHUNK = 50_000
"""How many parameter values are stepped at a time: copies that stay in the cache take a third of the time."""


def updates(setup: Setup, optimizer: Optimizer, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rms of what the optimizer's next step would add to each parameter that it holds.

    The step is taken by a copy of the optimizer on copies of the parameters, a chunk at a time. Optimizers
    whose step wants a closure (LBFGS) are left out.

    Raises:
        SetupError: if the optimizer cannot step with such parameters and gradients.
    """
    if wants_closure(optimizer):
        return {}
    names = {id(p): name for name, p in named_parameters(setup.model)}
    held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in names]
    stand_ins = {id(p): p.detach().requires_grad_() for p in held}
    for p in held:
        gradient = gradients.get(names[id(p)])
        stand_ins[id(p)].grad = gradient if setup.gradient_transform is None else _own(gradient)
    if not _transformed(setup, list(stand_ins.values())):
        return {}
    wanted = {id(p): stand_ins[id(p)].grad for p in held}
    return {
        names[id(p)]: stats.norm(change) / math.sqrt(change.numel())
        for p, change in changes(optimizer, held, wanted)
    }


def _transformed(setup: Setup, parameters: list[Tensor]) -> bool:
    """Run a copy of the gradient transform; False if it refuses gradients that are not finite."""
    if setup.gradient_transform is None:
        return True
    try:
        copy.deepcopy(setup.gradient_transform)(cast(list[nn.Parameter], parameters))
    except (RuntimeError, TypeError, ValueError) as error:
        if not all(p.grad.isfinite().all() for p in parameters if p.grad is not None):
            return False
        raise SetupError(f"`gradient_transform` fails on the gradients of this setup: {error}") from error
    return True


def wants_closure(optimizer: Optimizer) -> bool:
    """Whether a step cannot be taken without a closure, as with LBFGS."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def obstacle(optimizer: Optimizer, model: nn.Module) -> str | None:
    """Why no step can be tried on a copy of this model; None if it can.

    Args:
        optimizer: made for the copy.
        model: the original.
    """
    if wants_closure(optimizer):
        return "the optimizer's step wants a closure"
    own = {id(p) for p in model.parameters()}
    if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        return "the optimizer's factory holds on to the model's own parameters"
    return None


def changes(
    optimizer: Optimizer,
    held: Sequence[Tensor],
    gradients: dict[int, Tensor | None],
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What one step of a copy of the optimizer changes in copies of the parameters that it holds.

    Args:
        held: parameters of the optimizer.
        gradients: by the `id` of the parameter; sparse ones stay sparse, as the optimizer gets them.
        dtype: to compute in; by default the parameters' own, so that what is lost to rounding is lost.

    Raises:
        SetupError: if the optimizer cannot step with such parameters and gradients.
    """
    for chunk in _chunks(held):
        yield from _changes(optimizer, chunk, gradients, dtype)


def _changes(
    optimizer: Optimizer,
    chunk: Sequence[Tensor],
    gradients: dict[int, Tensor | None],
    dtype: torch.dtype | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    twins = {id(p): _copy(p.detach(), dtype).requires_grad_() for p in chunk}
    for p in chunk:
        gradient = gradients[id(p)]
        twins[id(p)].grad = None if gradient is None else _copy(gradient, dtype)
    copied = copy.copy(optimizer)
    copy_attributes(optimizer, copied, dict[int, Any](twins))
    copied.state = defaultdict(dict, {twins[id(p)]: _state(optimizer, p, dtype) for p in chunk})
    copied.param_groups = [
        {**group, "params": [twins[id(p)] for p in group["params"] if id(p) in twins]}
        for group in optimizer.param_groups
    ]
    _step(copied)
    return ((p, twins[id(p)].detach() - p.detach()) for p in chunk)


def _step(optimizer: Optimizer) -> None:
    """One step past the hooks that the user has on the steps of all optimizers."""
    step: Any = type(optimizer).step
    try:
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)
    except (RuntimeError, TypeError, ValueError) as error:
        raise SetupError(
            f"A copy of the optimizer {type(optimizer).__name__} cannot step: {error}"
        ) from error


def _state(optimizer: Optimizer, p: Tensor, dtype: torch.dtype | None) -> dict[str, Any]:
    """A copy of what the optimizer remembers of a parameter."""
    state: dict[str, Any] = copy.deepcopy(optimizer.state.get(p, {}))
    of_its_size = (item for item in state.items() if isinstance(item[1], Tensor) and item[1].shape == p.shape)
    return {**state, **{key: _as(value, dtype) for key, value in of_its_size}}


def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    copied = _as(tensor, dtype)
    return tensor.clone() if copied is tensor else copied


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _own(gradient: Tensor | None) -> Tensor | None:
    """A copy that may be written to: autograd hands out one tensor for both of two summed parameters."""
    return None if gradient is None else gradient.clone()


def _chunks(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    chunk: list[Tensor] = []
    for parameter in parameters:
        chunk.append(parameter)
        if sum(p.numel() for p in chunk) >= _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
