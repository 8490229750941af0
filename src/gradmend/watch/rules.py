"""Rules on the stream of a running training. Each looks at what was read so far and says what it finds.

What they cannot explain they only point at (`suspects`): then a step is measured in full, and the rules of
diagnosis say what it is, in the words of `check`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

import numpy as np

from gradmend.causes import Cause
from gradmend.console import lines, number
from gradmend.diagnosis import Finding, Severity
from gradmend.diagnosis.course import oscillating_loss, plateau
from gradmend.training import History
from gradmend.watch.stream import RECENT, Array, Stream, Table

_SOON = 20
"""Steps after a rise of the learning rate within which a rise of the loss is put down to it."""

_LONG = 1000
"""Steps before which a loss that rests says nothing: warmup, or a task that is slow to begin with."""

_TENFOLD = 10.0
"""A layer whose size changes tenfold between two looks, more than the others do, is worth a full one."""

_GONE, _STRIDE = 0.01, 0.1
"""What shrinks to a hundredth was not trained to be so, if a step moves it by less than a tenth of itself."""

_SAME = 1e-3
"""Two losses that differ by less, relative to their size, are the same."""


_MANY = 20
"""Steps in a row that are skipped for another reason than that the scale is too large."""


def calm(stream: Stream) -> bool:
    """Whether no rule on losses can find anything: the loss is below the first, no rate was raised."""
    losses, rates = stream.losses, stream.rates
    return (
        rates.raised is None
        and stream.skipped < _MANY
        and losses.last is not None
        and -math.inf < losses.last <= losses.start + 0.5 * abs(losses.start)
    )


def non_finite(stream: Stream) -> Finding | None:
    """The loss of the last step is NaN or infinite: says where that was born, as far as it was seen.

    Or the loss is finite, and 20 steps in a row were skipped: a scale of 65536 is below 0.1 then.
    """
    if not stream.losses.recent or math.isfinite(stream.losses.recent[-1][1]):
        return _skipping(stream)
    step, loss = stream.losses.recent[-1]
    before = [value for _, value in stream.losses.recent if math.isfinite(value)]
    after = f", after {number(before[-1], 4)}" if before else ""
    birth = stream.origin
    text = f"The loss of step {step} is {loss}{after}. {birth.sentence if birth else ''}".strip()
    sites, where = (birth.sites, birth.where) if birth else ((), ())
    return Finding(Cause.NON_FINITE, Severity.ERROR, text, sites=sites, where=where)


def _skipping(stream: Stream) -> Finding | None:
    if stream.skipped < _MANY:
        return None
    text = f"The last {stream.skipped} steps were skipped: the loss is finite, its gradient is not."
    return Finding(Cause.NON_FINITE, Severity.ERROR, text)


def learning_rate_too_high(stream: Stream) -> Finding | None:
    """Within 20 steps of the rate's rise to three times all rates before, the loss is at its highest.

    It has to be above all of the 20 losses and more before the rise, and half as high again as their median.
    It has passed when the rate or the losses are down again.
    """
    rates, recent = stream.rates, stream.losses.recent
    if rates.raised is None or not recent:
        return None
    if recent[-1][0] > rates.raised + _SOON:
        known = stream.lasting.get(Cause.LEARNING_RATE_TOO_HIGH)
        return known if (rates.now or 0.0) > 3 * rates.before and _up(stream) else None
    before = [loss for step, loss in recent if step <= rates.raised and math.isfinite(loss)]
    after = [loss for step, loss in recent if step > rates.raised]
    if len(before) < 3 or not after:
        return None
    usual, worst = median(before), max((loss for loss in after if math.isfinite(loss)), default=math.inf)
    if not (worst > max(before) and worst > usual + 0.5 * abs(usual)):
        return None
    text = (
        f"At step {rates.raised} the learning rate rose from {number(rates.before)} to {number(rates.now)}, "
        f"and the loss from {number(usual)} to {number(worst)} by step {recent[-1][0]}."
    )
    times = (rates.now or 0.0) / rates.before
    return Finding(Cause.LEARNING_RATE_TOO_HIGH, Severity.ERROR, text, times, 1.0, "times the rate before")


def _up(stream: Stream) -> bool:
    """Whether each of the last six losses is half as high again as the first, or not finite."""
    start = stream.losses.start
    last = [loss for _, loss in stream.losses.recent][-6:]
    return not any(loss <= start + 0.5 * abs(start) for loss in last)


def divergence(stream: Stream) -> Finding | None:
    """Each of the last six losses is half as high again as the first, and above all lately before them.

    It has passed when one is not half as high again as the first any more. Where the learning rate has just
    been raised, that is the cause; the losses of a game may rise.
    """
    start = stream.losses.start
    losses = [loss for _, loss in stream.losses.recent]
    before, last = losses[:-6], losses[-6:]
    if stream.game or len(before) < 12 or not all(map(math.isfinite, (*last, start))) or not _up(stream):
        return None
    if Cause.DIVERGENCE not in stream.lasting and not min(last) > max(before):
        return None
    if learning_rate_too_high(stream) is not None:
        return None
    text = f"The loss went from {number(start)} up to {number(last[-1])} in {stream.losses.count} steps."
    return Finding(Cause.DIVERGENCE, Severity.ERROR, text, last[-1], start, "loss")


def weights_gone(stream: Stream) -> Finding | None:
    """Between two looks the weights of a layer shrank to a hundredth: something has overwritten them.

    Not the optimizer: at the first look its step was below a tenth of their size. It has passed once they are
    above a hundredth again.
    """
    now, before = stream.latest("weights"), stream.previous("weights")
    if now is None or before is None:
        return None
    sizes = dict(zip(now.rows, now.column("value").tolist(), strict=True))
    stream.gone = {name: old for name, old in stream.gone.items() if sizes.get(name, old) < _GONE * old}
    stream.gone |= _gone(now, before)
    if not stream.gone:
        return None
    worst = min(stream.gone, key=lambda name: sizes[name] / stream.gone[name])
    new, old = sizes[worst], stream.gone[worst]
    text = (
        f"Between steps {before.step} and {now.step} the weights of {worst} went from rms "
        f"{number(old)} to {number(new)}: nothing of its input comes through."
    )
    return at(stream, Cause.WEIGHTS_TOO_SMALL, Severity.ERROR, text, new, old, tuple(stream.gone))


def _gone(now: Table, before: Table) -> dict[str, float]:
    """What shrank so far, with its size before."""
    old, new = before.column("value"), now.column("value")
    gone = np.flatnonzero((old > 0) & (new < _GONE * old) & ~(before.column("update") > _STRIDE * old))
    return {name: float(old[i]) for i in gone if not (name := now.rows[i]).endswith("bias")}


def bouncing(stream: Stream) -> Finding | None:
    """The last losses are `in_turn`, and yet each step moves weights by a tenth of their size and more.

    They jump from one side of a valley to the other and back: where it curves by 2 / rate, steps neither
    shrink nor grow (Cohen, Kaur, Li, Kolter, Talwalkar 2021, https://arxiv.org/abs/2103.00065).
    """
    table = stream.latest("weights")
    if table is None or not in_turn(stream):
        return None
    with np.errstate(all="ignore"):
        moved = table.column("update") / table.column("value")
    matrices = [int(i) for i in np.flatnonzero(moved > _STRIDE) if not table.rows[i].endswith("bias")]
    if not matrices:
        return None
    worst = max(matrices, key=lambda i: moved[i])
    (_, one), (_, other) = list(stream.losses.recent)[-2:]
    text = (
        f"The last {RECENT} losses are {number(one)} and {number(other)} in turn, and nothing else, though "
        f"each step moves {table.rows[worst]} by {moved[worst]:.0%} of its size: there and back."
    )
    names, unit = tuple(table.rows[i] for i in matrices), "step over the size of the weights"
    measured = float(moved[worst])
    return at(stream, Cause.OSCILLATING_LOSS, Severity.ERROR, text, measured, _STRIDE, names, unit)


def in_turn(stream: Stream) -> bool:
    """Whether the last 64 losses are but two numbers in turn, perhaps equal ones; not where all is learnt."""
    last = [loss for _, loss in stream.losses.recent]
    if len(last) < RECENT or not all(map(math.isfinite, last)):
        return False
    sides = last[::2], last[1::2]
    same = all(max(side) - min(side) <= _SAME * abs(median(side)) for side in sides)
    return same and median(last) > _SAME * stream.losses.start


def silent_layer(stream: Stream) -> Finding | None:
    """No unit of a layer gets any gradient, though it comes through to other layers."""
    table = stream.latest("gradients")
    names = silent(table)
    if table is None or not names or not (table.column("gradient") > 0).any():
        return None
    text = f"No unit of {lines(names)} gets any gradient."
    return at(stream, Cause.DEAD_UNITS, Severity.ERROR, text, 1.0, 0.0, names, "share of the units")


def silent(table: Table | None) -> tuple[str, ...]:
    """The biases of which no unit had a gradient."""
    if table is None:
        return ()
    return tuple(table.rows[i] for i in np.flatnonzero(table.column("silent") == 1))


def at(
    stream: Stream,
    cause: Cause,
    severity: Severity,
    sentence: str,
    measured: float,
    expected: float,
    parameters: tuple[str, ...],
    unit: str = "rms of the weights",
) -> Finding:
    """A finding at the sites that use these parameters, as far as the model has been read."""
    known = [stream.sites[name] for name in parameters if name in stream.sites]
    sites = tuple(dict.fromkeys(site for site, _ in known)) or parameters
    where = tuple(dict.fromkeys(line for _, line in known if line))
    return Finding(cause, severity, sentence, measured, expected, unit, sites, where)


STEP_RULES: tuple[Callable[[Stream], Finding | None], ...] = (
    non_finite,
    learning_rate_too_high,
    divergence,
)
"""On losses and rates; for every step."""

TABLE_RULES: dict[str, tuple[Callable[[Stream], Finding | None], ...]] = {"weights": (weights_gone, bouncing)}
"""On what is read of the model, whenever a table of it is."""


def judge_course(stream: Stream) -> list[Finding]:
    """What the rules on a finished training say of one that has come so far.

    Not that on divergence, which takes the first losses as they are: those of single samples are chance. Of
    a game nothing: a player's loss rests, swings or rises as the others learn (Goodfellow et al. 2014).
    """
    if stream.game:
        return []
    history = _history(stream)
    found = [oscillating_loss(history), risen(stream)]
    if stream.losses.count >= _LONG:
        found.append(plateau(history))
    return [finding for finding in found if finding is not None]


def risen(stream: Stream) -> Finding | None:
    """The last 64 losses are all far above the first: the weights were lost in the first few steps.

    Their median is half as high again, and the first lies below their least by a quarter of what that lies
    below the median: so that a first loss that is low by chance, as of a single sample, is none.
    """
    start, last = (*stream.losses.all, math.nan)[0], [loss for _, loss in stream.losses.recent]
    if stream.lasting or len(last) < RECENT or not all(map(math.isfinite, (start, *last))):
        return None
    usual = median(last)
    if usual < start + 0.5 * abs(start) or start > min(last) - 0.25 * (usual - min(last)):
        return None
    text = f"The loss went from {number(start)} up to {number(usual)} in {stream.losses.count} steps."
    return Finding(Cause.DIVERGENCE, Severity.ERROR, text, usual, start, "loss")


def _history(stream: Stream) -> History:
    losses = tuple(stream.losses.all)
    return History(
        loss=losses,
        accuracy=None,
        test_loss=None,
        test_accuracy=None,
        epochs=1,
        steps=stream.losses.count,
        seconds=0.0,
        step_seconds=0.0,
        diverged=not all(map(math.isfinite, losses)),
        device="",
        threads=1,
        offered=1,
    )


def suspects(stream: Stream, name: str) -> bool:
    """Whether the last reading of a table asks for a full look: many units of a layer dead, or a jump."""
    now, before = stream.latest(name), stream.previous(name)
    if name == "gradients" and now is not None:
        return bool(silent(now)) or bool((now.column("dead") > 0.5).any())
    return name == "layers" and now is not None and before is not None and _jumped(now.values, before.values)


def _jumped(new: Array, old: Array) -> bool:
    """Whether rms or gradient of a layer changed tenfold, relative to how those of all layers did."""
    with np.errstate(all="ignore"):
        changed = new / old
        if (changed.max(0) < _TENFOLD * changed.min(0)).all():  # as in nearly all steps; false with any NaN
            return False
    known = (old > 0).all(1) & ~np.isnan(new).any(1)
    new, old = new[known], old[known]
    if not len(new):
        return False
    if not (np.isfinite(new).all() and new.all()):
        return True
    changes = np.log(new / old)
    changes -= np.sort(changes, axis=0)[len(changes) // 2]
    return bool(np.abs(changes).max() > math.log(_TENFOLD))
