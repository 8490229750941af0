"""Gradients: the size of every parameter's gradient as the optimizer gets it, and which units have none.

A bias's gradient is the sum over the batch of the loss's slope at its unit: where that is exactly zero, no
sample of the batch had a slope there: the unit was dead in this batch, and nothing else has to be measured.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradmend.watch.weights import local

LONG = 8
"""A unit without gradient in so many batches that were looked at, one after the other, counts as dead."""

_FEWEST = 8
"""Biases of fewer units say little about shares of units."""


class Gradients:
    """Reads the gradients of parameters of floating point.

    Examples:
        >>> layer = nn.Linear(2, 1)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> Gradients(list(layer.parameters())).read()[:, 0].tolist()  # rms
        [1.0, 1.0]
    """

    statistics = ("gradient", "silent", "dead")

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._roots = torch.tensor([math.sqrt(local(p).numel()) for p in parameters])
        groups: dict[object, list[int]] = defaultdict(list)
        for place, p in enumerate(parameters):
            if p.dim() == 1 and p.numel() >= _FEWEST:
                groups[p.shape, p.device].append(place)
        self._biases = tuple(groups.values())
        self._silent = [torch.zeros(0) for _ in self._biases]

    def read(self) -> Tensor:
        """Per parameter the rms of its gradient, and of biases two shares of units: [parameters, 3].

        The shares are of the units without gradient now, and of those that had none in the last `LONG`
        readings. NaN where there is nothing to read, or to count.
        """
        gradients = [dense(p.grad) for p in self._parameters]
        known = [place for place, gradient in enumerate(gradients) if gradient is not None]
        found = [gradient for gradient in gradients if gradient is not None]
        if not found:
            return torch.full((len(gradients), 3), torch.nan)
        norms = torch.stack(_on_one_device(torch._foreach_norm(found)))
        table = norms.new_full((len(gradients), 3), torch.nan)
        if self._roots.device != norms.device:
            self._roots = self._roots.to(norms.device)
        if len(known) == len(gradients):
            table[:, 0] = norms / self._roots
        else:
            table[known, 0] = norms / self._roots[known]
        for group, members in enumerate(self._biases):
            self._count(group, members, gradients, table)
        return table

    def _count(
        self, group: int, members: Sequence[int], gradients: Sequence[Tensor | None], table: Tensor
    ) -> None:
        found = [gradients[place] for place in members]
        slopes = [gradient for gradient in found if gradient is not None]
        if len(slopes) < len(members):
            self._silent[group] = torch.zeros(0)
            return
        silent = torch.stack(slopes) == 0
        before = self._silent[group]
        self._silent[group] = (before + 1) * silent if before.numel() else silent.to(torch.int16)
        table[members, 1] = silent.mean(1, dtype=table.dtype)
        table[members, 2] = (self._silent[group] >= LONG).mean(1, dtype=table.dtype)


def dense(gradient: Tensor | None) -> Tensor | None:
    """What can be read of a gradient without waiting for other processes: of a sharded one the shard."""
    if gradient is None:
        return None
    if hasattr(gradient, "to_local"):
        gradient = gradient.to_local()
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _on_one_device(norms: Sequence[Tensor]) -> list[Tensor]:
    device, dtype = norms[0].device, torch.promote_types(norms[0].dtype, torch.float32)
    same = all(norm.device == device and norm.dtype == dtype for norm in norms)
    return list(norms) if same else [norm.to(device, dtype) for norm in norms]
