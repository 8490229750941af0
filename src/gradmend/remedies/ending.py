"""The end of a network: its last function, and another one in its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from gradmend import rewrite, surgery
from gradmend.anatomy import Anatomy, Site
from gradmend.contract import read_contract
from gradmend.readings import Contract, LossReading, OutputReading, TargetReading
from gradmend.remedies.base import is_output
from gradmend.setup import Batch, LossFn, Setup
from gradmend.surgery import Edit

_LAST = ("activation", "softmax")


@dataclass(frozen=True)
class Ending:
    """What the loss compares, as far as all of it is known.

    Args:
        last: the activation or softmax that the output comes from, unchanged but for its shape.
    """

    contract: Contract
    output: OutputReading
    loss: LossReading
    target: TargetReading
    last: Site | None

    @property
    def squashed(self) -> bool:
        """Whether the output is a softmax, or an activation between 0 and 1."""
        return self.softmax or self.sigmoid

    @property
    def softmax(self) -> bool:
        """Whether the output sums to one over its units."""
        named = self.output.kind == "softmax" and self.output.function == "softmax"
        return named or self.output.sums_to_one not in (None, 0)

    @property
    def numbered(self) -> bool:
        """Whether each sample has one class, given by its number."""
        target = self.target
        single = math.prod(target.shape[1:]) == 1
        return target.whole and target.low >= 0 and target.one_hot is None and single

    @property
    def sigmoid(self) -> bool:
        """Whether each unit stays between 0 and 1 by itself."""
        return self.output.kind == "activation" and self.output.bounds == (0.0, 1.0)


def read_ending(setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]) -> Ending | None:
    """How the network ends and what the loss wants; None where that is not sure."""
    found = read_contract(setup, batches)
    if found is None or found.output is None or found.loss is None or found.target is None:
        return None
    named = [s for s in anatomy.sites if s.name == found.output.site and s.kind in _LAST]
    return Ending(found, found.output, found.loss, found.target, named[0] if named else None)


def ends_out_of_reach(setup: Setup, anatomy: Anatomy) -> bool:
    """Whether an activation or softmax behind the last weights cannot be changed."""
    last = [site for site in anatomy.sites if site.kind in _LAST and is_output(anatomy, site)]
    return not all(reachable(setup, anatomy, site) for site in last)


def reachable(setup: Setup, anatomy: Anatomy, site: Site) -> bool:
    """Whether another function can take the place of this one."""
    if rewrite.calls(setup.model, site):
        return rewrite.obstacle(setup.model, anatomy, [site]) is None
    return _own_module(setup, anatomy, site)


def left_to_user(
    setup: Setup, anatomy: Anatomy, sites: Sequence[Site], new: nn.Module | None
) -> tuple[str, ...]:
    """What the user has to type where no other function, or none, can take the place of these."""
    return tuple(
        f"{site.line or site.name}: {_to_type(site, new)} by hand{_why(setup, anatomy, site)}."
        for site in sites
        if not reachable(setup, anatomy, site)
    )


def _to_type(site: Site, new: nn.Module | None) -> str:
    return f"leave out `{site.function}`" if new is None else f"type `{new}` for `{site.function}`"


def end_with(
    setup: Setup, anatomy: Anatomy, batches: Sequence[Batch], last: Site | None, new: nn.Module | None
) -> tuple[Setup, list[Edit]]:
    """Let the network end with another function, or with none, in the place of the last one."""
    if last is None and new is None:
        return setup, []
    if last is None and new is not None:
        model, edit = surgery.wrap_output(setup.model, new)
        return replace(setup, model=model), [edit] if edit else []
    if last is None or not reachable(setup, anatomy, last):
        return setup, []
    if rewrite.calls(setup.model, last):
        return setup, rewrite.put(setup.model, anatomy, [last], lambda _: new, lambda: setup.loss(batches[0]))
    edit = surgery.replace(setup.model, last.module, nn.Identity() if new is None else new)
    return setup, [edit] if edit else []


def _own_module(setup: Setup, anatomy: Anatomy, site: Site) -> bool:
    """Whether the call is that of an activation module which is called nowhere else."""
    kind = type(setup.model.get_submodule(site.module))
    alone = sum(other.module == site.module for other in anatomy.sites) == 1
    return bool(site.module) and alone and kind.__module__ == "torch.nn.modules.activation"


def _why(setup: Setup, anatomy: Anatomy, site: Site) -> str:
    if not rewrite.calls(setup.model, site):
        return f" ({site.module or 'the module'} is called in other places too)"
    return f" ({rewrite.obstacle(setup.model, anatomy, [site])})"


def loss_for(name: str, output: OutputReading, target: TargetReading) -> tuple[LossFn, str]:
    """A loss of torch's, that brings targets into the dtype and shape that it takes, and its code.

    Args:
        name: such as CrossEntropyLoss.
        output: that it will get.
        target: as the data give it.
    """
    loss: nn.Module = getattr(nn, name)()
    real = target.dtype.startswith(("float", "bfloat"))
    numbered = math.prod(target.shape) != math.prod(output.shape)
    plain = real and target.shape == output.shape
    if numbered:
        plain = target.dtype == "int64" and len(target.shape) == len(output.shape) - 1
    if plain:
        return loss, f"loss_fn = nn.{name}()"
    given = "y.long().flatten()" if numbered else "y.to(output.dtype).view_as(output)"
    return Adapted(loss, numbered), f"loss_fn = lambda output, y: nn.{name}()(output, {given})"


@dataclass(frozen=True)
class Adapted:
    """A loss that gets the targets as the numbers of classes, or in the dtype and shape of the output.

    Examples:
        >>> import torch
        >>> Adapted(nn.MSELoss(), False)(torch.ones(3, 1), torch.tensor([1, 1, 1]))
        tensor(0.)
    """

    loss: LossFn
    numbered: bool

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of output and fitted target."""
        given = target.long().flatten() if self.numbered else target.to(output.dtype).view_as(output)
        return self.loss(output, given)
