"""Clipping: bounds what one step can do. It cures rare explosions and does nothing for vanishing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from gradmend.anatomy import Anatomy
from gradmend.causes import Cause
from gradmend.remedies.base import Remedy
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit

_TREATS = frozenset({Cause.EXPLODING_GRADIENT, Cause.LEARNING_RATE_TOO_HIGH})


@dataclass(frozen=True)
class ClipNorm(Remedy):
    """Scale the whole gradient down when its norm exceeds a bound; its direction stays.

    Source: Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2013,
    https://arxiv.org/abs/1211.5063
    """

    treats: ClassVar[frozenset[Cause]] = _TREATS
    intrusion: ClassVar[int] = 4
    summary: ClassVar[str] = "gradient clipping to norm {max_norm:g}"
    max_norm: float = 1.0

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether nothing changes the gradient yet."""
        return setup.gradient_transform is None

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Clip before each step."""
        clip = partial(clip_grad_norm_, max_norm=self.max_norm)
        edit = _edit("clip_grad_norm_", self.max_norm, self.title)
        return replace(setup, gradient_transform=clip), self, [edit]


@dataclass(frozen=True)
class ClipValue(Remedy):
    """Bound every entry of the gradient; its direction may turn.

    Source: Mikolov, Statistical language models based on neural networks, 2012.
    """

    treats: ClassVar[frozenset[Cause]] = _TREATS
    intrusion: ClassVar[int] = 4
    summary: ClassVar[str] = "gradient clipping to values within {value:g}"
    value: float = 0.5

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether nothing changes the gradient yet."""
        return setup.gradient_transform is None

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Clip before each step."""
        clip = partial(clip_grad_value_, clip_value=self.value)
        edit = _edit("clip_grad_value_", self.value, self.title)
        return replace(setup, gradient_transform=clip), self, [edit]


def _edit(function: str, bound: float, text: str) -> Edit:
    code = f"# before each optimizer.step():\n# torch.nn.utils.{function}(model.parameters(), {bound!r})"
    return Edit("", code, text)
