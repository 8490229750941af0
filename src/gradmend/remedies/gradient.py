"""Gradients: clipping bounds what one step can do, accumulation averages its noise, cuts are joined.

Clipping cures rare explosions and does nothing for vanishing gradients. Weights and outputs stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from gradmend import rewrite
from gradmend.anatomy import Anatomy
from gradmend.causes import Cause
from gradmend.errors import SetupError
from gradmend.harmless import undisturbed
from gradmend.remedies.base import Remedy
from gradmend.setup import Batch, GradientTransform, Setup
from gradmend.surgery import Edit
from gradmend.tracing import without_lines

_TREATS = frozenset(
    {
        Cause.EXPLODING_GRADIENT,
        Cause.EXPLODING_THROUGH_TIME,
        Cause.LEARNING_RATE_TOO_HIGH,
        Cause.DIVERGENCE,
    }
)


class _Clipping(Remedy):
    """What all ways of clipping share: what they treat, and that nothing else may change the gradient."""

    treats: ClassVar[frozenset[Cause]] = _TREATS
    intrusion: ClassVar[int] = 4

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether nothing changes the gradient yet."""
        return setup.gradient_transform is None


@dataclass(frozen=True)
class ClipNorm(_Clipping):
    """Scale the whole gradient down when its norm exceeds a bound; its direction stays.

    For rare explosions; one that comes with every step needs other weights or a lower rate. Through time as
    through depth: it is the usual cure of exploding recurrent networks. Costs one norm.

    Source: Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2013,
    https://arxiv.org/abs/1211.5063
    """

    summary: ClassVar[str] = "gradient clipping to norm {max_norm:g}"
    max_norm: float = 1.0

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Clip before each step."""
        clip = partial(clip_grad_norm_, max_norm=self.max_norm)
        return _clipped(setup, self, clip, f"torch.nn.utils.clip_grad_norm_({_ALL}, {self.max_norm!r})")


@dataclass(frozen=True)
class ClipValue(_Clipping):
    """Bound every entry of the gradient; its direction may turn.

    For single huge entries, as of rare words, which a bound of the norm would let hold back all others. Costs
    a pass over the gradient.

    Source: Mikolov, Statistical language models based on neural networks, thesis, Brno, 2012.
    """

    summary: ClassVar[str] = "gradient clipping to values within {value:g}"
    value: float = 0.5

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Clip before each step."""
        clip = partial(clip_grad_value_, clip_value=self.value)
        return _clipped(setup, self, clip, f"torch.nn.utils.clip_grad_value_({_ALL}, {self.value!r})")


@dataclass(frozen=True)
class ClipAdaptive(_Clipping):
    """Bound the gradient of each unit by a share of the norm of its weights (adaptive clipping, AGC).

    A layer with small weights may take small steps only, whatever the others do; so it needs no bound that
    fits the whole network. Costs two norms per parameter.

    Args:
        share: of a unit's gradient, at most, in the norm of its weights.

    Source: Brock, De, Smith, Simonyan, High-performance large-scale image recognition without normalization,
    2021, https://arxiv.org/abs/2102.06171
    """

    summary: ClassVar[str] = "gradient clipping to {share:g} of each unit's weights"
    share: float = 0.01

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Clip before each step."""
        clip = partial(clip_adaptively, share=self.share)
        source = f"{inspect.getsource(clip_adaptively)}\n\n"
        return _clipped(setup, self, clip, f"clip_adaptively(list({_ALL}), {self.share!r})", source)


def clip_adaptively(parameters: Sequence[Tensor], share: float, least: float = 1e-3) -> None:
    """Scale each unit's gradient down to a share of the norm of its weights, or of `least` if that is more.

    A unit is a row of a weight (its first dimension); of a bias and other vectors it is the whole.

    Examples:
        >>> weight = torch.ones(2, 4, requires_grad=True)
        >>> weight.grad = torch.tensor([[30.0, 0, 0, 0], [0, 0.01, 0, 0]])
        >>> clip_adaptively([weight], 0.1)
        >>> weight.grad.norm(dim=1)
        tensor([0.2000, 0.0100])
    """
    for parameter in parameters:
        if parameter.grad is not None:
            axes = tuple(range(1, parameter.dim())) or None
            tensors = (parameter.detach(), parameter.grad)
            size, slope = (torch.linalg.vector_norm(t, dim=axes, keepdim=True) for t in tensors)
            parameter.grad.mul_((share * size.clamp_min(least) / slope.clamp_min(1e-12)).clamp_max(1.0))


@dataclass(frozen=True)
class Accumulate(Remedy):
    """Average the gradient of several batches for each optimizer step, as if the batch were so large.

    Fewer and steadier steps for the same data. Memory stays that of one batch; batch normalization still
    looks at each batch by itself. Costs nothing but steps.

    Args:
        batches: per optimizer step.

    Source: Goyal et al., Accurate, large minibatch SGD, 2017, https://arxiv.org/abs/1706.02677
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.OSCILLATING_LOSS, Cause.UNFIT_BATCH_SIZE})
    intrusion: ClassVar[int] = 4
    summary: ClassVar[str] = "{batches} batches per optimizer step"
    batches: int = 4

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a step takes fewer batches."""
        return setup.optimizer is not None and setup.accumulate < self.batches

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Set the number."""
        code = (
            f"accumulate = {self.batches}\n"
            "# for your loop: (loss / accumulate).backward() for each of so many batches,\n"
            "# then once optimizer.step() and optimizer.zero_grad()"
        )
        return replace(setup, accumulate=self.batches), self, [Edit("", code, self.title)]


