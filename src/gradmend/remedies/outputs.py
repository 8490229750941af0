"""Repairs of what comes out: the last function, the number of units and the shape."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from gradmend import surgery
from gradmend.anatomy import Anatomy, Site
from gradmend.causes import Cause
from gradmend.contract import read_contract
from gradmend.remedies.base import Remedy, is_output
from gradmend.remedies.ending import (
    Ending,
    end_with,
    ends_out_of_reach,
    left_to_user,
    loss_for,
    reachable,
    read_ending,
)
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit

_SQUASHING = {"softmax": "cross_entropy", "sigmoid": "binary_cross_entropy_with_logits"}


@dataclass(frozen=True)
class DropSquashing(Remedy):
    """Remove the softmax or sigmoid that stands before a loss which applies its own.

    Squashed twice, probabilities are nearly equal whatever the weights, and gradients small. A function in
    the user's forward is left out by rewriting; losses written by hand are known by their slopes. Costs
    nothing; the outputs become raw scores, so apply softmax or sigmoid to read probabilities.

    Source: Goodfellow, Bengio, Courville, Deep Learning, section 6.2.2, 2016, https://www.deeplearningbook.org
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {Cause.SOFTMAX_BEFORE_LOGITS_LOSS, Cause.SIGMOID_BEFORE_LOGITS_LOSS}
    )
    intrusion: ClassVar[int] = 1
    summary: ClassVar[str] = "raw scores to the loss (no softmax or sigmoid before it)"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether the output is squashed where a loss of torch squashes too, or where the loss is unknown."""
        return any(reachable(setup, anatomy, site) for site in self._suspects(anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Leave it out."""
        edits = []
        for site in self._guilty(setup, anatomy, batches):
            setup, more = end_with(setup, anatomy, batches, site, None)
            edits += more
        return setup, self, edits

    def by_hand(self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]) -> tuple[str, ...]:
        """The squashing functions that cannot be reached."""
        if all(reachable(setup, anatomy, site) for site in self._suspects(anatomy)):
            return ()
        return left_to_user(setup, anatomy, self._guilty(setup, anatomy, batches), None)

    def _suspects(self, anatomy: Anatomy) -> list[Site]:
        if anatomy.losses:
            fed = {(index, loss.function) for loss in anatomy.losses for index in loss.direct}
            return [s for s in anatomy.sites if (s.index, _SQUASHING.get(s.function)) in fed]
        last = [s for s in anatomy.sites if s.function in _SQUASHING and is_output(anatomy, s)]
        return last[-1:]

    def _guilty(self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]) -> list[Site]:
        suspects = self._suspects(anatomy)
        if anatomy.losses or not suspects:
            return suspects
        ending = read_ending(setup, anatomy, batches)
        logits = ending is not None and ending.loss.wants == "logits" and ending.loss.family != "poisson"
        return [ending.last] if ending and logits and ending.last and ending.squashed else []


@dataclass(frozen=True)
class LastActivation(Remedy):
    """End the network with what its loss asks for, in the place of the last activation.

    A softmax, a sigmoid or a logarithm of a softmax, where the loss takes (logarithms of) probabilities;
    nothing, where the last activation keeps the output from reaching the targets, or puts out the same number
    whatever goes in. The loss stays, weights too; the outputs mean something else afterwards. Costs nothing.

    Source: Goodfellow, Bengio, Courville, Deep Learning, section 6.2.2, 2016, https://www.deeplearningbook.org
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {
            Cause.LOGITS_BEFORE_PROBABILITY_LOSS,
            Cause.SOFTMAX_OVER_ONE_UNIT,
            Cause.SOFTMAX_OVER_THE_BATCH,
            Cause.UNREACHABLE_TARGETS,
            Cause.UNFIT_LOSS,
            Cause.NON_FINITE,
            Cause.NO_GRADIENT,
        }
    )
    intrusion: ClassVar[int] = 1
    summary: ClassVar[str] = "the last activation that the loss asks for"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is an output that can be changed at all."""
        last = [site for site in anatomy.sites if is_output(anatomy, site)]
        return bool(last) and setup.step is None

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Replace the last function, or add one."""
        ending = read_ending(setup, anatomy, batches)
        if ending is None or not _needs_other(ending):
            return setup, self, []
        setup, edits = end_with(setup, anatomy, batches, ending.last, _wanted(ending))
        return setup, self, edits

    def by_hand(self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]) -> tuple[str, ...]:
        """The last function, if it cannot be reached."""
        if not self.applies_to(setup, anatomy) or not ends_out_of_reach(setup, anatomy):
            return ()
        ending = read_ending(setup, anatomy, batches)
        if ending is None or ending.last is None or not _needs_other(ending):
            return ()
        return left_to_user(setup, anatomy, [ending.last], _wanted(ending))


def _needs_other(ending: Ending) -> bool:
    """Whether the last function and the loss contradict each other."""
    output, loss = ending.output, ending.loss
    low, high = output.bounds or (-math.inf, math.inf)
    if loss.family == "flat":
        return False
    if output.kind == "softmax" and (output.units == 1 or output.sums_to_one == 0):
        return len(output.shape) > 1 or math.prod(output.shape) > 1
    if loss.wants in ("values", "logits") and output.kind == "activation" and output.low == output.high:
        return True  # no sample gets through it
    if loss.wants == "log probabilities":
        return output.logs_of_one is None and output.function != "log_softmax"
    if loss.wants == "probabilities" and loss.per_class:
        return output.units > 1 and not ending.softmax
    if loss.wants == "probabilities":
        return output.low < 0 or output.high > 1 or low < 0 or high > 1
    if loss.family in ("binary cross entropy", "hinge"):
        return low >= 0 and not ending.squashed and ending.last is not None
    return loss.wants == "values" and loss.family != "poisson" and (ending.contract.shortfall or 0.0) > 0.01


def _wanted(ending: Ending) -> nn.Module | None:
    loss, units = ending.loss, ending.output.units
    axis = loss.axis if loss.axis else -1
    if loss.wants == "log probabilities":
        return nn.LogSoftmax(dim=axis)
    if loss.wants == "probabilities":
        return nn.Softmax(dim=axis) if loss.per_class and units > 1 else nn.Sigmoid()
    one = ending.output.kind == "softmax" and units == 1
    return nn.Sigmoid() if one and loss.wants == "values" and ending.target.binary else None


_OF_TWO = ("binary cross entropy", "hinge")
"""Losses that tell two classes apart by one unit."""


@dataclass(frozen=True)
class OutputUnits(Remedy):
    """Give the last linear layer as many units as there are classes, or targets.

    Units that were there keep what they learned, new ones begin at zero. Of several units that were compared
    with one target the mean is kept. Where one unit had to tell several classes apart, by a binary
    cross-entropy, a hinge or a softmax of its own, the loss becomes cross-entropy on raw scores. Costs the
    new rows.

    Source: Bishop, Pattern Recognition and Machine Learning, section 5.2, 2006.
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {Cause.WRONG_OUTPUT_COUNT, Cause.SOFTMAX_OVER_ONE_UNIT, Cause.UNFIT_LOSS}
    )
    intrusion: ClassVar[int] = 2
    summary: ClassVar[str] = "as many output units as classes or targets"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether the last weights are those of an `nn.Linear`."""
        return _last_linear(setup, anatomy) is not None

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Replace the layer."""
        path, ending = _last_linear(setup, anatomy), read_ending(setup, anatomy, batches)
        units = _units(ending) if ending is not None else None
        if path is None or units is None or ending is None:
            return setup, self, []
        layer = setup.model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        if units == layer.out_features:
            return setup, self, []
        text = f"{path}: {layer.out_features} -> {units} units"
        surgery.replace(setup.model, path, with_units(layer, units))
        new = f'with_units(model.get_submodule("{path}"), {units})'
        code = f'{inspect.getsource(with_units)}\n\nmodel.set_submodule("{path}", {new})'
        edits = [Edit(path, code, text)]
        alone = ending.loss.family == "flat" and ending.output.shape == ending.target.shape
        if not (alone or ending.loss.family in _OF_TWO) or not ending.numbered or units < 2:
            return setup, self, edits
        output = replace(ending.output, shape=(*ending.output.shape[:1], units))
        loss_fn, loss_code = loss_for("CrossEntropyLoss", output, ending.target)
        setup, more = end_with(setup, anatomy, batches, ending.last, None)
        edits += [*more, Edit("", loss_code, "loss: CrossEntropyLoss")]
        return replace(setup, loss_fn=loss_fn), self, edits


