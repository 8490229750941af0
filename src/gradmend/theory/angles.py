"""What an activation does to the angle between two samples, fast enough for a thousand layers."""

from __future__ import annotations

import math
from typing import NamedTuple

from gradmend.theory.quadrature import SMALLEST, GaussianTable, Moments

_LEAST = 1e-18  # the quadrature cannot tell smaller gaps from 0; there all is linear
_STEP = 0.125  # in ln gap: a cubic through values and slopes is then right to about six digits


class Angle(NamedTuple):
    """Of two pre-activations with one gap 1 - cosine between them.

    Args:
        gap: 1 - cosine of the activation's outputs.
        slope: E phi'(u1) phi'(u2) over E phi'^2.
    """

    gap: float
    slope: float


class AngleMap:
    """The angles that one activation makes of others, remembered as curves over ln gap.

    Scales q that the moments do not tell apart share a curve: at all q for ReLU, at small ones for most.
    """

    def __init__(self, table: GaussianTable) -> None:
        self.table = table
        self._curves: dict[tuple[float, ...], _Curve] = {}

    def gap(self, q: float, moments: Moments, gap: float) -> float:
        """1 - cosine of the outputs, from that of pre-activations with second moment q."""
        if not gap or not moments.output:
            return 0.0
        if gap < _LEAST:
            return self.gap(q, moments, _LEAST) * (gap / _LEAST)
        curve = self._curve(q, moments, gap)
        found = curve.at(gap).gap if curve else self.table.spread(q, gap) / moments.output
        return min(found, 2.0)

    def slope(self, q: float, moments: Moments, gap: float) -> float:
        """E phi'(u1) phi'(u2) over E phi'^2: by so much the cosine of two samples' gradients shrinks."""
        if gap < _LEAST or not moments.slope:
            return 1.0
        curve = self._curve(q, moments, gap)
        return curve.at(gap).slope if curve else self.table.pair_slope(q, gap) / moments.slope

    def _curve(self, q: float, moments: Moments, gap: float) -> _Curve | None:
        """The curve for this scale, from the second time on that it is wanted."""
        if gap > 1 or self.table.jumps or not moments.slope:
            return None
        numbers = (moments.mean / math.sqrt(q), moments.output / q, moments.slope, moments.length)
        key = tuple(float(f"{number:.9e}") for number in numbers)
        if key in self._curves:
            return self._curves[key]
        self._curves[key] = _Curve(self.table, q, moments)
        return None


class _Curve:
    """ln(gap of the outputs) over ln(gap), a cubic between nodes that are computed when they are met."""

    def __init__(self, table: GaussianTable, q: float, moments: Moments) -> None:
        self.table, self.q, self.moments = table, q, moments
        self._nodes: dict[int, tuple[float, float]] = {}

    def at(self, gap: float) -> Angle:
        place = math.log(gap) / _STEP
        left = min(math.floor(place), -1)
        (a, da), (b, db) = self._node(left), self._node(left + 1)
        t, rise = place - left, b - a
        bend = (da + db - 2 * rise) * t + 3 * rise - 2 * da - db
        log = a + t * (da + t * bend)
        steepness = da + t * (2 * bend + t * (da + db - 2 * rise))
        found = math.exp(log)
        share = self.moments.output / (self.q * self.moments.slope)
        return Angle(found, steepness / _STEP * found / gap * share)

    def _node(self, index: int) -> tuple[float, float]:
        """ln of the outputs' gap, and its change per step."""
        if index not in self._nodes:
            gap = math.exp(index * _STEP)
            spread, slope = self.table.spread(self.q, gap), self.table.pair_slope(self.q, gap)
            if not spread:  # below the smallest number: so close to each other, phi is straight
                spread, slope = gap * self.q * self.moments.slope, self.moments.slope
            change = _STEP * gap * self.q * slope / spread
            self._nodes[index] = math.log(max(spread, SMALLEST)) - math.log(self.moments.output), change
        return self._nodes[index]
