"""Repairs of what goes in and what comes out: input scale, output squashed twice, forgotten parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend import surgery
from gradmend.anatomy import INPUT, Anatomy
from gradmend.causes import Cause
from gradmend.layers import Standardize
from gradmend.remedies.base import Remedy
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit

_SQUASHING = {"softmax": "cross_entropy", "sigmoid": "binary_cross_entropy_with_logits"}
_ROUNDING = 1e-6


@dataclass(frozen=True)
class StandardizeInput(Remedy):
    """Standardize the input, as the first layer of the model: it takes the same data as before.

    Mean and deviation are those of the batches, per feature (the last dimension), or per channel of images.

    Source: LeCun, Bottou, Orr, Müller, Efficient BackProp, 1998, https://doi.org/10.1007/3-540-49430-8_2
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.UNSCALED_INPUT})
    intrusion: ClassVar[int] = 1
    summary: ClassVar[str] = "input standardized"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether the model takes the input as its first argument, and not as numbers of an embedding."""
        return setup.step is None and all(site.kind != "embedding" for site in anatomy.readers(INPUT))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Wrap the model."""
        inputs = [batch[0] for batch in batches if isinstance(batch, (tuple, list))]
        if not inputs or not all(isinstance(x, Tensor) for x in inputs):
            return setup, self, []
        channels = any(site.kind == "convolution" for site in anatomy.readers(INPUT))
        model, edit = surgery.wrap_input(setup.model, Standardize(*_moments(inputs, channels)))
        return replace(setup, model=model), self, [edit] if edit else []


@dataclass(frozen=True)
class DropSquashing(Remedy):
    """Remove the softmax or sigmoid that stands before a loss which applies its own.

    Source: Goodfellow, Bengio, Courville, Deep Learning, section 6.2.2, 2016, https://www.deeplearningbook.org
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {Cause.SOFTMAX_BEFORE_LOGITS_LOSS, Cause.SIGMOID_BEFORE_LOGITS_LOSS}
    )
    intrusion: ClassVar[int] = 1
    summary: ClassVar[str] = "raw scores to the loss (no softmax or sigmoid before it)"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a module (not a function in the user's forward) squashes the output."""
        return bool(self._paths(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Put an identity in its place."""
        edits = [surgery.replace(setup.model, p, nn.Identity()) for p in self._paths(setup, anatomy)]
        return setup, self, [edit for edit in edits if edit]

    def _paths(self, setup: Setup, anatomy: Anatomy) -> list[str]:
        fed = {(index, loss.function) for loss in anatomy.losses for index in loss.direct}
        guilty = {s for s in anatomy.sites if (s.index, _SQUASHING.get(s.function)) in fed}
        inner = {s.module for s in anatomy.sites if s not in guilty}
        modules = dict(setup.model.named_modules())
        paths = dict.fromkeys(s.module for s in anatomy.sites if s in guilty and s.module not in inner)
        return [path for path in paths if isinstance(modules[path], (nn.Softmax, nn.Softmax2d, nn.Sigmoid))]


@dataclass(frozen=True)
class AddMissingParameters(Remedy):
    """Give the optimizer the parameters that it lacks, in its first group.

    Source: PyTorch, torch.optim, https://docs.pytorch.org/docs/stable/optim.html
    """

    treats: ClassVar[frozenset[Cause]] = frozenset({Cause.NOT_IN_OPTIMIZER})
    intrusion: ClassVar[int] = 1
    summary: ClassVar[str] = "all parameters in the optimizer"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a live optimizer lacks parameters that want a gradient."""
        return isinstance(setup.optimizer, Optimizer) and bool(_missing(setup, setup.optimizer))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Append them."""
        if not isinstance(setup.optimizer, Optimizer):
            return setup, self, []
        missing = _missing(setup, setup.optimizer)
        setup.optimizer.param_groups[0]["params"] += missing.values()
        code = (
            f"names = {list(missing)!r}\n"
            "optimizer.param_groups[0]['params'] += [model.get_parameter(name) for name in names]"
        )
        return setup, self, [Edit("", code, f"{len(missing)} parameters added to the optimizer")]


def _missing(setup: Setup, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {n: p for n, p in setup.model.named_parameters() if p.requires_grad and id(p) not in held}


def _moments(inputs: Sequence[Tensor], channels: bool) -> tuple[Tensor, Tensor]:
    """Mean and deviation per feature [..., features], or per channel [batch, channels, ...]."""
    last = inputs[0].dim() - 1
    dim = 1 if last >= 3 or (channels and last >= 1) else last
    rows = torch.cat([x.detach().movedim(dim, -1).reshape(-1, x.shape[dim] if last else 1) for x in inputs])
    std, mean = torch.std_mean(rows.double(), dim=0, unbiased=False)
    std[std <= _ROUNDING * mean.abs()] = 0.0  # a constant column: only centred
    shape = (-1, *[1] * (last - dim))
    dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    return mean.view(shape).to(dtype), std.view(shape).to(dtype)
