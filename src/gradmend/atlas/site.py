"""The site: its pages in their order, the first of them, and where they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from plotly.offline import get_plotlyjs

from gradmend.atlas import (
    activations,
    jacobians,
    normalization,
    optimizers,
    phases,
    residual,
    schedules,
    starts,
    times,
    trainability,
)
from gradmend.atlas.sizes import FULL, Sizes
from gradmend.atlas.words import COMMAND, TITLE
from gradmend.errors import GradmendError, suggest
from gradmend.language import LANGUAGES
from gradmend.report.page import render
from gradmend.report.parts import Links, Page, Section

MARKER: Final = "gradmend-atlas"
"""A file of this name says that a folder is one of ours, and may be built again."""

INDEX: Final = "index.html"
_PLOTLY: Final = "plotly.js"


@dataclass(frozen=True)
class Leaf:
    """One page before it is made.

    Args:
        name: of its file, without the end.
        title: in the list of pages.
        question: that it answers.
        page: makes it.
    """

    name: str
    title: str
    question: str
    page: Callable[[Sizes], Page]


LEAVES: Final = (
    Leaf(
        "activations",
        "Activations",
        "What does the slope of an activation do to the gradient?",
        activations.page,
    ),
    Leaf("jacobians", "Jacobians", "Why do gradients vanish or explode with depth?", jacobians.page),
    Leaf("starts", "Every start", "Which weights belong to which activation?", starts.page),
    Leaf("phases", "Order and chaos", "How far down does a signal get?", phases.page),
    Leaf(
        "normalization",
        "Normalization",
        "What does batch normalization cure, and what does it do?",
        normalization.page,
    ),
    Leaf("residual", "Residual", "Why do skips help, and why must their branches be small?", residual.page),
    Leaf("times", "Through time", "What does a recurrent network remember?", times.page),
    Leaf("optimizers", "Optimizers", "Which way do they go, on a ravine and at a cliff?", optimizers.page),
    Leaf("schedules", "Schedules", "What does a learning rate do that falls, or begins low?", schedules.page),
    Leaf("trainability", "What trains", "Can it be foretold?", trainability.page),
)


def build(
    folder: Path,
    lang: str = "en",
    report: Callable[[str], None] | None = None,
    sizes: Sizes = FULL,
) -> list[Path]:
    """Measure everything and write the site; the same seed gives the same pictures.

    Args:
        folder: for the pages; it is made if need be. Another atlas there is replaced.
        lang: one of `gradmend.language.LANGUAGES`.
        report: is told what is done.
        sizes: how much is measured; the usual takes about two minutes on one core.

    Returns:
        The pages, the first of them `index.html`.

    Raises:
        GradmendError: for an unknown language, and a folder that holds something else or cannot be written.
    """
    tell = report or _silent
    if lang not in LANGUAGES:
        raise GradmendError(f"There is no language {lang!r}. {suggest(lang, LANGUAGES)}")
    room(folder)
    (folder / MARKER).write_text(f"{COMMAND}\n", encoding="utf-8")
    (folder / _PLOTLY).write_text(get_plotlyjs(), encoding="utf-8")
    written = [folder / INDEX]
    with _settled(sizes.seed):
        for number, leaf in enumerate(LEAVES, 1):
            tell(f"{number}/{len(LEAVES)} {leaf.title}")
            written.append(folder / f"{leaf.name}.html")
            _write(written[-1], leaf.page(sizes), lang)
    _write(written[0], index(), lang)
    return written


def index() -> Page:
    """The first page: what there is, and in which order to read it."""
    rows = tuple((f"{leaf.name}.html", leaf.title, leaf.question) for leaf in LEAVES)
    return Page(
        TITLE,
        "Why deep networks learn, and why they do not: measured, not drawn.",
        "note",
        (
            Section(
                "Ten pages",
                (
                    "A deep network learns by a gradient that has to get through all of its layers. Most "
                    "of what goes wrong goes wrong on that way. Each page shows one piece of it, with "
                    "dials to turn.",
                    Links(rows),
                    "All pictures are measurements of small networks, made by gradmend on this machine. "
                    "Lines called theory are mean-field predictions for infinitely wide networks; "
                    "nothing in them is fitted. Below each picture stand the lines that make it again.",
                ),
            ),
        ),
        command=COMMAND,
    )


def room(folder: Path) -> None:
    """Make the folder, unless it holds something that is not ours.

    Raises:
        GradmendError: if it does, or cannot be made.
    """
    if folder.is_file():
        raise GradmendError(f"{str(folder)!r} is a file. Name a folder for the atlas, such as atlas/.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise GradmendError(
            f"The folder {str(folder)!r} holds something that is no atlas, so nothing is written there. "
            f"Choose an empty folder or a new name, such as {str(folder / 'atlas')!r}."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GradmendError(f"The folder {str(folder)!r} cannot be made: {error.strerror}.") from error


def _write(path: Path, page: Page, lang: str) -> None:
    ways = ((INDEX, TITLE), *((f"{leaf.name}.html", leaf.title) for leaf in LEAVES))
    known = tuple(("" if address == path.name else address, title) for address, title in ways)
    path.write_text(render(replace(page, ways=known), lang, plotly=_PLOTLY), encoding="utf-8")


@contextmanager
def _settled(seed: int) -> Iterator[None]:
    """torch's global generator begins at the seed, and is afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _silent(_: str) -> None:
    return None
