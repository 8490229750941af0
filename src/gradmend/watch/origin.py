"""Origin: where a number that is not finite came into the world, found before the optimizer spreads it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch import nn

from gradmend.causes import Cause
from gradmend.diagnosis import Finding, Severity
from gradmend.harmless import undisturbed, untouched
from gradmend.kinds import tensors_in
from gradmend.setup import parameters_of
from gradmend.watch.exam import Exam

Call: TypeAlias = tuple[Any, Any]
"""Arguments and keywords."""

SPOILT_BATCH = "The batch holds values that are not finite."


class Calls:
    """The arguments of a model's last calls, until it is known that what came of them is finite.

    On the CPU that is before the backward pass; elsewhere nobody waits, and it is known a step or two later.

    Attributes:
        now: of the call whose backward pass has not ended.

    Examples:
        >>> calls = Calls()
        >>> calls.now = (torch.full((4, 2), torch.nan),), {}
        >>> calls.end(late=True)
        >>> calls.find_later(nn.Linear(2, 1)).sentence
        'The batch holds values that are not finite.'
    """

    def __init__(self) -> None:
        self.now: Call | None = None
        self._before: deque[Call] = deque(maxlen=2)

    def end(self, late: bool) -> None:
        """The backward pass has ended.

        Args:
            late: whether its loss is not known yet.
        """
        if late and self.now is not None:
            self._before.append(self.now)
        self.now = None

    def forget(self) -> None:
        """Keep none of them."""
        self.now = None
        self._before.clear()

    def find_now(self, model: nn.Module) -> Finding | None:
        """What was not finite in the last call, if it did not come to a backward pass."""
        with suppress(Exception):  # what the model has raised, it raises again
            return None if self.now is None else first_lost(model, *self.now)
        return None

    def find_later(self, model: nn.Module) -> Finding | None:
        """What was not finite in a step that is over; one that was taken has spoilt the weights as well."""
        if any(_spoilt(*call) for call in self._before):
            return _finding(SPOILT_BATCH)
        if _lost_parameters(model):
            return None
        found = (first_lost(model, *call) for call in self._before)
        return next((finding for finding in found if finding is not None), None)


def find_origin(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Finding:
    """Have the model take the arguments of its last call once more, and see what is not finite first.

    It is the loss where `first_lost` finds nothing. Everything of the user's is left as it was.

    Examples:
        >>> find_origin(nn.Linear(2, 1), (torch.full((4, 2), torch.nan),), {}).sentence
        'The batch holds values that are not finite.'
    """
    return first_lost(model, args, kwargs) or _finding("The model's output is finite, the loss is not.")


def first_lost(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Finding | None:
    """What is not finite first: looked for in the weights, in the arguments, and at every site."""
    if lost := _lost_parameters(model):
        many = f"{len(lost)} parameters were not finite before this step, the last of them {lost[-1]}."
        return _finding(
            many if len(lost) > 1 else f"{lost[-1]} was not finite before this step.", (lost[-1],)
        )
    if _spoilt(args, kwargs):
        return _finding(SPOILT_BATCH)
    exam = Exam(model, lambda function: function)
    args, kwargs = untouched((tuple(args), dict(kwargs)))
    with undisturbed(model), torch.no_grad():
        exam.begin(args, kwargs, sys._getframe())
        try:
            model(*args, **kwargs)
        finally:
            exam.end()
    site = exam.first_lost()
    if site is None:
        return None
    text = f"The first output that is not a finite number comes from {site.function} at {site.name}."
    return _finding(text, (site.name,), (site.line,) if site.line else ())


def _lost_parameters(model: nn.Module) -> list[str]:
    return [name for name, p in parameters_of(model.named_modules()) if not _finite(p)]


def _spoilt(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return not all(map(_finite, tensors_in([*args, *kwargs.values()])))


def _finite(x: torch.Tensor) -> bool:
    return not x.is_floating_point() or bool(x.detach().isfinite().all())


def _finding(sentence: str, sites: tuple[str, ...] = (), where: tuple[str, ...] = ()) -> Finding:
    return Finding(Cause.NON_FINITE, Severity.ERROR, sentence, sites=sites, where=where)
