"""Scores over groups of programs, with confidence intervals.

Variants of one program share a group. In each group a score is averaged over its programs, and each group
then weighs 1. Intervals are Wilson's (1927, https://doi.org/10.1080/01621459.1927.10502953) with the number
of groups for the number of trials; where a group's own score lies between 0 and 1 they are wider than
they need be, since no quantity between 0 and 1 of mean p varies more than p(1 - p).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, median
from typing import Protocol, TypeVar

from benchmarks.corpora.answers import Answer, Level
from benchmarks.corpora.cases import CONTROLS, Truth

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A share with its 95 % interval, from so many units of weight 1."""

    share: float
    low: float
    high: float
    units: float

    def __str__(self) -> str:
        if not self.units:
            return "-"
        return f"{self.share:.2f} ({self.low:.2f}-{self.high:.2f})"


def wilson(share: float, units: float) -> Estimate:
    """Wilson's score interval of a share; without units nothing is known."""
    if not units:
        return Estimate(math.nan, 0.0, 1.0, 0)
    middle = share + _Z**2 / (2 * units)
    half = _Z * math.sqrt(share * (1 - share) / units + _Z**2 / (4 * units**2))
    scale = 1 + _Z**2 / units
    return Estimate(share, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale), units)


class Known(Protocol):
    """What a tool has to do with a program: an answer, an outcome, a comparison."""

    @property
    def truth(self) -> Truth: ...
    @property
    def tool(self) -> str: ...
    @property
    def status(self) -> str: ...


Of = TypeVar("Of", bound=Known)


def by_group(found: Iterable[Of], score: Callable[[Of], float]) -> list[float]:
    """The mean score of each group."""
    scores: dict[str, list[float]] = {}
    for each in found:
        scores.setdefault(each.truth.group, []).append(score(each))
    return [fmean(group) for group in scores.values()]


def over_groups(found: Iterable[Of], score: Callable[[Of], float]) -> Estimate:
    """The mean of the groups' means."""
    shares = by_group(found, score)
    return wilson(fmean(shares) if shares else math.nan, len(shares))


@dataclass(frozen=True)
class Detection:
    """How alarms agree with verdicts.

    Args:
        recall: the share of buggy programs with an alarm.
        precision: the share of buggy programs among those with an alarm. It depends on how many of the
            programs are buggy; `false_alarms` does not.
        false_alarms: the share of programs with an alarm among fixed, normal and clean ones: all, and each.
    """

    recall: Estimate
    precision: Estimate
    false_alarms: dict[str, Estimate]


def detection(answers: Sequence[Answer], level: Level) -> Detection:
    """Count findings of at least this level as alarms.

    Failing never helps: a buggy program on which the tool failed is missed, a control is left out.
    """

    def alarm(answer: Answer) -> float:
        return answer.alarm(level)

    buggy = [a for a in answers if a.truth.verdict == "buggy"]
    controls = [a for a in answers if a.truth.verdict in CONTROLS and a.status == "ran"]
    right, wrong = sum(by_group(buggy, alarm)), sum(by_group(controls, alarm))
    kinds = {kind: [a for a in controls if a.truth.verdict == kind] for kind in CONTROLS}
    return Detection(
        recall=over_groups(buggy, alarm),
        precision=wilson(right / (right + wrong) if right + wrong else math.nan, right + wrong),
        false_alarms={kind: over_groups(of, alarm) for kind, of in {"all": controls, **kinds}.items()},
    )


@dataclass(frozen=True)
class Localization:
    """How the blamed parts agree with the labelled ones.

    Args:
        first: the share of programs where the first finding blames a labelled part.
        three: where one of the first three does.
        reciprocal: the mean of 1 over the rank of the first finding that does, 0 where none does.
        rank: the median of that rank where there is one.
        labelled: the share of the blamed parts that are labelled, where any is blamed.
        named: how many different parts are blamed on average.
    """

    first: Estimate
    three: Estimate
    reciprocal: Estimate
    rank: float
    labelled: Estimate
    named: float


def localization(answers: Sequence[Answer]) -> Localization:
    """Count warnings and errors, in the tool's own order."""
    ranks = [rank for answer in answers if (rank := first_hit(answer))]
    return Localization(
        first=over_groups(answers, lambda a: 0 < first_hit(a) <= 1),
        three=over_groups(answers, lambda a: 0 < first_hit(a) <= 3),
        reciprocal=over_groups(answers, lambda a: 1 / (first_hit(a) or math.inf)),
        rank=median(ranks) if ranks else math.nan,
        labelled=over_groups([a for a in answers if _parts(a)], _labelled),
        named=fmean(by_group(answers, lambda a: len(set(_parts(a))))) if answers else math.nan,
    )


def first_hit(answer: Answer) -> int:
    """The rank, from 1, of the first finding that blames a labelled part; 0 if none does."""
    hits = (rank for rank, claim in enumerate(answer.blamed, 1) if set(claim.parts) & set(answer.truth.parts))
    return next(hits, 0)


def _parts(answer: Answer) -> list[str]:
    return [part for claim in answer.blamed for part in claim.parts]


def _labelled(answer: Answer) -> float:
    return fmean(part in answer.truth.parts for part in _parts(answer))
