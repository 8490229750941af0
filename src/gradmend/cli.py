"""The command line. torch is loaded inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Group
from rich.text import Text

from gradmend.causes import Cause
from gradmend.console import listed, plain_data
from gradmend.errors import GradmendError, TargetError, suggest
from gradmend.running import AS_TYPED, export, run
from gradmend.showing import LangOption, Order, ReportOption, again, atlas, ordered, view
from gradmend.terminal import Terminal

if TYPE_CHECKING:
    from gradmend.patch.files import Order as Patch
    from gradmend.remedies.card import Card
    from gradmend.target import Target

HEALTHY, ILL, BAD_INPUT, STOPPED = 0, 1, 2, 130

app = typer.Typer(
    name="gradmend",
    help="Finds out why a deep network does not learn, mends it, and proves that it did.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", help="file.py:name (a model, a Setup, or a function), model.keras, or a recipe."
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="digits, mnist, breast-cancer, recall-100, digits-rows, ..., table.csv:COLUMN, arrays.npz, "
        "file.py:name."
    ),
]
LossOption = Annotated[str | None, typer.Option(help="cross_entropy, bce_with_logits, mse, ...")]
OptimizerOption = Annotated[str | None, typer.Option(help="NAME or NAME:LR, such as SGD:0.1.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
DepthOption = Annotated[int | None, typer.Option(min=1, help="Hidden layers of a recipe.")]
WidthOption = Annotated[int | None, typer.Option(min=1, help="Units of each hidden layer of a recipe.")]
PlannedOption = Annotated[
    int | None,
    typer.Option(min=1, help="Optimizer steps that you mean to train for: whether they are enough."),
]
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
    depth: DepthOption = None,
    width: WidthOption = None,
    planned_steps: PlannedOption = None,
    report: ReportOption = None,
    lang: LangOption = "en",
    as_json: JsonOption = False,
) -> None:
    """Find out what is wrong with a network before it trains. Exit code 0: healthy, 1: findings.

    Of a journal (run.gradmend): what was found while it was recorded.
    """
    with _output(as_json) as show:
        wanted = ordered(report, lang)
        if target.endswith(".gradmend"):
            raise typer.Exit(_check_journal(target, show, wanted))
        from gradmend.diagnosis import diagnose

        wishes = {"data": data, "loss": loss, "optimizer": optimizer, "device": device, "seed": seed}
        found = _find(target, **wishes, depth=depth, width=width)
        batches = found.batches(limit=4)
        diagnosis = diagnose(found.setup, batches, steps=planned_steps)
        asked = {**wishes, "depth": depth, "width": width, "planned-steps": planned_steps}
        mend = again("mend", target, asked)
        show(diagnosis, *([] if diagnosis.healthy else ["", f"To mend it: {mend}"]))
        if wanted is not None:
            from gradmend.report.pages import check_page
            from gradmend.spread import spread

            command = again("check", target, {**asked, "report": report, "lang": lang})
            seen = spread(found.setup, batches[0])
            page = check_page(diagnosis, seen, title=f"gradmend check {target}", mend=mend)
            show("", wanted.fill(page, command))
    raise typer.Exit(HEALTHY if diagnosis.healthy else ILL)


def _check_journal(target: str, show: _Shown, wanted: Order | None) -> int:
    from gradmend.journal import Journal
    from gradmend.recorded import read_recorded

    recorded = read_recorded(Journal(target))
    show(recorded)
    if wanted is not None:
        from gradmend.report.run import run_page

        command = again("check", target, {"report": wanted.path, "lang": wanted.lang})
        show("", wanted.fill(run_page(Journal(target)), command))
    return HEALTHY if recorded.healthy else ILL


@app.command()
def mend(
    target: TargetArgument,
    data: DataOption = None,
    loss: LossOption = None,
    optimizer: OptimizerOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    depth: DepthOption = None,
    width: WidthOption = None,
    planned_steps: PlannedOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each trial.")] = 200,
    seconds: Annotated[
        float, typer.Option(min=1, help="Of all together; then the best so far is taken.")
    ] = 120,
    trials: Annotated[int, typer.Option(min=1, help="Short trainings, of all together.")] = 50,
    patch: Annotated[
        Path | None, typer.Option(metavar="DIFF", help="Write the changes of your source to this new file.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Change the source itself; a copy stays beside it (.bak).")
    ] = False,
    report: ReportOption = None,
    lang: LangOption = "en",
    as_json: JsonOption = False,
) -> None:
    """Find the least change that makes a network train, and prove it. Your files stay, but for --write."""
    with _output(as_json) as show:
        from gradmend.setup import Budget
        from gradmend.treatment import mend

        source, wanted = _ordered(target, patch, write), ordered(report, lang)
        wishes = {"data": data, "loss": loss, "optimizer": optimizer, "device": device, "seed": seed}
        found = _find(target, **wishes, depth=depth, width=width)
        batches, budget = found.batches(limit=1000), Budget(steps, seconds, trials)
        with _status() as say:
            treatment = mend(found.setup, batches, budget, say, steps=planned_steps)
        if not as_json:
            show(treatment.before, "")
        own = found.code(treatment.changes)
        if not as_json and treatment.changes:
            show("In your own code:", "", own, "")
        show(treatment, more={"code": own})
        if source is not None:
            typed = [part for part, given in (("loss", loss), ("optimizer", optimizer)) if given is not None]
            lines = source.fill(found.setup, treatment, batches[0], typed, seed)
            Terminal(soft_wrap=True).print("\n".join(lines))
        if wanted is not None:
            from gradmend.report.pages import mend_page
            from gradmend.spread import spread

            seen = (spread(found.setup, batches[0]), spread(treatment.setup, batches[0]))
            sizes = {"depth": depth, "width": width, "planned-steps": planned_steps}
            tried = {"steps": steps, "seconds": seconds, "trials": trials}
            command = again("mend", target, {**wishes, **sizes, **tried, "report": report, "lang": lang})
            page = mend_page(treatment, own, seen, title=f"gradmend mend {target}")
            show("", wanted.fill(page, command))
    raise typer.Exit(HEALTHY if treatment.after.healthy else ILL)


@app.command()
def train(
    target: TargetArgument,
    data: DataOption = None,
    loss: LossOption = None,
    optimizer: OptimizerOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    depth: DepthOption = None,
    width: WidthOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes through the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows per batch.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a network or a shipped recipe and print its test accuracy."""
    with _output(as_json) as show:
        from gradmend.diagnosis.course import judge_course
        from gradmend.training import train

        wishes = {"data": data, "loss": loss, "optimizer": optimizer, "device": device, "seed": seed}
        sizes = {"depth": depth, "width": width, "epochs": epochs, "batch_size": batch_size}
        found = _find(target, **wishes, **sizes)
        history = train(
            found.setup,
            found.data,
            epochs=found.epochs,
            batch_size=found.batch_size,
            seed=seed,
            device=device,
            progress=not as_json,
        )
        show(history, *judge_course(history))
    raise typer.Exit(ILL if history.diverged else HEALTHY)


