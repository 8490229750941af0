"""Design: which setups a study compares, and what is varied in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from fractions import Fraction as Ratio
from functools import cached_property
from itertools import product
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch.nn.functional as F
from rich.console import RenderableType
from rich.table import Table

from gradmend.console import Printable
from gradmend.data import Data
from gradmend.errors import NotApplicableError, SetupError, suggest
from gradmend.remedies import Remedy
from gradmend.study.bases import Base, Length, Source, digest, hashed, read_bases
from gradmend.study.build import build
from gradmend.study.combine import combinations_of
from gradmend.study.fraction import Fraction, arms_of, fraction
from gradmend.study.levels import TRAINING, Factor, Level, read_factor, read_remedies, written
from gradmend.study.outcome import MEASURES
from gradmend.theory import trainable_depth
from gradmend.zoo import Recipe

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from gradmend.study.analysis import Results

SETUP: Final = "setup"
"""The factor of a study of several setups."""

_MOST_ARMS: Final = 10_000

_PREDICTABLE: Final = {name: getattr(F, name) for name in ("sigmoid", "tanh", "relu", "elu", "gelu", "silu")}
_PASSED: Final = {"norm", "skip"}
"""Activations of which theory foretells the depth that trains, and settings of which it says nothing here."""

_POINTS: Final = 60


@dataclass(frozen=True)
class Arm:
    """One combination of levels.

    Args:
        levels: factor -> label of its level.
        changes: settings of the recipe and its training.
        remedies: Python calls such as "BatchNorm()", applied in this order.
        base: the name of the setup that it starts from.
    """

    levels: Mapping[str, str]
    changes: Mapping[str, Any]
    remedies: tuple[str, ...]
    base: str = ""


@dataclass(frozen=True, eq=False)
class Study(Printable):
    """A plan of trials: setups, with and without remedies, at the levels of factors, each with many seeds.

    Every factor's first level is the base. Remedies are factors of the levels "no" and "yes"; `combine` says
    which come together. All that is crossed with the other factors and with the setups, or a balanced
    `fraction` of it is taken.

    Args:
        setups: the name of a recipe, or several; or a table name -> a recipe and its settings
            (`{"recipe": "deep", "width": 16}`), a `Setup` (with the same weights for all seeds), or a
            function of the seed that makes one.
        remedies: remedies; or a table name -> what it changes: remedies, or settings.
        factors: name of a setting -> its values; or any name -> labels and what they change.
        combine: alone, pairs (and alone), all (together), without (all, and all but each), full; or a list of
            these and of lists of remedies. The arm without any remedy always is one.
        fraction: a share of all arms (0.5 or "1/2"), or their number.
        seeds: of the trials.
        settings: of all arms, of the network (width, depth, ...) and of its training: data, batch_size,
            optimizer ("Adam" or "Adam:0.01"), learning_rate, momentum, weight_decay, schedule.
        data: what all are trained on: a `Data`, or what `load` takes; None takes that of the recipe.
        epochs: how many times through the data; None takes those of the recipe.
        steps: of the optimizer, instead of epochs.
        batch_size: rows per batch; None takes those of the recipe.
        measure: what is compared, one of `MEASURES`.
        target: the accuracy that is to be reached.
        name: of the study.
        question: that it answers.

    Raises:
        SetupError: for an unknown setting, remedy, measure or way to combine, levels that contradict each
            other, and too many arms.
        TargetError: for an unknown recipe.

    Examples:
        >>> study = Study("deep", remedies=["BatchNorm()", "AddSkips()"], factors={"depth": [5, 20]})
        >>> len(study.arms()), study.trials
        (6, 30)
        >>> dict(study.arms()[0].levels)
        {'depth': '5', 'BatchNorm()': 'no', 'AddSkips()': 'no'}
    """

    setups: Source | Sequence[Any] | Mapping[str, Any]
    _: KW_ONLY
    remedies: Sequence[Remedy | str] | Mapping[str, Any] = ()
    factors: Mapping[str, Any] = field(default_factory=dict)
    combine: str | Sequence[Any] = "alone"
    fraction: float | int | str | None = None
    seeds: Sequence[int] = range(5)
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Data | str | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    measure: str = "test_accuracy"
    target: float | int = 0.9
    name: str = ""
    question: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", _seeds(self.seeds))
        if self.measure not in MEASURES:
            raise SetupError(f"There is no measure {self.measure!r}. {suggest(self.measure, MEASURES)}")
        if self.epochs is not None and self.steps is not None:
            raise SetupError(f"Give `epochs` or `steps`, not both ({self.epochs} and {self.steps}).")
        if any(count is not None and count < 1 for count in (self.epochs, self.steps, self.batch_size)):
            raise SetupError("`epochs`, `steps` and `batch_size` are 1 or more.")
        if not 0 < self.target <= 1:
            raise SetupError(f"`target` is an accuracy above 0, up to 1, not {self.target}.")
        self._check_names()
        self._check_settings()
        self._arms  # noqa: B018

    def arms(self) -> tuple[Arm, ...]:
        """All combinations of levels that are tried; the first is the base."""
        return self._arms

    @property
    def trials(self) -> int:
        """How many there are: arms times seeds."""
        return len(self._arms) * len(self.seeds)

    @property
    def levels(self) -> dict[str, tuple[str, ...]]:
        """Factor -> the labels of its levels, the base first."""
        return {factor.name: tuple(level.label for level in factor.levels) for factor in self._factors}

    @property
    def resolution(self) -> str:
        """What a fraction of the arms can tell apart; "" if all are tried."""
        return "" if self._fraction is None else self._fraction.sentence

    @property
    def predicted(self) -> tuple[tuple[float, float], ...]:
        """Up to which depth theory expects to train at each weight variance, where a study varies both.

        Returns:
            Points of a curve: weight variance and depth.

        Source: Schoenholz et al., Deep information propagation, 2017, https://arxiv.org/abs/1611.01232
        """
        changes = self._arms[0].changes
        phi = _PREDICTABLE.get(changes.get("activation", "sigmoid"))
        if not {"depth", "weight_variance"} <= set(self.levels) or phi is None or _PASSED & set(changes):
            return ()
        bias = float(changes.get("bias_variance") or 0.0)
        variances = [float(arm.changes["weight_variance"]) for arm in self._arms]
        between = np.linspace(min(variances), max(variances), _POINTS)
        points = ((float(one), trainable_depth(phi, float(one), bias)) for one in between)
        return tuple((variance, depth) for variance, depth in points if isfinite(depth))

    def build(self, arm: Arm, seed: int) -> Recipe:
        """What one trial trains; torch's random state stays as it was.

        Raises:
            NotApplicableError: if a setting or a remedy has nothing to change there, or does not fit.
            SetupError: for a setting with an impossible value.
            DataError: if the data cannot be loaded.
        """
        remedies = [self._remedies[text] for text in arm.remedies]
        return build(self._bases[arm.base], arm.changes, remedies, seed, Length(self.epochs, self.steps))

    def check(self) -> None:
        """Build a few trials, so that every level is tried once.

        Raises:
            GradmendError: what is wrong with a setting, or with the data.
        """
        seen: set[tuple[str, str]] = set()
        for arm in self._arms:
            if not set(arm.levels.items()) <= seen or not seen:
                seen |= set(arm.levels.items())
                try:
                    self.build(arm, self.seeds[0])
                except NotApplicableError:
                    continue

    def key(self, arm: Arm, seed: int) -> str:
        """A name for a trial by what decides its outcome: the same on all machines, whatever it is called."""
        settings = {**self._bases[arm.base].usual, **arm.changes}
        changes = {name: digest(value) for name, value in settings.items()}
        if (arm.base, seed) not in self._prints:
            self._prints[arm.base, seed] = self._bases[arm.base].fingerprint(seed)
        return hashed([self._prints[arm.base, seed], changes, arm.remedies, self.epochs, self.steps, seed])

    def run(self, journal: str | Path, workers: str = "local", *, progress: bool = True) -> Results:
        """Run the trials that a journal does not hold yet, and analyse all.

        Args:
            journal: a file, by custom `*.gradmend`; it is made if need be.
            workers: "local", or "ray" for those of a Ray cluster.
            progress: show a bar on standard error.
        """
        from gradmend.study.engine import run

        return run(self, journal, workers, progress=progress)

    def figures(self, dark: bool = False) -> dict[str, Figure]:
        """Histograms of every hidden layer of every arm before the first step, by what they show.

        Args:
            dark: for a dark background.
        """
        drawn = {what: self.plot(what, dark) for what in ("outputs", "gradients")}
        return {what: figure for what, figure in drawn.items() if any(panel.z.size for panel in figure.data)}

    def plot(self, name: str | None = None, dark: bool = False) -> Figure:
        """One of the `figures`.

        Args:
            name: outputs, as by default, or gradients.
            dark: for a dark background.
        """
        from gradmend.study.histograms import histograms

        return histograms(self, name or "outputs", dark)

    def definition(self) -> dict[str, Any]:
        """The plan as plain data: what a journal keeps of it."""
        return {
            "name": self.name,
            "question": self.question,
            "measure": self.measure,
            "target": self.target,
            "setups": {base.name: base.fingerprint(self.seeds[0]) for base in self._bases.values()},
            "factors": {factor.name: _plain(factor.levels) for factor in self._factors},
            "settings": _plain_settings(self._common),
            "arms": [dict(arm.levels) for arm in self._arms],
            "epochs": self.epochs,
            "steps": self.steps,
            "seeds": list(self.seeds),
        }

    def to_dict(self) -> dict[str, Any]:
        """The same as `definition`."""
        return self.definition()

    def __rich__(self) -> RenderableType:
        table = Table(
            box=None, pad_edge=False, show_header=False, title=self.name or None, title_justify="left"
        )
        table.add_column(style="bold")
        for name, text in self._lines():
            table.add_row(name, text)
        return table

    def _lines(self) -> Iterator[tuple[str, str]]:
        if self.question:
            yield "question", self.question
        if len(self._bases) == 1:
            yield SETUP, next(iter(self._bases))
        yield from ((name, " · ".join(labels)) for name, labels in self.levels.items())
        common = _plain_settings(self._common)
        if common:
            yield "settings", ", ".join(f"{name} {value}" for name, value in common.items())
        yield "trials", f"{self.trials}: {len(self._arms)} arms x {len(self.seeds)} seeds"
        if self.resolution:
            yield "fraction", self.resolution
        yield "measure", MEASURES[self.measure].sentence

    @cached_property
    def _bases(self) -> dict[str, Base]:
        return {base.name: base for base in read_bases(self.setups)}

    @cached_property
    def _prints(self) -> dict[tuple[str, int], str]:
        """What the bases are, by name and seed: a setup of the user's own is made to tell."""
        return {}

    @cached_property
    def _common(self) -> dict[str, Any]:
        """The settings of all arms."""
        given = {"data": self.data, "batch_size": self.batch_size}
        return {**self.settings, **{key: value for key, value in given.items() if value is not None}}

    @cached_property
    def _crossed(self) -> tuple[Factor, ...]:
        """The setups, if there are several, and all factors but the remedies."""
        several = [Factor(SETUP, tuple(map(Level, self._bases)))] if len(self._bases) > 1 else []
        return (*several, *(read_factor(str(name), given) for name, given in self.factors.items()))

    @cached_property
    def _combined(self) -> tuple[Factor, ...]:
        return read_remedies(self.remedies)

    @property
    def _factors(self) -> tuple[Factor, ...]:
        return (*self._crossed, *self._combined)

    @property
    def _remedies(self) -> dict[str, Remedy]:
        """All remedies by the calls that make them."""
        levels = (level for factor in self._factors for level in factor.levels)
        return {written(remedy): remedy for level in levels for remedy in level.remedies}

    @cached_property
    def _fraction(self) -> Fraction | None:
        if self.fraction is None:
            return None
        if self._combined and self.combine != "full":
            raise SetupError('A `fraction` is one of all combinations: add `combine = "full"`.')
        counts = [len(factor.levels) for factor in self._factors]
        return fraction(counts, arms_of(_share(self.fraction), prod(counts)))

    @cached_property
    def _arms(self) -> tuple[Arm, ...]:
        if self._fraction is not None:
            return tuple(map(self._arm, self._fraction.rows))
        combined = combinations_of([factor.name for factor in self._combined], self.combine)
        counts = [len(factor.levels) for factor in self._crossed]
        total = prod(counts) * len(combined)
        if total > _MOST_ARMS:
            raise SetupError(
                f"These are {total} arms, more than {_MOST_ARMS}. Take a part of them: `fraction = 64`."
            )
        return tuple(self._arm((*row, *part)) for row in product(*map(range, counts)) for part in combined)

    def _arm(self, row: Sequence[int]) -> Arm:
        levels = {factor.name: factor.levels[i] for factor, i in zip(self._factors, row, strict=True)}
        base = self._bases[levels[SETUP].label if SETUP in levels else next(iter(self._bases))]
        return Arm(
            levels={name: level.label for name, level in levels.items()},
            changes={**self._common, **base.settings, **_merged(levels)},
            remedies=tuple(written(remedy) for level in levels.values() for remedy in level.remedies),
            base=base.name,
        )

    def _check_names(self) -> None:
        names = [factor.name for factor in self._factors]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SetupError(f"{twice[0]!r} is varied twice. Give each factor and remedy a name of its own.")

    def _check_settings(self) -> None:
        """Every setting must be one of the training, or of the network of one of the setups."""
        known = {*TRAINING, *(name for base in self._bases.values() for name in base.usual)}
        levels = [level.changes for factor in self._factors for level in factor.levels]
        bases = [base.settings for base in self._bases.values()]
        for name in (name for group in (self._common, *bases, *levels) for name in group):
            if name not in known:
                raise SetupError(f"There is no setting {name!r}. {suggest(name, known)}")
        if "data" in self._common and any("data" in group for group in (*bases, *levels)):
            raise SetupError(
                "The arms of this study differ in their data: it cannot be given for all of them."
            )


