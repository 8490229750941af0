"""Optimizer factories whose parameter groups get other options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.optim import Optimizer

from gradmend.errors import SetupError
from gradmend.setup import OptimizerFactory, Setup
from gradmend.surgery import Edit


@dataclass(frozen=True)
class WithOptions:
    """An optimizer factory whose groups get other options."""

    factory: OptimizerFactory
    options: tuple[tuple[str, float | bool], ...]

    def __call__(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """Make the optimizer and set the options."""
        optimizer = self.factory(parameters)
        for group in optimizer.param_groups:
            group.update(self.options)
        return optimizer


def with_options(setup: Setup, **options: float | bool) -> Setup:
    """The setup with other options in all parameter groups, of a live optimizer (in place) or a factory."""
    if isinstance(setup.optimizer, Optimizer):
        for group in setup.optimizer.param_groups:
            group.update(options)
        return setup
    if setup.optimizer is None:
        raise SetupError("This setup has no optimizer.")
    return replace(setup, optimizer=WithOptions(setup.optimizer, tuple(options.items())))


def option_edit(option: str, value: object, text: str) -> Edit:
    """The same as code."""
    return Edit("", f"for group in optimizer.param_groups:\n    group[{option!r}] = {value!r}", text)
