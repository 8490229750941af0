"""Estimates in words: units, signs and intervals."""

from __future__ import annotations

from gradmend.console import number
from gradmend.study.effects import Estimate
from gradmend.study.grid import EXACT, RATIOS, SHARES

_POINTS = SHARES | {"gap"}
_COUNTS = frozenset({"parameters", "steps_to_target"})
_NAMES = {
    "gap": "train - test gap",
    "step_seconds": "time per step",
    "seconds": "training time",
    "gradient_ratio": "first/last gradient",
}
_UNITS = {
    "test_accuracy": ("%", 100.0),
    "train_accuracy": ("%", 100.0),
    "gap": ("%", 100.0),
    "step_seconds": ("ms", 1e3),
    "seconds": ("s", 1.0),
    "memory": ("MB", 1e-6),
}


def name(measure: str) -> str:
    """A measure as people call it.

    >>> name("test_accuracy"), name("step_seconds")
    ('test accuracy', 'time per step')
    """
    return _NAMES.get(measure, measure.replace("_", " "))


def unit(measure: str, change: bool = False) -> tuple[str, float]:
    """The unit in which a measure or its change is told, and how many of it make 1.

    >>> unit("test_accuracy"), unit("test_accuracy", change=True), unit("seconds", change=True)
    (('%', 100.0), ('points', 100.0), ('times as much', 1.0))
    """
    if change and measure in RATIOS:
        return "times as much", 1.0
    words, factor = _UNITS.get(measure, ("", 1.0))
    return ("points" if change and words == "%" else words), factor


def change(of: Estimate, measure: str, *, units: bool = True) -> str:
    """A difference with its interval, or how many times as much.

    >>> change(Estimate(0.1, 0.05, 0.15, 5), "test_accuracy")
    '+10.0 [+5.0, +15.0] points'
    >>> change(Estimate(1.5, 1.25, 1.8, 5, ratio=True), "seconds")
    'x1.5 [1.25, 1.8]'
    """
    if measure in EXACT and of.exact and of.value == 1:
        return "the same"
    words = f" {unit(measure, change=True)[0]}" if units and measure not in RATIOS else ""
    return (bare(of, measure) + _interval(of, measure, change=True) + words).rstrip()


def bare(of: Estimate, measure: str) -> str:
    """A change without its interval.

    >>> bare(Estimate(0.1, 0.05, 0.15, 5), "test_accuracy")
    '+10.0'
    """
    return "x" * (measure in RATIOS) + _text(of.value, measure, change=True)


def value(of: Estimate, measure: str) -> str:
    """A number with its interval and unit.

    >>> value(Estimate(0.9, 0.85, 0.95, 5), "test_accuracy")
    '90.0 % [85.0, 95.0]'
    >>> value(Estimate(12000.0, 12000.0, 12000.0, 5), "parameters")
    '12,000'
    """
    if not of.seeds:
        return "-"
    text = f"{_text(of.value, measure)} {unit(measure)[0]}".rstrip()
    return text + _interval(of, measure)


def _interval(of: Estimate, measure: str, change: bool = False) -> str:
    if measure in EXACT and of.exact:
        return ""
    if not of.bounded:
        return f" ({seeds(of.seeds)})"
    return f" [{_text(of.low, measure, change)}, {_text(of.high, measure, change)}]"


def _text(v: float, measure: str, change: bool = False) -> str:
    v *= unit(measure, change)[1]
    if measure in _POINTS:
        return f"{v:+.1f}" if change else f"{v:.1f}"
    if measure in _COUNTS and not change:
        return f"{v:,.0f}"
    return "+" * (change and measure not in RATIOS and v > 0) + number(v)


def seeds(count: int) -> str:
    """How many seeds.

    >>> seeds(1), seeds(5)
    ('1 seed', '5 seeds')
    """
    return f"{count} seed{'s' * (count != 1)}"
