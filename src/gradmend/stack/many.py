"""Many: trainings grouped by structure, stacked, and run one stack after the other."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from itertools import chain
from statistics import median
from time import perf_counter

import torch

from gradmend.data import Data, load
from gradmend.errors import SetupError
from gradmend.setup import Setup
from gradmend.stack.graph import NotStackableError
from gradmend.stack.member import Member
from gradmend.stack.stack import Record, Show, Stack
from gradmend.training.evaluation import modes_restored
from gradmend.training.feed import choose_device, home, move
from gradmend.training.loop import one_thread
from gradmend.training.run import ENDLESS, History, plan_for, tested, train

_WORTH = 800
"""Steps, of all networks of a structure, that repay tracing it, which takes as long as some 300."""

_LEAST, _MOST = 8, 32
"""Networks of a stack: fewer leave much of each call to its overhead, more leave the cache."""


def train_many(
    setups: Sequence[Setup],
    data: Data | str,
    *,
    seeds: Sequence[int],
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    show: Show | None = None,
) -> list[History]:
    """Train many setups **in place**, each as `train` does it, those of one structure in one computation.

    Networks that differ in numbers only, such as weights, rates, schedules and seeds, are stacked: each
    kernel works on all of them, on one thread of the CPU. What cannot be stacked, or would not gain, is
    trained one after the other.

    Args:
        setups: with optimizer factories; a live optimizer is trained alone.
        data: a `Data`, or what `load` takes.
        seeds: of the order of the rows and of the noise of each.
        epochs: times through the data; 10 if nothing else is said.
        steps: optimizer steps, instead of epochs.
        batch_size: rows per batch; that of each setup, or 32, if nothing is said.
        device: where to train and leave the models; auto takes CUDA, else MPS, else the CPU.
        show: is called now and then with the number of steps, of single networks, taken since.

    Returns:
        What `train` gives, in the order of the setups. Losses differ from those by rounding only;
        `step_seconds` is the share of one network.

    Raises:
        SetupError: for another number of seeds than of setups, and as `train` does.

    Examples:
        >>> from functools import partial
        >>> from gradmend.zoo import mlp
        >>> sgd = partial(torch.optim.SGD, lr=0.1)
        >>> setups = [Setup(mlp(64, 10, depth=1), torch.nn.CrossEntropyLoss(), sgd) for _ in range(3)]
        >>> histories = train_many(setups, "digits", seeds=range(3), steps=300, device="cpu")
        >>> [history.steps for history in histories]
        [300, 300, 300]
    """
    if len(seeds) != len(setups):
        raise SetupError(f"There are {len(setups)} setups, but {len(seeds)} seeds: give one for each.")
    where = choose_device(device)
    rows = (load(data) if isinstance(data, str) else data).to(where)
    for setup in setups:
        move(setup, where)
    plans = [plan_for(setup, rows, epochs, steps, batch_size, 0) for setup in setups]
    members = [Member(place, plan, seed) for place, (plan, seed) in enumerate(zip(plans, seeds, strict=True))]
    found = _stacked(members, show or (lambda _: None))
    for member in members:
        if member.place not in found:
            found[member.place] = _alone(member, device, show)
    return [found[place] for place in range(len(members))]


def _alone(member: Member, device: str, show: Show | None) -> History:
    plan = member.plan
    by_epochs = plan.steps == ENDLESS
    history = train(
        plan.setup,
        plan.data,
        epochs=plan.epochs if by_epochs else None,
        steps=None if by_epochs else plan.steps,
        batch_size=plan.batch_size,
        seed=member.seed,
        device=device,
    )
    if show:
        show(history.steps)
    return history


def _stacked(members: Sequence[Member], show: Show) -> dict[int, History]:
    """What became of those that could be stacked, by their places."""
    found: dict[int, History] = {}
    offered = torch.get_num_threads()
    with one_thread():  # several would wait for each other at every one of many short kernels
        for part in (part for group in _groups(members) for part in _cut(group)):
            found |= _together(part, show, offered)
    return found


def _groups(members: Sequence[Member]) -> list[list[Member]]:
    """Members of one structure, those of one manner side by side, where they repay tracing."""
    groups: dict[Hashable, dict[Hashable, list[Member]]] = {}
    for member in members:
        if member.stackable:
            groups.setdefault(member.structure, {}).setdefault(member.manner, []).append(member)
    alike = [list(chain.from_iterable(manners.values())) for manners in groups.values()]
    return [group for group in alike if len(group) > 1 and sum(m.plan.length for m in group) >= _WORTH]


def _cut(group: Sequence[Member]) -> list[Sequence[Member]]:
    """Parts of about equal size. The number of cores has no say, so that every machine rounds alike."""
    parts = max(math.ceil(len(group) / _MOST), min(2, len(group) // _LEAST), 1)
    size = math.ceil(len(group) / parts)
    return [group[start : start + size] for start in range(0, len(group), size)]


def _together(members: Sequence[Member], show: Show, offered: int) -> dict[int, History]:
    """Train a part as one; empty if that cannot be done. Where memory is short, half of it at a time."""
    try:
        with ExitStack() as modes:
            for member in members:
                modes.enter_context(modes_restored(member.plan.setup.model))
            return _trained(members, show, offered)
    except NotStackableError:
        return {}
    except (MemoryError, RuntimeError) as error:
        if len(members) == 1 or not lacks_memory(error):
            raise
    half = len(members) // 2
    return _together(members[:half], show, offered) | _together(members[half:], show, offered)


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that there is too little memory, on whatever device."""
    lacking = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return lacking or "can't allocate memory" in str(error)


def _trained(members: Sequence[Member], show: Show, offered: int) -> dict[int, History]:
    start = perf_counter()
    stack = Stack(members, show)
    stack.train()
    stack.write_back()
    seconds = (perf_counter() - start) / len(members)
    pairs = zip(members, stack.records, strict=True)
    return {member.place: _history(member, record, seconds, offered) for member, record in pairs}


def _history(member: Member, record: Record, seconds: float, offered: int) -> History:
    plan = member.plan
    device = home(plan.setup.model)
    known = not any(map(math.isnan, record.accuracy))
    history = History(
        loss=tuple(record.losses),
        accuracy=tuple(record.accuracy) if known else None,
        test_loss=None,
        test_accuracy=None,
        epochs=len(record.accuracy),
        steps=len(record.losses),
        seconds=seconds,
        step_seconds=median(record.step_seconds),
        diverged=record.diverged,
        device=str(device),
        threads=1,
        offered=offered,
    )
    return tested(history, plan, None, device)
