"""Stack: networks of one structure that are trained in one computation, step by step."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter

import torch
from torch import Tensor

from gradmend.data import Data
from gradmend.stack.blocks import Parameters, blocks
from gradmend.stack.graph import Graph, NotStackableError
from gradmend.stack.member import Member
from gradmend.stack.settle import Settled
from gradmend.training.loop import grouped, seeded, to_train

Batch = list[Tensor]
Show = Callable[[int], None]

_CLOSE = 1e-3
"""Sums in another order differ by rounding, which is some hundred times less."""

_GRAPHS: OrderedDict[Hashable, Graph] = OrderedDict()
_KEPT = 32
"""Graphs that are kept, those used last: tracing one takes as long as some 300 steps of a network."""

_STRETCH = 50
"""Steps whose losses are fetched together, as in a plain training."""


@dataclass
class Record:
    """What one network did, until it diverged.

    Args:
        losses: of every optimizer step.
        accuracy: of every epoch, the share of right outputs while training; NaN without classes.
        step_seconds: of one step, its share of the stack's, per stretch of steps.
        diverged: whether a loss was no number.
    """

    losses: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    diverged: bool = False
    _right: float = 0.0
    _rows: int = 0

    def add(self, losses: Sequence[float], right: float, rows: int, seconds: float) -> None:
        """Note a stretch of steps."""
        self.losses += losses
        self._right += right
        self._rows += rows
        self.step_seconds.append(seconds)
        self.diverged = not all(map(math.isfinite, losses))

    def end_epoch(self) -> None:
        """Note the accuracy of the steps since the last one, if there were any."""
        if self._rows:
            self.accuracy.append(self._right / self._rows)
        self._right, self._rows = 0.0, 0


class Stack:
    """Networks of one structure on the rows of one data set, each in an order of its own.

    Args:
        members: those of one manner are neighbours. Their models stay as they are until `write_back`.
        show: is called with the number of steps, of single networks, that were taken.
    """

    def __init__(self, members: Sequence[Member], show: Show) -> None:
        self._members, self._plan, self._show = members, members[0].plan, show
        self._data: Data = self._plan.data
        models = [member.plan.setup.model for member in members]
        for model in models:
            to_train(model)
        self._parameters = Parameters(members)
        self._names = [name for group in members[0].names for name in group if name]
        self._frozen = _together([dict(model.named_parameters()) for model in models], but=self._names)
        self._buffers = _together([dict(model.named_buffers()) for model in models])
        self._blocks = blocks(self._parameters, members)
        self._orders = [torch.Generator().manual_seed(member.seed) for member in members]
        self._noises = [torch.Generator(self._data.x.device).manual_seed(member.seed) for member in members]
        self._runs: dict[torch.Size, Settled] = {}
        self._pending: list[tuple[Tensor, Tensor, int]] = []
        self._since = perf_counter()
        self.records = [Record() for _ in members]

    def train(self) -> None:
        """Take all steps, or until no network is left whose losses are numbers.

        Raises:
            NotStackableError: if they cannot be computed together.
        """
        steps, plan = 0, self._plan
        for _ in range(plan.epochs):
            for group in islice(grouped(self._epoch(), plan.setup.accumulate), plan.steps - steps):
                self._step(group, first=steps == 0)
                steps += 1
                if len(self._pending) >= _STRETCH:
                    self._fetch()
            self._fetch()
            for record in self.records:
                record.end_epoch()
            if steps >= plan.steps or all(record.diverged for record in self.records):
                return

    def write_back(self) -> None:
        """Give the models what they have learnt."""
        with torch.no_grad():
            for row, member in enumerate(self._members):
                for p, view in zip(member.parameters, self._parameters.values, strict=True):
                    p.copy_(view[row])
                for name, buffer in member.plan.setup.model.named_buffers():
                    buffer.copy_(self._buffers[name][row])

    def _epoch(self) -> Iterator[Batch]:
        """Batches [networks, rows, ...]: of each network the rows that it would have got alone."""
        orders = [self._data.order(self._plan.batch_size, generator) for generator in self._orders]
        for rows in zip(*orders, strict=True):
            chosen = torch.stack(rows)
            parts = ((part, part.index_select(0, chosen.flatten())) for part in (self._data.x, self._data.y))
            yield [found.view(*chosen.shape, *part.shape[1:]) for part, found in parts]

    def _step(self, group: Sequence[Batch], first: bool) -> None:
        losses, rights, rows = [], [], 0
        for part, batch in enumerate(group):
            with torch.no_grad():
                loss, right, *buffers = self._run(batch)
            if first and part == 0:
                self._check(batch, loss[0])
            self._buffers = dict(zip(self._buffers, buffers, strict=True))
            self._parameters.accumulate(part, len(group))
            losses.append(loss)
            rights.append(right)
            rows += batch[0].shape[1]
        for block in self._blocks:
            block.step()
        self._pending.append((torch.stack(losses).mean(0), torch.stack(rights).sum(0), rows))

    def _run(self, batch: Batch) -> Sequence[Tensor]:
        """One step: losses, how many were right, and the buffers after it."""
        shape = batch[0].shape
        if shape not in self._runs:
            self._runs[shape] = self._settled(batch)
        return self._runs[shape](*self._buffers.values(), *batch)

    def _settled(self, batch: Batch) -> Settled:
        graph = self._graph(batch)
        still = [*self._parameters.values, *self._frozen.values()]
        given = [*self._buffers.values(), *batch]
        return graph.settled(still, self._parameters.slopes, given, self._noises)

    def _graph(self, batch: Batch) -> Graph:
        """That of batches of this shape, which earlier stacks of the same structure may have made."""
        key = self._members[0].structure, *(part.shape for part in batch)
        if key not in _GRAPHS:
            parameters = dict(zip(self._names, self._parameters.values, strict=True))
            _GRAPHS[key] = Graph(self._plan.setup, parameters, self._frozen, self._buffers, batch)
            if len(_GRAPHS) > _KEPT:
                _GRAPHS.popitem(last=False)
        _GRAPHS.move_to_end(key)
        return _GRAPHS[key]

    def _check(self, batch: Batch, together: Tensor) -> None:
        """The first loss must be that of a network alone, and all its parameters must have a gradient."""
        member = self._members[0]
        setup = self._plan.setup.copy()
        with seeded(member.seed, batch[0].device):
            loss = setup.loss(tuple(part[0] for part in batch))
            loss.backward()  # type: ignore[no-untyped-call]
        own = dict(setup.model.named_parameters())
        if any(own[name].grad is None for name in self._names):
            raise NotStackableError("A parameter is not reached by the gradient.")
        if not torch.allclose(loss, together, rtol=_CLOSE, atol=_CLOSE, equal_nan=True):
            raise NotStackableError(f"Together its loss is {together}, alone {loss}.")

    def _fetch(self) -> None:
        """Bring the losses of a stretch to the host; a network with one that is no number is left."""
        if not self._pending:
            return
        losses, rights, rows = zip(*self._pending, strict=True)
        table = torch.stack([torch.stack(losses).double(), torch.stack(rights).double()]).cpu().numpy()
        now = perf_counter()
        share = (now - self._since) / len(rows) / len(self.records)
        for place, record in enumerate(self.records):
            if not record.diverged:
                record.add(table[0, :, place].tolist(), table[1, :, place].sum(), sum(rows), share)
        self._show(len(rows) * len(self.records))
        self._since = now
        self._pending.clear()


def _together(models: Sequence[Mapping[str, Tensor]], but: Sequence[str] = ()) -> dict[str, Tensor]:
    return {
        name: torch.stack([model[name].detach() for model in models]) for name in models[0] if name not in but
    }
