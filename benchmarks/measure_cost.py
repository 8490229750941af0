"""What one measured step (`gradmend.measure`) costs over a plain one: time, memory, growth with depth."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial

import torch

import gradmend
from benchmarks.memory import peak_bytes
from benchmarks.timing import CLOCKS, Call, Row, compare
from benchmarks.workloads import ADAM, SGD, WORKLOADS, Job, Workload, deep_mlp
from gradmend.readings import ParameterReading, Reading

MEMORY = 1.1
ROUNDING = 1e-2
"""A signal rounded to the other side of a ReLU's zero turns a gradient on or off: on one CPU, readings in
float32 and float64 differ by up to 4e-3 in the deep networks, and by 1e-7 where nothing has a kink."""

MLP_100 = Workload("MLP 100 x 256, batch 128", partial(deep_mlp, 100, 256), 1.6)


def run() -> Iterator[Row | str]:
    torch.set_num_threads(1)
    yield "One measured step over a plain forward and backward pass"
    yield from _costs("cpu")
    if not torch.cuda.is_available():
        yield "The same on CUDA: skipped, as torch finds no CUDA device here."
        return
    torch.backends.cudnn.allow_tf32 = False
    yield "The same on CUDA"
    yield from _costs("cuda")
    for workload in WORKLOADS:
        yield workload.name
        yield from _as_on_cpu(workload)


def _costs(device: str) -> Iterator[Row | str]:
    for workload in (*WORKLOADS, MLP_100):
        yield workload.name
        yield from _time(workload, device)
        yield _memory(workload, device)
        yield from _time_with_optimizer(workload, device)
    yield from _linearity(device)


def _time(workload: Workload, device: str) -> Iterator[Row]:
    job, twin = workload.job(device=device), workload.job(device=device)
    subjects = {"control: the plain step over itself": twin.step, "measure": job.measure}
    results = compare(job.step, subjects, clock=CLOCKS[device], budget=9)
    control, measured = results.items()
    yield Row(*control)
    yield Row(*measured, workload.reach)


def _time_with_optimizer(workload: Workload, device: str) -> Iterator[Row]:
    """The measured step also computes the optimizer's next step, on copies; the plain one takes it."""
    for name, optimizer in (("SGD with momentum", SGD), ("Adam", ADAM)):
        job = workload.job(optimizer, device)
        subject = f"measure, {name} in both"
        yield Row(subject, compare(job.step, {subject: job.measure}, clock=CLOCKS[device], budget=2)[subject])


def _memory(workload: Workload, device: str) -> Row:
    job = workload.job(device=device)
    job.step(), job.measure()
    job.model.zero_grad(set_to_none=True)
    ours, theirs = peak_bytes(job.measure, device), peak_bytes(job.step, device)
    return Row(f"measure, peak memory ({_mb(ours)} over {_mb(theirs)})", ours / theirs, MEMORY)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _linearity(device: str) -> Iterator[Row | str]:
    """Ten steps of the shallow one against one of the deep one, so that pairs are of one length."""
    shallow, deep = (
        Workload(f"MLP {depth} x 64", partial(deep_mlp, depth, 64), 2.5).job(device=device)
        for depth in (100, 1000)
    )
    yield "1,000 layers over ten times 100 layers, of width 64"
    for name, short, long, reach in (
        ("the plain step", shallow.step, deep.step, None),
        ("measure", shallow.measure, deep.measure, (0.9, 1.1)),
    ):
        ten = partial(_repeat, short)
        yield Row(name, compare(ten, {name: long}, clock=CLOCKS[device], budget=6)[name], reach)


def _repeat(call: Call, times: int = 10) -> None:
    for _ in range(times):
        call()


def _as_on_cpu(workload: Workload) -> Iterator[Row]:
    host, device = (_numbers(workload.job(device=name).measure()) for name in ("cpu", "cuda"))
    apart = max(abs(a - b) / max(abs(a), abs(b)) for a, b in zip(host, device, strict=True) if a or b)
    yield Row("measure, largest difference from the CPU", apart, ROUNDING)
    yield Row("measure, synchronizations", _synchronizations(workload.job(device="cuda")), 1)


def _numbers(profile: gradmend.Profile) -> list[float]:
    """The loss, and the size of every signal, weight and gradient."""
    readings: list[Reading | ParameterReading] = [*profile.sites, *profile.parameters]
    numbers = [profile.loss, *(n for r in readings for n in (r.rms, r.gradient))]
    return [n for n in numbers if n is not None and not math.isnan(n)]


def _synchronizations(job: Job) -> int:
    """How often one measured step waits for the device."""
    job.measure()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            job.measure()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)
