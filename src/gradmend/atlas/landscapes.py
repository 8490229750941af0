"""Landscapes of two numbers, and what optimizers do on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adagrad, Adam, Optimizer, RMSprop

from gradmend.setup import Setup
from gradmend.training.loop import Stepper

_LATE: Final = 1e9
"""So many steps on, nothing is left of Adam's correction."""

_RECURRENT: Final = 25
_WANTED: Final = 0.7

Loss = Callable[[Float[Tensor, "*points 2"]], Float[Tensor, "*points"]]


def ravine(at: Float[Tensor, "*points 2"]) -> Float[Tensor, "*points"]:
    """A quadratic that is 25 times as steep up and down as along.

    >>> ravine(torch.tensor([1.0, 1.0]))
    tensor(13.)
    """
    return (at[..., 0] ** 2 + 25 * at[..., 1] ** 2) / 2


def cliff(at: Float[Tensor, "*points 2"]) -> Float[Tensor, "*points"]:
    """The loss of one recurrent unit, h' = w sigmoid(h) + b, that has to be right after 25 steps.

    Source: Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2013,
    https://arxiv.org/abs/1211.5063

    >>> round(cliff(torch.tensor([0.0, 0.0])).item(), 4)
    0.04
    """
    w, b = at.unbind(-1)
    h = torch.full_like(w, 0.5)
    for _ in range(_RECURRENT):
        h = w * torch.sigmoid(h) + b
    return (torch.sigmoid(h) - _WANTED) ** 2


@dataclass(frozen=True)
class Landscape:
    """A loss of two numbers.

    Args:
        loss: of points.
        names: of the two numbers.
        across: from where to where the first is drawn.
        up: the second.
        start: of all paths.
        rates: of learning, the first shown first.
        optimizers: names of `OPTIMIZERS`.
    """

    loss: Loss
    names: tuple[str, str]
    across: tuple[float, float]
    up: tuple[float, float]
    start: tuple[float, float]
    rates: tuple[float, ...]
    optimizers: tuple[str, ...]


def uncorrected(parameters: Sequence[nn.Parameter], lr: float) -> Optimizer:
    """Adam without the correction of its first averages, which begin at 0.

    Examples:
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> weight.grad = torch.ones(1)
        >>> _ = uncorrected([weight], lr=1.0).step()
        >>> round(-weight.item(), 2)
        3.16
    """
    optimizer = Adam(parameters, lr=lr)
    for p in parameters:
        zero = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.tensor(_LATE), **zero}
    return optimizer


OPTIMIZERS: Final[Mapping[str, Callable[..., Optimizer]]] = {
    "SGD": SGD,
    "momentum": partial(SGD, momentum=0.9),
    "Nesterov": partial(SGD, momentum=0.9, nesterov=True),
    "Adagrad": Adagrad,
    "RMSprop": RMSprop,
    "Adam": Adam,
    "Adam, not corrected": uncorrected,
}

RAVINE: Final = Landscape(
    ravine,
    ("x", "y"),
    (-4.4, 1.6),
    (-1.3, 1.3),
    (-4.0, 1.0),
    (0.01, 0.03, 0.1, 0.3, 1.0),
    tuple(OPTIMIZERS),
)
CLIFF: Final = Landscape(
    cliff,
    ("w", "b"),
    (2.6, 7.4),
    (-4.0, -0.8),
    (5.6, -2.6),
    (0.1, 0.5, 1.0, 2.0),
    ("SGD", "momentum", "RMSprop", "Adam"),
)


@dataclass(frozen=True, eq=False)
class Path:
    """Where an optimizer went.

    Args:
        points: before the first step and after each.
        losses: there.
    """

    points: Float64[np.ndarray, "points 2"]
    losses: Float64[np.ndarray, " points"]


class _Point(nn.Module):
    def __init__(self, at: tuple[float, float], loss: Loss) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at, dtype=torch.float64))
        self.loss = loss

    def forward(self) -> Float[Tensor, ""]:
        found: Tensor = self.loss(self.at)
        return found


def path(land: Landscape, optimizer: str, rate: float, steps: int, clip: float | None = None) -> Path:
    """Follow an optimizer of torch from the start of a landscape.

    Args:
        optimizer: a name of `OPTIMIZERS`.
        rate: of learning.
        steps: at most; a loss that is no number ends it.
        clip: the largest norm of a gradient, or None.

    Examples:
        >>> found = path(RAVINE, "SGD", rate=0.01, steps=2)
        >>> found.points.round(3).tolist()
        [[-4.0, 1.0], [-3.96, 0.75], [-3.92, 0.562]]
    """
    model = _Point(land.start, land.loss)
    transform: Any = None if clip is None else partial(clip_grad_norm_, max_norm=clip)
    factory = partial(OPTIMIZERS[optimizer], lr=rate)
    step = Stepper(Setup(model, step=_loss, optimizer=factory, gradient_transform=transform))
    points, losses = [model.at.tolist()], []
    for _ in range(steps):
        losses.append(step([()]).item())
        points.append(model.at.tolist())
        if not math.isfinite(losses[-1]):
            break
    losses.append(float(land.loss(model.at.detach())))
    return Path(np.array(points), np.array(losses))


def _loss(model: nn.Module, _: object) -> Tensor:
    found: Tensor = model()
    return found


def ground(
    land: Landscape, points: int
) -> tuple[Float64[np.ndarray, " x"], Float64[np.ndarray, " y"], Float64[np.ndarray, "y x"]]:
    """The loss over a grid."""
    x, y = (np.linspace(*ends, points) for ends in (land.across, land.up))
    grid = torch.from_numpy(np.stack(np.meshgrid(x, y), axis=-1))
    return x, y, land.loss(grid).numpy()
