"""Residual connections around what keeps the shape, their scale, and dense connections."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, TypeAlias

from torch import nn

from gradmend import surgery
from gradmend.anatomy import Anatomy, Site
from gradmend.causes import Cause
from gradmend.layers import Scale
from gradmend.remedies.base import Remedy, is_output
from gradmend.remedies.branches import (
    Block,
    Branch,
    module_blocks,
    residual_branches,
    sequential_blocks,
)
from gradmend.remedies.drawing import written
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit
from gradmend.weights import widen

_TREATS = frozenset(
    {
        Cause.CONTRACTING_ACTIVATION,
        Cause.WEIGHTS_TOO_SMALL,
        Cause.VANISHING_GRADIENT,
        Cause.INFORMATION_COLLAPSE,
        Cause.CHAOS,
        Cause.BATCH_NORM_EXPLOSION,
        Cause.SHATTERED_GRADIENTS,
        Cause.ATTENTION_COLLAPSE,
    }
)
_LAYER_SCALE = 0.1

Make: TypeAlias = Callable[[], nn.Module]


@dataclass(frozen=True)
class AddSkips(Remedy):
    """Residual connections `x + scale * block(x)` around blocks that keep the shape.

    A block is an activation and the layer after it, in one `nn.Sequential`; where there are none, one of
    several modules of the user's own that are alike and keep the shape. With scale 1/sqrt(blocks) the signal
    grows by a constant factor in all, at any depth; with scale 1 it doubles per block. Learned weights stay,
    the function changes. Costs one sum per block, and the memory of its input.

    Args:
        scale: of every branch; None takes 1/sqrt(number of blocks).
        learned: makes each scale a parameter; with `scale=0.0` this is ReZero or SkipInit.
        project: around blocks that change the shape too, the input through an orthogonal projection.

    Source: He, Zhang, Ren, Sun, Identity mappings in deep residual networks, 2016,
    https://arxiv.org/abs/1603.05027; Bachlechner et al., ReZero is all you need, 2020,
    https://arxiv.org/abs/2003.04887; De, Smith, Batch normalization biases residual blocks towards the
    identity function, 2020, https://arxiv.org/abs/2002.10444
    """

    treats: ClassVar[frozenset[Cause]] = _TREATS
    intrusion: ClassVar[int] = 7
    summary: ClassVar[str] = "residual connections of scale {scale:.3g}"
    scale: float | None = None
    learned: bool = False
    project: bool = False

    @property
    def title(self) -> str:
        """The summary with the values of the fields."""
        text = self.summary.format(**vars(self)) if self.scale is not None else "residual connections"
        return f"{text}, with projections" if self.project else text

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is a block."""
        blocks = sequential_blocks(setup, anatomy)
        if self.project:
            return any(_projection(anatomy, block) for block in blocks)
        return any(block.keeps_shape for block in blocks) or _has_modules(setup.model)

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Wrap each block."""
        blocks = sequential_blocks(setup, anatomy)
        wraps: list[tuple[Sequence[str], Make | None]]
        wraps = [(block.paths, self._skip(anatomy, block)) for block in blocks]
        wraps = [wrap for wrap, block in zip(wraps, blocks, strict=True) if wrap[1] or block.keeps_shape]
        wraps = wraps or [([path], None) for path in module_blocks(setup, anatomy, batches[0])]
        scale = 1 / math.sqrt(max(1, len(wraps))) if self.scale is None else self.scale
        edits: list[Edit] = []
        for paths, make in wraps:
            skip = make() if make else None
            edit = surgery.wrap_residual(setup.model, paths, scale, self.learned, skip)
            edits += [edit] if edit else []
            edits += [_orthogonal(setup.model, f"{paths[0]}.skip")] if edit and skip else []
        return setup, replace(self, scale=scale), edits

    def _skip(self, anatomy: Anatomy, block: Block) -> Make | None:
        return _projection(anatomy, block) if self.project else None


@dataclass(frozen=True)
class ScaleBranches(Remedy):
    """Scale the branches of residual connections that are there, so that the stream does not grow with depth.

    With 1/sqrt(branches) it grows by a constant factor in all. Learned weights stay, the function changes.
    Costs one product per branch.

    Args:
        scale: of every branch; None takes 1/sqrt(number of branches), with `per_unit` 0.1.
        learned: makes each scale a parameter; with `scale=0.0` this is SkipInit.
        per_unit: learned, one scale for each feature or channel: LayerScale.

    Source: Zhang, Dauphin, Ma, Fixup initialization, 2019, https://arxiv.org/abs/1901.09321; De, Smith, Batch
    normalization biases residual blocks towards the identity function, 2020,
    https://arxiv.org/abs/2002.10444 (SkipInit); Touvron et al., Going deeper with image transformers, 2021,
    https://arxiv.org/abs/2103.17239 (LayerScale)
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {Cause.RESIDUAL_GROWTH, Cause.EXPLODING_GRADIENT, Cause.WEIGHTS_TOO_LARGE, Cause.CHAOS}
    )
    intrusion: ClassVar[int] = 6
    summary: ClassVar[str] = "residual branches scaled by {scale:.3g}"
    scale: float | None = None
    learned: bool = False
    per_unit: bool = False

    @property
    def title(self) -> str:
        """The summary with the values of the fields."""
        return self.summary.format(**vars(self)) if self.scale is not None else "residual branches scaled"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a branch ends in a layer that nothing else reads."""
        return bool(_ends(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Put a factor after the last layer of each branch."""
        ends = _ends(setup, anatomy)
        usual = _LAYER_SCALE if self.per_unit else 1 / math.sqrt(max(1, len(ends)))
        scale = usual if self.scale is None else self.scale
        edits = []
        for site in ends:
            if isinstance(setup.model.get_submodule(site.module), Scale):
                continue
            ones = (1,) * (len(site.shape) - 1 - site.unit_dim)
            shape = (site.units, *ones) if self.per_unit else ()
            new = Scale(scale, self.learned or self.per_unit, shape)
            edits.append(surgery.insert_after(setup.model, site.module, new))
        return setup, replace(self, scale=scale), [edit for edit in edits if edit]


