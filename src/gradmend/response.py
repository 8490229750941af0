"""Response: how the loss answers to the optimizer's steps, tried on a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend.probe import undisturbed, wants_closure
from gradmend.profile import Response
from gradmend.setup import Batch, Setup


def respond(setup: Setup, batch: Batch, steps: int = 10) -> Response | None:
    """Step on a copy and watch the loss: along the first step, and over a few steps on one batch.

    Args:
        steps: how many steps are taken on the same batch.

    Returns:
        The losses, or None if no step can be tried on a copy: the optimizer's step wants a closure (LBFGS),
        or its factory holds on to the model's own parameters, whatever parameters it is given.

    Example:
        >>> from functools import partial
        >>> setup = Setup(nn.Linear(2, 1), nn.MSELoss(), partial(torch.optim.SGD, lr=1e-6))
        >>> respond(setup, (torch.randn(64, 2), torch.randn(64, 1))).best_fraction > 100
        True
    """
    with undisturbed(setup.model):
        return _respond(setup, setup.copy(), batch, steps)


def _respond(setup: Setup, trial: Setup, batch: Batch, steps: int) -> Response | None:
    with undisturbed(trial.model):
        optimizer = trial.build_optimizer()
        parameters = _held(optimizer)
        if wants_closure(optimizer) or {*map(id, parameters)} & {*map(id, setup.model.parameters())}:
            return None
        start = [p.detach().clone() for p in parameters]
        before = _train_step(trial, optimizer, batch)
        moved = [p.detach().clone() for p in parameters]
        line = tuple((t, _loss_at(trial, batch, parameters, start, moved, t)) for t in _FRACTIONS)
        _place(parameters, start, moved, 1.0)
        losses = [_train_step(trial, optimizer, batch) for _ in range(steps)]
        return Response(before, line, tuple(losses))


_FRACTIONS = tuple(4.0**k for k in range(-6, 7))


def _train_step(setup: Setup, optimizer: Optimizer, batch: Batch) -> float:
    """One optimizer step with fixed noise, so that only the parameters tell the losses apart."""
    torch.manual_seed(0)
    loss = setup.loss(batch)
    parameters = [p for p in _held(optimizer) if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    if setup.gradient_transform is not None:
        setup.gradient_transform(parameters)
    optimizer.step()
    return loss.item()


def _held(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _loss_at(
    setup: Setup,
    batch: Batch,
    parameters: Sequence[Tensor],
    start: Sequence[Tensor],
    end: Sequence[Tensor],
    fraction: float,
) -> float:
    _place(parameters, start, end, fraction)
    torch.manual_seed(0)
    with torch.no_grad():
        return setup.loss(batch).item()


@torch.no_grad()
def _place(
    parameters: Sequence[Tensor], start: Sequence[Tensor], end: Sequence[Tensor], fraction: float
) -> None:
    for parameter, a, b in zip(parameters, start, end, strict=True):
        parameter.copy_(a + fraction * (b - a))
