"""Repairs of the loss: the right kind for the targets, the right sign, classes that count alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmend.anatomy import Anatomy
from gradmend.causes import Cause
from gradmend.readings import LossReading
from gradmend.remedies.base import Remedy
from gradmend.remedies.ending import (
    Ending,
    end_with,
    ends_out_of_reach,
    left_to_user,
    loss_for,
    reachable,
    read_ending,
)
from gradmend.remedies.factory import option_edit, with_options
from gradmend.setup import Batch, LossFn, Setup
from gradmend.surgery import Edit


@dataclass(frozen=True)
class FitLoss(Remedy):
    """The loss of the right kind for the targets, on raw outputs; the last activation is left out.

    Cross-entropy for classes (by number, one-hot or probabilities), binary cross-entropy with logits for
    zeros and ones, the logistic loss for ones and minus ones, the squared error for amounts. A loss that
    suits its targets and its output stays. Terms that a hand-written loss adds, such as penalties, are lost
    with it. Costs nothing; probabilities have to be computed from the raw outputs afterwards.

    Source: Bishop, Pattern Recognition and Machine Learning, section 4.3, 2006; Golik, Doetsch, Ney,
    Cross-entropy vs. squared error training, 2013, https://doi.org/10.21437/Interspeech.2013-436
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {
            Cause.UNFIT_LOSS,
            Cause.LOGITS_BEFORE_PROBABILITY_LOSS,
            Cause.SOFTMAX_OVER_ONE_UNIT,
            Cause.SOFTMAX_OVER_THE_BATCH,
            Cause.WRONG_OUTPUT_COUNT,
            Cause.WRONG_DIRECTION,
            Cause.MISMATCHED_SHAPES,
            Cause.NON_FINITE,
        }
    )
    intrusion: ClassVar[int] = 2
    summary: ClassVar[str] = "a loss for this kind of targets"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is a loss function of output and target."""
        return setup.loss_fn is not None

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Replace the loss, and leave out the last activation."""
        ending = read_ending(setup, anatomy, batches)
        name = _right_loss(ending) if ending is not None else None
        if ending is None or name is None or not _reachable(setup, anatomy, ending):
            return setup, self, []
        loss_fn, code = loss_for(name, ending.output, ending.target)
        setup, edits = end_with(setup, anatomy, batches, ending.last, None)
        return replace(setup, loss_fn=loss_fn), self, [*edits, Edit("", code, f"loss: {name}")]

    def by_hand(self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]) -> tuple[str, ...]:
        """The last activation, if it cannot be left out."""
        if not self.applies_to(setup, anatomy) or not ends_out_of_reach(setup, anatomy):
            return ()
        ending = read_ending(setup, anatomy, batches)
        if ending is None or ending.last is None or not _right_loss(ending):
            return ()
        return left_to_user(setup, anatomy, [ending.last], None)


def _reachable(setup: Setup, anatomy: Anatomy, ending: Ending) -> bool:
    """Whether the loss will get raw outputs: the last activation can go, or there is none."""
    return reachable(setup, anatomy, ending.last) if ending.last else not ending.squashed


def _right_loss(ending: Ending) -> str | None:
    """The name of another loss of torch's for these targets; None if the present one suits."""
    output, loss, target = ending.output, ending.loss, ending.target
    same, single = math.prod(target.shape) == math.prod(output.shape), math.prod(target.shape[1:]) == 1
    probable = ending.softmax or output.function == "log_softmax"
    numbered = target.whole and target.low >= 0 and target.high < output.units and single
    if output.units > 1 and len(output.shape) == 2 and not same and numbered:
        suits = loss.family == "cross entropy" and loss.sign > 0 and loss.axis != 0
        suits = suits and not loss.blind(target)
        suits = suits and (probable if "prob" in loss.wants else not ending.squashed)
        return None if suits else "CrossEntropyLoss"
    if not same:
        return None
    if output.units > 1 and len(output.shape) == 2 and target.one_hot == 1:
        suits = bool(loss.axis) and loss.sign > 0 and (probable or "prob" not in loss.wants)
        return None if suits and not (loss.wants == "logits" and ending.squashed) else "CrossEntropyLoss"
    if target.binary and target.distinct == 2:
        wanted = output.bounds == (0.0, 1.0) if loss.wants == "probabilities" else not ending.squashed
        suits = loss.family == "binary cross entropy" and loss.sign > 0 and loss.ignored < 0.1
        return None if suits and wanted else "BCEWithLogitsLoss"
    if target.signs:
        return None if _suits_signs(loss) else "SoftMarginLoss"
    if output.shape == target.shape and ending.contract.paired is False:
        return "MSELoss"
    return "MSELoss" if _unfit_for_amounts(ending) else None


