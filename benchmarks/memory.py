"""Peak memory of the tensors that one call allocates."""

from __future__ import annotations

import gc
import os
from itertools import accumulate

import torch
from torch.autograd.profiler import profile

from benchmarks.timing import Call

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints a line per profile


def peak_bytes(call: Call, device: str = "cpu") -> int:
    """The most bytes of tensors held at once during the call, over those held before it.

    What was held before must not be freed in the call: the profiler does not know the size of such tensors.

    Example:
        >>> peak_bytes(lambda: torch.zeros(1000) + torch.zeros(1000))
        12000
    """
    gc.collect()
    return _device_peak(call) if device == "cuda" else _host_peak(call)


def _host_peak(call: Call) -> int:
    """Every allocation and release of torch's allocator for the CPU, replayed in order."""
    with profile(profile_memory=True) as profiler:
        call()
    events = profiler.kineto_results.events()
    held: int = max(accumulate((e.nbytes() for e in events if e.name() == "[memory]"), initial=0))
    return held


def _device_peak(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held
