"""Importing this lets each loaded tool look at a tiny case: what a first call loads is not timed then.

The process that all jobs are forked from imports it last.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib import import_module

import torch
from torch import Tensor, nn

from benchmarks.corpora import tools


class Penalized(nn.Sequential):
    """A network that knows its weight penalty, as (parameter, l1, l2)."""

    penalties: tuple[tuple[nn.Parameter, float, float], ...] = ()

    def penalty(self) -> Tensor:
        parts = [l1 * p.abs().sum() + l2 * p.square().sum() for p, l1, l2 in self.penalties]
        return torch.stack([torch.zeros(()), *parts]).sum()


def _network() -> Penalized:
    return Penalized(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@dataclass(frozen=True)
class TinyCase:
    """A case with all that tools use: a small net on random points."""

    model: Penalized = field(default_factory=_network)
    loss_fn: Callable[[Tensor, Tensor], Tensor] = nn.functional.mse_loss
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = torch.optim.SGD
    x_train: Tensor = field(default_factory=lambda: torch.randn(64, 4))
    y_train: Tensor = field(default_factory=lambda: torch.randn(64, 2))
    batch_size: int = 16
    epochs: int | None = 2
    data_is_standin: bool = False

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss_fn(self.model(x), y) + self.model.penalty()


def warm_up() -> None:
    """Run each tool that is loaded once; what fails here fails again where it is reported."""
    torch.set_num_threads(1)
    for name in ("sklearn.datasets", "sklearn.model_selection"):  # what makes the cases' data
        import_module(name)
    loaded = [module for name, module in sys.modules.items() if name.startswith(f"{tools.__name__}.")]
    for tool in loaded:
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                tool.check(TinyCase(), 0)


warm_up()
