"""Blocks: the parameters of many networks side by side, and torch's own optimizers over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from gradmend.setup import GradientTransform
from gradmend.stack.member import Member
from gradmend.training.loop import build_schedule, fuse


class Parameters:
    """The numbers that are trained. Those of a group of the optimizer lie one after the other in memory.

    Args:
        members: of one structure.

    Attributes:
        values: of each parameter those of all networks, [networks, ...].
        slopes: their gradients.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        stacked = [torch.stack(list(networks)) for networks in zip(*_own(members), strict=True)]
        self._cuts = [len(group) for group in members[0].names]
        self._flat = [torch.cat([tensor.flatten() for tensor in group]) for group in self._grouped(stacked)]
        self._flat_slopes = [torch.zeros_like(flat) for flat in self._flat]
        several = members[0].plan.setup.accumulate > 1
        self._totals = [torch.zeros_like(flat) for flat in self._flat if several]
        self.values = list(_views(self._flat, self._grouped(stacked)))
        self.slopes = list(_views(self._flat_slopes, self._grouped(stacked)))

    def accumulate(self, part: int, parts: int) -> None:
        """After each of several batches: the slopes are those of the last one, in the end the mean of all."""
        if parts == 1:
            return
        for slopes, total in zip(self._flat_slopes, self._totals, strict=True):
            torch.add(total, slopes, out=total) if part else total.copy_(slopes)
            if part + 1 == parts:
                torch.div(total, parts, out=slopes)

    def held(self, rows: slice) -> list[list[nn.Parameter]]:
        """For an optimizer over some networks: of each group as few tensors as possible, with slopes."""
        if rows == slice(0, len(self.values[0])):
            return [[_parameter(*pair)] for pair in zip(self._flat, self._flat_slopes, strict=True)]
        pairs = zip(self.values, self.slopes, strict=True)
        return self._grouped([_parameter(value[rows], slope[rows]) for value, slope in pairs])

    def of(self, row: int) -> list[nn.Parameter]:
        """The parameters of one network, with their gradients, in the memory of the stack."""
        pairs = zip(self.values, self.slopes, strict=True)
        return [_parameter(value[row], slope[row]) for value, slope in pairs]

    def _grouped(self, tensors: Iterable[Any]) -> list[list[Any]]:
        """A list of what belongs to each parameter, as one for each group."""
        stream = iter(tensors)
        return [list(islice(stream, count)) for count in self._cuts]


class Block:
    """Networks that share all options of the optimizer, its schedule and its clipping.

    Args:
        parameters: of the whole stack.
        rows: from which to which.
        member: one of the block.
    """

    def __init__(self, parameters: Parameters, rows: slice, member: Member) -> None:
        held = parameters.held(rows)
        self._optimizer = _remade(member.optimizer, held)
        self._schedule = build_schedule(member.plan.setup, self._optimizer)
        self._clip = _clipping(member.plan.setup.gradient_transform, parameters, rows, [*chain(*held)])

    def step(self) -> None:
        """Change the parameters by the gradients that they hold."""
        self._clip()
        self._optimizer.step()
        if self._schedule is not None:
            self._schedule.step()


def blocks(parameters: Parameters, members: Sequence[Member]) -> list[Block]:
    """One for each run of members that are trained in the same manner."""
    found, start = [], 0
    for _, run in groupby(members, key=lambda member: member.manner):
        alike = list(run)
        found.append(Block(parameters, slice(start, start + len(alike)), alike[0]))
        start += len(alike)
    return found


def _own(members: Sequence[Member]) -> list[list[Tensor]]:
    return [[p.detach() for p in member.parameters] for member in members]


def _views(flats: Sequence[Tensor], groups: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """Parts of flat tensors, in the shapes of others."""
    for flat, group in zip(flats, groups, strict=True):
        parts = torch.split(flat, [tensor.numel() for tensor in group])
        yield from (part.view_as(tensor) for part, tensor in zip(parts, group, strict=True))


def _parameter(values: Tensor, slopes: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(values)
    parameter.grad = slopes
    return parameter


def _remade(optimizer: Optimizer, held: Sequence[Sequence[nn.Parameter]]) -> Optimizer:
    """The same optimizer over other parameters."""
    pairs = zip(optimizer.param_groups, held, strict=True)
    kind: Any = type(optimizer)
    remade: Optimizer = kind([{**group, "params": parameters} for group, parameters in pairs])
    fuse(remade)
    return remade


def _clipping(
    transform: GradientTransform | None, parameters: Parameters, rows: slice, held: Sequence[nn.Parameter]
) -> Callable[[], object]:
    """What a gradient transform does, to many networks at once where it is one of torch's."""
    known = transform.func if isinstance(transform, partial) and not transform.args else None
    options = transform.keywords if isinstance(transform, partial) else {}
    if transform is None:
        return lambda: None
    if known is clip_grad_norm_ and set(options) == {"max_norm"}:
        return partial(_clip_norms, [slope[rows] for slope in parameters.slopes], **options)
    if known is clip_grad_value_ and set(options) == {"clip_value"}:
        return partial(clip_grad_value_, held, **options)
    networks = [parameters.of(row) for row in range(rows.start, rows.stop)]
    return lambda: [transform(network) for network in networks]


def _clip_norms(slopes: Sequence[Tensor], max_norm: float) -> None:
    """Bound the norm of the gradient of each network, as `clip_grad_norm_` does."""
    norms = torch.stack([torch.linalg.vector_norm(slope.flatten(1), dim=1) for slope in slopes]).norm(dim=0)
    factors = (max_norm / (norms + 1e-6)).clamp_max(1.0)
    for slope in slopes:
        slope.mul_(factors.view(-1, *[1] * (slope.dim() - 1)))
