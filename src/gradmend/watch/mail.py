"""Mail: numbers on their way from the device to the host, which nobody waits for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Deliver: TypeAlias = Callable[[Tensor], None]

_LATE = 16
"""Without events that tell when a copy is there, numbers are fetched so many posts later."""


class Mail:
    """Brings tensors to the host in their order: those on the CPU at once, others when they are there.

    Examples:
        >>> Mail().post(torch.ones(2), lambda x: print(x.tolist()))
        [1.0, 1.0]
    """

    def __init__(self) -> None:
        self._under_way: deque[tuple[Tensor, Any, Deliver]] = deque()

    def post(self, values: Tensor, deliver: Deliver) -> None:
        """Have `deliver` called with the values on the host."""
        if values.is_cpu and not self._under_way:  # a device's name takes ten times as long
            deliver(values)
            return
        self._under_way.append((*_send(values), deliver))
        self.fetch()

    def fetch(self, wait: bool = False) -> None:
        """Deliver what has arrived; if asked to, wait for the rest."""
        while self._under_way:
            values, event, deliver = self._under_way[0]
            if not (wait or (event.query() if event is not None else len(self._under_way) > _LATE)):
                return
            self._under_way.popleft()
            if event is not None:
                event.synchronize()
            deliver(values.cpu())


def _send(values: Tensor) -> tuple[Tensor, Any]:
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host, event
