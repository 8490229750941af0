"""Slopes of a loss at outputs made up for it, and the laws that they follow."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Compare: TypeAlias = Callable[[Tensor, Tensor], Tensor]

TOLERANCE = 1e-2
"""Of a law, relative: the constants that are added before logarithms (1e-7 to 1e-3) change slopes by less."""


def slopes_at(compare: Compare, points: Tensor, target: Tensor) -> Tensor | None:
    """The slope of the loss at each of the points, in float64 if it takes that; None if it refuses them."""
    for dtype in (torch.float64, torch.float32):
        found = [_slope(compare, point.to(dtype), _as(target, dtype)) for point in points]
        if all(slope is not None for slope in found):
            slopes = torch.stack([slope for slope in found if slope is not None]).double()
            return slopes if slopes.isfinite().any() else None
    return None


def _slope(compare: Compare, point: Tensor, target: Tensor) -> Tensor | None:
    point = point.clone().requires_grad_()
    with _quiet():
        try:
            loss = compare(point, target)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                return None
            (slope,) = torch.autograd.grad(loss.reshape(()), point, allow_unused=True)
        except Exception:  # a user's function may refuse made-up outputs in any way that it likes
            return None
    return slope.detach() if slope is not None else None


def value_at(compare: Compare, point: Tensor, target: Tensor) -> float | None:
    """The loss of an output; None if it refuses it."""
    for dtype in (torch.float64, torch.float32):
        with _quiet():
            try:
                value = float(compare(point.to(dtype), _as(target, dtype)))
            except Exception:
                continue
        return value
    return None


def _quiet() -> warnings.catch_warnings[None]:
    torch.default_generator.manual_seed(0)  # a loss may draw
    return warnings.catch_warnings(action="ignore")


def _as(target: Tensor, dtype: torch.dtype) -> Tensor:
    return target.to(dtype) if target.is_floating_point() else target.clone()


def follows(slopes: Tensor, law: Tensor) -> int:
    """1 if the slopes are a positive multiple of the law plus a constant, at each output; -1 if negative."""
    miss, sign = miss_of(slopes, law)
    return sign if miss <= TOLERANCE else 0


def miss_of(slopes: Tensor, law: Tensor) -> tuple[float, int]:
    """How far slopes are from a multiple of the law plus a constant, at worst; and the multiple's sign."""
    active = (slopes != 0).any(0) & slopes.isfinite().all(0)
    apart, given = slopes - slopes.mean(0), law - law.mean(0)
    weight = (apart * given).sum(0) / given.square().sum(0).clamp_min(1e-300)
    size = weight.abs() * given.abs().amax(0)
    miss = ((apart - weight * given).abs().amax(0) / size)[active]
    sign = sign_of(weight[active])
    if not _most(active, slopes) or not sign or not miss.isfinite().all():
        return math.inf, 0
    return float(miss.max()), sign


def steady_sign(slopes: Tensor) -> int:
    """1 if the slopes are the same at all points, for each output, and not negative; -1 if not positive."""
    active = (slopes != 0).any(0) & slopes.isfinite().all(0)
    fits = slopes.amax(0) - slopes.amin(0) <= TOLERANCE * slopes.abs().amax(0)
    return sign_of(slopes[0][active]) if _most(active, slopes) and bool(fits[active].all()) else 0


def _most(active: Tensor, slopes: Tensor) -> bool:
    """Whether there is something to judge by: some slopes, most of them numbers."""
    return bool(active.any()) and bool(slopes.isfinite().double().mean() > 0.5)


def sign_of(values: Tensor) -> int:
    """1 if all are above zero, -1 if all are below, else 0."""
    return int(bool((values > 0).all())) - int(bool((values < 0).all()))


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Numbers from 0 to 1, always the same."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
