"""Normalization: of signals between a layer and its activation, of weights, of the logits of attention."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from gradmend import surgery
from gradmend.anatomy import INPUT, Anatomy, Site
from gradmend.causes import Cause
from gradmend.kinds import elementwise
from gradmend.probe import measure
from gradmend.remedies.base import SIGNAL, Remedy, weighted_layers
from gradmend.remedies.drawing import learning_layers
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit
from gradmend.weights import absorb, scale_queries_and_keys

_BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_ROUNDED = 1.01
"""Logits that exceed their size by less have been scaled already."""


class Normalization(Remedy):
    """What all normalizations share: their place, after each layer that an activation follows directly.

    Before the activation, layer and RMS normalization keep the gradient's size; after it, layer normalization
    would make gradients explode as batch normalization does.
    """

    treats: ClassVar[frozenset[Cause]] = SIGNAL | {Cause.CONTRACTING_ACTIVATION}
    intrusion: ClassVar[int] = 6

    @abstractmethod
    def norm(self, site: Site) -> nn.Module | None:
        """What normalizes the output of a layer; None if nothing of this kind does."""

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a layer that it can normalize is followed by an activation directly."""
        return any(self.norm(site) for site in _places(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Insert the normalizations."""
        news = [(site.module, self.norm(site)) for site in _places(setup, anatomy)]
        edits = [surgery.insert_after(setup.model, path, new) for path, new in news if new is not None]
        return setup, self, [edit for edit in edits if edit]


@dataclass(frozen=True)
class BatchNorm(Normalization):
    """Batch normalization after each linear or convolutional layer that an activation follows.

    In plain deep stacks it makes the gradient explode by a factor of about 1.5 per layer, so it belongs into
    shallow ones or beside residual connections (Yang et al. 2019, https://arxiv.org/abs/1902.08129). For
    weights of any size; those that are there stay. Costs a pass over each output, and a large enough batch.

    Source: Ioffe, Szegedy, Batch normalization, 2015, https://arxiv.org/abs/1502.03167
    """

    summary: ClassVar[str] = "batch normalization"

    def norm(self, site: Site) -> nn.Module | None:
        """`nn.BatchNorm1d`, `2d` or `3d`; none for linear layers that are applied along a sequence."""
        kinds = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
        if site.kind == "convolution" and len(site.shape) == 3:
            return nn.BatchNorm1d(site.units)
        if len(site.shape) not in kinds or (site.kind == "linear" and len(site.shape) != 2):
            return None
        return kinds[len(site.shape)](site.units)


@dataclass(frozen=True)
class LayerNorm(Normalization):
    """Layer normalization after each linear layer that an activation follows; rows do not depend on others.

    For weights of any size, in deep networks too; those that are there stay. Costs a pass over each output.

    Source: Ba, Kiros, Hinton, Layer normalization, 2016, https://arxiv.org/abs/1607.06450
    """

    summary: ClassVar[str] = "layer normalization"

    def norm(self, site: Site) -> nn.Module | None:
        """`nn.LayerNorm` over the features of a linear layer."""
        return nn.LayerNorm(site.units) if site.kind == "linear" else None


@dataclass(frozen=True)
class RMSNorm(Normalization):
    """RMS normalization after each linear layer that an activation follows: the size alone, not the mean.

    For weights of any size; those that are there stay. Costs a pass over each output, less than layer norm.

    Source: Zhang, Sennrich, Root mean square layer normalization, 2019, https://arxiv.org/abs/1910.07467
    """

    summary: ClassVar[str] = "RMS normalization"

    def norm(self, site: Site) -> nn.Module | None:
        """`nn.RMSNorm` over the features of a linear layer."""
        return nn.RMSNorm(site.units) if site.kind == "linear" else None


@dataclass(frozen=True)
class GroupNorm(Normalization):
    """Group normalization after each layer that an activation follows: as batch norm, but sample by sample.

    For images in small batches; weights that are there stay. Costs a pass over each output.

    Args:
        groups: of channels; fewer where the channels cannot be divided by that many.

    Source: Wu, He, Group normalization, 2018, https://arxiv.org/abs/1803.08494
    """

    summary: ClassVar[str] = "group normalization"
    groups: int = 8

    def norm(self, site: Site) -> nn.Module | None:
        """`nn.GroupNorm`; none for linear layers that are applied along a sequence."""
        if site.kind == "linear" and len(site.shape) != 2:
            return None
        return nn.GroupNorm(math.gcd(self.groups, site.units), site.units)


@dataclass(frozen=True)
class WeightNorm(Remedy):
    """Write each weight as length times direction, learned apart; the function stays the same.

    Gradients along the weights are taken out, so that the scale of the weights is learned by itself. Nothing
    is computed from the batch. torch refuses to pickle parametrized modules: save their `state_dict`. Costs
    a norm per unit and step.

    Source: Salimans, Kingma, Weight normalization, 2016, https://arxiv.org/abs/1602.07868
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.SLOW_CONVERGENCE, Cause.LEARNING_RATE_TOO_HIGH})
    intrusion: ClassVar[int] = 6
    summary: ClassVar[str] = "weight normalization"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a layer with weights that are not frozen is not parametrized, and its weight is its own."""
        return bool(self._paths(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Parametrize the weights."""
        paths = self._paths(setup, anatomy)
        return setup, self, [surgery.change(setup.model, p, weight_norm, self.title) for p in paths]

    def _paths(self, setup: Setup, anatomy: Anatomy) -> list[str]:
        uses = [name for site in anatomy.sites for name in set(site.parameters)]
        paths = [site.module for site, _ in learning_layers(setup, anatomy)]
        calls = [site.module for site in anatomy.sites]
        own = [p for p in paths if uses.count(f"{p}.weight".lstrip(".")) == calls.count(p)]
        return [p for p in own if p and not parametrize.is_parametrized(setup.model.get_submodule(p))]


@dataclass(frozen=True)
class DropBatchNorm(Remedy):
    """Layer normalization for batch normalization, group normalization for that of images; scales are kept.

    Then no sample depends on the others, gradients no longer explode in plain deep stacks, and batches of one
    row can train. Running statistics are lost, and with them the function in evaluation. Costs nothing.

    Args:
        groups: of channels; fewer where the channels cannot be divided by that many.

    Source: Ba, Kiros, Hinton, Layer normalization, 2016, https://arxiv.org/abs/1607.06450; Wu, He, Group
    normalization, 2018, https://arxiv.org/abs/1803.08494
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {Cause.BATCH_NORM_EXPLOSION, Cause.BATCH_OF_ONE, Cause.EXPLODING_GRADIENT}
    )
    intrusion: ClassVar[int] = 6
    summary: ClassVar[str] = "layer or group normalization in the place of batch normalization"
    groups: int = 8

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is batch normalization with scales of its own."""
        return any(_batch_norm(setup.model, site) for site in anatomy.sites)

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Put the other in its place, with the scales and shifts that it had."""
        edits: list[Edit | None] = []
        for site in anatomy.sites:
            old = _batch_norm(setup.model, site)
            if old is not None:
                edits.append(surgery.replace(setup.model, site.module, self._norm(old, site), keep=True))
        return setup, self, [edit for edit in edits if edit]

    def _norm(self, old: _BatchNorm, site: Site) -> nn.Module:
        if len(site.shape) == 2:
            return nn.LayerNorm(old.num_features, eps=old.eps)
        groups = math.gcd(self.groups, old.num_features)
        return nn.GroupNorm(groups, old.num_features, eps=old.eps)


@dataclass(frozen=True)
class CalmAttention(Remedy):
    """Scale queries and keys down until the logits of attention have the given rms, so that all keys count.

    What was learned stays but for the scale: which key is nearest to a query does not change. Costs a
    measured step.

    Args:
        logits: rms of the logits that is left; calls below it stay as they are.

    Source: Zhai et al., Stabilizing transformer training by preventing attention entropy collapse, 2023,
    https://arxiv.org/abs/2303.06296
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.ATTENTION_SATURATION})
    intrusion: ClassVar[int] = 3
    summary: ClassVar[str] = "attention logits of rms {logits:g}"
    logits: float = 1.0

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether the layers that give queries and keys are known."""
        return any(_projections(setup.model, anatomy, site) for site in anatomy.sites)

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Scale the weights of both by the same factor."""
        factors = dict[tuple[str, ...], float]()
        for reading in measure(setup, batches[:1]).sites:
            size = reading.attention.logit_rms if reading.attention else 0.0
            paths = _projections(setup.model, anatomy, reading.site)
            if paths and size > _ROUNDED * self.logits:
                factors.setdefault(paths, math.sqrt(self.logits / size))
        edits = [edit for paths, factor in factors.items() for edit in _calm(setup, paths, factor)]
        return setup, self, edits


