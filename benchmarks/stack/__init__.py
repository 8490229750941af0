"""Many networks trained as one computation, against one after the other, torch's own vmap, and JAX."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.optim import Adam

from benchmarks.timing import Call, Row, compare, host_seconds, wall_seconds
from gradmend.data import Data, load
from gradmend.setup import Setup
from gradmend.stack import train_many

NETWORKS, RATE = 64, 1e-3


@dataclass(frozen=True)
class Work:
    """Networks to train.

    Args:
        name: of the row.
        sizes: units per layer, from the input to the output.
        rows: per batch.
        steps: of the optimizer.
        reach: how many times as fast as one after the other.
    """

    name: str
    sizes: tuple[int, ...]
    rows: int
    steps: int
    reach: float


WORKS = (
    Work("64-64-64-10, batch 64", (64, 64, 64, 10), 64, 400, 6),
    Work("30 layers x 32, batch 32", (64, *(32,) * 30, 10), 32, 200, 12),
    Work("784-64-64-10, batch 64 (MNIST)", (784, 64, 64, 10), 64, 200, 3),
)


def run() -> Iterator[Row | str]:
    """On one core by CPU time; and on all by the clock, where each may use them as it can."""
    every = sorted(os.sched_getaffinity(0))
    for cores in {1: every[-1:], len(every): every}.values():
        where = "one core" if len(cores) == 1 else f"{len(cores)} cores"
        yield f"{NETWORKS} networks, Adam, on {where}: seconds of the others over seconds of ours"
        with ProcessPoolExecutor(1, get_context("spawn"), _confined, (cores,)) as alone:
            for work in WORKS:  # in a process of their own, for JAX counts the cores but once
                yield from alone.submit(_rows, work, len(cores)).result()


def _confined(cores: Sequence[int]) -> None:
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)


def _rows(work: Work, cores: int) -> list[Row]:
    data = _data(work)
    others = {
        "one after the other": partial(_one_by_one, work, data),
        "torch.func vmap": partial(_vmapped, work, data),
        **({"torch.func vmap, threads": partial(_threaded, cores, work, data)} if cores > 1 else {}),
        **_in_jax(work, data),
    }
    with ProcessPoolExecutor(cores, get_context("spawn"), _confined_to_one) as workers:
        ours = (
            partial(_stacked, work, data) if cores == 1 else partial(_shared_out, workers, cores, work, data)
        )
        clock = host_seconds if cores == 1 else wall_seconds
        found = compare(ours, others, clock=clock, budget=40)
    return [
        Row(f"{work.name}: {name}", ratio, (work.reach if name == "one after the other" else 1, math.inf))
        for name, ratio in found.items()
    ]


def _confined_to_one() -> None:
    torch.set_num_threads(1)


def _shared_out(workers: Executor, cores: int, work: Work, data: Data) -> None:
    """As a study does it: stacks in as many processes as there are cores, which are at hand already."""
    parts = [range(core, NETWORKS, cores) for core in range(cores)]
    list(workers.map(partial(_stacked, work, data), parts))


def _threaded(cores: int, work: Work, data: Data) -> None:
    torch.set_num_threads(cores)
    try:
        _vmapped(work, data)
    finally:
        torch.set_num_threads(1)


def _network(sizes: Sequence[int]) -> nn.Sequential:
    layers = [part for sizes in pairwise(sizes) for part in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _data(work: Work) -> Data:
    rows = 100 * work.rows
    if work.sizes[0] == 784 and os.environ.get("GRADMEND_DATA"):
        whole = load("mnist")
        return Data(whole.x[:rows].flatten(1), whole.y[:rows], whole.x[:0], whole.y[:0], "mnist", 10)
    torch.manual_seed(0)
    x, y = torch.randn(rows, work.sizes[0]), torch.randint(10, (rows,))
    return Data(x, y, x[:0], y[:0], "random", classes=10)


def _stacked(work: Work, data: Data, seeds: Sequence[int] = range(NETWORKS)) -> None:
    setups = [_setup(work, seed) for seed in seeds]
    train_many(setups, data, seeds=seeds, steps=work.steps, batch_size=work.rows, device="cpu")


def _setup(work: Work, seed: int) -> Setup:
    torch.manual_seed(seed)
    return Setup(_network(work.sizes), nn.CrossEntropyLoss(), partial(Adam, lr=RATE))


def _batches(data: Data, work: Work, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    return data.batches(work.rows, generator=torch.Generator().manual_seed(seed))


def _one_by_one(work: Work, data: Data) -> None:
    """The loop that people write, with torch's fused kernel."""
    for seed in range(NETWORKS):
        model = _setup(work, seed).model
        optimizer = Adam(model.parameters(), lr=RATE, fused=True)
        for _, (x, y) in zip(range(work.steps), _batches(data, work, seed), strict=False):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def _vmapped(work: Work, data: Data) -> None:
    """As torch's tutorial on ensembles has it, with a fused optimizer over the stacked parameters."""
    models = [_setup(work, seed).model for seed in range(NETWORKS)]
    base = models[0]
    parameters, _ = stack_module_state(models)
    optimizer = Adam(list(parameters.values()), lr=RATE, fused=True)
    streams = [_batches(data, work, seed) for seed in range(NETWORKS)]

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(base, parameters, (x,)), y)

    slopes = vmap(grad(loss))
    for _ in range(work.steps):
        x, y = map(torch.stack, zip(*map(next, streams), strict=True))
        with torch.no_grad():
            found = slopes({name: p.detach() for name, p in parameters.items()}, x, y)
        for name, parameter in parameters.items():
            parameter.grad = found[name]
        optimizer.step()


def _in_jax(work: Work, data: Data) -> dict[str, Call]:
    try:
        import jax
    except ImportError:
        return {"JAX": partial(_missing, "jax is not installed: pip install jax")}
    from benchmarks.stack.in_jax import one_by_one, vmapped

    x, y = jax.numpy.asarray(data.x.numpy()), jax.numpy.asarray(data.y.numpy())
    given = work.sizes, work.rows, work.steps, NETWORKS, RATE, x, y
    return {"JAX, vmap and scan": partial(vmapped, *given), "JAX, one by one": partial(one_by_one, *given)}


def _missing(text: str) -> Any:
    raise ImportError(text)
