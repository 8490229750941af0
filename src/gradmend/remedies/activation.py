"""Other activations in the place of those that shrink, saturate or die."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from gradmend import surgery
from gradmend.anatomy import Anatomy, Site
from gradmend.causes import Cause
from gradmend.errors import SetupError, suggest
from gradmend.remedies.base import Remedy, is_output
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "LeakyReLU": nn.LeakyReLU,
    "PReLU": nn.PReLU,
    "ELU": nn.ELU,
    "SELU": nn.SELU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "Tanh": nn.Tanh,
}

_GATES = ("sigmoid", "hardsigmoid", "tanh", "hardtanh", "softsign")


@dataclass(frozen=True)
class SwapActivation(Remedy):
    """Replace every hidden activation module by another one of torch's.

    Only modules that stand between layers are replaced: no gates (bounded activations whose output is
    multiplied with another signal), no output activations, and no module that is one of these in another
    place. A function that the user's own `forward` calls is out of reach and stays.

    Args:
        to: ReLU, LeakyReLU, PReLU, ELU, SELU, GELU, SiLU or Tanh.

    Source: Nair, Hinton 2010, https://icml.cc/Conferences/2010/papers/432.pdf (ReLU); Maas et al. 2013 (leaky
    ReLU); He et al. 2015, https://arxiv.org/abs/1502.01852 (PReLU); Clevert et al. 2016,
    https://arxiv.org/abs/1511.07289 (ELU); Klambauer et al. 2017, https://arxiv.org/abs/1706.02515 (SELU);
    Hendrycks, Gimpel 2016, https://arxiv.org/abs/1606.08415 (GELU, SiLU).
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {
            Cause.CONTRACTING_ACTIVATION,
            Cause.VANISHING_GRADIENT,
            Cause.INFORMATION_COLLAPSE,
            Cause.SATURATED_UNITS,
            Cause.DEAD_UNITS,
        }
    )
    intrusion: ClassVar[int] = 5
    summary: ClassVar[str] = "{to} activations"
    to: str = "ReLU"

    def __post_init__(self) -> None:
        if self.to not in ACTIVATIONS:
            raise SetupError(f"There is no activation {self.to!r} here. {suggest(self.to, ACTIVATIONS)}")

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is another activation module between layers."""
        return bool(self._paths(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Put the new activation in the place of each."""
        paths = self._paths(setup, anatomy)
        edits = [surgery.replace(setup.model, path, ACTIVATIONS[self.to]()) for path in paths]
        return setup, self, [edit for edit in edits if edit]

    def _paths(self, setup: Setup, anatomy: Anatomy) -> list[str]:
        modules = dict(setup.model.named_modules())
        calls: dict[str, list[Site]] = {}
        for site in anatomy.sites:
            calls.setdefault(site.module, []).append(site)
        new = type(ACTIVATIONS[self.to]())
        inside = [p for p, sites in calls.items() if p and all(_between_layers(anatomy, s) for s in sites)]
        return [p for p in inside if type(modules[p]) is not new and _is_activation_layer(modules[p])]


def _between_layers(anatomy: Anatomy, site: Site) -> bool:
    """Whether its input comes straight from layers, and its output is neither the model's nor a gate."""
    before = [anatomy.sites[i].kind for i in site.direct if i >= 0]
    follows = any(kind in ("linear", "convolution", "normalization", "sum") for kind in before)
    return follows and not is_output(anatomy, site) and not _is_gate(anatomy, site)


def _is_gate(anatomy: Anatomy, site: Site) -> bool:
    """Whether a bounded activation multiplies another signal, or is mixed with one before the next site."""
    readers = anatomy.readers(site.index)
    mixed = [set(r.inputs) if r.kind == "product" else set(r.inputs) - set(r.direct) for r in readers]
    return site.function in _GATES and any(site.index in signals and len(signals) > 1 for signals in mixed)


def _is_activation_layer(module: nn.Module) -> bool:
    return (
        type(module).__module__ == "torch.nn.modules.activation"
        and "inplace" not in inspect.signature(type(module).forward).parameters
    )
