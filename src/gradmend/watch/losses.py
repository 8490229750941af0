"""Losses: what a training propagates backward, made into one number per step of its optimizer."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

Loss: TypeAlias = float | Tensor
"""A number, or one that is still on its device."""

_Root: TypeAlias = tuple[Loss, float | Tensor, bool]
"""A loss, what a `GradScaler` multiplied it by, and whether the user had divided it by something."""


class Losses:
    """The losses since the last step.

    Several of one step are added up where they had been divided, as for accumulation, else averaged.

    Attributes:
        several: whether the last one was not the first of its step.

    Examples:
        >>> import torch
        >>> losses = Losses()
        >>> for part in (1.0, 3.0):
        ...     _ = losses.add(torch.tensor(part, requires_grad=True) / 2, 1.0)
        >>> losses.take()
        2.0
    """

    def __init__(self) -> None:
        self._new: list[_Root] = []
        self._aside: list[_Root] = []
        self.several = False

    def add(self, loss: Tensor, scale: float | Tensor) -> Loss:
        """Take a loss as it is propagated, and give it back without its graph; on the CPU as a number."""
        self.several = bool(self._new)
        found = loss.item() if loss.is_cpu else loss.detach()
        self._new.append((found, scale, self.several and _divided(loss)))
        return found

    @property
    def waiting(self) -> bool:
        """Whether there are losses of a step that has not come."""
        return bool(self._new)

    def put_aside(self) -> None:
        """Another optimizer steps: the losses so far are its own, unless there are no others."""
        if self._new:
            self._aside, self._new = self._new, []

    def take(self) -> Loss | None:
        """The loss of the step; None without any."""
        roots, self._new, self._aside = self._new or self._aside, [], []
        if not roots:
            return None
        loss, scale, _ = roots[0]
        if len(roots) == 1:
            return loss if type(scale) is float else loss / scale
        total = sum(loss / scale for loss, scale, _ in roots)
        return total if roots[-1][2] else total / len(roots)


def _divided(loss: Tensor) -> bool:
    """Whether the loss is a quotient, also behind the product of a `GradScaler`."""
    node = loss.grad_fn
    if node is not None and node.name() == "MulBackward0":
        node = node.next_functions[0][0]
    return node is not None and node.name() == "DivBackward0"
