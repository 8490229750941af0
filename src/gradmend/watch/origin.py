"""Origin: where a number that is not finite came into the world, found before the optimizer spreads it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gradmend.causes import Cause
from gradmend.diagnosis import Finding, Severity
from gradmend.harmless import undisturbed, untouched
from gradmend.kinds import tensors_in
from gradmend.setup import parameters_of
from gradmend.watch.exam import Exam

SPOILT_BATCH = "The batch holds values that are not finite."


def find_origin(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Finding:
    """Have the model take the arguments of its last call once more, and see what is not finite first.

    Looked for in the weights, in the arguments, and at every site; else it is the loss. Everything of the
    user's is left as it was.

    Example:
        >>> find_origin(nn.Linear(2, 1), (torch.full((4, 2), torch.nan),), {}).sentence
        'The batch holds values that are not finite.'
    """
    lost = [name for name, p in parameters_of(model.named_modules()) if not _finite(p)]
    if lost:
        text = f"{len(lost)} parameters were not finite before this step, the last of them {lost[-1]}."
        return _finding(text, (lost[-1],))
    if not all(map(_finite, tensors_in([*args, *kwargs.values()]))):
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
        return _finding("The model's output is finite, the loss is not.")
    text = f"The first output that is not a finite number comes from {site.function} at {site.name}."
    return _finding(text, (site.name,), (site.line,) if site.line else ())


def _finite(x: torch.Tensor) -> bool:
    return not x.is_floating_point() or bool(x.detach().isfinite().all())


def _finding(sentence: str, sites: tuple[str, ...] = (), where: tuple[str, ...] = ()) -> Finding:
    return Finding(Cause.NON_FINITE, Severity.ERROR, sentence, sites=sites, where=where)
