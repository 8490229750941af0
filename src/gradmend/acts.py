"""What was done to a running training about a finding."""

from __future__ import annotations

from dataclasses import dataclass

from gradmend.causes import Cause


@dataclass(frozen=True)
class Act:
    """Something that was done to a running training.

    Args:
        step: of the optimizer, after which it was done.
        cause: what it was done against.
        text: what was done, in one sentence.
        before: the number that was changed, as it was.
        after: the same as it is now.
        unit: of both.
    """

    step: int
    cause: Cause
    text: str
    before: float | None = None
    after: float | None = None
    unit: str = ""
