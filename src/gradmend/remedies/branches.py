"""Branches: where residual connections are, and where there is room for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn

from gradmend.anatomy import Anatomy, Site
from gradmend.harmless import undisturbed
from gradmend.layers import Residual
from gradmend.setup import Batch, Setup


@dataclass(frozen=True)
class Branch:
    """A residual branch: what stands between a sum and that which both its terms come from.

    Args:
        sum: of stream and branch.
        layers: with weights, in the order of execution; of two ways, as beside a projection, the longer one.
        end: the site that the sum reads, if it reads one unchanged.
    """

    sum: Site
    layers: tuple[Site, ...]
    end: Site | None


def residual_branches(anatomy: Anatomy) -> list[Branch]:
    """The residual branches of a model, in the order of execution."""
    reached = [1]  # of the batch and each site, which others it comes from: one bit each
    branches = []
    for site in anatomy.sites:
        ways = [reached[i + 1] for i in site.inputs]
        reached.append(reduce(or_, ways, 1 << site.index + 1))
        if site.kind != "sum" or len(ways) != 2:
            continue
        common = ways[0] & ways[1]
        own = [_sites(anatomy, way & ~common) for way in ways]
        longer = max(own, key=lambda sites: sum(s.weighted for s in sites))
        layers = tuple(s for s in longer if s.weighted)
        end = longer[-1] if longer and longer[-1].index in site.direct else None
        branches += [Branch(site, layers, end)] if layers else []
    return branches


def _sites(anatomy: Anatomy, bits: int) -> list[Site]:
    return [site for site in anatomy.sites if bits >> site.index + 1 & 1]


@dataclass(frozen=True)
class Block:
    """An activation and the layer that reads it, with what stands between them, in one `nn.Sequential`."""

    paths: tuple[str, ...]
    activation: Site
    layer: Site

    @property
    def keeps_shape(self) -> bool:
        """Whether the layer gives the shape that the activation takes."""
        return self.activation.shape == self.layer.shape


def sequential_blocks(setup: Setup, anatomy: Anatomy) -> list[Block]:
    """Runs of an activation and the layer after it, consecutive in one `nn.Sequential`."""
    blocks = []
    for site in anatomy.sites:
        readers = anatomy.readers(site.index)
        if site.kind != "activation" or len(readers) != 1:
            continue
        layer = readers[0]
        if layer.weighted and layer.direct == (site.index,):
            run = _siblings(setup.model, site.module, layer.module)
            blocks += [Block(tuple(run), site, layer)] if run else []
    return blocks


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


def module_blocks(setup: Setup, anatomy: Anatomy, batch: Batch) -> list[str]:
    """The paths of the user's own modules of which there are several alike that keep the shape.

    Each has weights and no residual connection in it or around it, but for those of `layers.Residual`; of
    nested ones these are the outer.
    """
    ours = {path for path, module in setup.model.named_modules() if isinstance(module, Residual)}
    branches = [branch for branch in residual_branches(anatomy) if branch.sum.module not in ours]
    inner = {branch.sum.module for branch in branches} | {s.module for b in branches for s in b.layers}
    working = {s.module for s in anatomy.sites if s.weighted or s.kind in ("attention", "recurrent")}
    found = list[str]()
    for path in _shape_keepers(setup, batch):
        inside = [m for m in working if f"{m}.".startswith(f"{path}.")]
        summed = any(f"{m}.".startswith(f"{path}.") for m in inner)
        if inside and not summed and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    kinds = Counter(type(setup.model.get_submodule(path)) for path in found)
    return [path for path in found if kinds[type(setup.model.get_submodule(path))] > 1]


def _shape_keepers(setup: Setup, batch: Batch) -> list[str]:
    """The paths of the modules with children that are called once, on one tensor, and keep its shape."""
    calls = Counter[str]()
    keepers = set[str]()
    own = [
        (path, module)
        for path, module in setup.model.named_modules()
        if path and next(module.children(), None) and _is_own(module)
    ]

    def look(path: str, args: Sequence[Any], output: Any) -> None:
        calls[path] += 1
        if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            keepers.update([path] if args[0].shape == output.shape else [])

    handles = [
        module.register_forward_hook(lambda _, args, output, path=path: look(path, args, output))
        for path, module in own
    ]
    try:
        with undisturbed(setup.model), torch.no_grad():
            setup.loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    return [path for path, _ in own if path in keepers and calls[path] == 1]


def _is_own(module: nn.Module) -> bool:
    home = type(module).__module__
    return not home.startswith(("torch.", "gradmend.layers"))