@dataclass(frozen=True)
class DenseConnections(Remedy):
    """Each block reads the outputs of all blocks before it, side by side; at first the function is the same.

    A block is an activation and the layer after it that keeps the shape, in one `nn.Sequential`. Layers get
    the further inputs with weights of zero; other initial weights are for an initialization. Costs parameters
    that grow with the square of the blocks in one group, so groups are short.

    Args:
        blocks: in one group at most.

    Source: Huang, Liu, van der Maaten, Weinberger, Densely connected convolutional networks, 2017,
    https://arxiv.org/abs/1608.06993
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.VANISHING_GRADIENT, Cause.INFORMATION_COLLAPSE})
    intrusion: ClassVar[int] = 7
    summary: ClassVar[str] = "dense connections"
    blocks: int = 6

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there are two blocks in a row."""
        return bool(self._groups(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Widen the layers and connect the blocks."""
        edits: list[Edit | None] = []
        for group in self._groups(setup, anatomy):
            width = group[0].layer.units
            for i, block in enumerate(group[1:], 2):
                text = f"reads {i} outputs"
                edits.append(surgery.change(setup.model, block.layer.module, widen, text, inputs=i * width))
            starts = [sum(len(block.paths) for block in group[:i]) for i in range(len(group))]
            where = [path for block in group for path in block.paths]
            edits.append(surgery.wrap_dense(setup.model, where, starts, group[0].layer.unit_dim))
        return setup, self, [edit for edit in edits if edit]

    def _groups(self, setup: Setup, anatomy: Anatomy) -> list[list[Block]]:
        calls = [site.module for site in anatomy.sites]
        groups: list[list[Block]] = []
        for block in sequential_blocks(setup, anatomy):
            if not _can_widen(setup.model, block, calls):
                continue
            last = groups[-1] if groups else []
            if last and len(last) < self.blocks and _follows(setup.model, last[-1], block):
                last.append(block)
            else:
                groups.append([block])
        return [group for group in groups if len(group) > 1]


def _projection(anatomy: Anatomy, block: Block) -> Make | None:
    """What makes the block's output shape of its input; None where it is the same, or nothing does."""
    given, wanted, layer = block.activation.shape, block.layer.shape, block.layer
    if block.keeps_shape or is_output(anatomy, layer) or len(given) != len(wanted):
        return None
    if layer.kind == "linear":
        fits = given[:-1] == wanted[:-1]
        return partial(nn.Linear, given[-1], wanted[-1], bias=False) if fits else None
    kinds: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    stride = layer.settings["stride"]
    sides = tuple((side - 1) // step + 1 for side, step in zip(given[2:], stride, strict=True))
    fits = len(given) in kinds and sides == wanted[2:]
    return partial(kinds[len(given)], given[1], wanted[1], 1, stride, bias=False) if fits else None


def _orthogonal(model: nn.Module, path: str) -> Edit:
    weight = model.get_submodule(path).get_parameter("weight")
    gain = math.sqrt(max(1.0, weight.shape[0] / weight.shape[1]))
    init = partial(nn.init.orthogonal_, gain=gain)
    return surgery.fill(model, path, init, written(init))


def _has_modules(model: nn.Module) -> bool:
    """Whether there may be blocks among the user's own modules."""
    kinds = [type(m) for m in model.modules() if m is not model and next(m.children(), None) is not None]
    return any(kinds.count(kind) > 1 for kind in kinds if not kind.__module__.startswith("torch."))


def _ends(setup: Setup, anatomy: Anatomy) -> list[Site]:
    """The last sites of residual branches: calls of layers that nothing but the sum reads."""
    calls = [site.module for site in anatomy.sites]
    ends = [branch.end for branch in residual_branches(anatomy) if _only_end(anatomy, branch)]
    once = [site for site in ends if site and calls.count(site.module) == 1]
    return [site for site in once if _is_layer(setup.model.get_submodule(site.module))]


def _is_layer(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _only_end(anatomy: Anatomy, branch: Branch) -> bool:
    return branch.end is not None and anatomy.readers(branch.end.index) == [branch.sum]


def _can_widen(model: nn.Module, block: Block, calls: Sequence[str]) -> bool:
    """Whether the block's layer can take more inputs: a plain layer, called once, that keeps the shape."""
    layer: Any = model.get_submodule(block.layer.module)
    plain = type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) and "weight" in layer._parameters
    once = calls.count(block.layer.module) == calls.count(block.activation.module) == 1
    return plain and once and block.keeps_shape and getattr(layer, "groups", 1) == 1


def _follows(model: nn.Module, first: Block, second: Block) -> bool:
    """Whether the second block begins where the first ends."""
    parent = first.paths[-1].rpartition(".")[0]
    names = [f"{parent}.{name}".lstrip(".") for name, _ in model.get_submodule(parent).named_children()]
    return (first.paths[-1], second.paths[0]) in pairwise(names)
