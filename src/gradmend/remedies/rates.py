"""Learning rates that differ from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from gradmend.anatomy import Anatomy
from gradmend.causes import Cause
from gradmend.remedies.base import Remedy, is_output
from gradmend.remedies.drawing import first_layers, learning_layers
from gradmend.setup import Batch, OptimizerFactory, Setup
from gradmend.surgery import Edit

_SHALLOW = 20
"""So many layers in a row may learn at the full rate."""


@dataclass(frozen=True)
class DepthRates(Remedy):
    """A lower learning rate for the layers between the first and the last of a deep plain network.

    All of them move the output in the same directions, so that one step moves it by as much as there are
    layers, while the first and the last layer each move it once. At a rate that suits a shallow network, the
    layers between get 20/layers of it. For networks without residual connections of more than 20 layers.
    Optimizers whose groups have several rates already stay as they are. Costs nothing.

    Args:
        factor: of the rate; None takes 20 / number of layers between.

    Source: measured here, on plain networks of 1,000 layers; on rates and depth Yang et al., Tensor programs
    VI: feature learning in infinite-depth neural networks, 2024, https://arxiv.org/abs/2310.02244
    """

    treats: ClassVar[frozenset[Cause]] = frozenset()
    intrusion: ClassVar[int] = 2
    summary: ClassVar[str] = "{factor:.3g} of the learning rate between the first and the last layer"
    factor: float | None = None

    @property
    def title(self) -> str:
        """The summary with the values of the fields."""
        return "learning rates by depth" if self.factor is None else self.summary.format(factor=self.factor)

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is an optimizer, and more layers between the first and the last."""
        return setup.optimizer is not None and bool(self._between(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Move their parameters to a group of their own."""
        between = self._between(setup, anatomy)
        found = replace(self, factor=self._factor(between))
        if len({group["lr"] for group in setup.build_optimizer().param_groups}) > 1:
            return setup, found, []
        modules = [setup.model.get_submodule(path) for path in between]
        chosen = {p for module in modules for p in module.parameters() if p.requires_grad}
        if isinstance(setup.optimizer, Optimizer):
            set_apart(setup.optimizer, chosen, found.factor or 1.0)
        elif setup.optimizer is not None:
            places = [p in chosen for p in setup.model.parameters() if p.requires_grad]
            factory = SetApart(setup.optimizer, tuple(places), found.factor or 1.0)
            setup = replace(setup, optimizer=factory)
        return setup, found, [Edit("", _code(between, found.factor or 1.0), found.title)]

    def _between(self, setup: Setup, anatomy: Anatomy) -> list[str]:
        layers = [site for site, _ in learning_layers(setup, anatomy)]
        first = first_layers(anatomy, layers)
        paths = [s.module for s in layers if s not in first and not is_output(anatomy, s)]
        return paths if self._factor(paths) != 1 else []

    def _factor(self, paths: Sequence[str]) -> float:
        return min(1.0, _SHALLOW / max(1, len(paths))) if self.factor is None else self.factor


@dataclass(frozen=True)
class SetApart:
    """An optimizer factory that gives some parameters another rate.

    Args:
        factory: of the optimizer.
        places: of all parameters that are not frozen, whether each is one of them.
        factor: of their rate.
    """

    factory: OptimizerFactory
    places: tuple[bool, ...]
    factor: float

    def __call__(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """Make the optimizer and split its groups."""
        optimizer = self.factory(parameters)
        chosen = {p for p, meant in zip(parameters, self.places, strict=True) if meant}
        set_apart(optimizer, chosen, self.factor)
        return optimizer


def set_apart(optimizer: Optimizer, chosen: set[nn.Parameter], factor: float) -> None:
    """Move parameters to groups of their own, with another learning rate; the state stays.

    >>> import torch
    >>> layers = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=1.0)
    >>> set_apart(optimizer, {*layers[1].parameters()}, 0.1)
    >>> [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
    [(1.0, 2), (0.1, 2)]
    """
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if p in chosen]
        if moved:
            group["params"] = [p for p in group["params"] if p not in chosen]
            group.pop("param_names", None)
            optimizer.add_param_group({**group, "params": moved, "lr": factor * group["lr"]})


def _code(paths: Sequence[str], factor: float) -> str:
    return (
        f"between = {list(paths)!r}\n"
        "chosen = {p for name in between for p in model.get_submodule(name).parameters()}\n"
        "for group in list(optimizer.param_groups):\n"
        "    moved = [p for p in group['params'] if p in chosen]\n"
        "    if moved:\n"
        "        group['params'] = [p for p in group['params'] if p not in chosen]\n"
        f"        optimizer.add_param_group({{**group, 'params': moved, 'lr': {factor!r} * group['lr']}})"
    )
