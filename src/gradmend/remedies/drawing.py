"""Drawing weights: what initializations and tailored activations have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradmend.anatomy import INPUT, Anatomy, Site
from gradmend.harmless import undisturbed
from gradmend.remedies.base import weighted_layers
from gradmend.setup import Batch, Setup
from gradmend.weights import delta_orthogonal_

Init: TypeAlias = "partial[Tensor]"
"""Fills a tensor in place; a partial function of `torch.nn.init` or `gradmend.weights`."""

RECTIFIERS = frozenset(("relu", "leaky_relu", "prelu", "rrelu", "relu6", "gelu", "silu", "mish"))


def learning_layers(setup: Setup, anatomy: Anatomy) -> list[tuple[Site, Site | None]]:
    """The layers whose weights are not frozen: frozen ones usually hold what another training learned.

    Each with the activation after it.
    """
    return [pair for pair in weighted_layers(setup, anatomy) if _learns(setup.model, pair[0].module)]


def _learns(model: nn.Module, path: str) -> bool:
    named = model.get_submodule(path).named_parameters()
    return any(p.requires_grad for name, p in named if name != "bias")


def rectified(after: Site | None) -> bool:
    """Whether a rectifier follows."""
    return after is not None and after.function in RECTIFIERS


def slope(after: Site | None) -> float:
    """The slope of a rectifier on its negative side."""
    if after is None or after.function not in ("leaky_relu", "prelu") or after.activation is None:
        return 0.0
    return -after.activation(torch.tensor(-1.0, dtype=torch.float64)).item()


def rectifier_gain(after: Site | None) -> float:
    """sqrt(2 / (1 + slope^2)) before a rectifier, else 1."""
    return math.sqrt(2 / (1 + slope(after) ** 2)) if rectified(after) else 1.0


def orthogonal(site: Site, gain: float, delta: bool = False) -> Init:
    """Orthogonal weights that keep the size of each value, in expanding layers too, which torch's shrink.

    Args:
        site: of the layer.
        gain: of the size.
        delta: makes kernels that have a centre zero around it.
    """
    if delta and centred(site):
        inputs = (site.fan_in or site.units) / math.prod(site.settings["kernel"])
        return partial(delta_orthogonal_, gain=gain * math.sqrt(max(1.0, site.units / inputs)))
    expansion = math.sqrt(max(1.0, site.units / (site.fan_in or site.units)))
    return partial(nn.init.orthogonal_, gain=gain * expansion)


def centred(site: Site) -> bool:
    """Whether a convolution has a centre, and each unit reads all channels."""
    odd = site.kind == "convolution" and all(side % 2 for side in site.settings["kernel"])
    return odd and site.settings["groups"] == 1 and "transpose" not in site.function


def written(init: Init) -> str:
    """The expression that gives it."""
    options = "".join(f", {key}={value!r}" for key, value in init.keywords.items())
    name = init.func.__name__
    name = f"nn.init.{name}" if hasattr(nn.init, name) else name
    return f"partial({name}{options})" if options else name


def activation_before(anatomy: Anatomy, site: Site) -> int:
    """The index of the activation that a layer reads, past reshapes, dropout and pools; -1 for another."""
    while len(site.direct) == 1 and site.direct[0] != INPUT:
        site = anatomy.sites[site.direct[0]]
        if site.kind == "activation":
            return site.index
        if site.kind not in ("dropout", "pool"):
            break
    return -1


def first_layers(anatomy: Anatomy, layers: Sequence[Site]) -> list[Site]:
    """Those of the layers that read the batch, and no other layer with weights."""
    deep = set[int]()
    for site in anatomy.sites:
        fed = any(i in deep or anatomy.sites[i].weighted for i in site.inputs if i != INPUT)
        deep |= {site.index} if fed else set()
    return [site for site in layers if site.index not in deep]


def input_rms(setup: Setup, batch: Batch, paths: Sequence[str]) -> dict[str, float]:
    """The root mean square of what goes into these layers while a batch runs through the model."""
    found: dict[str, Tensor] = {}

    def look(path: str, args: tuple[Any, ...]) -> None:
        found.setdefault(path, args[0].detach().double().square().mean().sqrt())

    handles = [
        setup.model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: look(path, args))
        for path in paths
    ]
    try:
        with undisturbed(setup.model), torch.no_grad():
            setup.loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {path: value.item() for path, value in found.items()}
