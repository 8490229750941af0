"""Room: what is left out of a diagnosis because there is not enough memory for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_WORDS = "can't allocate memory", "out of memory"
"""Allocators of some devices have no error of their own."""

Found = TypeVar("Found")


class Room:
    """Tries what needs memory, and remembers what there was not enough for.

    Examples:
        >>> room = Room()
        >>> room.attempt("a product", lambda: 6 * 7)
        42
        >>> room.attempt("a copy", lambda: torch.empty(2**50)) is None
        True
        >>> room.lacked
        ['a copy']
    """

    def __init__(self) -> None:
        self.lacked: list[str] = []

    def attempt(self, what: str, compute: Callable[[], Found]) -> Found | None:
        """What is computed; None if memory does not suffice."""
        try:
            return compute()
        except Exception as error:
            if not out_of_memory(error):
                raise
            self.lacked.append(what)
            return None


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory did not suffice, by an error or by what it came from.

    >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    True
    """
    if error is None:
        return False
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(words in str(error) for words in _WORDS) or out_of_memory(error.__cause__)
