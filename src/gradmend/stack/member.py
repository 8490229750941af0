"""Member: one training of a stack, and what it has in common with others."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from itertools import chain

from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from gradmend.stack.plain import plain
from gradmend.training.run import Plan

_ELEMENTWISE = (SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta)
"""Optimizers that treat every number by itself, so that several networks may share one."""


class Member:
    """One network of a stack.

    Args:
        place: among all that are trained.
        plan: its setup and data, and for how long.
        seed: of its order of rows and its noise.
    """

    def __init__(self, place: int, plan: Plan, seed: int) -> None:
        self.place, self.plan, self.seed = place, plan, seed

    @cached_property
    def optimizer(self) -> Optimizer:
        """Over its own parameters; it lends its groups and options."""
        return self.plan.setup.build_optimizer()

    @cached_property
    def names(self) -> list[list[str | None]]:
        """Of the parameters in each group of the optimizer; None for those that are not the model's."""
        known = {id(p): name for name, p in self.plan.setup.model.named_parameters()}
        return [[known.get(id(p)) for p in group["params"]] for group in self.optimizer.param_groups]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """In the order of the optimizer's groups."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def stackable(self) -> bool:
        """Whether networks of its structure can share an optimizer at all."""
        fresh = not isinstance(self.plan.setup.optimizer, Optimizer)
        return fresh and type(self.optimizer) in _ELEMENTWISE and None not in chain(*self.names)

    @cached_property
    def structure(self) -> Hashable:
        """Everything but numbers in tensors, rates and the like: those with the same can be stacked."""
        setup, plan = self.plan.setup, self.plan
        length = plan.epochs, plan.steps, plan.batch_size
        return plain(
            (
                setup.model,
                setup.loss_fn,
                setup.step,
                setup.accumulate,
                type(self.optimizer),
                self.names,
                length,
            )
        )

    @cached_property
    def manner(self) -> Hashable:
        """What one optimizer for several networks shares: options, schedule and clipping."""
        setup, groups = self.plan.setup, self.optimizer.param_groups
        options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        return plain((options, setup.schedule, setup.gradient_transform))
