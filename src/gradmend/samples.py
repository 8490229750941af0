"""Samples: which of them statistics look at, and in what precision."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=256)
def places(size: int, most: int, device: torch.device) -> Tensor:
    """The indices of at most so many samples, drawn at random but always the same.

    >>> places(3, 16, torch.device("cpu")).sort().values.tolist()
    [0, 1, 2]
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return torch.randperm(size, generator=generator)[:most].to(device)


def precision(x: Tensor) -> torch.dtype:
    """That of what is computed from a tensor: float64 of float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def real(x: Tensor) -> Tensor:
    """The same values in float32 or float64, as they follow each other."""
    return x.to(precision(x)).contiguous()


def readable(signal: Tensor) -> bool:
    """Whether it is a batch of real numbers, and not what a transform of torch.func sees of it.

    >>> readable(torch.zeros(2, 3)), readable(torch.arange(3))
    (True, False)
    """
    inside = torch._C._functorch.is_functorch_wrapped_tensor(signal)
    return signal.is_floating_point() and signal.dim() > 1 and not inside


def samples_first(x: Tensor, batch_dim: int) -> Tensor:
    """The tensor with the samples as its first dimension.

    >>> samples_first(torch.zeros(5, 2, 3), 1).shape
    torch.Size([2, 5, 3])
    """
    return x.movedim(batch_dim, 0) if batch_dim else x
