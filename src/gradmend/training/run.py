"""Training: the loop for a setup and its data, and short trials on copies."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from gradmend.console import Printable, number, plain_data
from gradmend.data import Data, load
from gradmend.errors import DataError, SetupError
from gradmend.profile import Profile
from gradmend.setup import Batch, Setup
from gradmend.terminal import Terminal
from gradmend.training.evaluation import evaluate, modes_restored, observe
from gradmend.training.feed import Feed, choose_device, feed, move
from gradmend.training.loop import Meter, Stepper, accuracy, best_threads, grouped, seeded, to_train
from gradmend.training.recall import Recall
from gradmend.zoo import Recipe, recipe

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Show: TypeAlias = Callable[[int, Tensor], None]

EPOCHS, BATCH_SIZE = 10, 32
"""Times through the data and rows per batch, if nothing is said."""

_TEST_ROWS = 1000
_LONG = 200  # steps; fewer do not repay the choice of threads
ENDLESS = sys.maxsize
"""As many steps or epochs as it takes."""


@dataclass(frozen=True)
class History(Printable):
    """What a training did.

    Args:
        loss: of every optimizer step, as the loss function gives it (usually a mean over the batch).
        accuracy: per epoch, the share of right outputs while training; None without classes.
        test_loss: after training, a mean over the test rows; None without test rows.
        test_accuracy: after training, the share of right outputs; None without test rows or classes.
        epochs: how many were begun.
        steps: optimizer steps.
        seconds: of the training, without the test.
        step_seconds: of one step with its data, the median over stretches of 50 steps.
        diverged: whether a loss was NaN or infinite; the training ended within 50 steps then.
        device: on which it ran.
        threads: how many torch used on the CPU.
        offered: how many it would have used by its own settings.
        wreck: the profile of the step in which the first number was born that is not finite, if any was.
    """

    loss: tuple[float, ...]
    accuracy: tuple[float, ...] | None
    test_loss: float | None
    test_accuracy: float | None
    epochs: int
    steps: int
    seconds: float
    step_seconds: float
    diverged: bool
    device: str
    threads: int
    offered: int
    wreck: Profile | None = None

    def figures(self, dark: bool = False) -> dict[str, Figure]:
        """The pictures that there are, by their names: the losses, and how the wreck looks if there is one.

        Args:
            dark: for a dark background.
        """
        from gradmend.pictures.curves import history

        drawn = {"loss": history(self.loss, self.accuracy or (), self.test_accuracy, dark)}
        return {**(drawn if self.loss else {}), **(self.wreck.figures(dark) if self.wreck else {})}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: numbers, strings, lists; NaN and infinity become None."""
        data: dict[str, Any] = plain_data(self)
        return data

    def __rich__(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="bold")
        table.add_row("loss", f"{number(self.loss[0])} to {number(self.loss[-1])}" + self._mark())
        if self.accuracy is not None:
            table.add_row("accuracy", f"{self.accuracy[-1]:.2%}")
        if self.test_accuracy is not None:
            table.add_row("test accuracy", f"{self.test_accuracy:.2%}")
        if self.test_loss is not None:
            table.add_row("test loss", number(self.test_loss))
        table.add_row("steps", f"{self.steps} in {_counted(self.epochs, 'epoch')}")
        each, threads = _time(self.step_seconds), _counted(self.threads, "thread")
        table.add_row("time", f"{self.seconds:.1f} s, {each} per step on {self.device}, {threads}")
        return table

    def _mark(self) -> str:
        return ", diverged" if self.diverged else ""


def _counted(count: int, of: str) -> str:
    return f"{count} {of}{'s' * (count != 1)}"


def _time(seconds: float) -> str:
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1e3 * seconds)} ms"