def _suits_signs(loss: LossReading) -> bool:
    logistic = loss.family == "binary cross entropy" and loss.wants == "logits" and not loss.endless
    values = loss.wants == "values" and loss.family != "poisson" and not (loss.divides or loss.floored)
    return loss.sign > 0 and (logistic or values)


def _unfit_for_amounts(ending: Ending) -> bool:
    loss, target = ending.loss, ending.target
    if loss.divides or loss.floored or (loss.family in ("flat", "undefined") and not ending.numbered):
        return True
    if target.whole or (target.low >= 0 and target.high <= 1):
        return False
    family = loss.per_class or loss.family in ("cross entropy", "binary cross entropy", "hinge")
    return family or loss.sign < 0 or (loss.family == "poisson" and target.low < 0)


@dataclass(frozen=True)
class Relabel(Remedy):
    """Number the labels as the loss expects them: from 0 on, by a table of the values that are there.

    The data stay as they are; the loss looks each label up. Two kinds of labels become 0 and 1 for a binary
    cross-entropy; as many kinds as units, or 1 to C, become 0 to C - 1. Costs a look-up per batch.

    Source: PyTorch, CrossEntropyLoss, https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.LABELS_OUT_OF_RANGE})
    intrusion: ClassVar[int] = 1
    summary: ClassVar[str] = "labels numbered from 0"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is a loss function whose targets can be looked up."""
        return setup.loss_fn is not None and not isinstance(setup.loss_fn, Relabelled)

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Wrap the loss."""
        ending = read_ending(setup, anatomy, batches)
        targets = [batch[-1] for batch in batches if isinstance(batch, (tuple, list))]
        levels = _levels(ending, targets) if ending is not None and targets else None
        if levels is None or setup.loss_fn is None:
            return setup, self, []
        loss_fn = Relabelled(setup.loss_fn, tuple(levels))
        levels_of = f"torch.tensor({levels}, dtype=torch.float64, device=y.device)"
        found = f"(y.double()[..., None] - {levels_of}).abs().argmin(-1).to(y.dtype)"
        code = f"loss_fn = partial(lambda loss, output, y: loss(output, {found}), loss_fn)"
        return replace(setup, loss_fn=loss_fn), self, [Edit("", code, f"labels {levels} are 0, 1, ...")]


def _levels(ending: Ending, targets: Sequence[Tensor]) -> list[float] | None:
    """The labels in their order, where the loss expects 0, 1, ...; None where they are so already."""
    output, loss, target = ending.output, ending.loss, ending.target
    kinds = torch.unique(torch.cat([t.flatten() for t in targets])).tolist()
    if loss.family == "binary cross entropy" and (target.low < 0 or target.high > 1):
        signed = loss.wants == "logits" and kinds == [-1, 1] and not loss.endless
        return None if len(kinds) != 2 or signed else kinds
    by_number = loss.family == "cross entropy" and math.prod(target.shape[1:]) == 1 and output.units > 1
    if not by_number or (kinds[-1] < output.units and target.whole and target.low >= 0):
        return None
    if target.whole and target.low >= 1 and target.high == output.units:
        return [float(i + 1) for i in range(output.units)]
    return kinds if len(kinds) == output.units else None


@dataclass(frozen=True)
class Relabelled:
    """A loss that takes the place of each label among the levels for the label.

    Examples:
        >>> loss = Relabelled(nn.CrossEntropyLoss(), (1.0, 2.0))
        >>> loss(torch.tensor([[9.0, -9.0]]), torch.tensor([1])) < 1e-6
        tensor(True)
    """

    loss: LossFn
    levels: tuple[float, ...]

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of output and renumbered target."""
        return self.loss(output, self.renumbered(target))

    def renumbered(self, target: Tensor) -> Tensor:
        """For each label the place of the nearest level, in the dtype of the labels."""
        levels = torch.tensor(self.levels, dtype=torch.float64, device=target.device)
        return (target.double()[..., None] - levels).abs().argmin(-1).to(target.dtype)