def _batch_norm(model: nn.Module, site: Site) -> _BatchNorm | None:
    """The batch normalization whose call this is."""
    module: Any = model.get_submodule(site.module)
    return module if isinstance(module, _BatchNorm) and module.affine else None


def _places(setup: Setup, anatomy: Anatomy) -> list[Site]:
    pairs = weighted_layers(setup, anatomy)
    return [site for site, after in pairs if after is not None and after.direct == (site.index,)]


def _calm(setup: Setup, paths: tuple[str, ...], factor: float) -> list[Edit]:
    text = f"queries and keys scaled by {factor:.3g}"
    if len(paths) == 1:
        return [surgery.change(setup.model, paths[0], scale_queries_and_keys, text, factor=factor)]
    return [surgery.change(setup.model, path, absorb, text, after=factor) for path in paths]


def _projections(model: nn.Module, anatomy: Anatomy, site: Site) -> tuple[str, ...]:
    """The paths of the layers that give queries and keys: one `nn.MultiheadAttention`, or two layers."""
    if isinstance(model.get_submodule(site.module), nn.MultiheadAttention):
        owner: Any = model.get_submodule(site.module)
        return (site.module,) if site.kind == "attention" and owner.in_proj_weight is not None else ()
    if site.function == "softmax":
        product = _product_before(anatomy, site)
        return _projections(model, anatomy, product) if product else ()
    fed = [anatomy.sites[i] for i in site.inputs if i != INPUT]
    layers = dict.fromkeys(s.module for s in fed if isinstance(model.get_submodule(s.module), nn.Linear))
    known = site.kind == "product" and not elementwise(site.function) and len(layers) == len(fed) == 2
    return tuple(layers) if known else ()


def _product_before(anatomy: Anatomy, site: Site) -> Site | None:
    """The product of two matrices whose softmax this is, past scale, mask and dropout."""
    while len(signals := [i for i in site.inputs if i != INPUT]) == 1:
        site = anatomy.sites[signals[0]]
        if site.kind not in ("scale", "sum", "dropout"):
            return site if site.kind == "product" and not elementwise(site.function) else None
    return None