_CUTS = ("detach", "data")


@dataclass(frozen=True)
class Reconnect(Remedy):
    """Let the gradient pass where the user's forward cuts it: `detach()` and `.data` are left out.

    What the model computes stays the same, and weights too. A cut may be meant, as for a target that another
    network gives: so nothing is changed unless parameters get a gradient by it that had none. Costs the
    backward pass that was cut off.

    Source: PyTorch, Autograd mechanics, https://docs.pytorch.org/docs/stable/notes/autograd.html
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.NO_GRADIENT})
    intrusion: ClassVar[int] = 2
    summary: ClassVar[str] = "gradients no longer cut off"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a forward of the user's cuts a gradient, by its text."""
        return bool(_cutting(setup.model))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Leave out the cuts that keep parameters from learning."""
        edits = []
        for path in _cutting(setup.model):
            module, lost = setup.model.get_submodule(path), _lost(setup, batches[0])
            own = type(module)
            try:
                edit = rewrite.leave_out(setup.model, path, _CUTS, lambda: setup.loss(batches[0]))
            except SetupError:  # left to the user
                continue
            if edit is not None and _lost(setup, batches[0]) < lost:
                edits.append(edit)
            else:
                module.__class__ = own
        return setup, self, edits

    def by_hand(self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]) -> tuple[str, ...]:
        """The forwards that cut a gradient and cannot be traced, where parameters get none."""
        if not _lost(setup, batches[0]):
            return ()
        paths = _cutting(setup.model)
        obstacles = [rewrite.untraced(setup.model.get_submodule(path)) for path in paths]
        return tuple(f"{text} Take out `detach` by hand." for text in obstacles if text)


def _cutting(model: nn.Module) -> list[str]:
    """The modules whose own forward, written by the user, speaks of a cut."""
    return [path for path, module in model.named_modules() if _speaks_of_a_cut(type(module))]


def _speaks_of_a_cut(kind: Any) -> bool:
    if kind.__module__.startswith("torch."):
        return False
    forwards = getattr(kind, "forwards", None)
    try:
        text = without_lines("\n".join(forwards)) if forwards else inspect.getsource(kind.forward)
    except (OSError, TypeError):  # typed into a console
        return False
    return any(f".{cut}" in text for cut in _CUTS) or "'data'" in text


def _lost(setup: Setup, batch: Batch) -> frozenset[str]:
    """The names of parameters that want a gradient and get none."""
    with undisturbed(setup.model):
        loss = setup.loss(batch)
        wanting = {name: p for name, p in setup.model.named_parameters() if p.requires_grad}
        if not loss.requires_grad:
            return frozenset(wanting)
        slopes = torch.autograd.grad(loss, list(wanting.values()), allow_unused=True)
    return frozenset(name for name, slope in zip(wanting, slopes, strict=True) if slope is None)


_ALL = "model.parameters()"


def _clipped(
    setup: Setup, remedy: Remedy, clip: GradientTransform, call: str, source: str = ""
) -> tuple[Setup, Remedy, list[Edit]]:
    code = f"{source}def clip(*_):\n    {call}\n\noptimizer.register_step_pre_hook(clip)"
    return replace(setup, gradient_transform=clip), remedy, [Edit("", code, remedy.title)]
