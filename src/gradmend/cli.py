"""The command line. torch is loaded inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradmend.causes import Cause
from gradmend.console import plain_data
from gradmend.errors import GradmendError, TargetError, suggest

if TYPE_CHECKING:
    from gradmend.patch.files import Order
    from gradmend.target import Target

HEALTHY, ILL, BAD_INPUT = 0, 1, 2

app = typer.Typer(
    name="gradmend",
    help="Finds out why a deep network does not learn, mends it, and proves that it did.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="file.py:name (a model, a Setup, or a function), or a recipe.")
]
DataOption = Annotated[
    str | None, typer.Option(help="digits, mnist, fashion-mnist, table.csv:COLUMN, arrays.npz, file.py:name.")
]
LossOption = Annotated[str | None, typer.Option(help="cross_entropy, bce_with_logits, mse, ...")]
OptimizerOption = Annotated[str | None, typer.Option(help="NAME or NAME:LR, such as SGD:0.1.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
SeedOption = Annotated[int, typer.Option(help="Of the initial weights and of all that is random.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")]


@app.command()
def check(
    target: TargetArgument,
    data: DataOption = None,
    loss: LossOption = None,
    optimizer: OptimizerOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Find out what is wrong with a network before it trains. Exit code 0: healthy, 1: findings."""
    with _output(as_json) as show:
        from gradmend.diagnosis import diagnose

        found = _find(target, data, loss, optimizer, device, seed)
        diagnosis = diagnose(found.setup, found.batches(limit=4))
        show(diagnosis, *([] if diagnosis.healthy else ["", f"To mend it: gradmend mend {target}"]))
    raise typer.Exit(HEALTHY if diagnosis.healthy else ILL)


