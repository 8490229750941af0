"""States of a running training that it can go back to: weights, buffers and what the optimizer remembers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

EVERY = 50
"""Steps from one state to the next; to copy one takes about as long as the optimizer's share of a step."""


@dataclass(frozen=True, eq=False)
class State:
    """A copy of what a training has learnt. It keeps neither the model nor the optimizer alive.

    Args:
        step: of the optimizer after which it was taken.
        values: of parameters and buffers.
        memory: what the optimizer remembers of each parameter.
    """

    step: int
    values: WeakTensorKeyDictionary
    memory: WeakTensorKeyDictionary


def take(step: int, model: nn.Module, optimizer: Optimizer) -> State:
    """Copy a training as it is now.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> before, state = model.weight.item(), take(0, model, optimizer)
        >>> nn.init.zeros_(model.weight).item()
        0.0
        >>> put_back(state, optimizer)
        >>> model.weight.item() == before
        True
    """
    values, memory = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
    for tensor in _tensors(model, optimizer):
        values[tensor] = tensor.detach().clone()
    for parameter, remembered in optimizer.state.items():
        memory[parameter] = _copied(remembered)
    return State(step, values, memory)


def put_back(state: State, optimizer: Optimizer) -> None:
    """Give a training the values that it had; gradients, schedules and random generators stay as they are.

    What came into the model since, or has another shape now, stays as well.
    """
    with torch.no_grad():
        for tensor, value in state.values.items():  # type: ignore[no-untyped-call]
            if tensor.shape == value.shape:
                tensor.copy_(value)
    for parameter in [p for p in optimizer.state if p in state.values]:
        del optimizer.state[parameter]
    for parameter, remembered in state.memory.items():  # type: ignore[no-untyped-call]
        optimizer.state[parameter] = _copied(remembered)


class States:
    """The last state that has proved good, and one that still has to: two copies in all.

    A state is good if nothing was amiss up to the next one, `EVERY` steps later. So what went wrong before
    anybody could see it is not come back to. The one before the first step counts as good.
    """

    def __init__(self) -> None:
        self.good: State | None = None
        self._next: State | None = None

    def keep(self, step: int, model: nn.Module, optimizer: Optimizer) -> bool:
        """Copy the training if it is time to; whether that has proved an earlier copy good."""
        if self.good is None:
            self.good = take(step, model, optimizer)
        elif step % EVERY == 0:
            proved, self._next = self._next, None
            self.good = proved or self.good  # lets go of the older one before the next is copied
            self._next = take(step, model, optimizer)
            return proved is not None
        return False

    def doubt(self) -> None:
        """Something is amiss: what has not proved good yet is not kept."""
        self._next = None

    def clear(self) -> None:
        """Keep nothing."""
        self.good = self._next = None


def _tensors(model: nn.Module, optimizer: Optimizer) -> Iterable[Tensor]:
    stepped = (p for group in optimizer.param_groups for p in group["params"])
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *stepped)}.values()


def _copied(remembered: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), remembered)
