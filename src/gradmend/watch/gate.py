"""Gate: a hook before every module's forward that is set and taken away at each step, and costs little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook


class Gate:
    """A global forward pre-hook that is there only while the gate is open.

    Args:
        look: is called with a module and its arguments.

    Examples:
        >>> import torch
        >>> gate = Gate(lambda module, args: print(type(module).__name__))
        >>> gate.open()
        >>> _ = torch.nn.Identity()(1)
        Identity
        >>> gate.close()
        >>> _ = torch.nn.Identity()(1)
    """

    def __init__(self, look: Callable[..., None]) -> None:
        self._look = look
        handle = register_module_forward_pre_hook(look)
        self._hooks: Any = handle.hooks_dict_ref()  # a new handle each time takes longer than all else
        self._id = handle.id
        self.close()

    def open(self) -> None:
        """Let the hook be called from the next module on."""
        self._hooks[self._id] = self._look

    def close(self) -> None:
        """Let it be called no more."""
        self._hooks.pop(self._id, None)
