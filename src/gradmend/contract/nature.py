"""The nature of a loss function, found by its slope at outputs made up for it.

Losses are written by hand as often as they are taken from torch, so names say little. But the slope of a
loss in its output tells what it is. For those that follow from a likelihood it is a law: a fixed transform of
the slope equals `weight * (law(output) - target)`, whatever the reduction, the class weights, the smoothing
of the labels, or what is added to the loss (such as a penalty of the weights). So the law can be read from a
few points, without knowing what the loss takes for the target:

    softmax cross entropy      slope                           softmax(output)
    sigmoid cross entropy      slope                           sigmoid(output)
    squared error              slope                           output
    Poisson, of logarithms     slope                           exp(output)
    binary cross entropy       output (1 - output) * slope     output
    cross entropy              output * slope                  constant
    the same, normalized       output * slope                  output / sum(output)

Absolute errors, and others with their lowest point where output and target are equal, are known by the sign
of the slope on both sides of the target; hinges by a slope that is constant and then zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradmend.contract.slopes import (
    TOLERANCE,
    Compare,
    draw,
    follows,
    miss_of,
    sign_of,
    slopes_at,
    steady_sign,
    value_at,
)
from gradmend.readings import LossReading

_STRATA = ((-4.0, -1.2), (-1.0, 0.0), (0.0, 1.0), (1.2, 4.0))
"""Between which raw scores are drawn: beyond both ends of a hinge, and far enough to bend a sigmoid."""

_HEAVIER = 1.2
"""Slopes of two classes that differ by less count the same: smoothing and clipping differ by as much."""

_SILENT = 1e-5
"""Samples whose slope is less than this share of the steepest one count nothing: clipping leaves as much."""

_NEAR, _DIVIDED = 0.01, 5.0
"""Below this share of their root mean square targets are near zero. So many times steeper there than at those
which are ten times as large, a loss divides by its targets."""

_SEEN = 0.3
"""This share of outputs around the targets has a slope, where a loss looks at outputs above zero only."""

_BENT = 0.1
"""A hinge bends at 1 over its target; of amounts, this share does so where it is looked at."""

_AROUND = torch.tensor((-3.0, -0.6, 0.8, 2.5), dtype=torch.float64)
"""How many deviations from the target the loss of an amount is probed."""


def read_loss(compare: Compare, shape: tuple[int, ...], target: Tensor) -> LossReading | None:
    """What a loss function does with outputs of this shape and these targets.

    Args:
        compare: `(output, target) -> scalar`; it is called about a dozen times.
        shape: of the output.
        target: real targets, as the loss takes them.

    Returns:
        Its nature, or None where it is not sure.

    Examples:
        >>> y = torch.tensor([0, 2, 1, 1])
        >>> found = read_loss(torch.nn.functional.cross_entropy, (4, 3), y)
        >>> found.family, found.wants, found.axis
        ('cross entropy', 'logits', 1)
    """
    near = 0.1 + 0.8 * draw((4, *shape))
    wide = torch.stack([a + (b - a) * draw(shape, i) for i, (a, b) in enumerate(_STRATA)])
    slopes = slopes_at(compare, near, target)
    if (slopes is None or not slopes.isfinite().all()) and _undefined(compare, (*near, *wide), target):
        return LossReading("undefined", "nothing")
    if slopes is None:
        return None
    axes = _axes(shape, target)
    if found := _on_probabilities(near, slopes, axes, target):
        return replace(found, ignored=_ignored(slopes))
    others = slopes_at(compare, wide, target)
    if others is None:
        return None
    points, slopes = torch.cat([near, wide]), torch.cat([slopes, others])
    if not slopes.any():
        return LossReading("flat", "nothing", axis=axes[0] if axes else None)
    found = _on_logits(points, slopes, axes)
    if found is None or found.family == "squared":
        found = _on_values(compare, shape, target) or found
    found = found or _straight(slopes, axes, target) or _hinge(points, slopes)
    found = found or _unmoved_by_shifts(slopes, axes)
    return replace(found, ignored=_ignored(slopes)) if found else _one_target(compare, shape, target)


def pairs_samples(compare: Compare, shape: tuple[int, ...], target: Tensor) -> bool | None:
    """Whether a loss changes if the targets change places; None if there is no telling.

    Examples:
        >>> loss = lambda a, b: (a - b).square().mean()
        >>> pairs_samples(loss, (3, 1), torch.rand(3)), pairs_samples(loss, (3, 1), torch.rand(3, 1))
        (False, True)
    """
    moved = target.roll(1, 0) if target.dim() else target
    if torch.equal(moved, target) or not shape:
        return None
    near, aligned = draw((2, *shape)), _aligned(target, shape)
    around = [] if aligned is None else [aligned + (2 * near - 1) * _spread(aligned)]
    found = [_pairs(compare, points, target, moved) for points in (near, *around)]
    return True if True in found else found[0]


def answers_alike(compare: Compare, shape: tuple[int, ...], target: Tensor) -> bool:
    """Whether a loss asks every sample for the same answer: targets may change places, outputs do not meet.

    Losses that compare two sets, such as the maximum mean discrepancy, let outputs meet each other.

    Examples:
        >>> pairs = lambda a, b: (a - b.flatten()).square().mean()
        >>> sets = lambda a, b: (a.mean() - b.mean()).square()
        >>> y = torch.rand(4, 1)
        >>> [answers_alike(loss, (4, 1), y) for loss in (pairs, sets, torch.nn.functional.mse_loss)]
        [True, False, False]
    """
    half = shape[0] // 2 if shape else 0
    if not half or not target.is_floating_point() or pairs_samples(compare, shape, target) is not False:
        return False
    points = draw((2, *shape))
    points[1, :half] = points[0, :half]
    slopes = slopes_at(compare, points, target)
    others = slopes_at(compare, points, target.flip(0) + 1)
    if slopes is None or others is None:
        return False
    apart = torch.allclose(slopes[0, :half], slopes[1, :half], rtol=1e-4)
    return apart and not torch.allclose(slopes, others, rtol=1e-4)


def classes_told_apart(
    compare: Compare, shape: tuple[int, ...], target: Tensor, classes: Sequence[float]
) -> int:
    """How many of these classes a loss tells apart, by where it slopes if all targets are of one class.

    What only slopes more steeply for one class than for another asks the same of both.

    Examples:
        >>> above = lambda p, y: torch.nn.functional.binary_cross_entropy(p, (y > 1).to(p))
        >>> classes_told_apart(above, (4,), torch.tensor([0, 1, 2, 3]), [0.0, 1.0, 2.0, 3.0])
        2
    """
    if _units_swap(compare, shape, [torch.full_like(target, value) for value in classes]):
        return 1
    points = 0.1 + 0.8 * draw((1, *shape))
    found: list[Tensor] = []
    for value in classes:
        slopes = slopes_at(compare, points, torch.full_like(target, value))
        if slopes is None:
            continue
        slopes = slopes / slopes.abs().max().clamp_min(1e-300)
        if not any(torch.allclose(slopes, known, atol=1e-6) for known in found):
            found.append(slopes)
    return len(found)


def weighs_more(compare: Compare, z: Tensor, target: Tensor, first: Tensor, second: Tensor) -> bool:
    """Whether samples of the second class move a loss clearly more than as many of the first.

    Args:
        z: an output that prefers neither class, all rows alike.
        first: the target of a sample of that class, in the form of one row of `target`.

    Examples:
        >>> loss = torch.nn.CrossEntropyLoss(torch.tensor([0.1, 0.9]))
        >>> y = torch.tensor([0, 0, 0, 1])
        >>> weighs_more(loss, torch.zeros(4, 2), y, y[0], y[3])
        True
    """
    half = min(len(target), len(z)) // 2
    if not half:
        return False
    slopes = slopes_at(compare, z[None, : 2 * half], torch.stack([first] * half + [second] * half))
    if slopes is None:
        return False
    sizes = slopes[0].abs()
    return bool(sizes[half:].sum() > _HEAVIER * sizes[:half].sum())


def _undefined(compare: Compare, points: Iterable[Tensor], target: Tensor) -> bool:
    """Whether a loss is no number with these amounts, whatever the output, and is one with others."""
    if not target.is_floating_point() or not bool(target.isfinite().all()):
        return False
    others = 0.1 + 0.8 * draw(tuple(target.shape), 1)
    found = [[value_at(compare, point, y) for y in (target, others)] for point in points]
    numbers = [[value is not None and math.isfinite(value) for value in pair] for pair in found]
    return not any(own for own, _ in numbers) and any(other for _, other in numbers)


def _pairs(compare: Compare, points: Tensor, target: Tensor, moved: Tensor) -> bool | None:
    values = [value_at(compare, points[i], t) for i, t in ((0, target), (1, target), (0, moved))]
    first, other, swapped = (math.nan if value is None else value for value in values)
    if first == other or math.isnan(first + other + swapped):
        return None
    return abs(first - swapped) > 1e-5 * abs(first - other) + 1e-12 * abs(first)


def _axes(shape: tuple[int, ...], target: Tensor) -> list[int]:
    """The axes of the output that may count classes, the likelier first."""
    last = len(shape) - 1
    if last < 1:
        return []
    if last == 1:
        return [1]
    first = tuple(target.shape) == (shape[0], *shape[2:]) or (
        target.shape == shape and bool(torch.allclose(target.double().sum(1), torch.ones(()).double()))
    )
    return [1, last] if first else [last, 1]


def _on_probabilities(z: Tensor, slopes: Tensor, axes: list[int], target: Tensor) -> LossReading | None:
    """The law that fits best: with large targets, one of them comes near another."""
    laws = [(miss_of(z * (1 - z) * slopes, z), LossReading("binary cross entropy", "probabilities"))]
    laws += [(miss_of(z * slopes, z), LossReading("poisson", "values"))]
    for axis in axes:
        shares = z / z.sum(axis + 1, keepdim=True)
        found = LossReading("cross entropy", "probabilities", axis, normalizes=True)
        laws += [(miss_of(z * slopes, shares), found)] if z.shape[axis + 1] > 1 else []
    (miss, sign), best = min(laws, key=lambda law: law[0][0])
    given = _aligned(target, tuple(z.shape[1:]))
    turned = given.sign() if given is not None and bool((given < 0).any()) else 1  # below zero it pushes away
    steady = 0 if steady_sign(slopes) else steady_sign(turned * z * slopes)
    if steady and not bool((slopes == 0).any()) and bool((target == target.flatten()[0]).all()):
        return LossReading(None, "probabilities", sign=-steady)  # both fit if all targets are 1
    if steady:
        return LossReading("cross entropy", "probabilities", axes[0] if axes else None, sign=-steady)
    if miss > TOLERANCE or (best.family == "poisson" and not _counts(z, slopes, target)):
        return None
    return replace(best, sign=sign)


def _counts(z: Tensor, slopes: Tensor, target: Tensor) -> bool:
    """Whether the slope is `1 - target / output`, up to a factor: then the loss regards targets as counts."""
    aligned = _aligned(target, tuple(z.shape[1:]))
    return aligned is not None and steady_sign(slopes / (1 - aligned / z)) == 1


def _on_logits(z: Tensor, slopes: Tensor, axes: list[int]) -> LossReading | None:
    for axis in [axis for axis in (*axes, 0) if z.shape[axis + 1] > 1]:
        if sign := follows(slopes, z.softmax(axis + 1)):
            return LossReading("cross entropy", "logits", axis, sign=sign)
    if sign := follows(slopes, z.sigmoid()):
        steep = slopes.abs()
        endless = bool((steep.amin(0) >= 0.5 * steep.amax(0)).any())  # as 1 + sigmoid, of a target of -1
        return LossReading("binary cross entropy", "logits", sign=sign, endless=endless)
    if sign := follows(slopes, z):
        return LossReading("squared", "values", sign=sign)
    if sign := follows(slopes, z.exp()):
        return LossReading("poisson", "logits", sign=sign)
    return None


def _on_values(compare: Compare, shape: tuple[int, ...], target: Tensor) -> LossReading | None:
    """Lowest where output and target are equal: the slope has the sign of their difference."""
    aligned = _aligned(target, shape)
    if aligned is None or (target.numel() < aligned.numel() and not _units_alike(compare, shape, target)):
        return None
    apart = _spread(aligned) * _AROUND.reshape(-1, *[1] * len(shape)) * (0.5 + draw((4, *shape)))
    slopes = slopes_at(compare, aligned + apart, target)
    if slopes is None:
        return None
    sign = sign_of((slopes * apart)[_sloped(aligned + apart, slopes)])
    if not sign:
        return None
    family = "squared" if follows(slopes, apart) else "absolute" if steady_sign(slopes.abs()) else None
    steep = (slopes / apart if family == "squared" else slopes).abs().amax(0)
    divides = _divides(steep, aligned)
    return LossReading(family, "values", sign=sign, divides=divides, floored=_floored(compare, shape, target))


def _sloped(z: Tensor, slopes: Tensor) -> Tensor:
    """Where to look at slopes: everywhere, unless all outputs below some number are taken for it."""
    sloped = slopes != 0
    cut = sloped.double().mean() >= _SEEN and not sloped.all() and z[~sloped].max() <= z[sloped].min()
    return sloped if cut else torch.ones_like(sloped)


def _divides(steep: Tensor, target: Tensor) -> bool:
    """Whether it is far steeper at small targets, as if it divided by them; they go through zero."""
    size, typical = target.abs(), float(target.square().mean().sqrt())
    if size.all() and not bool((target < 0).any() and (target > 0).any()):
        return False
    near, other = steep[size <= _NEAR * typical], steep[size > 10 * _NEAR * typical]
    inverse = not _even(steep) and any(_even((steep * size**power)[size > 0]) for power in (1, 2))
    return inverse or bool(len(near) and len(other) and near.min() > _DIVIDED * other.max())


def _even(sizes: Tensor) -> bool:
    """Whether there are any, and all are the same."""
    return bool(len(sizes)) and bool(sizes.amax() - sizes.amin() <= TOLERANCE * sizes.amax())


def _floored(compare: Compare, shape: tuple[int, ...], target: Tensor) -> bool:
    """Whether it takes targets below zero for zero, as those do that take logarithms of one and more."""
    if not bool((target < 0).any() and (target > 0).any()):
        return False
    points = 2 * draw(shape) - 1
    found = [value_at(compare, points, y) for y in (target, target.clamp_min(0), target.abs())]
    first, floored, other = (math.nan if value is None else value for value in found)
    return abs(first - floored) <= 1e-6 * abs(first) < abs(first - other)


def _straight(slopes: Tensor, axes: list[int], target: Tensor) -> LossReading | None:
    """Linear in the output, with the probability of the class as the factor: it takes logarithms of these."""
    sign = steady_sign(slopes)
    for axis in axes if sign else ():
        given = _memberships(target, tuple(slopes.shape[1:]), axis)
        if given is not None and bool(((given == 0) == (slopes[0] == 0)).all()):
            return LossReading("cross entropy", "log probabilities", axis, sign=-sign)
    return None


def _memberships(target: Tensor, shape: tuple[int, ...], axis: int) -> Tensor | None:
    """How much each class is meant, in the shape of the output, if the targets say that."""
    if tuple(target.shape) == shape and target.is_floating_point():
        logs = target.double().exp() if bool((target <= 0).all()) else target.double()
        total = logs.sum(axis)
        return logs if bool((logs >= 0).all()) and torch.allclose(total, torch.ones_like(total)) else None
    wanted = shape[:axis] + shape[axis + 1 :]
    whole = target.double()
    if tuple(target.shape) != wanted or not bool((whole == whole.round()).all()):
        return None
    places = torch.arange(shape[axis]).reshape(-1, *[1] * (len(shape) - 1 - axis))
    return (whole.unsqueeze(axis) == places).double()


def _hinge(z: Tensor, slopes: Tensor) -> LossReading | None:
    """Along each output the slope is constant, and from some point on zero."""
    order = z.argsort(0)
    slopes = slopes.gather(0, order)
    on, size = slopes != 0, slopes.abs().amax(0)
    flat = ((slopes.abs() - size).abs() <= TOLERANCE * size) | ~on
    rising, falling = ~on[:-1] | on[1:], on[:-1] | ~on[1:]
    up, down = (slopes >= 0).all(0) & rising.all(0), (slopes <= 0).all(0) & falling.all(0)
    active = on.any(0)
    bends = active & ~on.all(0)
    if not (flat.all(0) & (up | down)).all() or not bends.any() or bends.sum() < _BENT * active.sum():
        return None
    return LossReading("hinge", "values")


def _unmoved_by_shifts(slopes: Tensor, axes: list[int]) -> LossReading | None:
    """Adding one number to the scores of all classes changes nothing, as if a softmax followed."""
    for axis in [axis for axis in axes if slopes.shape[axis + 1] > 1]:
        total, size = slopes.sum(axis + 1).abs(), slopes.abs().sum(axis + 1)
        if bool((total <= 1e-5 * size).all()):
            return LossReading(None, "logits", axis)
    return None


def _one_target(compare: Compare, shape: tuple[int, ...], target: Tensor) -> LossReading | None:
    """Of several units with one target per sample: each is compared with it, or they may change places."""
    if _units_alike(compare, shape, target):
        return LossReading(None, "values")
    return LossReading(None, "nothing", kinds=1) if _units_swap(compare, shape, [target]) else None


def _units_swap(compare: Compare, shape: tuple[int, ...], targets: Sequence[Tensor]) -> bool:
    """Whether several units may change places, where a loss compares each sample by itself with one target.

    Losses that compare samples with each other, such as those of embeddings, do not need units to differ.

    Examples:
        >>> index, product = torch.nn.functional.nll_loss, lambda z, y: -(y[:, None] * z).sum(1).mean()
        >>> [_units_swap(loss, (4, 2), [torch.tensor([0, 1, 1, 0])]) for loss in (index, product)]
        [False, True]
    """
    if len(shape) != 2 or shape[1] < 2 or any(target.numel() != shape[0] for target in targets):
        return False
    half = shape[0] // 2
    first, other = 0.1 + 0.8 * draw((2, *shape))
    points = torch.stack([first, first.roll(1, -1), torch.cat([first[:half], other[half:]])])
    for target in targets:
        slopes = slopes_at(compare, points, target)
        if slopes is None or not torch.allclose(slopes[0].roll(1, -1), slopes[1]):
            return False
        if not torch.allclose(slopes[0, :half], slopes[2, :half], rtol=1e-4):
            return False
    return True


def _units_alike(compare: Compare, shape: tuple[int, ...], target: Tensor) -> bool:
    """Whether several units are compared with one target per sample: each by itself, and all in one way."""
    if len(shape) != 2 or shape[1] < 2 or target.numel() != shape[0]:
        return False
    z = draw((2, *shape))
    mixed = torch.cat([z[0, :, :1], z[1, :, 1:]], 1)
    slopes = slopes_at(compare, torch.stack([*z, mixed, z[0].roll(1, 1)]), target)
    if slopes is None or steady_sign(slopes):
        return False
    apart = torch.cat([slopes[0, :, :1], slopes[1, :, 1:]], 1)
    return torch.allclose(slopes[2], apart) and torch.allclose(slopes[3], slopes[0].roll(1, 1))


def _aligned(target: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Real targets in the shape of the output, if there is one for each, or for all units of a sample."""
    if not target.is_floating_point():
        return None
    given = tuple(target.shape)
    if len(given) == len(shape) > 1 and given == (*shape[:-1], 1):
        return target.double().expand(shape)
    same = given == shape or (given == shape[:-1] and shape[-1] == 1) or given == (*shape, 1)
    return target.double().reshape(shape) if same else None


def _spread(values: Tensor) -> float:
    return (float(values.std()) if values.numel() > 1 else 0.0) or float(values.abs().max()) or 1.0


def _ignored(slopes: Tensor) -> float:
    """The share of samples that have next to no slope at any of the points."""
    steep = slopes.abs().amax(0)
    silent = steep <= _SILENT * steep.nan_to_num(0.0, 0.0).max()
    return float(silent.reshape(silent.shape[0], -1).all(1).double().mean())
