"""Facts about the output, the targets and the input of a setup, as far as they are plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradmend.anatomy import Activation, Site
from gradmend.readings import ColumnsReading, OutputReading, TargetReading

_MOST = 1_000_000
"""At most so many values are looked at."""

_KINDS = 200
"""Whole numbers of no more kinds than this may be classes."""

_STRAY = 100.0
"""So many times as large as the others is a column of row numbers or dates."""


_ENDLESS = 1000.0
"""A function that goes so far on the way to a million has no end."""


def read_output(output: Tensor, passed: Iterable[tuple[Site, Tensor]]) -> OutputReading:
    """What a network puts out, and what the last function can put out at all.

    Args:
        output: of the model, with real values.
        passed: the sites on the way, with their outputs, in the order of execution.
    """
    found = [(site, value) for site, value in passed if _same(value, output)]
    site = found[-1][0] if found else None
    values = output.detach().double()
    reading = OutputReading(
        shape=tuple(output.shape),
        low=float(values.min()),
        high=float(values.max()),
        sums_to_one=_sums_to_one(values),
        logs_of_one=_sums_to_one(values.exp()) if bool((values <= 0).all()) else None,
    )
    if site is None:
        return reading
    return replace(
        reading,
        function=site.function,
        kind=site.kind,
        site=site.name,
        line=site.line,
        bounds=bounds(site),
        positive=site.activation is not None and _at(site.activation, -5.0) > 0,
    )


def bounds(site: Site) -> tuple[float, float] | None:
    """Between which values a site's output stays, whatever it gets; None if that is not known."""
    if site.function in ("softmax", "softmin"):
        return 0.0, 1.0
    if site.function == "log_softmax":
        return -math.inf, 0.0
    if site.activation is not None:
        return range_of(site.activation)
    return (-math.inf, math.inf) if site.weighted else None


def range_of(phi: Activation) -> tuple[float, float]:
    """Between which values a function of one number stays, found by trying it.

    Examples:
        >>> range_of(torch.tanh), range_of(torch.relu)
        ((-1.0, 1.0), (0.0, inf))
    """
    x = torch.cat([torch.linspace(-30, 30, 3001), torch.tensor([-1e6, 1e6])]).double()
    y = phi(x)
    low, high = float(y.min()), float(y.max())
    return (-math.inf if low < -_ENDLESS else round(low, 6)), (
        math.inf if high > _ENDLESS else round(high, 6)
    )


