"""Anatomy: a model as read. Its sites in the order of execution, and how its loss is computed.

A *site* is one place where a signal is measured: the call of a torch function, whether a module such as
`nn.Linear` makes the call or the user's own `forward` does (`torch.sigmoid(x)`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor

Activation: TypeAlias = Callable[[Tensor], Tensor]

INPUT = -1
"""Stands for the batch where a site's inputs are named."""


@dataclass(frozen=True)
class Site:
    """One call of a torch function that carries a signal.

    Args:
        index: position in the order of execution.
        name: the module's path, with the function's name where the module itself makes several calls,
            and `#2`, `#3` for later calls of the same place.
        kind: linear, convolution, embedding, activation, softmax, normalization, recurrent, attention; sum
            and product (of two signals), scale (by a constant), dropout, pool, concat.
        function: the torch function's name, such as `sigmoid`.
        module: path of the module whose forward made the call.
        line: `file:line` in the user's code, if known.
        inputs: the sites it reads (`INPUT` for the batch), through reshapes or other operations.
        direct: the sites whose output it reads unchanged but for its shape.
        shape: of the output.
        unit_dim: which dimension counts the units (features or channels).
        fan_in: how many values each unit sums (linear and convolution).
        activation: the elementwise function without in-place effects (activation sites).
        parameters: names of the parameters that it uses.
        settings: the numbers it was called with. convolution: kernel, stride, padding, dilation (a tuple
            each) and groups; avg_pool: kernel, stride; normalization: eps, groups; dropout: p; scale: factor,
            the constant's rms.
        batch_dim: which dimension counts the samples: 1 behind recurrent and attention layers that take the
            steps first.
    """

    index: int
    name: str
    kind: str
    function: str
    module: str
    line: str | None
    inputs: tuple[int, ...]
    direct: tuple[int, ...]
    shape: tuple[int, ...]
    unit_dim: int
    fan_in: int | None = None
    activation: Activation | None = None
    parameters: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    batch_dim: int = 0

    @property
    def weighted(self) -> bool:
        """Whether it multiplies its input by weights: its output is a pre-activation."""
        return self.kind in ("linear", "convolution")

    @property
    def label(self) -> str:
        """Its name; that of the module alone where the function stands for the whole module."""
        return self.name.removesuffix(f".{self.function}") if self.kind == "attention" else self.name

    @property
    def units(self) -> int:
        """How many features or channels it has."""
        return self.shape[self.unit_dim]


@dataclass(frozen=True)
class LossCall:
    """One call of a torch loss function: which sites feed it, and with what targets.

    Args:
        direct: the sites whose output it compares, unchanged but for its shape.
        output: shape of the network's output.
        target: shape of the target.
        target_dtype: such as `int64`.
    """

    function: str
    line: str | None
    direct: tuple[int, ...]
    output: tuple[int, ...]
    target: tuple[int, ...]
    target_dtype: str


@dataclass(frozen=True)
class Anatomy:
    """A model as read: its sites in the order of execution, and how its loss is computed."""

    sites: tuple[Site, ...]
    losses: tuple[LossCall, ...]

    def readers(self, index: int) -> list[Site]:
        """The sites that read this one."""
        return list(self._readers.get(index, ()))

    @cached_property
    def _readers(self) -> dict[int, list[Site]]:
        found: dict[int, list[Site]] = {}
        for site in self.sites:
            for index in dict.fromkeys(site.inputs):
                found.setdefault(index, []).append(site)
        return found

    def activation_after(self, site: Site) -> Site | None:
        """The nonlinearity that follows a weighted site, past normalization and the like; None without."""
        for reader in self.readers(site.index):
            if reader.kind == "activation":
                return reader
            if reader.kind in ("normalization", "scale", "dropout"):
                return self.activation_after(reader)
        return None

    def weighted(self) -> list[Site]:
        """The sites with weights, in the order of execution."""
        return [site for site in self.sites if site.weighted]
