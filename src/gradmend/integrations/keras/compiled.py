"""What `model.compile` said, as a loss and an optimizer of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from gradmend.integrations.keras.backend import import_keras
from gradmend.setup import GradientTransform, OptimizerFactory

_Options = Callable[[Mapping[str, Any]], dict[str, Any]]


class KerasLoss(nn.Module):
    """A loss of Keras as torch calls its own: the output first.

    Args:
        loss: `(targets, outputs) -> losses`, as Keras calls it; their mean is taken.
    """

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss
        self.__name__ = getattr(loss, "name", getattr(loss, "__name__", type(loss).__name__))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch, a scalar."""
        losses: Tensor = self.loss(target, output)
        return losses.mean()


def _betas(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"betas": (config["beta_1"], config["beta_2"]), "eps": config["epsilon"]}


def _adam(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_betas(config), "amsgrad": config["amsgrad"]}


def _adamw(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_adam(config), "weight_decay": config["weight_decay"] or 0.0}


def _momentum(config: Mapping[str, Any]) -> dict[str, Any]:
    momentum = config["momentum"]
    return {"momentum": momentum, "nesterov": bool(config["nesterov"] and momentum)}


def _rmsprop(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {"alpha": config["rho"], "eps": config["epsilon"], "momentum": config["momentum"]}
    return {**found, "centered": config["centered"]}


_OPTIMIZERS: dict[str, tuple[type[Optimizer], _Options]] = {
    "SGD": (torch.optim.SGD, _momentum),
    "Adam": (torch.optim.Adam, _adam),
    "AdamW": (torch.optim.AdamW, _adamw),
    "Adamax": (torch.optim.Adamax, _betas),
    "Nadam": (torch.optim.NAdam, _betas),
    "RMSprop": (torch.optim.RMSprop, _rmsprop),
    "Adagrad": (
        torch.optim.Adagrad,
        lambda c: {"eps": c["epsilon"], "initial_accumulator_value": c["initial_accumulator_value"]},
    ),
    "Adadelta": (torch.optim.Adadelta, lambda c: {"rho": c["rho"], "eps": c["epsilon"]}),
}
"""Torch's optimizers that update as Keras's of the same name do; epsilon may sit inside the root there."""


def optimizer_like(optimizer: Any) -> OptimizerFactory | None:
    """A factory of torch's optimizer of the same kind, with the same numbers; None if torch has none.

    Args:
        optimizer: of Keras.

    Examples:
        >>> from gradmend.integrations.keras.backend import import_keras
        >>> factory = optimizer_like(import_keras().optimizers.SGD(0.5, momentum=0.75))
        >>> factory([nn.Parameter(torch.zeros(1))]).defaults["momentum"]
        0.75
    """
    name = type(optimizer).__name__
    if name not in _OPTIMIZERS:
        return None
    kind, options = _OPTIMIZERS[name]
    made: Callable[..., Optimizer] = kind
    return partial(made, lr=first_rate(optimizer), **options(optimizer.get_config()))


def first_rate(optimizer: Any) -> float:
    """The learning rate of the first step."""
    schedule = optimizer._learning_rate
    return float(schedule(0) if _varies(optimizer) else optimizer.learning_rate)


def schedule_like(optimizer: Any) -> Callable[[Optimizer], LRScheduler] | None:
    """The schedule of a Keras optimizer, if its rate follows one."""
    if not _varies(optimizer):
        return None
    schedule, first = optimizer._learning_rate, first_rate(optimizer)
    factor = (lambda step: float(schedule(step)) / first) if first else (lambda _: 1.0)
    return partial(LambdaLR, lr_lambda=factor)


def _varies(optimizer: Any) -> bool:
    schedules = import_keras().optimizers.schedules
    return isinstance(optimizer._learning_rate, schedules.LearningRateSchedule)


def clipping_like(optimizer: Any) -> GradientTransform | None:
    """What a Keras optimizer does to the gradient before its step, if anything."""
    if optimizer.global_clipnorm:
        return partial(nn.utils.clip_grad_norm_, max_norm=optimizer.global_clipnorm)
    if optimizer.clipnorm:
        return partial(_clip_each, max_norm=optimizer.clipnorm)
    if optimizer.clipvalue:
        return partial(nn.utils.clip_grad_value_, clip_value=optimizer.clipvalue)
    return None


def _clip_each(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    for parameter in parameters:
        nn.utils.clip_grad_norm_(parameter, max_norm)
