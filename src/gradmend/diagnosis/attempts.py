"""Attempts: single changes of a setup, or of its batches, that may let it learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from gradmend.causes import Cause
from gradmend.profile import Profile
from gradmend.setup import Batch, Setup, named_parameters


@dataclass(frozen=True)
class Attempt:
    """One change that may let a setup learn.

    Args:
        causes: what it would be the cure of; the first of them that was found already, else the first.
        words: of what is different.
        multiples: of the learning rate that are tried in turn.
        make: the changed setup, from a copy that is its own.
        feed: the changed batches.
    """

    causes: tuple[Cause, ...]
    words: str
    multiples: tuple[float, ...]
    make: Callable[[Setup], Setup] = lambda setup: setup
    feed: Callable[[Sequence[Batch]], Sequence[Batch]] = lambda batches: batches


def at_rate(setup: Setup, multiple: float) -> Setup:
    """With an optimizer at a multiple of its rates."""
    optimizer = setup.build_optimizer()
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * multiple
    return replace(setup, optimizer=optimizer)


_LENGTHS, _LONGEST = (1.0, 4.0, 16.0), 9
"""Multiples of the rate; and the first power of four by which none is lengthened: rates of 1e-8 exist."""

USUAL_EPSILON = 1e-7
"""Keras' default, the largest in common use; if it is too large, the gradient is to blame."""


def attempts(profile: Profile, most: float) -> Iterator[Attempt]:
    """What may be to blame, from what is nearly always a fault to what may be."""
    if profile.inputs is not None and odd(profile.inputs.rms):
        causes = (Cause.UNSCALED_INPUT, Cause.STRAY_COLUMN)
        yield Attempt(causes, "the input standardized", _LENGTHS, feed=partial(standardized, member=0))
    if amounts(profile):
        feed = partial(standardized, member=-1)
        yield Attempt((Cause.UNSCALED_TARGETS,), "the targets standardized", _LENGTHS, feed=feed)
    yield Attempt((Cause.LEARNING_RATE_TOO_HIGH,), "steps a hundredth as long", (0.1, 0.01))
    if drops(profile):
        yield Attempt((Cause.TOO_MUCH_DROPOUT,), "no dropout", _LENGTHS, make=undropped)
    slow = (Cause.LEARNING_RATE_TOO_LOW, Cause.TOO_FEW_STEPS, Cause.UNFIT_BATCH_SIZE)
    longer = tuple(max(1.0, most) * 4.0**k for k in range(most >= 1, _LONGEST))
    yield Attempt(slow, "longer ones", longer)
    if not adapts(profile):
        yield Attempt((Cause.UNFIT_OPTIMIZER,), "those of Adam", (1.0, 10.0), make=with_adam)
    size = Cause.WEIGHTS_TOO_LARGE if too_large(profile) else Cause.WEIGHTS_TOO_SMALL
    yield Attempt((size, Cause.SYMMETRIC_WEIGHTS), "weights drawn afresh", _LENGTHS, make=_drawn)


_CONSTANT = 1e-5
"""A column that deviates by no more than this share of its mean is a constant, rounded."""


def amounts(profile: Profile) -> bool:
    """Whether the targets are numbers far from the size that a fresh network puts out."""
    contract = profile.contract
    target = contract.target if contract is not None else None
    return regresses(profile) and target is not None and odd(target.rms)


def regresses(profile: Profile) -> bool:
    """Whether the targets are amounts, whatever their size."""
    contract = profile.contract
    if contract is None or contract.loss is None or contract.target is None:
        return False
    return contract.loss.wants == "values" and not contract.target.binary


def odd(rms: float) -> bool:
    """Whether numbers are far from the size that networks are made for."""
    return not 0.3 < rms < 3.0


def adapts(profile: Profile) -> bool:
    """Whether the optimizer is Adam or of its kin: what another Adam does better is a matter of the rate."""
    groups = () if profile.regime is None else profile.regime.optimizer.groups
    return bool(groups) and all(g.betas and (g.epsilon or 0.0) <= USUAL_EPSILON for g in groups)


def drops(profile: Profile) -> bool:
    """Whether there is dropout at work."""
    return any(site.kind == "dropout" and site.settings.get("p") for site in profile.anatomy.sites)


def too_large(profile: Profile) -> bool:
    """Whether some weights have more than twice the variance that any usual initialization gives them."""
    return max((r.weight_variance or 0.0 for r in profile.weighted()), default=0.0) > 4.0


def standardized(batches: Sequence[Batch], member: int) -> Sequence[Batch]:
    """With mean 0 and deviation 1: each column of a table, all values of anything else together."""
    parts = [batch[member] for batch in batches]
    if not parts[0].is_floating_point():
        return batches
    every = torch.cat(parts)
    axes = (0,) if every.dim() < 3 else tuple(range(every.dim()))
    deviation, mean = torch.std_mean(every, axes, keepdim=True)
    constant = deviation <= _CONSTANT * (mean.abs() + deviation)
    changed = [((part - mean) / deviation).where(~constant, 0.0) for part in parts]
    place = member % len(batches[0])
    return [(*batch[:place], part, *batch[place + 1 :]) for batch, part in zip(batches, changed, strict=True)]


def undropped(setup: Setup) -> Setup:
    """Without dropout; the setup is changed in place."""
    for module in setup.model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return setup


def with_adam(setup: Setup) -> Setup:
    """With Adam at its usual rate."""
    return replace(setup, optimizer=partial(torch.optim.Adam, lr=1e-3))


@torch.no_grad()
def _drawn(setup: Setup) -> Setup:
    """Weights of variance 2 / fan-in (He et al. 2015)."""
    draw = torch.Generator().manual_seed(0)
    for _, p in named_parameters(setup.model):
        if p.dim() > 1 and p.requires_grad:
            fresh = torch.randn(p.shape, generator=draw) * math.sqrt(2 * len(p) / p.numel())
            p.copy_(fresh.to(p))
    return setup