@app.command()
def study(
    name: Annotated[
        str | None, typer.Argument(metavar="STUDY", help="study.toml, or a shipped study; without: which.")
    ] = None,
    data: DataOption = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many, instead of those of the study.")] = None,
    journal: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of the trials: by default STUDY.gradmend, here.")
    ] = None,
    workers: Annotated[str, typer.Option(help="local, or ray: a Ray cluster (RAY_ADDRESS).")] = "local",
    report: ReportOption = None,
    lang: LangOption = "en",
    as_json: JsonOption = False,
) -> None:
    """Compare cures on a task by many trainings, and recommend one. Stopped, the same command goes on."""
    with _output(as_json) as show:
        from gradmend.study.engine import finished
        from gradmend.studying import Shipped, plan_study

        if name is None:
            show(Shipped())
            raise typer.Exit(HEALTHY)
        planned, wanted = plan_study(name, data, seeds), ordered(report, lang)
        file = journal or Path(f"{planned.name}{'' if data is None else f'-{Path(data).stem}'}.gradmend")
        try:
            results = planned.run(file, workers, progress=not as_json)
        except KeyboardInterrupt:
            results = finished(planned, file)
            show(results, "", f"Stopped: {len(results.outcomes)} of {planned.trials} trials are in {file}.")
            raise typer.Exit(STOPPED) from None
        told = [f"The trials are in {file}."]
        if wanted is not None:
            asked = {"data": data, "seeds": seeds, "journal": journal, "workers": workers, "report": report}
            page = results.page(tuple(planned.figures().values()))
            told.append(wanted.fill(page, again("study", name, {**asked, "lang": lang})))
        show(results, "", *told)
    raise typer.Exit(ILL if any(outcome.status == "failed" for outcome in results.outcomes) else HEALTHY)


