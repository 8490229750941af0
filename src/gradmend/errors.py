"""Everything that gradmend raises or warns about.

GradmendError
├── TargetError         the TARGET of a command cannot be found, imported or used
├── DataError           the data cannot be found, read or trained on
├── BatchError          model, batch and loss do not fit each other
├── JournalError        a journal cannot be found, read or written
├── SetupError          the setup lacks something, or contradicts itself
├── NotApplicableError  a remedy or a setting has nothing to change in this setup
└── MissingExtraError   an optional dependency is not installed
NoEffectWarning         a change matched nothing, so nothing was changed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_NAMES = 20


class GradmendError(Exception):
    """The base of all errors: what was given, what is possible, what to type."""


class TargetError(GradmendError):
    """The TARGET of a command cannot be found, imported or used."""


class DataError(GradmendError):
    """The data cannot be found, read or trained on."""


class BatchError(GradmendError):
    """Model, batch and loss do not fit each other."""


class SetupError(GradmendError):
    """The setup lacks something, or contradicts itself."""


class NotApplicableError(GradmendError):
    """A remedy or a setting has nothing to change in this setup."""


class MissingExtraError(GradmendError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed. Type: pip install 'gradmend[{extra}]'"
        )


class NoEffectWarning(UserWarning):
    """A change matched nothing, so nothing was changed."""


def suggest(given: str, possible: Iterable[str]) -> str:
    """Say what was possible, the close names first.

    >>> suggest("vanishng", ["vanishing", "exploding"])
    "Did you mean 'vanishing'? Possible: exploding, vanishing."
    """
    names = sorted(possible)
    close = difflib.get_close_matches(given, names, n=3)
    question = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{question}Possible: {', '.join(names[:MOST_NAMES]) or 'none'}{more}."