def _merged(levels: Mapping[str, Level]) -> dict[str, Any]:
    """What the levels of an arm change, all together."""
    merged: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for name, level in levels.items():
        for key, value in level.changes.items():
            if key in owner:
                raise SetupError(
                    f"{owner[key]!r} and {name!r} cannot come together: both change `{key}`. List the "
                    "combinations that can be (`combine = [[...], ...]`), or make them levels of one factor."
                )
            merged[key], owner[key] = value, name
    return merged


def _seeds(given: Sequence[int]) -> tuple[int, ...]:
    seeds = tuple(given)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise SetupError(f"`seeds` are different whole numbers, 0 or more, at least one, not {list(seeds)}.")
    return seeds


def _share(given: float | int | str) -> float | int:
    try:
        share = float(Ratio(given)) if isinstance(given, str) else given
    except (ValueError, ZeroDivisionError):
        share = 0.0
    if share <= 0:
        raise SetupError(f'`fraction` is a share of all arms (0.5 or "1/2") or their number, not {given!r}.')
    return share


def _plain(levels: Iterable[Level]) -> dict[str, Any]:
    """Label -> what the level changes, as plain data."""
    return {
        level.label: {**_plain_settings(level.changes), "remedies": [written(one) for one in level.remedies]}
        for level in levels
    }


def _plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.name if isinstance(value, Data) else value for key, value in settings.items()}