@app.command()
def mend(
    target: TargetArgument,
    data: DataOption = None,
    loss: LossOption = None,
    optimizer: OptimizerOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each trial.")] = 200,
    patch: Annotated[
        Path | None, typer.Option(metavar="DIFF", help="Write the changes of your source to this new file.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Change the source itself; a copy stays beside it (.bak).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the least change that makes a network train, and prove it. Your files stay, but for --write."""
    with _output(as_json) as show:
        from gradmend.setup import Budget
        from gradmend.treatment import mend

        ordered = _ordered(target, patch, write)
        found = _find(target, data, loss, optimizer, device, seed)
        batches = found.batches(limit=1000)
        with _status() as say:
            treatment = mend(found.setup, batches, Budget(steps=steps), say)
        if not as_json:
            show(treatment.before, "")
        show(treatment)
        if not as_json and treatment.changes:
            show("", "The same in your own code:", "", treatment.code())
        if ordered is not None:
            typed = [part for part, given in (("loss", loss), ("optimizer", optimizer)) if given is not None]
            lines = ordered.fill(found.setup, treatment, batches[0], typed, seed)
            Console(soft_wrap=True, highlight=False).print("\n".join(lines), markup=False)
    raise typer.Exit(HEALTHY if treatment.after.healthy else ILL)


@app.command()
def train(
    target: TargetArgument,
    data: DataOption = None,
    loss: LossOption = None,
    optimizer: OptimizerOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes through the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows per batch.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a network or a shipped recipe and print its test accuracy."""
    with _output(as_json) as show:
        from gradmend.diagnosis.course import judge_course
        from gradmend.training import train

        found = _find(target, data, loss, optimizer, device, seed)
        history = train(
            found.setup,
            found.data,
            epochs=epochs or found.epochs,
            batch_size=batch_size or found.batch_size,
            seed=seed,
            device=device,
            progress=not as_json,
        )
        show(history, *judge_course(history))
    raise typer.Exit(ILL if history.diverged else HEALTHY)


@app.command()
def explain(
    cause: Annotated[
        str | None, typer.Argument(metavar="CAUSE", help="Such as 'vanishing gradient'.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a cause means, why it happens, how it shows and what treats it."""
    with _output(as_json) as show:
        show(_Catalogue() if cause is None else _cause(cause))
    raise typer.Exit(HEALTHY)


@app.command()
def demo(
    data: Annotated[str, typer.Option(help="digits, mnist, fashion-mnist, or a file.")] = "digits",
    depth: Annotated[int, typer.Option(min=1, help="Hidden layers.")] = 30,
    activation: Annotated[str, typer.Option(help="Of the hidden layers.")] = "sigmoid",
    init: Annotated[str, typer.Option(help="Of the weights: default is torch's own.")] = "default",
    seed: SeedOption = 0,
) -> None:
    """Watch a deep network fail, be examined, be mended, and learn."""
    from gradmend.demo import run

    raise typer.Exit(
        HEALTHY
        if run(Console(), data=data, depth=depth, activation=activation, init=init, seed=seed)
        else ILL
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 healthy or mended, 1 findings remain, 2 bad input."""
    try:
        app(arguments)
    except GradmendError as error:
        _complain(str(error))
    except Exception as error:
        from gradmend.target import users_traceback

        text, found = users_traceback(error)
        if not found:
            raise
        _complain(f"your code raised an error:\n\n{text}")


def _complain(text: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"gradmend: {text}", markup=False)
    sys.exit(BAD_INPUT)


class _Shown:
    """Prints nouns and lines: as text, or one noun as JSON on the real stdout."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.stdout = sys.stdout

    def __call__(self, *items: Any) -> None:
        nouns = [item for item in items if hasattr(item, "to_dict")]
        if self.as_json and nouns:
            print(json.dumps(plain_data(nouns[0].to_dict()), allow_nan=False), file=self.stdout)
        elif not self.as_json:
            console = Console(file=self.stdout, highlight=False)
            for item in items:
                console.print(item, markup=False, soft_wrap=isinstance(item, str))


@contextmanager
def _output(as_json: bool) -> Iterator[_Shown]:
    """What prints; with JSON, whatever else prints (the user's own file) goes to stderr."""
    shown = _Shown(as_json)
    with redirect_stdout(sys.stderr) if as_json else redirect_stdout(sys.stdout):
        yield shown


@contextmanager
def _status() -> Iterator[Any]:
    with Console(stderr=True).status("measuring") as status:
        yield status.update


def _find(
    target: str, data: str | None, loss: str | None, optimizer: str | None, device: str, seed: int
) -> Target:
    from gradmend.target import Wishes, find

    found = find(target, Wishes(data, loss, optimizer, device, seed))
    for note in found.notes:
        Console(stderr=True, style="dim", highlight=False).print(note, markup=False)
    return found


def _ordered(target: str, patch: Path | None, write: bool) -> Order | None:
    """The patch that was asked for; with JSON, what it says goes to stderr."""
    if patch is None and not write:
        return None
    from gradmend.patch.files import order

    return order(target, patch, write)


class _Catalogue:
    """All causes, a line each, or as data."""

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for cause in Cause:
            table.add_row(Text(cause.title, no_wrap=True), Text(cause.sentence))
        return table

    def to_dict(self) -> dict[str, Any]:
        return {"causes": [_Explanation(cause).to_dict() for cause in Cause]}


class _Explanation:
    """A cause as text for people, or as data."""

    def __init__(self, cause: Cause) -> None:
        self.cause = cause

    def __rich__(self) -> Text:
        illness = self.cause.illness
        rows = (
            ("Why", illness.why),
            ("How it shows", illness.signs),
            ("What treats it", illness.cure),
            ("Part", illness.part),
            ("Source", illness.reference),
        )
        text = "".join(f"\n{key}: {value}" for key, value in rows)
        return Text(f"{self.cause.title.upper()}: {illness.sentence}\n{text}")

    def to_dict(self) -> dict[str, str]:
        return {"cause": self.cause.title, **asdict(self.cause.illness)}


def _cause(name: str) -> _Explanation:
    wanted = name.lower().replace("_", " ").replace("-", " ").strip()
    known = {cause.title: cause for cause in Cause}
    if wanted not in known:
        raise TargetError(f"There is no cause {name!r}. {suggest(wanted, known)}")
    return _Explanation(known[wanted])
