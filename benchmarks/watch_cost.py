"""What a watch costs in a running training (`gradmend.watch.Watch`): time and memory beside the bare loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import quantiles
from time import perf_counter

import torch

from benchmarks.memory import peak_bytes
from benchmarks.peers import PEERS, After, costs
from benchmarks.timing import Ratio, Row, host_seconds
from benchmarks.workloads import SGD, WORKLOADS, Job, Workload, deep_mlp
from gradmend.watch import Notice, Watch

MLP_50 = Workload("MLP 50 x 64, batch 64", lambda: _half(deep_mlp(50, 64)), 1.6)
MLP_20, _, GPT, RESNET, GRU = WORKLOADS

DEFAULT = ((MLP_20, 1.02), (RESNET, 1.02), (GRU, 1.02), (GPT, 1.02), (MLP_50, 1.03))
EVERY_STEP = ((MLP_20, 1.15), (MLP_50, 1.40), (RESNET, 1.12), (GRU, 1.04))
MEMORY = 1.02

BLOCK, TURNS, GROUPS = 0.1, 16, 9
"""Seconds of steps in a block, blocks in a group, groups: blocks are short, as a machine's moods change
within seconds, and groups long, as looks are dozens of steps apart, and all count."""

SETTLE = 4.0
"""Seconds of steps after which the watch knows what its looks cost."""


def run() -> Iterator[Row | str]:
    torch.set_num_threads(1)
    yield "A watched training step (SGD with momentum) over the bare step: the default, budget 2 %"
    for workload, reach in DEFAULT:
        yield from _default(workload, reach)
    peers = {**PEERS, "torch-audit autopatch, every step": torch_audit}
    yield "Every layer's activation and gradient at every step, beside the peers in the same run"
    for workload, reach in EVERY_STEP:
        yield workload.name
        yield Row("gradmend, every=1", over_bare(workload, every=1), reach)
        found = costs(workload, peers)
        yield from (Row(name, found[name]) for name in peers)


@contextmanager
def torch_audit(job: Job) -> Iterator[After]:
    """Its checks at every step (https://github.com/RMalkiv/torch-audit)."""
    from torch_audit import Severity, autopatch

    auditor = autopatch(
        job.model, optimizer=job.optimizer, every_n_steps=1, reporters=[], fail_level=Severity.FATAL
    )
    try:
        yield lambda loss: loss
    finally:
        auditor.unpatch()


def _half(made: tuple[torch.nn.Module, torch.Tensor, torch.Tensor]) -> tuple[torch.nn.Module, ...]:
    model, x, y = made
    return model, x[:64], y[:64]


def _default(workload: Workload, reach: float) -> Iterator[Row]:
    yield Row(workload.name, over_bare(workload), reach)
    yield Row(f"{workload.name}, peak memory", peak_over_bare(workload), MEMORY)


def silently(_notice: Notice) -> None:
    """The workloads are as ill as they are; here they are timed."""


def over_bare(workload: Workload, every: int | None = None, block: float = BLOCK) -> Ratio:
    """Seconds of watched steps over those of bare ones, all looks included, in turns of one job.

    Of two equal jobs one may be slower by some percent, by where its tensors happen to lie.
    """
    job = workload.job(SGD)
    watch = Watch(job.model, job.optimizer, every=every, report=silently)
    _settle(job, watch)
    steps = max(1, round(block / host_seconds(job.step)))
    ratios = [_ratio(job, watch, steps) for _ in range(GROUPS)]
    low, middle, high = quantiles(ratios, n=4)
    return Ratio(middle, low, high)


def _settle(job: Job, watch: Watch) -> None:
    with watch:
        end = perf_counter() + SETTLE
        while perf_counter() < end:
            job.step()


def _ratio(job: Job, watch: Watch, steps: int) -> float:
    """Short turns of each, so that what else the machine does hits both alike.

    Before each come as many steps to settle: the first ones after a change take longer.
    """
    ours = theirs = 0.0
    for _ in range(TURNS):
        _steps(job, steps)
        theirs += host_seconds(lambda: _steps(job, steps))
        with watch:
            _steps(job, steps)
            ours += host_seconds(lambda: _steps(job, steps))
    return ours / theirs


def _steps(job: Job, steps: int) -> None:
    for _ in range(steps):
        job.step()


def peak_over_bare(workload: Workload) -> float:
    """The worst of some watched steps over a bare one: each kind of look is among them but the full one."""
    bare, watched = workload.job(SGD), workload.job(SGD)
    bare.step(), watched.step()
    theirs = _peak(bare)
    watch = Watch(watched.model, watched.optimizer, report=silently)
    with watch:
        watched.step()  # the first one is measured in full
        return max(_peak(watched) for _ in range(5)) / theirs


def _peak(job: Job) -> int:
    job.model.zero_grad(set_to_none=True)  # the profiler does not know the size of what was there before
    return peak_bytes(job.step)
