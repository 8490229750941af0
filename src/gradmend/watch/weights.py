"""Weights: the size of the parameters, and how far a step moves them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MOST = 128
"""The change of larger parameters is that of so many of their values, spread evenly."""


class Weights:
    """Measures parameters before and after a step of the optimizer.

    Args:
        parameters: of floating point; those of one optimizer's model.

    Examples:
        >>> weight = torch.ones(10, requires_grad=True)
        >>> weights = Weights([weight])
        >>> weights.before()
        >>> _ = weight.detach().add_(2)
        >>> weights.after().tolist()  # its rms was 1, and its change's 2
        [[1.0, 2.0]]
    """

    statistics = ("value", "update")

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._norms: list[Tensor] = []
        self._samples: list[Tensor] = []
        self._matrices = [parameter for parameter in parameters if parameter.dim() > 1]
        self._version = self._writes = -1

    def overwritten(self) -> bool:
        """Whether matrices were written oftener or more seldom from the last step to this one than before.

        An optimizer writes equally often in each step; what is written through `.data` is not seen.
        """
        version, writes = self._version, self._writes
        self._version = sum([parameter._version for parameter in self._matrices])
        self._writes = -1 if version < 0 else self._version - version
        return writes not in (-1, self._writes)

    def before(self) -> None:
        """Look at the values."""
        values = [local(p) for p in self._parameters]
        self._norms = list(torch._foreach_norm(values))
        self._samples = [_sample(x).clone() for x in values]

    def after(self) -> Tensor:
        """Rms of the values before the step, and of the step: [parameters, 2]."""
        now = [_sample(local(p)) for p in self._parameters]
        torch._foreach_sub_(self._samples, now)
        steps = torch._foreach_norm(self._samples)
        counts = [math.sqrt(local(p).numel()) for p in self._parameters]
        sampled = [math.sqrt(x.numel()) for x in now]
        device = steps[0].device
        rows = [
            torch.stack([norm.to(device, torch.float32) for norm in norms])
            / torch.tensor(sizes).to(device, non_blocking=True)
            for norms, sizes in ((self._norms, counts), (steps, sampled))
        ]
        self._norms, self._samples = [], []
        return torch.stack(rows, dim=1)


def local(parameter: Tensor) -> Tensor:
    """The values, of a sharded parameter the shard."""
    found: Tensor = parameter.detach()
    return found.to_local() if hasattr(found, "to_local") else found


def _sample(values: Tensor) -> Tensor:
    flat = values.reshape(-1)
    return flat[:: max(1, math.ceil(flat.numel() / _MOST))]
