"""The page of trainings that were recorded, or still are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from gradmend.console import lines, number
from gradmend.diagnosis import Severity
from gradmend.journal import Journal
from gradmend.journal.file import select
from gradmend.look import Look
from gradmend.pictures.heat import CELLS
from gradmend.pictures.training import SCALES, Draw, at_once, comparison, pictures
from gradmend.recorded import Lasted, RecordedModel, RecordedRun, drawings, read_recorded
from gradmend.report.page import Dial, Page, Part, Section, Table
from gradmend.report.pages import card, sections

MOST_RUNS: Final = 6
"""Of more runs only the newest are shown in full."""

_ROOM: Final = 160_000
"""Cells of all heatmaps of a page, which is to stay below six megabytes."""


def run_page(journals: Journal | Sequence[Journal], more: Sequence[Section] = ()) -> Page:
    """What journals hold of trainings: what was found, and the pictures of each.

    Args:
        journals: one or several.
        more: sections that follow.

    Raises:
        JournalError: if one cannot be read.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(folder + "/run.gradmend")
        ...     journal.run("first").close()
        ...     run_page(journal).verdict
        'No step of a training is recorded here.'
    """
    held = [journals] if isinstance(journals, Journal) else list(journals)
    runs = [run for journal in held for run in read_recorded(journal).runs]
    studies = [section for journal in held for section in _study(journal)]
    return page_of(runs, lines([journal.path.name for journal in held]), (*studies, *more))


def _study(journal: Journal) -> tuple[Section, ...]:
    """That there is a study in a journal, and how its results are shown."""
    if not any(select(journal.path, "SELECT 1 FROM sqlite_master WHERE name = 'study'")):
        return ()
    names = [row["name"] for row in select(journal.path, "SELECT name FROM study")]
    shown = f"`gradmend view {journal.path.name}` shows its results."
    return sections(("Studies", [f"The study {name} is recorded here. {shown}" for name in names]))


def page_of(
    runs: Sequence[RecordedRun], title: str, more: Sequence[Section] = (), draw: Draw = at_once
) -> Page:
    """The page of some runs, the newest of them first.

    Args:
        runs: the oldest first.
        title: of the page.
        more: sections that follow.
        draw: calls the functions that draw.
    """
    stepped = [run for run in runs if any(model.steps or model.findings for model in run.models)]
    shown = stepped[-MOST_RUNS:]
    trainings = sum(len(run.models) for run in shown)
    several, room = trainings > 1, min(CELLS, _ROOM // len(SCALES) // max(1, trainings))
    drawn = partial(_drawn, room=room, draw=draw)
    own = [section for run in reversed(shown) for section in _run(run, several, drawn)]
    both = list(comparison(drawings(shown), Look(), draw).values()) if several else []
    verdict, tone = _verdict(stepped)
    return Page(title, verdict, tone, (*sections(("Side by side", both)), *own, *more), _notes(runs, stepped))


def _verdict(runs: Sequence[RecordedRun]) -> tuple[str, str]:
    """What came of all runs in one sentence, and how bad that is."""
    if not runs:
        return "No step of a training is recorded here.", "note"
    if len(runs) == 1:
        return _outcome(runs[0])
    ill = [run for run in runs if not run.healthy]
    if ill:
        return f"{len(ill)} of {len(runs)} runs went wrong: {lines(_causes(ill))}.", "error"
    warned = [run for run in runs if _outcome(run)[1] == "warning"]
    if warned:
        return f"{len(warned)} of {len(runs)} runs ended with a warning, and none with an error.", "warning"
    return f"{len(runs)} runs, and nothing wrong at the end of any.", "good"


def _outcome(run: RecordedRun) -> tuple[str, str]:
    found = [entry for model in run.models for entry in model.findings]
    lasting = [entry for entry in found if entry.ended is None]
    worst = max((entry.finding.severity for entry in lasting), default=Severity.NOTE)
    steps = max(model.steps for model in run.models)
    if worst is Severity.ERROR:
        first = next(entry for entry in lasting if entry.finding.severity is worst)
        return f"This training went wrong from step {first.began} on: {lines(_causes([run]))}.", "error"
    if worst is Severity.WARNING:
        return f"A warning lasted to the end of {steps} steps: {lines(_titles(lasting))}.", "warning"
    if _titles(found):
        return (
            f"Nothing lasted to the end of {steps} steps; what has passed: {lines(_titles(found))}.",
            "good",
        )
    return f"Nothing wrong was found in {steps} steps.", "good"


def _causes(runs: Sequence[RecordedRun]) -> list[str]:
    """The errors that lasted, each once."""
    found = [entry for run in runs for model in run.models for entry in model.findings if entry.ended is None]
    return _titles([entry for entry in found if entry.finding.severity is Severity.ERROR])


def _titles(found: Sequence[Lasted]) -> list[str]:
    return list(dict.fromkeys(e.finding.cause.title for e in found if e.finding.severity > Severity.NOTE))


def _run(run: RecordedRun, several: bool, drawn: Callable[[RecordedModel], list[Part]]) -> Iterator[Section]:
    """What there is to show of a run, model by model."""
    for model in run.models:
        name = model.name if len(run.models) > 1 else run.name
        after = f": {name}" if several else ""
        yield from sections(
            (f"What was found{after}", _findings(run, model)),
            (f"What was done{after}", _acts(model)),
            (f"The training{after}" if several else "The training", drawn(model)),
        )


def _findings(run: RecordedRun, model: RecordedModel) -> list[Part]:
    """The worst first, and what lasted before what has passed."""
    order = sorted(model.findings, key=lambda e: (e.ended is not None, -e.finding.severity, e.began))
    about = [f"{model.name}, {model.size}; {run.started}, {run.outcome}."]
    return [*about, *(card(entry.finding, _span(entry)) for entry in order)]


def _span(entry: Lasted) -> str:
    if entry.ended is None:
        return f"It was found at step {entry.began}, and lasted to the end."
    return f"It was found at step {entry.began}, and had passed by step {entry.ended}."


def _acts(model: RecordedModel) -> list[Part]:
    rows = [
        (str(act.step), act.cause.title, act.text, number(act.before), number(act.after), act.unit)
        for act in model.acts
    ]
    return [Table(("step", "against", "what", "before", "after", "of"), tuple(rows))] if rows else []


def _drawn(model: RecordedModel, room: int, draw: Draw) -> list[Part]:
    """Its course, the gradient of each layer, and what else was read of them to choose from."""
    drawn = pictures(model.drawing(), Look(), room, draw)
    rest = {(SCALES[name].words,): drawn[name] for name in SCALES if name in drawn and name != "gradient"}
    parts: list[Part] = [drawn[name] for name in ("course", "gradient") if name in drawn]
    if rest:
        parts.append(
            Dial({"shown": tuple(words for (words,) in rest)}, rest, "What else was read of the layers")
        )
    return parts


def _notes(runs: Sequence[RecordedRun], stepped: Sequence[RecordedRun]) -> tuple[str, ...]:
    """What watches said of themselves, and what is not shown."""
    said = [note for run in stepped[-MOST_RUNS:] for model in run.models for note in model.notes]
    if len(stepped) > MOST_RUNS:
        said.append(f"Of {len(stepped)} runs the newest {MOST_RUNS} are shown in full.")
    if len(runs) > len(stepped):
        said.append(f"{len(runs) - len(stepped)} runs without a step are left out.")
    if any("still running" in run.outcome for run in stepped):
        said.append("A run that has not ended is shown as far as it came.")
    if stepped:
        said.append("Layers are read now and then; a colour reaches halfway to the next reading.")
    return tuple(dict.fromkeys(said))