@dataclass(frozen=True)
class WeighClasses(Remedy):
    """Let rare classes count as much as common ones: each by the inverse of its share.

    For cross-entropy, NLL and binary cross-entropy with logits of torch's that have no weights yet. The
    outputs are no shares of the data afterwards. Label smoothing goes: torch weighs it too, by all classes at
    once, so that the rare class would draw every output to itself. Costs nothing.

    Source: King, Zeng, Logistic regression in rare events data, 2001, https://doi.org/10.1093/oxfordjournals.pan.a004868
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.CLASS_IMBALANCE})
    intrusion: ClassVar[int] = 2
    summary: ClassVar[str] = "classes weighed by their rarity"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether the loss is one of torch's that takes weights, and has none."""
        return _slot(setup.loss_fn) is not None

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Give the loss weights."""
        slot, ending = _slot(setup.loss_fn), read_ending(setup, anatomy, batches)
        weights = _weights(ending, slot) if ending is not None and slot else None
        if slot is None or weights is None or ending is None:
            return setup, self, []
        like = next(setup.model.parameters())
        given = torch.tensor(weights, dtype=like.dtype, device=like.device)
        loss_fn = _with(setup.loss_fn, slot, given)
        options = "" if like.dtype == torch.get_default_dtype() else f", dtype={like.dtype}"
        options += "" if like.device.type == "cpu" else f', device="{like.device}"'
        code = f"weights = torch.tensor({weights}{options})\n"
        code += (
            f"loss_fn = nn.{type(loss_fn).__name__}({slot}=weights{_options(loss_fn)})"
            if isinstance(loss_fn, nn.Module)
            else f"loss_fn = partial(F.{getattr(setup.loss_fn, '__name__', '')}, {slot}=weights)"
        )
        return replace(setup, loss_fn=loss_fn), self, [Edit("", code, self.title)]


_SLOTS: dict[str, str] = {
    "CrossEntropyLoss": "weight",
    "NLLLoss": "weight",
    "BCEWithLogitsLoss": "pos_weight",
    "cross_entropy": "weight",
    "nll_loss": "weight",
    "binary_cross_entropy_with_logits": "pos_weight",
}


def _slot(loss_fn: Any) -> str | None:
    """The argument of torch's loss that takes weights, if it has none."""
    if isinstance(loss_fn, nn.Module):
        own = type(loss_fn).__module__ == "torch.nn.modules.loss"
        slot = _SLOTS.get(type(loss_fn).__name__) if own else None
        return slot if slot and getattr(loss_fn, slot, None) is None else None
    name = getattr(loss_fn, "__name__", "")
    return _SLOTS.get(name) if loss_fn is getattr(F, name or "relu", None) else None


def _with(loss_fn: Any, slot: str, weights: Tensor) -> Any:
    if not isinstance(loss_fn, nn.Module):
        return partial(loss_fn, **{slot: weights})
    own: Any = loss_fn  # the private copy
    setattr(own, slot, weights)
    if hasattr(own, "label_smoothing"):
        own.label_smoothing = 0.0
    return own


def _options(loss_fn: nn.Module) -> str:
    """The options of torch's loss that are not the usual ones, as further arguments.

    >>> _options(nn.CrossEntropyLoss(ignore_index=0)), _options(nn.NLLLoss())
    (', ignore_index=0', '')
    """
    usual = {"ignore_index": -100, "reduction": "mean"}
    own = {name: getattr(loss_fn, name, value) for name, value in usual.items()}
    return "".join(f", {name}={value!r}" for name, value in own.items() if value != usual[name])


def _weights(ending: Ending, slot: str) -> list[float] | float | None:
    """For each class the mean count over its own, or zeros for each one; None where shares are equal."""
    output, target = ending.output, ending.target
    counts = {int(value): count for value, count in target.counts}
    if slot == "pos_weight":
        known = target.binary and len(counts) == 2 and target.one_hot is None
        return counts[0] / counts[1] if known and counts[0] != counts[1] else None
    axis = ending.loss.axis
    units = output.shape[axis] if axis else output.units
    own = [counts.get(i, 0) for i in range(units)]
    if not counts or max(counts) >= units or len(set(own) - {0}) < 2:
        return None
    mean = sum(own) / sum(n > 0 for n in own)
    return [mean / n if n else 1.0 for n in own]


@dataclass(frozen=True)
class Descend(Remedy):
    """Turn the training downhill: a loss of the wrong sign is negated, `maximize` of the optimizer set off.

    Costs nothing, and keeps all weights.

    Source: PyTorch, torch.optim.SGD, https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.WRONG_DIRECTION})
    intrusion: ClassVar[int] = 1
    summary: ClassVar[str] = "downhill instead of uphill"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is an optimizer with a sign, or a loss function."""
        return setup.optimizer is not None and setup.loss_fn is not None

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Turn round whichever is the wrong way; both together are right."""
        ending = read_ending(setup, anatomy, batches)
        groups = setup.build_optimizer().param_groups
        negated = ending is not None and ending.loss.sign < 0
        climbing = any(group.get("maximize") for group in groups)
        if negated == climbing or setup.loss_fn is None:
            return setup, self, []
        if negated:
            code = "loss_fn = partial(lambda loss, output, y: -loss(output, y), loss_fn)"
            return replace(setup, loss_fn=Negated(setup.loss_fn)), self, [Edit("", code, "loss negated")]
        return with_options(setup, maximize=False), self, [option_edit("maximize", False, "maximize=False")]


@dataclass(frozen=True)
class Negated:
    """Minus a loss.

    Examples:
        >>> Negated(nn.MSELoss())(torch.ones(2), torch.zeros(2))
        tensor(-1.)
    """

    loss: LossFn

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss, negated."""
        return -self.loss(output, target)
