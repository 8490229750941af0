"""Owner: which optimizers of a process step the parameters of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer


class Owner:
    """The optimizer of a model, known from the first step that it takes.

    Args:
        model: gives it, or None once it is gone.
        optimizer: whose steps count; None takes the first one seen that holds a parameter of the model.

    Attributes:
        rivals: whether another model was seen to be stepped as well, as in adversarial training.

    Examples:
        >>> import torch
        >>> models = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> optimizers = [torch.optim.SGD(model.parameters()) for model in models]
        >>> owner = Owner(lambda: models[1], None)
        >>> [owner.owns(optimizer) for optimizer in optimizers]
        [False, True]
        >>> len(owner.held())
        4
    """

    def __init__(self, model: Callable[[], nn.Module | None], optimizer: Optimizer | None) -> None:
        self._model = model
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self.rivals = False
        self._others: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def owns(self, optimizer: Optimizer) -> bool:
        """Whether the steps of this optimizer count."""
        ours = self._known()
        if optimizer is ours or optimizer in self._others:
            return optimizer is ours
        model = self._model()
        own = set() if model is None else {id(p) for p in model.parameters()}
        if ours is None and own & _ids(optimizer):
            self._optimizer = weakref.ref(optimizer)
            return True
        self._others.add(optimizer)
        self.rivals = self.rivals or not own & _ids(optimizer)
        return False

    def held(self) -> frozenset[int]:
        """The `id` of every parameter that some optimizer is known to step."""
        ours = self._known()
        known = [*self._others, *([] if ours is None else [ours])]
        return frozenset().union(*map(_ids, known))

    def _known(self) -> Optimizer | None:
        return None if self._optimizer is None else self._optimizer()


def rate(optimizer: Optimizer) -> float | None:
    """The largest learning rate; None where it is on a device."""
    highest = 0.0
    for group in optimizer.param_groups:
        found = group.get("lr")
        if type(found) is not float and not isinstance(found, int):
            return None
        highest = max(highest, found)
    return highest


def _ids(optimizer: Optimizer) -> frozenset[int]:
    return frozenset(id(p) for group in optimizer.param_groups for p in group["params"])
