"""Rules on the input: its scale, and columns that say nothing or drown the others."""

from __future__ import annotations

from gradmend.causes import Cause
from gradmend.console import lines, number
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.profile import Profile

_TABLE = 50
"""More columns than this are an image or a text, where some never change."""


def unscaled_input(profile: Profile) -> Finding | None:
    """What the first layer gets has rms above 10 or below 0.05, or a column that drowns the others.

    A column drowns the others if it deviates a hundred times the median column. Those that hardly vary, such
    as the pixels at the edge of an image, do no harm; those that drown all others do, because the learning
    rate must suit the largest (LeCun et al. 1998). The bounds of the rms
    leave room for every usual scaling ([0, 1], [-1, 1], standardized); raw pixels (rms about 100) and raw
    tables are outside. A network that begins by rescaling its input is exempt, and a stray column is
    another finding; so is one that is zero.
    """
    inputs = profile.inputs
    columns = profile.contract.columns if profile.contract else None
    if inputs is None or not inputs.rms or (columns is not None and columns.stray):
        return None
    low, high = inputs.deviations
    spread = high / low if low > 0 else 1.0
    if 0.05 <= inputs.rms <= 10 and spread <= 100:
        return None
    severity = Severity.ERROR if not 0.005 <= inputs.rms <= 50 or spread > 1000 else Severity.WARNING
    sentence = f"The input has mean {number(inputs.mean)} and rms {number(inputs.rms)}"
    if spread > 100:
        sentence += f"; one column deviates by {number(high)}, half of them by {number(low)} or less"
    sentence += ". Type `(x - x.mean(0)) / x.std(0)`, with the mean and deviation of the training data."
    where = tuple(r.site.line for r in profile.weighted()[:1] if r.site.line)
    unit = "rms of the input"
    return Finding(Cause.UNSCALED_INPUT, severity, sentence, inputs.rms, 1.0, unit, where=where)


def constant_input(profile: Profile) -> Finding | None:
    """All rows are equal: an error. Some columns of a table never change: a note."""
    columns = profile.contract.columns if profile.contract else None
    if columns is None:
        return None
    if columns.same:
        text = f"All {columns.rows} rows of the input are the same: nothing tells the samples apart."
        return Finding(Cause.CONSTANT_INPUT, Severity.ERROR, text, 1.0, 2.0, "different rows at least")
    if not columns.constant or columns.count > _TABLE:
        return None
    names = lines([str(i) for i in columns.constant])
    text = f"Of {columns.count} columns of the input, these never change (counted from 0): {names}."
    return Finding(Cause.CONSTANT_INPUT, Severity.NOTE, text, float(len(columns.constant)), 0.0, "columns")


def stray_column(profile: Profile) -> Finding | None:
    """A column holds whole numbers, different, evenly spread, and a hundred times as large as the others.

    So do row numbers and times in seconds. An error from a thousand times on, as for any column that drowns
    the others.
    """
    columns = profile.contract.columns if profile.contract else None
    if columns is None or not columns.stray:
        return None
    if profile.inputs is not None and profile.inputs.rms < columns.spread / 100:
        return None  # the network leaves it out, or scales it
    names = lines([str(i) for i in columns.stray])
    severity = Severity.ERROR if columns.spread > 1000 else Severity.WARNING
    text = f"Column {names} of the input (counted from 0) looks like row numbers, or times. Leave it out."
    return Finding(Cause.STRAY_COLUMN, severity, text, columns.spread, 1.0, "size over that of other columns")


RULES = (stray_column, unscaled_input, constant_input)
