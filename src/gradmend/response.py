"""Response: how the loss answers to the optimizer's steps, tried on a copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend.harmless import undisturbed, untouched
from gradmend.readings import Response
from gradmend.setup import Batch, Setup
from gradmend.updates import changes, wants_closure


def respond(setup: Setup, batch: Batch, steps: int = 10) -> Response | None:
    """Step on a copy and watch the loss: along the first step, and over a few steps on one batch.

    Args:
        steps: how many steps are taken on the same batch; four times as many if they overshoot.

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
        before = _backward(trial, optimizer, batch)
        response = Response(before, _line(trial, optimizer, batch), ())
        while len(response.losses) < steps or (
            response.overshoots and len(response.losses) < _PATIENCE * steps
        ):
            optimizer.step()
            loss = _backward(trial, optimizer, batch)
            response = replace(response, losses=(*response.losses, loss))
        return response


_FRACTIONS = tuple(4.0**k for k in range(-6, 7))
_LARGEST, _ROUNDING = 4.0**20, 1e-6
_PATIENCE = 4
"""Where steps overshoot, so many times more of them show whether the loss falls after all."""


def _backward(setup: Setup, optimizer: Optimizer, batch: Batch) -> float:
    """The loss and its gradients, with fixed noise, so that only the parameters tell the losses apart."""
    torch.manual_seed(0)
    loss = setup.loss(untouched(batch))
    parameters = [p for p in _held(optimizer) if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()  # two may share one tensor
    if setup.gradient_transform is not None:
        setup.gradient_transform(parameters)
    return loss.item()


def _held(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _line(setup: Setup, optimizer: Optimizer, batch: Batch) -> tuple[tuple[float, float], ...]:
    """(fraction, loss) along the next step, and further on until the loss rises.

    The step is computed in float64: a tiny one would be lost when it is added to float32 weights.
    """
    parameters = _held(optimizer)
    start = [p.detach().clone() for p in parameters]
    gradients = {id(p): p.grad for p in parameters}
    step = [
        change.to(p.dtype) for p, change in changes(optimizer, parameters, gradients, dtype=torch.float64)
    ]
    line = [(t, _loss_at(setup, batch, parameters, start, step, t)) for t in _FRACTIONS]
    while line[-1][1] <= min(loss for _, loss in line) * (1 + _ROUNDING) and line[-1][0] < _LARGEST:
        t = 4 * line[-1][0]
        line.append((t, _loss_at(setup, batch, parameters, start, step, t)))
    _place(parameters, start, step, 0.0)
    return tuple(line)


def _loss_at(
    setup: Setup,
    batch: Batch,
    parameters: Sequence[Tensor],
    start: Sequence[Tensor],
    step: Sequence[Tensor],
    fraction: float,
) -> float:
    _place(parameters, start, step, fraction)
    torch.manual_seed(0)
    return setup.loss(untouched(batch)).item()  # with gradients, for losses that take some themselves


@torch.no_grad()
def _place(
    parameters: Sequence[Tensor], start: Sequence[Tensor], step: Sequence[Tensor], fraction: float
) -> None:
    for parameter, origin, change in zip(parameters, start, step, strict=True):
        parameter.copy_(origin + fraction * change if fraction else origin)
