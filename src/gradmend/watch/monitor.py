"""Watch: the monitor inside a running training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.text import Text
from torch import nn
from torch.optim import Optimizer

from gradmend.acts import Act
from gradmend.errors import SetupError
from gradmend.journal import record
from gradmend.profile import Profile
from gradmend.terminal import Terminal
from gradmend.watch import events
from gradmend.watch.notices import Notice, Notices, Report, Sink, print_notice
from gradmend.watch.pace import Every, Pace, schedule
from gradmend.watch.ranks import rank
from gradmend.watch.session import Session
from gradmend.watch.treat import Autopilot
from gradmend.watch.treat_session import TreatedSession


class Watch:
    """Watches a running training, says what goes wrong and where, and changes nothing unless told to.

    Losses are seen at every step; sizes of gradients, weights, updates and of the layers' signals in as many
    steps as the budget allows, one kind at a time. Where these look ill, and now and then anyway, a step is
    measured in full while it runs, and the rules of `diagnose` say what it is. Gradients are those that the
    optimizer gets: unscaled, accumulated and clipped; losses are as they were before scaling.

    There is no hook on the model or the optimizer, and results are the same to the last bit. An error inside
    gradmend is reported once and ends the watch, not the training. The model is not kept alive.

    Of a training on several processes (DDP, FSDP2) each has its watch, and the first one speaks for all:
    losses and sizes are those of all processes, and what comes from one of them is found with its rank.

    Args:
        model: that trains. What is called must be this very module, else only its parameters are seen; so it
            is with compiled models.
        optimizer: whose steps count; by default the first one that steps a parameter of the model.
        every: when the layers' signals are looked at: None leaves it to the budget; a number of steps;
            "log" for the powers of two; or a function `step -> bool`, from step 1.
        budget: share of the training's time that watching may take.
        journal: takes all that is read: the path of a journal, or what has `write(kind, step, values)`.
        report: is called with each notice when its finding begins and when it ends; by default they are
            printed on standard error.
        treat: acts on what is found and can be treated while the training runs: lower rates, clipping, a
            step back, weights drawn again. Each act is said, and kept in `acts` and the journal. A training
            in which nothing is found is the same to the last bit. Two copies of weights, buffers and the
            optimizer's state are kept, one taken every 50 steps, and the gradient's norm is computed at every
            step. Rates are lowered, and gradients clipped, as long as the watch is attached.

    Raises:
        SetupError: for a model that is none, or an unknown `every`.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> with Watch(model, optimizer, report=lambda notice: print(notice.finding.cause.title)) as watch:
        ...     for step in range(3):
        ...         optimizer.zero_grad()
        ...         x = torch.randn(64, 8) if step < 2 else torch.full((64, 8), torch.nan)
        ...         model(x).square().mean().backward()
        ...         optimizer.step()
        non finite
        >>> watch.findings[0].finding.sentence.partition(". ")[2]
        'The batch holds values that are not finite.'
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        every: Every = None,
        budget: float = 0.02,
        journal: Sink | str | Path | None = None,
        report: Report | None = None,
        treat: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise SetupError(f"`model` must be a torch.nn.Module, not {type(model).__name__}.")
        if not budget > 0:
            raise SetupError(f"`budget` is a share of the training's time, above 0, not {budget}.")
        pace = Pace(budget, None if every is None else schedule(every))
        self._sink = None if journal is None else _Careful(journal, type(model).__name__, self._say)
        self._report = report or print_notice
        self._notices = Notices(self._hear, self._sink)
        parts = (model, optimizer, pace, self._notices, self._sink, self._fail)
        self._pilot: Autopilot | None = None
        if treat:
            self._session: Session = (treated := TreatedSession(*parts, tell=self._tell))
            self._pilot = treated.pilot
        else:
            self._session = Session(*parts)

    def attach(self) -> Watch:
        """Begin, or go on after `detach`; also in the midst of a training, and from within any hook."""
        if self._session.on:
            return self
        if self._sink is not None and rank() == 0:
            self._sink.open()
        self._session.start()
        if self._session.compiled and not self._session.step and rank() == 0:
            self._say(
                "The model, or a part of it, is compiled, so that hooks would not be called: losses, "
                "gradients and weights are watched, and no signals."
            )
        return self

    def detach(self, failed: bool = False) -> None:
        """End, and leave nothing behind.

        Args:
            failed: the training has raised an error: what was not finite in the last call is reported.
        """
        if failed:
            self._session.look_back()
        self._session.finish()
        events.settle()
        if self._sink is not None:
            self._sink.close()

    def __enter__(self) -> Watch:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach(isinstance(error, Exception))

    def leave_modules(self) -> None:
        """Look at no signals from now on: hooks on modules change what `torch.compile` makes of any model."""
        self._session.leave_modules()

    @property
    def findings(self) -> tuple[Notice, ...]:
        """All findings in the order in which they began, also those that ended."""
        return self._notices.all

    @property
    def acts(self) -> tuple[Act, ...]:
        """What was done about the findings, with `treat`."""
        return () if self._pilot is None else tuple(self._pilot.acts)

    @property
    def step(self) -> int:
        """How many steps of the optimizer were seen."""
        return self._session.step

    @property
    def loss(self) -> float | None:
        """Of the last step whose loss is known."""
        return self._session.stream.losses.last

    @property
    def profile(self) -> Profile | None:
        """Of the last step that was measured in full."""
        return self._session.profile

    def _fail(self, error: Exception) -> None:
        kind = f"{type(error).__name__}: {error}".splitlines()[0]
        self._say(f"An error inside gradmend has ended the watch, and not your training: {kind}")

    def _hear(self, notice: Notice) -> None:
        self._report(notice)
        if self._pilot is not None:
            self._pilot.take(notice)

    def _tell(self, step: int, text: str, act: Act | None) -> None:
        values = {"text": text} if act is None else {**asdict(act), "cause": act.cause.value}
        self._say(f"step {step}: {text}", "note" if act is None else "act", values)

    def _say(self, text: str, kind: str = "note", values: Mapping[str, Any] | None = None) -> None:
        if self._sink is not None:
            self._sink.write(kind, self._session.step, values or {"text": text})
        Terminal(stderr=True, soft_wrap=True).print(Text(f"gradmend: {text}", style="dim"))


class _Careful:
    """A journal whose first error ends its use, and is said once."""

    def __init__(self, journal: Sink | str | Path, name: str, say: Callable[[str], None]) -> None:
        self._journal, self._name, self._say = journal, name, say
        self._sink: Sink | None = None
        self._ours: Callable[[], None] | None = None

    def open(self) -> None:
        """Be ready to write; a path is opened, or made."""
        if not isinstance(self._journal, (str, Path)):
            self._sink = self._journal
            return
        with self._careful():
            opened = record(self._journal, self._name)
            self._sink, self._ours = opened, opened.close

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Hand a record on."""
        if self._sink is not None:
            with self._careful():
                self._sink.write(kind, step, values)

    def close(self) -> None:
        """Close what was opened here."""
        self._sink, close, self._ours = None, self._ours, None
        if close is not None:
            with self._careful():
                close()

    @contextmanager
    def _careful(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a journal is not worth a training
            self._sink = self._ours = None
            self._say(f"The journal cannot be written: {type(error).__name__}: {error}")
