"""Normalization between a layer and its activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from gradmend import surgery
from gradmend.anatomy import Anatomy, Site
from gradmend.causes import Cause
from gradmend.remedies.base import SIGNAL, Remedy, weighted_layers
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit

_TREATS = SIGNAL | {Cause.CONTRACTING_ACTIVATION}
_INTRUSION = 6


@dataclass(frozen=True)
class BatchNorm(Remedy):
    """Batch normalization after each linear or convolutional layer that an activation follows.

    In plain deep stacks it makes the gradient explode by a factor of about 1.5 per layer, so it belongs into
    shallow ones or beside residual connections (Yang et al. 2019, https://arxiv.org/abs/1902.08129).

    Source: Ioffe, Szegedy, Batch normalization, 2015, https://arxiv.org/abs/1502.03167
    """

    treats: ClassVar[frozenset[Cause]] = _TREATS
    intrusion: ClassVar[int] = _INTRUSION
    summary: ClassVar[str] = "batch normalization"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a layer with two- or four-dimensional output is followed by an activation directly."""
        return any(_norm(site) for site, _ in _places(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Insert the normalizations."""
        return setup, self, _insert(setup, anatomy, _norm)


@dataclass(frozen=True)
class LayerNorm(Remedy):
    """Layer normalization after each linear layer that an activation follows.

    Before the activation it keeps the gradient's size; after it, gradients would explode as with batch norm.

    Source: Ba, Kiros, Hinton, Layer normalization, 2016, https://arxiv.org/abs/1607.06450
    """

    treats: ClassVar[frozenset[Cause]] = _TREATS
    intrusion: ClassVar[int] = _INTRUSION
    summary: ClassVar[str] = "layer normalization"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a linear layer is followed by an activation directly."""
        return any(site.kind == "linear" for site, _ in _places(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Insert the normalizations."""
        return setup, self, _insert(setup, anatomy, _layer_norm)


def _norm(site: Site) -> nn.Module | None:
    kinds = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    if site.kind == "convolution" and len(site.shape) == 3:
        return nn.BatchNorm1d(site.units)
    if len(site.shape) not in kinds or (site.kind == "linear" and len(site.shape) != 2):
        return None
    return kinds[len(site.shape)](site.units)


def _layer_norm(site: Site) -> nn.Module | None:
    return nn.LayerNorm(site.units) if site.kind == "linear" else None


def _places(setup: Setup, anatomy: Anatomy) -> list[tuple[Site, Site]]:
    pairs = weighted_layers(setup, anatomy)
    return [(site, after) for site, after in pairs if after is not None and after.direct == (site.index,)]


def _insert(setup: Setup, anatomy: Anatomy, norm: Callable[[Site], nn.Module | None]) -> list[Edit]:
    edits = []
    for site, _ in _places(setup, anatomy):
        new = norm(site)
        edit = surgery.insert_after(setup.model, site.module, new) if new is not None else None
        edits += [edit] if edit else []
    return edits
