"""Residual connections around what keeps the shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from gradmend import surgery
from gradmend.anatomy import Anatomy, Site
from gradmend.causes import Cause
from gradmend.remedies.base import Remedy
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit


@dataclass(frozen=True)
class AddSkips(Remedy):
    """Residual connections `x + scale * layer(activation(x))` around shape-preserving blocks.

    A block is an activation and the layer after it, in one `nn.Sequential`. With scale 1/sqrt(blocks) the
    signal grows by a constant factor in all, at any depth; with scale 1 it doubles per block.

    Args:
        scale: of every branch; None takes 1/sqrt(number of blocks).
        learned: makes each scale a parameter; with `scale=0.0` this is ReZero.

    Source: He, Zhang, Ren, Sun, Identity mappings in deep residual networks, 2016,
    https://arxiv.org/abs/1603.05027; Bachlechner et al., ReZero is all you need, 2020,
    https://arxiv.org/abs/2003.04887
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {
            Cause.CONTRACTING_ACTIVATION,
            Cause.WEIGHTS_TOO_SMALL,
            Cause.VANISHING_GRADIENT,
            Cause.INFORMATION_COLLAPSE,
        }
    )
    intrusion: ClassVar[int] = 7
    summary: ClassVar[str] = "residual connections of scale {scale:.3g}"
    scale: float | None = None
    learned: bool = False

    @property
    def title(self) -> str:
        """The summary with the values of the fields."""
        return self.summary.format(**vars(self)) if self.scale is not None else "residual connections"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is a shape-preserving block."""
        return bool(_blocks(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Wrap each block."""
        blocks = _blocks(setup, anatomy)
        scale = 1 / math.sqrt(max(1, len(blocks))) if self.scale is None else self.scale
        edits = [surgery.wrap_residual(setup.model, block, scale, self.learned) for block in blocks]
        return setup, replace(self, scale=scale), [edit for edit in edits if edit]


def _blocks(setup: Setup, anatomy: Anatomy) -> list[list[str]]:
    """Runs of an activation and the layer after it, consecutive in one `nn.Sequential`, of equal shapes."""
    blocks = []
    for site in anatomy.sites:
        readers = anatomy.readers(site.index)
        if site.kind == "activation" and len(readers) == 1 and _keeps_shape(site, readers[0]):
            run = _siblings(setup.model, site.module, readers[0].module)
            blocks += [run] if run else []
    return blocks


def _keeps_shape(site: Site, layer: Site) -> bool:
    return layer.weighted and layer.shape == site.shape and layer.direct == (site.index,)


def _siblings(model: nn.Module, first: str, last: str) -> list[str]:
    """The paths from `first` to `last` if both are children of one Sequential, else nothing."""
    parent, dot, start = first.rpartition(".")
    other, _, end = last.rpartition(".")
    if parent != other or not isinstance(model.get_submodule(parent), nn.Sequential):
        return []
    names = [name for name, _ in model.get_submodule(parent).named_children()]
    if start not in names or end not in names:
        return []
    return [f"{parent}{dot}{name}" for name in names[names.index(start) : names.index(end) + 1]]