def train(
    setup: Setup | Recipe | str,
    data: Any = None,
    validate: Any = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> History:
    """Train a setup **in place**: its model and its live optimizer are changed, as by your own loop.

    An optimizer factory makes a fresh optimizer for each call, with torch's fused kernel where there is
    one; the same arithmetic but for rounding. A setup, data and seed give the same losses bit by bit, and
    torch's global random state stays as it was. A CPU training of more than 200 steps first times, on a
    copy, whether one thread is faster than yours; sums over several threads round differently, so fix
    `torch.set_num_threads(1)` where bits matter between runs.

    Args:
        setup: what to train, or a recipe, or the name of one: it brings data, batch size and epochs.
        data: a `Data` or what `load` takes; full arrays `(x, y)`, cut into shuffled batches; or a
            loader or list of batches, gone through once per epoch.
        validate: test rows `(x, y)`, or batches of them; by default those of the `Data`.
        epochs: times through the data; 10 if nothing else is said.
        steps: optimizer steps, instead of epochs.
        batch_size: rows per batch cut from `Data` or arrays; that of the setup, or 32, if nothing is said.
        seed: of the order of the rows and of all random numbers while training.
        device: where to train and leave the model; auto takes CUDA, else MPS, else the CPU.
        progress: show a bar on standard error.

    Raises:
        SetupError: for both `epochs` and `steps`, or a setup without loss or optimizer.
        DataError: if the data is empty, used up or cannot be loaded.
        BatchError: if model, batch and loss do not fit each other.
        TargetError: for an unknown recipe.

    Examples:
        >>> history = train("deep", steps=20, device="cpu")
        >>> history.steps, round(history.loss[-1], 1)  # ln 10: it has not learnt anything
        (20, 2.3)
    """
    plan = plan_for(setup, data, epochs, steps, batch_size, seed)
    where = choose_device(device)
    move(plan.setup, where)
    source = feed(plan.data, plan.batch_size, seed, where, plan.setup.batch_size)
    with modes_restored(plan.setup.model), seeded(seed, where):
        with _bar(plan.total(source.batches), progress) as show:
            history = _run(plan, source, where, show)
        return tested(history, plan, validate, where)


@dataclass(frozen=True)
class Plan:
    """A training as it was asked for, with what nobody said filled in."""

    setup: Setup
    data: Any
    epochs: int
    steps: int
    batch_size: int

    @property
    def length(self) -> int:
        """How many optimizer steps on the rows of a `Data` there will be, about."""
        return self.total(self.data.batch_count(self.batch_size)) or ENDLESS

    def total(self, batches: int | None) -> int | None:
        """How many optimizer steps there will be, about; None if that is not known."""
        per_epoch = ENDLESS if batches is None else math.ceil(batches / self.setup.accumulate)
        total = min(self.steps, self.epochs * per_epoch)
        return None if total >= ENDLESS else total


def plan_for(
    setup: Setup | Recipe | str,
    data: Any,
    epochs: int | None,
    steps: int | None,
    batch_size: int | None,
    seed: int,
) -> Plan:
    """What `train` is going to do with its arguments.

    Raises:
        SetupError: for both `epochs` and `steps`, or less than one.
    """
    if epochs is not None and steps is not None:
        raise SetupError(f"Give `epochs` or `steps`, not both ({epochs} and {steps}).")
    if any(count is not None and count < 1 for count in (epochs, steps)):
        raise SetupError("A training takes one epoch or step, or more.")
    if isinstance(setup, str):
        length = {"epochs": epochs, "batch_size": batch_size, "steps": steps}
        setup, data = recipe(setup, data=data, seed=seed, **length), None
    usual = (EPOCHS, BATCH_SIZE)
    if isinstance(setup, Recipe):
        usual = (setup.epochs, setup.batch_size)
        data = setup.data if data is None else data
        setup = setup.setup
    rows = load(data) if isinstance(data, str) else data
    limit = epochs or (usual[0] if steps is None else ENDLESS)
    return Plan(setup, rows, limit, steps or ENDLESS, batch_size or setup.batch_size or usual[1])


def _run(plan: Plan, source: Feed, device: torch.device, show: Show) -> History:
    observed, tally = observe(plan.setup)
    to_train(plan.setup.model)
    epochs = (grouped(source.epoch(), plan.setup.accumulate) for _ in count())
    opening = next(epochs)
    first = list(islice(opening, 1))
    offered = torch.get_num_threads()
    with _threads(plan, source, device, first):
        step, meter = Stepper(observed), Meter(tally)
        recall = Recall(plan.setup, step, meter)
        start = perf_counter()
        rates = list(_epochs(plan, chain([chain(first, opening)], epochs), step, meter, recall, show))
        seconds = perf_counter() - start
        return History(
            loss=tuple(meter.losses),
            accuracy=_known(rates),
            test_loss=None,
            test_accuracy=None,
            epochs=len(rates),
            steps=meter.steps,
            seconds=seconds,
            step_seconds=median(meter.step_seconds),
            diverged=meter.diverged,
            device=str(device),
            threads=torch.get_num_threads(),
            offered=offered,
            wreck=recall.wreck() if meter.diverged else None,
        )


def _threads(
    plan: Plan, source: Feed, device: torch.device, first: Sequence[list[Batch]]
) -> AbstractContextManager[None]:
    total = plan.total(source.batches)
    long = total is None or total > _LONG
    return best_threads(plan.setup, first[0]) if first and long and device.type == "cpu" else nullcontext()


def _epochs(
    plan: Plan,
    epochs: Iterator[Iterable[list[Batch]]],
    step: Stepper,
    meter: Meter,
    recall: Recall,
    show: Show,
) -> Iterator[float | None]:
    """Train epoch by epoch; the accuracy of each."""
    for epoch, groups in enumerate(islice(epochs, plan.epochs), start=1):
        before, counted = meter.steps, len(meter.right)
        for group in islice(groups, plan.steps - before):
            recall.keep(group)
            loss = step(group)
            meter.add(loss)
            show(epoch, loss)
            if meter.diverged:
                break
        meter.fetch()
        if meter.steps == before:
            raise DataError(
                f"Epoch {epoch} gave no batch. A generator is used up after one epoch: give a DataLoader "
                "or a list, or check the length of its dataset."
            )
        yield accuracy(meter.right[counted:])
        if meter.diverged or meter.steps >= plan.steps:
            return


def _known(rates: Sequence[float | None]) -> tuple[float, ...] | None:
    known = tuple(rate for rate in rates if rate is not None)
    return known or None


def tested(history: History, plan: Plan, validate: Any, device: torch.device) -> History:
    """The same history with what the test rows say, if there are any."""
    if validate is None and isinstance(plan.data, Data) and len(plan.data.x_test):
        validate = (plan.data.x_test, plan.data.y_test)
    if validate is None:
        return history
    batches = feed(validate, _TEST_ROWS, 0, device).epoch()
    loss, right = evaluate(plan.setup, batches)
    return replace(history, test_loss=loss, test_accuracy=right)


@contextmanager
def _bar(total: int | None, shown: bool) -> Iterator[Show]:
    """What to call after each step to see the progress, at most five times a second."""
    if not shown:
        yield lambda *_: None
        return
    columns = ("epoch {task.fields[epoch]}", BarColumn(), "loss {task.fields[loss]}", TimeRemainingColumn())
    with Progress(*columns, console=Terminal(stderr=True), auto_refresh=False) as progress:
        task, steps, due = progress.add_task("", total=total, epoch=1, loss="-"), 0, 0.0

        def show(epoch: int, loss: Tensor) -> None:
            nonlocal steps, due
            steps += 1
            if perf_counter() >= due:
                progress.update(task, completed=steps, epoch=epoch, loss=number(loss.item()), refresh=True)
                due = perf_counter() + 0.2

        yield show
        progress.update(task, completed=steps, total=steps, refresh=True)
