"""Blocks: the parameters of many networks in one row each, and torch's own optimizers over blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from gradmend.setup import GradientTransform
from gradmend.stack.member import Member
from gradmend.training.loop import build_schedule, fuse


class Parameters:
    """The numbers that are trained, [networks, numbers] for each group of the optimizer.

    Args:
        members: of one structure.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        own = [member.parameters for member in members]
        self.shapes = [p.shape for p in own[0]]
        self._cuts = [len(group) for group in members[0].names]
        self.values = [self._joined(columns) for columns in zip(*map(self._split, own), strict=True)]
        self.slopes = [torch.zeros_like(values) for values in self.values]

    def views(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """Each parameter, [networks, ...], as a view of the rows."""
        shapes, found = iter(self.shapes), []
        for rows, count in zip(flat, self._cuts, strict=True):
            start = 0
            for _ in range(count):
                shape = next(shapes)
                size = shape.numel()
                found.append(rows[:, start : start + size].view(len(rows), *shape))
                start += size
        return found

    def take(self, gradients: Sequence[Tensor], part: int, parts: int) -> None:
        """Keep the gradients of one of several batches, [networks, ...] each; in the end their mean."""
        for rows, slopes in zip(self.slopes, self._split(gradients), strict=True):
            flat = [slope.reshape(len(slope), -1) for slope in slopes]
            if part == 0:
                torch.cat(flat, dim=1, out=rows)
            else:
                rows.add_(torch.cat(flat, dim=1))
            if part + 1 == parts > 1:
                rows.div_(parts)

    def _split(self, tensors: Sequence[Any]) -> list[Sequence[Any]]:
        """A list of what belongs to each parameter, as one of the groups."""
        found, start = [], 0
        for count in self._cuts:
            found.append(tensors[start : start + count])
            start += count
        return found

    @staticmethod
    def _joined(networks: Sequence[Sequence[Tensor]]) -> Tensor:
        rows = [torch.cat([p.detach().flatten() for p in parameters]) for parameters in networks]
        return torch.stack(rows)


class Block:
    """Rows of networks that share all options of the optimizer, its schedule and its clipping.

    Args:
        parameters: of the whole stack.
        rows: from which to which.
        member: one of the block.
    """

    def __init__(self, parameters: Parameters, rows: slice, member: Member) -> None:
        self._held = [_row_parameter(v[rows], s[rows]) for v, s in _pairs(parameters)]
        self.optimizer = _remade(member.optimizer, self._held)
        self.schedule = build_schedule(member.plan.setup, self.optimizer)
        self._clip = _clipping(member.plan.setup.gradient_transform, parameters, rows, self._held)

    def step(self) -> None:
        """Change the parameters by the gradients that they hold."""
        self._clip()
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()


def blocks(parameters: Parameters, members: Sequence[Member]) -> list[Block]:
    """One for each run of members that are trained in the same manner."""
    found, start = [], 0
    for _, run in groupby(members, key=lambda member: member.manner):
        alike = list(run)
        found.append(Block(parameters, slice(start, start + len(alike)), alike[0]))
        start += len(alike)
    return found


def _pairs(parameters: Parameters) -> list[tuple[Tensor, Tensor]]:
    return list(zip(parameters.values, parameters.slopes, strict=True))


def _row_parameter(values: Tensor, slopes: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(values)
    parameter.grad = slopes
    return parameter


def _remade(optimizer: Optimizer, held: Sequence[nn.Parameter]) -> Optimizer:
    """The same optimizer over other parameters, one for each of its groups."""
    pairs = zip(optimizer.param_groups, held, strict=True)
    groups = [{**group, "params": [parameter]} for group, parameter in pairs]
    kind: Any = type(optimizer)
    remade: Optimizer = kind(groups)
    fuse(remade)
    return remade


def _clipping(
    transform: GradientTransform | None, parameters: Parameters, rows: slice, held: Sequence[nn.Parameter]
) -> Callable[[], object]:
    """What a gradient transform does, to many networks at once where it is one of torch's."""
    slopes = [slope[rows] for slope in parameters.slopes]
    known = transform.func if isinstance(transform, partial) and not transform.args else None
    options = transform.keywords if isinstance(transform, partial) else {}
    if transform is None:
        return lambda: None
    if known is clip_grad_norm_ and set(options) == {"max_norm"}:
        return partial(_clip_norms, slopes, **options)
    if known is clip_grad_value_ and set(options) == {"clip_value"}:
        return partial(clip_grad_value_, held, **options)
    networks = _networks(parameters, rows)
    return lambda: [transform(network) for network in networks]


def _clip_norms(slopes: Sequence[Tensor], max_norm: float) -> None:
    """Bound the norm of each row, over all groups, as `clip_grad_norm_` does."""
    norms = torch.stack([torch.linalg.vector_norm(slope, dim=1) for slope in slopes]).norm(dim=0)
    factors = (max_norm / (norms + 1e-6)).clamp_max(1.0).unsqueeze(1)
    for slope in slopes:
        slope.mul_(factors)


def _networks(parameters: Parameters, rows: slice) -> list[list[nn.Parameter]]:
    """The parameters of each network of a block, with their gradients, in the memory of the stack."""
    pairs = list(zip(parameters.views(parameters.values), parameters.views(parameters.slopes), strict=True))
    return [
        [_row_parameter(value[row], slope[row]) for value, slope in pairs]
        for row in range(*rows.indices(len(parameters.values[0])))
    ]
