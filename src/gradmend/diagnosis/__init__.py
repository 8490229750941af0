"""Diagnosis: what is wrong with a setup, where, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from gradmend.data import as_batches
from gradmend.diagnosis import signal, stepping, wiring
from gradmend.diagnosis.finding import Diagnosis, Finding, Severity
from gradmend.probe import measure
from gradmend.profile import Profile
from gradmend.response import respond
from gradmend.setup import Batch, Setup

__all__ = ["RULES", "Diagnosis", "Finding", "Severity", "diagnose", "look"]

RULES: tuple[Callable[[Profile], Finding | None], ...] = (
    *wiring.RULES,
    *signal.RULES,
    *stepping.RULES,
    wiring.frozen_parameters,
)
"""Each looks at a profile and says what it finds: exact contradictions first, then roots, then symptoms."""

_BATCHES = 4


def diagnose(setup: Setup, batches: Batch | Iterable[Batch]) -> Diagnosis:
    """Find out why a setup does not train, from one measured step and a few tried on a copy.

    Args:
        setup: what trains. It is left exactly as it was.
        batches: one batch `(x, y)` or several (a list, a `DataLoader`); at most four are looked at.

    Returns:
        A diagnosis: `.healthy`, `.findings`, `.profile`; printing it shows a table.

    Raises:
        BatchError: if model, batch and loss do not fit each other.
        DataError: if a batch is empty or holds NaN.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 3), nn.Softmax(dim=1))
        >>> batch = (torch.randn(64, 8), torch.randint(3, (64,)))
        >>> [f.cause.title for f in diagnose(Setup(model, nn.CrossEntropyLoss()), batch).findings]
        ['softmax before logits loss']
    """
    given = as_batches(batches, limit=_BATCHES)
    profile = measure(setup, iter(given))  # a list of tensors would pass for one batch
    if setup.optimizer is not None and wiring.non_finite(profile) is None:
        profile = replace(profile, response=respond(setup, given[0]))
    return _judge(profile)


def look(setup: Setup, batches: Batch | Iterable[Batch]) -> Diagnosis:
    """A quicker diagnosis, without the steps on a copy: it says nothing of the learning rate."""
    return _judge(measure(setup, iter(as_batches(batches, limit=1))))


def _judge(profile: Profile) -> Diagnosis:
    found = [finding for rule in RULES if (finding := rule(profile))]
    return Diagnosis(profile, tuple(sorted(found, key=lambda finding: -finding.severity)))