@app.command()
def explain(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Such as 'vanishing gradient' or 'clip norm'.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a cause means, why it happens and what treats it; or what a remedy does and costs."""
    with _output(as_json) as show:
        show(_Catalogue() if name is None else _explanation(name))
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
        if run(Terminal(), data=data, depth=depth, activation=activation, init=init, seed=seed)
        else ILL
    )


app.command(context_settings=AS_TYPED)(run)
app.command()(export)
app.command()(view)
app.command()(atlas)


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
    Terminal(stderr=True, soft_wrap=True).print(f"gradmend: {text}")
    sys.exit(BAD_INPUT)


class _Shown:
    """Prints nouns and lines: as text, or one noun as JSON on the real stdout."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.stdout = sys.stdout

    def __call__(self, *items: Any, more: Mapping[str, Any] | None = None) -> None:
        nouns = [item for item in items if hasattr(item, "to_dict")]
        if self.as_json and nouns:
            found = plain_data({**nouns[0].to_dict(), **(more or {})})
            print(json.dumps(found, allow_nan=False), file=self.stdout)
        elif not self.as_json:
            terminal = Terminal(file=self.stdout)
            for item in items:
                terminal.print(item, soft_wrap=isinstance(item, str))


@contextmanager
def _output(as_json: bool) -> Iterator[_Shown]:
    """What prints; with JSON, whatever else prints (the user's own file) goes to stderr."""
    shown = _Shown(as_json)
    with redirect_stdout(sys.stderr) if as_json else redirect_stdout(sys.stdout):
        yield shown


@contextmanager
def _status() -> Iterator[Any]:
    with Terminal(stderr=True).status("measuring", spinner="line") as status:
        yield lambda text: status.update(Text(text))


def _find(target: str, **wishes: Any) -> Target:
    from gradmend.target import Wishes, find

    found = find(target, Wishes(**wishes))
    for note in found.notes:
        Terminal(stderr=True, style="dim").print(note)
    return found


def _ordered(target: str, patch: Path | None, write: bool) -> Patch | None:
    """The patch that was asked for; with JSON, what it says goes to stderr."""
    if patch is None and not write:
        return None
    from gradmend.patch.files import order

    return order(target, patch, write)


class _Catalogue:
    """All causes and all remedies, a line each, or as data."""

    def __init__(self) -> None:
        from gradmend.remedies.card import cards

        self.cards = cards()

    def __rich__(self) -> Group:
        causes = [(cause.title, cause.sentence) for cause in Cause]
        remedies = [(card.name, card.what) for card in self.cards]
        return Group("Causes", listed(causes), "", "Remedies", listed(remedies))

    def to_dict(self) -> dict[str, Any]:
        causes = [_Explanation(cause).to_dict() for cause in Cause]
        return {"causes": causes, "remedies": [card.to_dict() for card in self.cards]}


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


def _explanation(name: str) -> _Explanation | Card:
    """What there is to say of a cause or a remedy, by its name, however it is written."""
    causes = {_plain(cause.title): cause for cause in Cause}
    if _plain(name) in causes:
        return _Explanation(causes[_plain(name)])
    from gradmend.remedies.card import cards

    remedies = {_plain(card.name): card for card in cards()}
    if _plain(name) in remedies:
        return remedies[_plain(name)]
    possible = [*(cause.title for cause in Cause), *(_words(card.name) for card in cards())]
    raise TargetError(f"There is no cause and no remedy {name!r}. {suggest(_words(name), possible)}")


def _plain(name: str) -> str:
    """A name in small letters alone: `ClipNorm` and `clip norm` are one."""
    return _words(name).replace(" ", "")


def _words(name: str) -> str:
    """The words of a name, in small letters.

    >>> _words("ClipNorm"), _words("dead_units")
    ('clip norm', 'dead units')
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[_-]", " ", name).lower().strip()