def with_units(layer: nn.Linear, units: int) -> nn.Linear:
    """A layer with the first units of another; new ones are zero, and a single one is the mean of all."""
    new = nn.Linear(layer.in_features, units, layer.bias is not None).to(layer.weight.device)
    new = new.to(layer.weight.dtype).train(layer.training).requires_grad_(layer.weight.requires_grad)
    for old, value in zip(layer.parameters(), new.parameters(), strict=True):
        rows = old.mean(0, keepdim=True) if units == 1 else old[:units]
        value.data.zero_()
        value.data[: len(rows)] = rows.data
    return new


def _last_linear(setup: Setup, anatomy: Anatomy) -> str | None:
    sites = [site for site in anatomy.weighted() if is_output(anatomy, site)]
    if not sites or not sites[-1].module:
        return None
    alone = sum(site.module == sites[-1].module for site in anatomy.sites) == 1
    layer = setup.model.get_submodule(sites[-1].module)
    alone = alone and len(surgery.paths(setup.model, layer)) == 1
    return sites[-1].module if alone and type(layer) is nn.Linear else None


def _units(ending: Ending) -> int | None:
    """How many units the targets ask for; None if those that there are, or if there is no telling."""
    output, loss, target = ending.output, ending.loss, ending.target
    numbers, classes = ending.numbered, int(target.high) + 1
    if numbers and loss.per_class and len(output.shape) == 2 and output.shape[1] < classes:
        return classes
    if numbers and loss.family in ("flat", *_OF_TWO) and output.units == 1 and classes > 2:
        return classes
    if loss.per_class or loss.family in (None, "flat") or len(output.shape) != 2:
        return None
    wanted = math.prod(target.shape) // output.shape[0]
    return wanted if 1 in (wanted, output.units) and wanted != output.units else None


@dataclass(frozen=True)
class OutputShape(Remedy):
    """Give the output the shape of the target, where they differ by an axis of one.

    Else the loss would broadcast, and compare every output with every target. It becomes the last layer of
    the model, which computes the same numbers. Costs nothing.

    Source: NumPy, Broadcasting, https://numpy.org/doc/stable/user/basics.broadcasting.html
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.MISMATCHED_SHAPES})
    intrusion: ClassVar[int] = 1
    summary: ClassVar[str] = "output in the shape of the target"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether the model's output goes to a loss function."""
        return setup.loss_fn is not None

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Add the layer."""
        found = read_contract(setup, batches)
        if found is None or found.paired is not False or found.output is None or found.target is None:
            return setup, self, []
        output, target = found.output.shape, found.target.shape
        new: nn.Module | None = None
        if output == (*target, 1):
            new = nn.Flatten(-2)
        elif target == (*output, 1):
            new = nn.Unflatten(-1, (-1, 1))
        if new is None:
            return setup, self, []
        model, edit = surgery.wrap_output(setup.model, new)
        return replace(setup, model=model), self, [edit] if edit else []