def read_target(targets: Sequence[Tensor]) -> TargetReading:
    """The targets of some batches, taken together.

    Examples:
        >>> found = read_target([torch.tensor([0, 2, 1]), torch.tensor([0, 0, 1])])
        >>> found.counts, found.whole, found.distinct
        (((0.0, 3), (1.0, 2), (2.0, 1)), True, 3)
    """
    first = targets[0]
    alike = [t for t in targets if t.dim() == first.dim() and t.shape[1:] == first.shape[1:]]
    rows = torch.cat(alike) if first.dim() else first[None]
    some = rows[: max(1, _MOST // max(1, rows[0].numel()))].double()
    whole = bool((some == some.round()).all())
    one_hot = next((a for a in _axes(some) if _one_hot(some, a)), None) if whole else None
    kinds, sizes = torch.unique(some, return_counts=True)
    return TargetReading(
        shape=tuple(first.shape),
        dtype=str(first.dtype).removeprefix("torch."),
        low=float(some.min()),
        high=float(some.max()),
        mean=float(some.mean()),
        deviation=float(some.std(correction=0)),
        whole=whole,
        distinct=kinds.numel(),
        counts=_counts(some, kinds, sizes, one_hot) if whole else (),
        one_hot=one_hot,
        distributions=_sums_to_one(some),
        samples=len(rows),
        sorted=_sorted(alike),
    )


def shortfall(target: Tensor, bounds: tuple[float, float], simplex: int | None) -> float | None:
    """The least mean squared error that outputs within the bounds can reach, over the targets' variance.

    Args:
        target: in the shape of the output.
        simplex: the axis along which outputs sum to one, if they do.

    Examples:
        >>> round(shortfall(torch.tensor([[-1.0], [1.0]]), (0.0, 1.0), None), 2)
        0.5
    """
    values = target.double()
    variance = float(values.var(dim=0, correction=0).mean()) if len(values) > 1 else 0.0
    if variance == 0:
        return None
    least = float((values - values.clamp(*bounds)).square().mean())
    if simplex is not None:
        least = max(least, float(((values.sum(simplex) - 1) / values.shape[simplex]).square().mean()))
    return least / variance


def read_columns(inputs: Sequence[Tensor]) -> ColumnsReading | None:
    """The columns of tables: rows of real numbers.

    Examples:
        >>> table = torch.rand(32, 3)
        >>> table[:, 1] = 1000 + torch.arange(32)
        >>> read_columns([table]).stray
        (1,)
    """
    first = inputs[0]
    alike = [x for x in inputs if x.shape[1:] == first.shape[1:] and x.dim() == first.dim()]
    if first.dim() < 2 or not first.is_floating_point() or sum(map(len, alike)) < 8:
        return None
    x = torch.cat(alike)
    x = x[: max(8, _MOST // max(1, x[0].numel()))].double()
    same = bool((x == x[:1]).all())
    if x.dim() > 2:
        return ColumnsReading(0, (), (), 1.0, same, len(x))
    constant = (x == x[:1]).all(0)
    sizes = x.square().mean(0).sqrt()
    whole = (x == x.round()).all(0) & ~constant
    numbered = [int(i) for i in whole.nonzero().flatten() if _numbers_rows(x[:, i])]
    others = [i for i in range(x.shape[1]) if i not in numbered and not constant[i]]
    middle = float(sizes[others].median()) if others else math.inf
    stray = tuple(i for i in numbered if float(sizes[i]) > _STRAY * middle > 0)
    spread = max((float(sizes[i]) / middle for i in stray), default=1.0)
    indices = tuple(int(i) for i in constant.nonzero().flatten())
    return ColumnsReading(x.shape[1], indices, stray, spread, same, len(x))


def _numbers_rows(column: Tensor) -> bool:
    """Of whole numbers: most are different, and rise from row to row, or are spread evenly if shuffled.

    Evenly: as a Kolmogorov-Smirnov test with a level of 5 % has it. Prices and counts are not.
    """
    steps, ordered = column.diff(), column.sort().values
    if float((ordered.diff() == 0).double().mean()) > 0.6:
        return False
    ranks = (torch.arange(len(column), device=column.device) + 0.5) / len(column)
    apart = float(((ordered - ordered[0]) / (ordered[-1] - ordered[0]) - ranks).abs().max())
    return bool((steps >= 0).all()) or apart < 1.36 / math.sqrt(len(column))


def _same(value: Tensor, output: Tensor) -> bool:
    """Whether two tensors have the same values, but for their order."""
    if value.numel() != output.numel() or not value.is_floating_point():
        return False
    a, b = value.detach().flatten(), output.detach().flatten().to(value.dtype)
    if torch.equal(a, b):
        return True
    return value.shape != output.shape and torch.equal(a.sort().values, b.sort().values)


def _at(phi: Activation, x: float) -> float:
    return float(phi(torch.tensor([x])))


def _axes(x: Tensor) -> list[int]:
    """The axes that may count classes, the likelier first."""
    return list(dict.fromkeys((x.dim() - 1, 1))) if x.dim() > 1 else []


def _sums_to_one(x: Tensor) -> int | None:
    """The axis along which values are non-negative and sum to one; that of the samples comes last."""
    if x.dim() < 1 or x.numel() < 2 or not bool((x >= 0).all()):
        return None
    for axis in (*_axes(x), 0):
        total = x.sum(axis)
        if total.numel() and bool(((total - 1).abs() < 1e-3).all()) and x.shape[axis] > 1:
            return axis
    return None


def _one_hot(x: Tensor, axis: int) -> bool:
    ones = (x == 1).sum(axis)
    return x.shape[axis] > 1 and bool((ones == 1).all()) and bool(((x == 0) | (x == 1)).all())


def _counts(x: Tensor, kinds: Tensor, sizes: Tensor, one_hot: int | None) -> tuple[tuple[float, int], ...]:
    if one_hot is not None:
        found = x.movedim(one_hot, -1).flatten(0, -2).sum(0)
        return tuple((float(i), int(n)) for i, n in enumerate(found.tolist()))
    if kinds.numel() > _KINDS:
        return ()
    return tuple(zip(kinds.tolist(), sizes.tolist(), strict=True))


def _sorted(targets: Sequence[Tensor]) -> bool:
    """Whether each of several batches holds a single value, and these rise or fall."""
    if len(targets) < 3 or any(len(t) < 4 for t in targets if t.dim()):
        return False
    single = all(bool((t == t.reshape(len(t), -1)[:1].reshape(1, *t.shape[1:])).all()) for t in targets)
    steps = torch.stack([t.flatten()[0].double() for t in targets]).diff()
    return single and bool(steps.any()) and bool((steps >= 0).all() or (steps <= 0).all())
