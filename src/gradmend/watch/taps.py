"""Taps: the size of each layer's output, and that of the gradient at it, in some of the steps.

One global forward hook looks at the output of the chosen modules, a hook on its node at its gradient. Both
write into one buffer that is made once; nothing of the signal is kept. Per layer that are two norms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from gradmend.anatomy import Anatomy, Site
from gradmend.kinds import tensors_in
from gradmend.probe import Guard

_Slots: TypeAlias = tuple[int, Tensor, Tensor]
"""Which module, and where its norm and that of its gradient go."""


class Taps:
    """Measures the outputs of some modules of a model while it takes a step.

    Of a module that is called several times the first call counts; a checkpoint's second one does not.

    Args:
        modules: by their names; their outputs are on one device.
        device: of their outputs.
        guard: wraps what the user's training calls, so that it never sees an error.

    Examples:
        >>> layer = nn.Linear(2, 1)
        >>> taps = Taps({"layer": layer}, torch.device("cpu"))
        >>> taps.open()
        >>> layer(torch.ones(3, 2)).mean().backward()
        >>> taps.close()
        >>> round(taps.read()[0, 1].item(), 4)  # the gradient is 1/3 at each of three outputs
        0.3333
    """

    statistics = ("rms", "gradient")

    def __init__(
        self, modules: Mapping[str, nn.Module], device: torch.device, guard: Guard = lambda function: function
    ) -> None:
        self.names = tuple(modules)
        self._norms = torch.full((len(modules), 2), math.nan, device=device)
        rows = ((row[0], row[1]) for row in self._norms)
        self._slots: dict[int, _Slots] = {  # by the `id`, so that no module is kept alive
            id(module): (place, *row)
            for place, (module, row) in enumerate(zip(modules.values(), rows, strict=True))
        }
        self._sizes = [math.nan] * len(modules)
        self._roots: Tensor | None = None
        self._waiting: dict[int, _Slots] = {}
        self._without_graph: dict[int, _Slots] = {}
        self._handle: RemovableHandle | None = None
        self._look = guard(self._see)
        self._take = guard(_add_gradient)

    def open(self) -> None:
        """Look at the next forward and backward pass."""
        self.close()
        self._norms.fill_(math.nan)
        self._waiting = dict(self._slots)
        self._handle = register_module_forward_hook(self._look)

    def close(self) -> None:
        """Look at nothing more."""
        self._waiting, self._without_graph = {}, {}
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def read(self, scale: float | Tensor = 1.0) -> Tensor:
        """Rms of the outputs, and of the gradients at them: [modules, 2], NaN where unknown.

        Args:
            scale: what the loss was multiplied by; gradients that are too large because of it are unknown.
        """
        if self._roots is None:
            roots = torch.tensor(self._sizes, dtype=torch.float32).sqrt_()
            self._roots = roots.to(self._norms.device, non_blocking=True)[:, None]
        found = self._norms / self._roots
        if isinstance(scale, Tensor):
            gradients = found[:, 1] / scale
            found[:, 1] = gradients.where(gradients.isfinite(), gradients.new_full((), math.nan))
        return found

    def _see(self, module: nn.Module, _given: object, output: Any) -> None:
        slots = self._waiting.pop(id(module), None)
        if slots is None:
            if self._without_graph:
                self._see_again(module, output)
            return
        signal = output if type(output) is Tensor else next(tensors_in(output), None)
        if signal is None or not signal.is_floating_point():
            return
        size = signal.numel()
        if self._sizes[slots[0]] != size:  # seldom, for to ask for a device takes longer than a norm
            if signal.device != self._norms.device:
                return
            self._sizes[slots[0]], self._roots = size, None
        _norm(signal, slots[1])
        if signal.requires_grad:
            self._follow(signal, slots[2])
        else:
            self._without_graph[id(module)] = slots

    def _see_again(self, module: nn.Module, output: Any) -> None:
        """A checkpoint computes once more, with a graph this time, what it had computed without."""
        slots = self._without_graph.pop(id(module), None)
        signal = next(tensors_in(output), None)
        if slots is not None and signal is not None and signal.requires_grad:
            self._follow(signal, slots[2])

    def _follow(self, signal: Tensor, slot: Tensor) -> None:
        """See the gradient at a signal; a hook on its node is set in half the time of one on itself."""
        node = signal.grad_fn
        if node is not None:
            node.register_prehook(partial(self._take, slot, signal.output_nr))


def _add_gradient(slot: Tensor, output: int, gradients: Sequence[Tensor | None]) -> None:
    gradient = gradients[output]
    if gradient is not None:
        _norm(gradient, slot)


def _norm(signal: Tensor, slot: Tensor) -> None:
    values = signal.detach() if signal.requires_grad else signal
    vector_norm(values if values.dtype == torch.float32 else values.float(), out=slot)


def layers(anatomy: Anatomy, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """One module per layer: that of its activation where there is one, else that of its weights.

    Where the user's code calls functions only, between modules of its own, there are none.
    """
    sites = [site for site in anatomy.sites if site.parameters and site.kind not in ("normalization", "sum")]
    ends = [_end(anatomy, site, modules) for site in sites]
    return {name: modules[name] for name in dict.fromkeys(ends) if name is not None}


def _end(anatomy: Anatomy, site: Site, modules: Mapping[str, nn.Module]) -> str | None:
    after = anatomy.activation_after(site)
    for found in (after, site):
        if found is not None and _is_whole(found, modules):
            return found.module
    return None


def _is_whole(site: Site, modules: Mapping[str, nn.Module]) -> bool:
    """Whether its module is the layer: one of torch's own, or of the user's without parts."""
    path = site.module
    return path in modules and (site.name == path or (path != "" and not modules[path]._modules))
