"""Weights drawn again in a running training: those of units that are dead, or all before much was learnt."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend import surgery
from gradmend.anatomy import Site
from gradmend.causes import Cause
from gradmend.diagnosis import Severity
from gradmend.errors import NoEffectWarning
from gradmend.kinds import tensors_in
from gradmend.probe import measure
from gradmend.profile import Profile
from gradmend.remedies.base import SEED, Change, weighted_layers
from gradmend.remedies.drawing import Init, written
from gradmend.remedies.initialization import Critical, He, Initialization, LooksLinear, Orthogonal
from gradmend.setup import Setup
from gradmend.watch.exam import judge
from gradmend.watch.gradients import LONG

INITIALIZATIONS: tuple[Initialization, ...] = (Critical(), He(), Orthogonal(), LooksLinear())
"""In this order the first one is taken that leaves nothing to find of what was found."""


def find_initialization(
    model: nn.Module, optimizer: Optimizer, call: tuple[Any, Any], causes: frozenset[Cause]
) -> Change | None:
    """The first initialization of all weights that learn after which these causes are gone, on a copy.

    Each is measured with the arguments of the model's last call, and a linear function of its output in the
    place of the loss, which is the user's. None where that does not show the causes in the weights as they
    are, or no initialization helps.

    Args:
        model: is left as it is.
        optimizer: that steps it.
        call: arguments and keywords of the model.
        causes: what was found.

    Raises:
        SetupError: if the model cannot be copied or edited.
    """
    batch = {"arguments": call[0], "keywords": call[1]}
    setup = Setup(model, step=_linear_loss, optimizer=optimizer)
    if not _errors(setup.copy(), batch) & causes:
        return None
    for remedy in INITIALIZATIONS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEffectWarning)
            change = remedy.apply(setup, batch)
        if change.edits and not _errors(change.setup, batch) & causes:
            return change
    return None


def take_over(change: Change, model: nn.Module, optimizer: Optimizer) -> None:
    """Give a model the weights that were drawn in a changed copy; the optimizer forgets them."""
    for path in {edit.where for edit in change.edits}:
        drawn = change.setup.model.get_submodule(path)
        with torch.no_grad():
            for p, new in zip(model.get_submodule(path).parameters(), drawn.parameters(), strict=True):
                p.copy_(new)
                optimizer.state.pop(p, None)


def _linear_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Over the samples, the mean of the outputs summed with alternating signs: slopes are +1/B and -1/B."""
    output = model(*batch["arguments"], **batch["keywords"])
    signal = next(x for x in tensors_in(output) if x.is_floating_point())
    rows = signal.flatten(1) if signal.dim() > 1 else signal[:, None]
    signs = 1.0 - 2.0 * (torch.arange(rows.shape[1], device=rows.device) % 2)
    return (rows * signs).sum(1).mean()


def _errors(setup: Setup, batch: Mapping[str, Any]) -> frozenset[Cause]:
    found = judge(measure(setup, batch))
    return frozenset(finding.cause for finding in found if finding.severity is Severity.ERROR)


class Silence:
    """Counts which units of some layers get no gradient, step by step, until that can be no chance.

    Args:
        layers: by their paths, what draws their weights.
        since: the step after which it is counted.
        least: units that count as an illness.
        again: whether they were drawn again before.
    """

    def __init__(self, layers: Mapping[str, Init], since: int, least: int = 1, again: bool = False) -> None:
        self.layers, self.least, self.again = layers, least, again
        self._since, self._steps = since, 0
        self._silent: dict[str, Tensor] = {}

    @property
    def count(self) -> int:
        """Units that were silent throughout."""
        return sum(int(found.sum()) for found in self._silent.values())

    @property
    def sure(self) -> bool:
        """Whether all that were looked at have been looked at long enough."""
        return self._steps >= LONG

    def look(self, model: nn.Module, step: int) -> None:
        """Look at the gradients of a step."""
        if step <= self._since:
            return
        self._steps += 1
        for path in self.layers:
            slopes = [p.grad for p in _weights(model, path) if p.grad is not None]
            none = [(slope == 0).flatten(1).all(1) if slope.dim() > 1 else slope == 0 for slope in slopes]
            for silent in none:
                self._silent[path] = self._silent.get(path, silent) & silent

    def redraw(self, model: nn.Module, optimizer: Optimizer, seed: int) -> None:
        """Draw the incoming weights of all units that were silent throughout.

        Their biases become zero, and what the optimizer remembers of them. All others stay to the last bit.

        Raises:
            SetupError: if the model cannot be edited.
        """
        silent = {path: found for path, found in self._silent.items() if found.any()}
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(SEED + seed)
            for path, rows in silent.items():
                weight = partial(_fill_rows, rows=rows, init=self.layers[path])
                code = written(self.layers[path])
                surgery.fill(model, path, weight, code, bias=partial(_clear_rows, rows=rows))
                _forget(optimizer, _weights(model, path), rows)


def dead_layers(model: nn.Module, profile: Profile, sites: Collection[str]) -> dict[str, Init]:
    """The layers whose activation is at one of the sites, and what theory draws their weights by.

    Of several layers one that is wholly dead silences those after it, and is the only one. Weights have to
    have a row for each unit.
    """
    wholly = [r.site.name for r in profile.sites if r.dead == 1 and r.site.name in sites]
    places = wholly[:1] or sites
    pairs = weighted_layers(Setup(model), profile.anatomy)
    blamed = [(s, after) for s, after in pairs if s.name in places or (after and after.name in places)]
    found = [(s, after) for s, after in blamed if _in_rows(model.get_submodule(s.module), s)]
    return {site.module: He().init(site, after) for site, after in found}


def _in_rows(layer: nn.Module, site: Site) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and weight.dim() > 1 and weight.shape[0] == site.units


def _weights(model: nn.Module, path: str) -> list[nn.Parameter]:
    found = model.get_submodule(path)._parameters
    return [p for p in (found.get("weight"), found.get("bias")) if p is not None]


def _fill_rows(value: Tensor, rows: Tensor, init: Init) -> None:
    """Draw on the CPU, so that a seed gives the same weights on every device."""
    drawn = init(torch.empty_like(value, device="cpu")).to(value.device)
    value[rows] = drawn[rows]


def _clear_rows(value: Tensor, rows: Tensor) -> None:
    value[rows] = 0


def _forget(optimizer: Optimizer, parameters: Sequence[nn.Parameter], rows: Tensor) -> None:
    """Clear what an optimizer remembers of some rows; what it remembers of a parameter as a whole stays."""
    for parameter in parameters:
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[rows] = 0
