"""The scale of what comes out: the network learns numbers near 1, whatever the unit of the targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradmend import surgery
from gradmend.anatomy import Anatomy
from gradmend.causes import Cause
from gradmend.layers import After, Rescale
from gradmend.remedies.base import Remedy
from gradmend.remedies.ending import read_ending
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit

_MARGIN = 0.1
"""So far inside the range of the last activation the targets come to lie, for it never reaches its ends."""


@dataclass(frozen=True)
class RescaleOutput(Remedy):
    """Let the output be in the unit of the targets, by an affine last layer with fixed numbers.

    An output without bounds is multiplied by the deviation of the targets and moved by their mean; one with
    bounds is stretched over their range and a tenth beyond. The loss keeps the user's targets, the network
    has to learn numbers near 1. What it computes changes, so it is for setups that have not trained yet. With
    SGD the learning rate has to shrink by the square of the scale (`LearningRate` finds it); Adam needs
    nothing. Costs one product per step.

    Source: Bishop, Neural Networks for Pattern Recognition, section 8.2, 1995.
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {
            Cause.UNSCALED_TARGETS,
            Cause.UNREACHABLE_TARGETS,
            Cause.LEARNING_RATE_TOO_LOW,
            Cause.SLOW_CONVERGENCE,
        }
    )
    intrusion: ClassVar[int] = 1
    summary: ClassVar[str] = "output scaled to the targets"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether the output goes to a loss function as it is."""
        return setup.loss_fn is not None and not _rescaled(setup.model)

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Add the layer."""
        ending = read_ending(setup, anatomy, batches)
        targets = [batch[-1] for batch in batches if isinstance(batch, (tuple, list))]
        amounts = ending is not None and ending.loss.wants == "values" and targets
        if ending is None or not amounts or ending.loss.family in ("hinge", "poisson"):
            return setup, self, []
        scale, shift = _span(
            torch.cat([_columns(t, ending.output.shape) for t in targets]), ending.output.bounds
        )
        if bool(((scale - 1).abs() < 0.5).all() and (shift.abs() < 0.5).all()):
            return setup, self, []
        model, edit = surgery.wrap_output(setup.model, Rescale(scale, shift))
        return replace(setup, model=model), self, [edit] if edit else []


def _rescaled(model: nn.Module) -> bool:
    return isinstance(model, After) and isinstance(model.after, Rescale)


def _columns(target: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The targets as rows of the output's last axis, if they have it, else as a single column."""
    wide = len(shape) > 1 and target.dim() == len(shape) and target.shape[1:] == shape[1:]
    return target.detach().double().reshape(-1, shape[-1] if wide else 1).cpu()


def _span(rows: Tensor, bounds: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
    """Scale and shift that bring the output to the targets, for each column."""
    least, most = bounds or (-math.inf, math.inf)
    low, high = rows.amin(0), rows.amax(0)
    beyond = _MARGIN * (high - low).masked_fill(high == low, 1.0)
    low, high = low - beyond, high + beyond
    std, mean = torch.std_mean(rows, dim=0, correction=0)
    scale = std.masked_fill(std == 0, 1.0) if math.isinf(most - least) else (high - low) / (most - least)
    if math.isfinite(least):
        shift = low - least * scale
    else:
        shift = high - most * scale if math.isfinite(most) else mean
    return (scale.float(), shift.float()) if len(scale) > 1 else (scale[0].float(), shift[0].float())
