"""gradmend finds out why a deep network does not learn, mends it, and proves that it did.

The names below are the whole public interface; each loads what it needs on first use, so that importing
gradmend does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmend.causes import Cause
    from gradmend.diagnosis import Diagnosis, Finding, diagnose
    from gradmend.errors import GradmendError
    from gradmend.probe import measure
    from gradmend.profile import Profile
    from gradmend.setup import Budget, Setup
    from gradmend.study.design import Study
    from gradmend.training import History, train
    from gradmend.treatment import Treatment, mend
    from gradmend.watch import Notice, Watch

_HOMES = {
    "Budget": "setup",
    "Cause": "causes",
    "Diagnosis": "diagnosis",
    "Finding": "diagnosis",
    "GradmendError": "errors",
    "History": "training",
    "Notice": "watch",
    "Profile": "profile",
    "Setup": "setup",
    "Study": "study.design",
    "Treatment": "treatment",
    "Watch": "watch",
    "diagnose": "diagnosis",
    "measure": "probe",
    "mend": "treatment",
    "train": "training",
}

__all__ = [
    "Budget",
    "Cause",
    "Diagnosis",
    "Finding",
    "GradmendError",
    "History",
    "Notice",
    "Profile",
    "Setup",
    "Study",
    "Treatment",
    "Watch",
    "diagnose",
    "measure",
    "mend",
    "train",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"gradmend.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'gradmend' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
