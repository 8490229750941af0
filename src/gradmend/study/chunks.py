"""Chunks: which trials of a study are trained together, bounded by memory and by time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from gradmend.setup import Batch, Setup
from gradmend.stack.member import Member
from gradmend.study.store import Trial
from gradmend.training.loop import Stepper, seeded, to_train
from gradmend.training.run import plan_for

if TYPE_CHECKING:
    from gradmend.study.design import Study
    from gradmend.zoo import Recipe

_MOST, _FEW, _CHUNKS = 32, 8, 16
"""Trials of a chunk: more are not faster. A study has many chunks, unless that leaves few trials in each."""

_STEPS = 4000
"""Of all trials of a chunk, at least: a stack of them is traced first, which takes as long as some 300."""

_WORK = 1e11
"""Multiplications of a chunk, which take one core about ten seconds: so much is lost if it is killed."""

SHARE = 0.5
"""Of the free memory; the rest is for what a step needs besides, and for others."""

_SOME = 4 << 30
"""Bytes that are taken to be free where the system does not tell."""


@dataclass(frozen=True)
class Job:
    """One trial to be done.

    Args:
        trial: of the study.
        turn: which of its arm's trials it is; the first ones are looked at more closely.
        memory: bytes that it takes, about; 0 if its setup cannot be built or take a step.
    """

    trial: Trial
    turn: int
    memory: int


@dataclass(frozen=True)
class Chunk:
    """Trials that are trained together.

    Args:
        jobs: at least one.
        steps: of the optimizer that each of them takes.
        work: multiplications of one such step, about.
    """

    jobs: tuple[Job, ...]
    steps: int
    work: float


Show: TypeAlias = Callable[[Chunk, int], None]
"""Is told how many optimizer steps more were taken of a chunk, of all its jobs together."""


@dataclass(frozen=True)
class _Sketch:
    """What is known of the trials of an arm before they run: of `kind` are those that can be stacked."""

    kind: Hashable
    memory: int = 0
    steps: int = 1
    work: float = 1.0


def plan(study: Study, trials: Sequence[Trial], room: float) -> list[Chunk]:
    """All trials of a study in chunks, the same for the same study and room, whatever is done already.

    So a trial has the same neighbours, and rounds in the same way, in a study that was killed.

    Args:
        study: to build them.
        trials: all of them, arm by arm.
        room: bytes that one chunk may take.
    """
    alike: dict[Hashable, tuple[_Sketch, list[Job]]] = {}
    for _, group in groupby(trials, key=lambda trial: id(trial.arm)):
        arm = list(group)
        sketch = _sketch(study, arm[0])
        jobs = [Job(trial, turn, sketch.memory) for turn, trial in enumerate(arm)]
        alike.setdefault(sketch.kind, (sketch, []))[1].extend(jobs)
    fair = math.ceil(len(trials) / _CHUNKS)
    return [chunk for sketch, jobs in alike.values() for chunk in _cut(sketch, jobs, room, fair)]


def without(chunks: Sequence[Chunk], done: Collection[str]) -> list[Chunk]:
    """What is left of chunks when trials of these keys are done."""
    left = (replace(c, jobs=tuple(job for job in c.jobs if job.trial.key not in done)) for c in chunks)
    return [chunk for chunk in left if chunk.jobs]


def work_of(chunk: Chunk) -> float:
    """Multiplications of all jobs of a chunk, about."""
    return chunk.work * chunk.steps * len(chunk.jobs)


def halves(chunk: Chunk) -> tuple[Chunk, Chunk]:
    """A chunk of two jobs or more as two."""
    middle = len(chunk.jobs) // 2
    return replace(chunk, jobs=chunk.jobs[:middle]), replace(chunk, jobs=chunk.jobs[middle:])


def room(workers: int = 1) -> float:
    """Bytes that a chunk may take where so many run at once on this machine."""
    return SHARE * free_memory() / workers


def free_memory() -> int:
    """Bytes that this process may still take, as far as the system tells."""
    return min(_free(), default=_SOME)


def steps_per_epoch(recipe: Recipe) -> int:
    """Optimizer steps of one time through the data."""
    return math.ceil(recipe.data.batch_count(recipe.batch_size) / recipe.setup.accumulate)


def _cut(sketch: _Sketch, jobs: Sequence[Job], room: float, fair: int) -> Iterator[Chunk]:
    """As few parts of about the same size as the limits allow."""
    wanted = min(_MOST, max(_FEW, fair, math.ceil(_STEPS / sketch.steps)))
    memory = max(1, *(job.memory for job in jobs))
    most = max(1, min(wanted, int(room / memory), int(_WORK / (sketch.work * sketch.steps))))
    parts = math.ceil(len(jobs) / most)
    edges = [round(i * len(jobs) / parts) for i in range(parts + 1)]
    return (Chunk(tuple(jobs[a:b]), sketch.steps, sketch.work) for a, b in pairwise(edges))


def _sketch(study: Study, first: Trial) -> _Sketch:
    """What an arm takes, by one step of its first trial; what fails here fails again as a trial."""
    try:
        recipe = study.build(first.arm, first.seed)
        batch = recipe.data.head(recipe.batch_size)
        steps = study.steps or recipe.epochs * steps_per_epoch(recipe)
        work = 6.0 * sum(p.numel() for p in recipe.setup.model.parameters()) * _uses(batch)
        return _Sketch(_kind(study, recipe), memory(recipe.setup, batch), steps, work)
    except Exception:
        return _Sketch(first.key)


def _kind(study: Study, recipe: Recipe) -> Hashable:
    epochs = None if study.steps else recipe.epochs
    length = {"epochs": epochs, "steps": study.steps, "batch_size": recipe.batch_size}
    return Member(0, plan_for(recipe.setup, recipe.data, **length, seed=0), 0).structure, recipe.data


def memory(setup: Setup, batch: Batch) -> int:
    """Bytes of parameters, gradients, optimizer state and saved activations, by one step of a copy.

    Examples:
        >>> from functools import partial
        >>> from torch import nn
        >>> setup = Setup(nn.Linear(10, 1, bias=False), nn.MSELoss(), partial(torch.optim.SGD, lr=0.1))
        >>> memory(setup, (torch.zeros(4, 10), torch.zeros(4, 1)))  # 10 weights, 10 gradients, 4 outputs
        96
    """
    copy = setup.copy()
    held = {_storage(tensor) for tensor in (*_tensors(batch), *copy.model.parameters())}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in held:
            saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    to_train(copy.model)
    step = Stepper(copy)
    with seeded(0, torch.device("cpu")), torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        step([batch])
    parameters = list(copy.model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    state = [x for values in step.optimizer.state.values() for x in _tensors(values.values())]
    return sum(saved.values()) + sum(x.numel() * x.element_size() for x in (*parameters, *gradients, *state))


def _uses(batch: Batch) -> float:
    """How often weights are used: once for each sample, and in sequences for each of their places."""
    x: Tensor = batch[0]
    return max(1.0, x.numel() / max(1, x.shape[-1]))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Iterable[object]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _free() -> Iterator[int]:
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        yield 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    with suppress(OSError, ValueError, StopIteration):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (group / "memory.stat").read_text().splitlines()
        files = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file"))
        yield max(0, limit - used + files)
    with suppress(OSError, ValueError, AttributeError):
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
