"""What the peers cost that watch a training step, and what `gradmend.measure` costs beside the same step."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Call, Ratio, Row, compare, first_line
from benchmarks.workloads import SGD, WORKLOADS, Job, Workload

After = Callable[[Tensor], object]
"""What a watched loop calls with the loss at the end of each step."""

Peer = Callable[[Job], AbstractContextManager[After]]


def run() -> Iterator[Row | str]:
    torch.set_num_threads(1)
    yield "A training step (SGD with momentum) that a peer watches, over the bare step"
    yield "(gradmend.measure is a step of its own: add 1 where every step is both trained and measured.)"
    for workload in WORKLOADS:
        yield workload.name
        yield from (Row(name, result) for name, result in costs(workload, PEERS).items())
    yield "cockpit 1.0.2 is left out: it imports pkg_resources, which setuptools has no more."


def costs(workload: Workload, peers: dict[str, Peer], budget: float = 3.0) -> dict[str, Ratio | str]:
    """What each peer costs, by name, gradmend first; the error's first line of a peer that cannot run.

    One peer after the other: what one does in its threads must not count for another.
    """
    bare, twin, ours = (workload.job(SGD) for _ in range(3))
    own: dict[str, Call] = {
        "control: the bare step over itself": twin.step,
        "gradmend.measure": ours.measure,
    }
    found = compare(bare.step, own, budget=budget)
    for name, peer in peers.items():
        found[name] = _cost(peer, bare, workload.job(SGD), budget)
    return found


def _cost(peer: Peer, bare: Job, job: Job, budget: float) -> Ratio | str:
    try:
        with TemporaryDirectory() as folder, _working_in(folder), _quiet(), peer(job) as after:
            return compare(bare.step, {"peer": lambda: after(job.step())}, budget=budget)["peer"]
    except Exception as error:  # the peers' errors are theirs to choose
        return first_line(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that full backward hooks give at every step where the input needs no gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        yield


@contextmanager
def _working_in(folder: str) -> Iterator[None]:
    """All that the peers write goes there, and nothing over the network."""
    before = os.getcwd()
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
    os.environ.update({f"WANDB_{kind}_DIR": folder for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT")})
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def hooks(job: Job) -> Iterator[After]:
    """What people write by hand: a forward and a full backward hook on each layer."""
    read: list[list[float]] = []

    def look(_layer: nn.Module, _given: object, out: Any) -> None:
        read.append(_statistics(out[0] if isinstance(out, tuple) else out))

    layers = [module for module in job.model.modules() if not list(module.children())]
    handles = [layer.register_forward_hook(look) for layer in layers]
    handles += [layer.register_full_backward_hook(look) for layer in layers]
    yield lambda _: read.clear()
    for handle in handles:
        handle.remove()


def _statistics(x: Tensor) -> list[float]:
    x = x.detach()
    parts = (x.mean(), x.std(), x.abs().max(), (x == 0).float().mean())
    return [part.item() for part in parts]


@contextmanager
def wandb_watch(job: Job) -> Iterator[After]:
    """Histograms of parameters and gradients at every step (Biewald 2020, https://wandb.ai).

    What its own process does, which takes the log, is not counted.
    """
    import wandb

    settings = wandb.Settings(silent=True, console="off", disable_git=True)
    with wandb.init(mode="offline", settings=settings) as tracked:
        tracked.watch(job.model, log="all", log_freq=1)
        yield lambda loss: tracked.log({"loss": loss.item()})
        tracked.unwatch(job.model)


@contextmanager
def tensorboard(job: Job) -> Iterator[After]:
    """Histograms of parameters and gradients at every step, as the TensorBoard guide writes them.

    Flushed, so that what its thread does counts here and not in the step after.
    """
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter("tensorboard") as writer:

        def write(loss: Tensor) -> None:
            writer.add_scalar("loss", loss.item())
            for name, parameter in job.model.named_parameters():
                writer.add_histogram(name, parameter)
                writer.add_histogram(f"{name}.grad", parameter.grad)
            writer.flush()

        yield write


@contextmanager
def torchmortem(job: Job) -> Iterator[After]:
    """All collectors, every step (https://github.com/sebseager/torchmortem)."""
    from torchmortem import Autopsy

    with Autopsy(job.model, optimizer=job.optimizer) as autopsy:
        yield lambda loss: autopsy.step(loss=loss.item())


PEERS: dict[str, Peer] = {
    "forward and full backward hooks, .item()": hooks,
    "wandb.watch, log all, every step": wandb_watch,
    "TensorBoard add_histogram, every step": tensorboard,
    "torchmortem": torchmortem,
}
