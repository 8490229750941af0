"""What the command `study` works on: a study by name or from a file, with setups of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from rich.console import RenderableType

from gradmend.console import listed
from gradmend.data import Data
from gradmend.setup import Setup
from gradmend.study.design import Study
from gradmend.study.file import load_study, shipped
from gradmend.target import Wishes, find
from gradmend.zoo import Recipe


class Shipped:
    """The studies that come with gradmend, a line each, or as data."""

    def __init__(self) -> None:
        self.studies = [load_study(name) for name in shipped()]

    def __rich__(self) -> RenderableType:
        return listed((study.name, study.question) for study in self.studies)

    def to_dict(self) -> dict[str, Any]:
        """Their definitions."""
        return {"studies": [study.to_dict() for study in self.studies]}


def plan_study(name: str, data: str | None = None, seeds: int | None = None) -> Study:
    """The study of this name or file, as options change it.

    Args:
        name: of a shipped study, or of a TOML file.
        data: what to train on instead: what `load` takes.
        seeds: how many, instead of its own.

    Raises:
        TargetError: if there is no such study, or no target that it names.
        SetupError: if it contradicts itself, or its data cannot be changed.

    Examples:
        >>> plan_study("depth", seeds=2).seeds
        (0, 1)
    """
    targets = _Targets()
    study = load_study(name, targets)
    study = study if data is None else replace(study, data=data)
    study = study if seeds is None else replace(study, seeds=range(seeds))
    targets.data = study.data if isinstance(study.data, str) else None
    return study


class _Targets:
    """Makes the setups of targets by the seed, with the data beside them if the study names none."""

    data: str | None = None

    def __call__(self, target: str) -> Callable[[int], Setup | Recipe]:
        return partial(self._made, target)

    def _made(self, target: str, seed: int) -> Setup | Recipe:
        found = find(target, Wishes(data=self.data, seed=seed))
        if not isinstance(found.data, Data):
            return found.setup
        return Recipe(target, found.setup, found.data, found.batch_size, found.epochs)
