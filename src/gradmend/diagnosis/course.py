"""Rules on the course of a training: what its losses say, measured against their own noise.

The loss is looked at in eight windows of equal length by their medians; a median of n values of deviation s
has the standard error 1.2533 s / sqrt(n) (Kenney, Keeping 1962). Noise is taken from the steps between
neighbours, which a slow trend hardly touches (von Neumann 1941), by their median, as outliers do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist, fmean, median

from gradmend.causes import Cause
from gradmend.console import number
from gradmend.diagnosis.finding import Finding, Severity, where
from gradmend.diagnosis.wiring import non_finite
from gradmend.profile import Profile
from gradmend.training import History

_WINDOWS, _FEWEST = 8, 40
"""Fewer steps than this say nothing of a course."""

_SURE = 5.0
"""Standard errors: noise alone passes them by chance in one of a million comparisons."""

_LAGS, _UNCORRELATED = 10, 45.0
"""Ljung, Box 1978: of white noise, the statistic of ten lags is above 45 in 2 of a million courses."""


@dataclass(frozen=True)
class Course:
    """The losses of a training in numbers.

    Args:
        start: the loss before anything was learnt: the first, or the median of five if that is lower.
        first: the losses of the first five steps.
        windows: medians of eight windows.
        error: standard error of one of them.
        swing: median change from one step to the next in the second half, up or down.
        late: the losses of the second half.
    """

    start: float
    first: tuple[float, ...]
    windows: tuple[float, ...]
    error: float
    swing: float
    late: tuple[float, ...]

    @property
    def end(self) -> float:
        """The loss in the last window."""
        return self.windows[-1]

    @property
    def gain(self) -> float:
        """What was gained from the start to the end."""
        return self.start - self.end


def read_course(losses: Sequence[float]) -> Course | None:
    """The course of the finite losses; None of fewer than forty.

    >>> read_course([1.0 / (1 + step / 10) for step in range(80)]).gain > 0.7
    True
    """
    values = [loss for loss in losses if math.isfinite(loss)]
    if len(values) < _FEWEST:
        return None
    cuts = [round(i * len(values) / _WINDOWS) for i in range(_WINDOWS + 1)]
    parts = [values[a:b] for a, b in pairwise(cuts)]
    steps = [abs(b - a) for a, b in pairwise(values)]
    deviation = median(steps) / 0.6745 / math.sqrt(2)
    late = values[len(values) // 2 :]
    return Course(
        start=min(values[0], median(values[:5])),
        first=tuple(values[:5]),
        windows=tuple(map(median, parts)),
        error=1.2533 * deviation / math.sqrt(len(values) / _WINDOWS),
        swing=median(abs(b - a) for a, b in pairwise(late)),
        late=tuple(late),
    )


def born_non_finite(history: History) -> Finding | None:
    """A loss was NaN or infinite: says at which step, and where in the step it was born, as far as known."""
    step = next((i for i, loss in enumerate(history.loss) if not math.isfinite(loss)), None)
    if step is None:
        return None
    birth = history.wreck and non_finite(history.wreck)
    last = f", after {number(history.loss[step - 1], 4)}" if step else ""
    text = f"The loss of step {step + 1} is {history.loss[step]}{last}. {birth.sentence if birth else ''}"
    sites, where = (birth.sites, birth.where) if birth else ((), ())
    return Finding(Cause.NON_FINITE, Severity.ERROR, text.strip(), sites=sites, where=where)


def divergence(history: History) -> Finding | None:
    """The last window lies above the start by five standard errors and half of it, or the end is no number.

    A single first loss may be low by chance, so the start is the median of five unless the loss grew
    threefold. Before a loss that is no number it has to have grown so; else its birth alone is reported.
    """
    if history.diverged:
        finite = [loss for loss in history.loss if math.isfinite(loss)]
        if not finite or not max(finite[-3:]) > 3 * abs(finite[0]):
            return None
        start, end = finite[0], max(finite[-3:])
    else:
        course = read_course(history.loss)
        if course is None:
            return None
        end = course.end
        start = course.start if end > 3 * abs(course.start) else median(course.first)
        if not end - start > max(_SURE * course.error, 0.5 * abs(start)):
            return None
    text = f"The loss went from {number(start)} up to {number(end)} in {history.steps} steps."
    return Finding(Cause.DIVERGENCE, Severity.ERROR, text, end, start, "loss")


def oscillating_loss(history: History) -> Finding | None:
    """In the second half the loss swings from step to step by more than it gained, and not as noise does.

    Swings are a tenth of the loss and more, and neighbouring steps depend on each other (Ljung, Box 1978, on
    ranks): batches drawn at random are independent of each other, swings of the weights are not.
    """
    course = None if history.diverged else read_course(history.loss)
    if course is None or course.swing < max(course.gain, 0.1 * abs(course.end)):
        return None
    dependence = _ljung_box(course.late)
    if dependence < _UNCORRELATED:
        return None
    text = (
        f"In the second half the loss changes by {number(course.swing)} from step to step, and all steps "
        f"together gained {number(course.gain)}."
    )
    return Finding(
        Cause.OSCILLATING_LOSS,
        Severity.ERROR,
        text,
        course.swing,
        max(course.gain, 0.0),
        "change of the loss",
    )


def plateau(history: History) -> Finding | None:
    """Over 200 steps and more the loss gained less than 5 %, and nothing in its second half.

    Nothing is less than five standard errors. Silent where the outputs are right for the most part: then the
    training began where another had ended.
    """
    course = None if history.diverged else read_course(history.loss)
    if course is None or history.steps < 200 or (history.accuracy and history.accuracy[-1] > 0.5):
        return None
    middle, end = fmean(course.windows[3:5]), course.end
    if course.gain > 0.05 * abs(course.start) or middle - end > _SURE * course.error:
        return None
    if divergence(history) or oscillating_loss(history):
        return None
    text = (
        f"After {history.steps} steps the loss is {number(end, 4)}, at the start {number(course.start, 4)}."
    )
    return Finding(Cause.PLATEAU, Severity.ERROR, text, end, course.start, "loss")


def slow_convergence(history: History) -> Finding | None:
    """The loss falls as fast in the second half as in the first, and less than a third of it is gone.

    As fast is at least half as fast, and by five standard errors of the difference of two windows.
    """
    course = None if history.diverged else read_course(history.loss)
    if course is None or not 0 < course.gain < abs(course.start) / 3:
        return None
    first, last = course.windows[0], course.windows[-1]
    middle = fmean(course.windows[3:5])
    late, early = middle - last, first - middle
    if late < max(0.5 * early, _SURE * math.sqrt(2) * course.error):
        return None
    text = (
        f"The second half of {history.steps} steps took {number(late)} off the loss, the first "
        f"{number(early)}; {number(course.end, 4)} of {number(course.start, 4)} is left."
    )
    gone = course.gain / abs(course.start)
    return Finding(Cause.SLOW_CONVERGENCE, Severity.WARNING, text, gone, 1 / 3, "share of the loss")


def overfitting(history: History) -> Finding | None:
    """On held-out rows the loss ends above where training began, or at twice that of training.

    The training loss has to have fallen by half. Where classes are counted, accuracy has to be a tenth lower
    than in training, for a loss may rise by overconfidence alone (Guo, Pleiss, Sun, Weinberger 2017).
    """
    course = None if history.diverged else read_course(history.loss)
    held = history.test_loss
    if course is None or held is None or not course.end < 0.5 * course.start:
        return None
    harm = held > course.start + _SURE * course.error
    counted = bool(history.accuracy) and history.test_accuracy is not None
    if (counted and _gap(history) < 0.1) or held < 2 * course.end or not (harm or counted):
        return None
    right = f", with {history.test_accuracy:.0%} right, {_gap(history):.0%} fewer" if counted else ""
    text = f"The training loss fell to {number(course.end)}, on held-out rows it is {number(held)}{right}."
    severity = Severity.ERROR if harm else Severity.WARNING
    return Finding(Cause.OVERFITTING, severity, text, held, course.end, "loss")


def _gap(history: History) -> float:
    """By how much accuracy is lower on held-out rows; 0 if it was not counted."""
    known = history.accuracy and history.test_accuracy is not None
    return history.accuracy[-1] - (history.test_accuracy or 0.0) if history.accuracy and known else 0.0


def too_many_threads(history: History) -> Finding | None:
    """On a copy, one thread took these steps faster than all of them: `train` used one."""
    if history.threads >= history.offered:
        return None
    text = f"One thread is faster here than {history.offered}, and was used."
    return Finding(Cause.TOO_MANY_THREADS, Severity.NOTE, text, float(history.offered), 1.0, "threads")


def dying_units(before: Profile, after: Profile) -> Finding | None:
    """Between two profiles of one model, a fifth more of an activation's units went silent for every sample.

    An error where over half of them are silent now. Both need 32 samples and more.
    """
    if min(before.samples, after.samples) < 32:
        return None
    then = {r.site.name: r.dead for r in before.sites if r.site.kind == "activation"}
    grown = [(r, r.dead - then[r.site.name]) for r in after.sites if r.site.name in then]
    died = [(reading, more) for reading, more in grown if more > 0.2]
    if not died:
        return None
    worst, more = max(died, key=lambda pair: pair[1])
    text = (
        f"At {worst.site.name} {worst.dead:.0%} of the units are silent, {worst.dead - more:.0%} were before."
    )
    return Finding(
        Cause.DYING_UNITS,
        Severity.ERROR if worst.dead > 0.5 else Severity.WARNING,
        text,
        worst.dead,
        worst.dead - more,
        "share of silent units",
        sites=tuple(reading.site.name for reading, _ in died),
        where=where([r for r, _ in died]),
    )


RULES: tuple[Callable[[History], Finding | None], ...] = (
    born_non_finite,
    divergence,
    oscillating_loss,
    plateau,
    slow_convergence,
    overfitting,
    too_many_threads,
)
"""Each looks at a finished training and says what it finds."""


def judge_course(
    history: History, before: Profile | None = None, after: Profile | None = None
) -> tuple[Finding, ...]:
    """What the course of a training says, the worst first.

    Args:
        history: of the training.
        before: a profile from before it, to see which units died.
        after: one from after it.

    Examples:
        >>> from gradmend.training import train
        >>> [f.cause.title for f in judge_course(train("deep", steps=250, device="cpu"))]
        ['plateau']
    """
    found = [finding for rule in RULES if (finding := rule(history))]
    if before is not None and after is not None and (died := dying_units(before, after)):
        found.append(died)
    return tuple(sorted(found, key=lambda finding: -finding.severity))


def _ljung_box(values: Sequence[float]) -> float:
    """How much neighbouring values depend on each other: n(n+2) sum r_k^2 / (n-k) over lags k, of ranks."""
    n = len(values)
    order = sorted(range(n), key=values.__getitem__)
    scores = [0.0] * n
    for rank, index in enumerate(order):
        scores[index] = NormalDist().inv_cdf((rank + 0.5) / n)
    power = sum(score * score for score in scores)
    correlations = [
        sum(a * b for a, b in zip(scores, scores[lag:], strict=False)) / power for lag in range(1, _LAGS + 1)
    ]
    return n * (n + 2) * sum(r * r / (n - lag) for lag, r in enumerate(correlations, start=1))
