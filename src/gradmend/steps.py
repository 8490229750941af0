"""Steps: what taking an optimizer's steps on a copy of a setup is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend.harmless import seed_noise, untouched
from gradmend.setup import Batch, Setup, named_parameters
from gradmend.updates import changes

_TINY = 1e-12
"""An epsilon below this is added to numbers as small as denormal ones."""


def held(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def seeded_loss(setup: Setup, batch: Batch) -> Tensor:
    """The loss with fixed noise, so that only the parameters tell two losses apart."""
    seed_noise(0)
    return setup.loss(untouched(batch))


def set_gradients(setup: Setup, optimizer: Optimizer, loss: Tensor) -> None:
    """Give the optimizer's parameters the gradients of a loss, as it is to get them."""
    parameters = [p for p in held(optimizer) if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    given: set[int] = set()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else _owned(gradient, given)
        given.add(id(gradient))
    if setup.gradient_transform is not None:
        setup.gradient_transform(parameters)


def _owned(gradient: Tensor, given: set[int]) -> Tensor:
    """A copy where autograd hands out one tensor twice, or one value as many; as `backward` does."""
    free = gradient.layout is torch.strided and gradient.is_contiguous() and id(gradient) not in given
    return gradient if free else gradient.clone()


@contextmanager
def flushed(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the processor takes denormal numbers for zero: with them it can be 100 times as slow.

    They are what Adam keeps of vanishing gradients, and its epsilon drowns them. Nothing changes for an
    optimizer that adds no such epsilon.
    """
    before = flushes()
    added = [group.get("eps") for group in optimizer.param_groups]
    needed = any(isinstance(epsilon, float) and epsilon < _TINY for epsilon in added)
    torch.set_flush_denormal(before or not needed)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def flushes() -> bool:
    """Whether denormal numbers count as zero on this processor, in this thread."""
    return not (torch.full((8,), 2e-38) * 0.25).any()


@dataclass(frozen=True, eq=False)
class Step:
    """The next step of an optimizer: what it adds to its parameters as they are.

    Args:
        parameters: of the optimizer.
        start: their values.
        change: what is added, in the same order.
        descent: the cosine between the step and the gradient; None if one is zero, or no number.
        shrinking: the cosine between the step of all weights and minus the weights; 0 if one is zero.
        weights: how many values `shrinking` is a cosine of.
    """

    parameters: list[nn.Parameter]
    start: list[Tensor]
    change: list[Tensor]
    descent: float | None
    shrinking: float
    weights: int

    @property
    def moves(self) -> bool:
        """Whether anything changes."""
        return any(bool(change.any()) for change in self.change)

    @torch.no_grad()
    def go(self, fraction: float) -> None:
        """Set the parameters to where this fraction of the step leads."""
        for parameter, start, change in zip(self.parameters, self.start, self.change, strict=True):
            parameter.copy_(start)
            if fraction:
                parameter.add_(change, alpha=fraction)


def next_step(setup: Setup, optimizer: Optimizer, loss: Tensor) -> Step:
    """The step on a loss; the parameters keep its gradients, and their values.

    It is computed in float64: a tiny step would be lost when it is added to float32 weights.

    Examples:
        >>> from functools import partial
        >>> setup = Setup(nn.Linear(2, 1), nn.MSELoss(), partial(torch.optim.SGD, lr=0.1))
        >>> batch = (torch.randn(8, 2), torch.randn(8, 1))
        >>> step = next_step(setup, setup.build_optimizer(), seeded_loss(setup, batch))
        >>> round(step.descent, 4), step.weights
        (-1.0, 2)
    """
    slopes, parameters = _slopes(setup, optimizer, loss), held(optimizer)
    start = [p.detach().clone() for p in parameters]
    change = [torch.empty_like(value) for value in start]
    matrices = {id(p): p for _, p in named_parameters(setup.model) if p.dim() > 1}
    gradients = {id(p): p.grad for p in parameters}
    along, inward, weights = [], [], 0
    steps = changes(optimizer, parameters, gradients, dtype=torch.float64)
    for (p, added), rounded in zip(steps, change, strict=True):
        rounded.copy_(added)
        if id(p) in slopes:
            along.append(_products(added, slopes[id(p)]))
        if id(p) in matrices:
            inward.append(_products(added, -p.detach()))
            weights += p.numel()
    return Step(parameters, start, change, _cosine(along), _cosine(inward) or 0.0, weights)


def _slopes(setup: Setup, optimizer: Optimizer, loss: Tensor) -> Mapping[int, Tensor]:
    """Set the gradients; returns them as they were before any transform, by the `id` of the parameter."""
    set_gradients(replace(setup, gradient_transform=None), optimizer, loss)
    wanted = [p for p in held(optimizer) if p.requires_grad]
    found = {id(p): p.grad for p in wanted if p.grad is not None and p.is_floating_point()}
    if setup.gradient_transform is None:
        return found
    found = {key: gradient.clone() for key, gradient in found.items()}
    setup.gradient_transform(wanted)
    return found


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Of two vectors, and of each with itself."""
    a, b = a.flatten(), b.to_dense().flatten().to(a.dtype)
    return torch.stack([a @ b, a @ a, b @ b])


def _cosine(products: Sequence[Tensor]) -> float | None:
    """Between two vectors given in pieces; None if one is zero, or no number."""
    if not products:
        return None
    device = products[0].device
    product, first, second = torch.stack([p.to(device) for p in products]).sum(0).tolist()
    size = math.sqrt(first * second)
    return product / size if size > 0 and math.isfinite(size) else None
