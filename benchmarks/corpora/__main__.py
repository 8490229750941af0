"""Run tools on programs with known faults: what they find, and what `mend` makes of the programs."""

from __future__ import annotations

import argparse
import os
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from rich.console import Console

from benchmarks.corpora import answers, repair_tables, repairs, runner, searches, tables, tools
from benchmarks.corpora.answers import Answer, to_line
from benchmarks.corpora.cases import Json, select
from benchmarks.corpora.repairs import Outcome
from benchmarks.corpora.runner import Job, prepare, run_all
from benchmarks.corpora.scoring import Of
from benchmarks.corpora.searches import Comparison

WIDTH = 180


@dataclass(frozen=True)
class Question(Generic[Of]):
    """What is asked of each program.

    Args:
        concerns: whether it is asked of this program.
        run: does one job within so many seconds.
        read: what earlier runs kept.
        report: prints tables.
    """

    concerns: Callable[[Json], bool]
    run: Callable[[Job, float], Of]
    read: Callable[[Iterable[Path]], list[Of]]
    report: Callable[[Sequence[Of], Console, argparse.Namespace], None]

    def answer(self, options: argparse.Namespace, console: Console) -> None:
        """Run or read, and print what is of the wanted split and cases."""
        found = self.read(options.read) if options.read else self.collect(options, console)
        wanted = [each for each in found if options.split in (each.truth.split, None)]
        wanted = [each for each in wanted if each.truth.id in options.ids or not options.ids]
        self.report([each for each in wanted if each.tool in options.tools], console, options)

    def collect(self, options: argparse.Namespace, console: Console) -> list[Of]:
        """Run each tool on each case; keep what is found as soon as it is there."""
        kept = self.read([options.out]) if options.resume and options.out and options.out.exists() else []
        found = [each for each in kept if each.status != "failed"]
        jobs = list(self.jobs(options, {(each.truth.id, each.tool) for each in found}))
        prepare(options.tools, "benchmarks.corpora.searches")
        with console.status("") as status:
            for count, each in enumerate(run_all(self.run, jobs, options.limit, options.jobs), 1):
                found.append(each)
                status.update(f"{count} of {len(jobs)}: {each.tool} on {each.truth.id}")
                if options.out:
                    options.out.write_text("".join(map(to_line, found)))
        return found

    def jobs(self, options: argparse.Namespace, done: set[tuple[str, str]]) -> Iterable[Job]:
        """What is still to be done."""
        for row, truth in select(options.cases, options.split, options.ids):
            for tool in options.tools if self.concerns(row) else ():
                if (truth.id, tool) not in done:
                    yield Job(row, truth, options.cases.resolve(), tool, options.seed, options.data)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.ask != "find":
        options.tools = ["gradmend"]
    console = Console(width=WIDTH, highlight=False, markup=False, soft_wrap=True)
    QUESTIONS[options.ask].answer(options, console)


def parser() -> argparse.ArgumentParser:
    known = sorted(info.name for info in pkgutil.iter_modules(tools.__path__))
    it = argparse.ArgumentParser(prog="python -m benchmarks.corpora", description=__doc__)
    source = it.add_mutually_exclusive_group(required=True)
    source.add_argument("--cases", type=Path, help="the file of cases, with build.py beside it")
    source.add_argument("--from", dest="read", type=Path, nargs="+", help="print from files of --out")
    it.add_argument("--ask", choices=QUESTIONS, default="find", help="the fault, or a repair")
    it.add_argument("--answers", type=Path, nargs="+", default=[], help="files of `find`, beside repairs")
    it.add_argument("--split", choices=("dev", "test"), help="only this side; both are never pooled")
    it.add_argument("--ids", nargs="+", default=[], help="only these cases")
    it.add_argument("--tools", nargs="+", default=known, choices=known)
    it.add_argument("--out", type=Path, help="keep each answer as a line of JSON")
    it.add_argument("--resume", action="store_true", help="run what --out lacks, and what failed there")
    it.add_argument("--data", type=Path, default=os.environ.get("GRADMEND_DATA"), help="folder of image sets")
    it.add_argument("--seed", type=int, default=0)
    it.add_argument("--limit", type=float, default=300.0, help="seconds of wall time for a tool on a case")
    it.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="processes at a time")
    it.add_argument("--list", action="store_true", help="print what was missed, and what falsely found")
    return it


def report_answers(found: Sequence[Answer], console: Console, options: argparse.Namespace) -> None:
    """The tables of each split apart."""
    console.print(tables.NOTES)
    for split in sorted({answer.truth.split for answer in found}):
        own = [answer for answer in found if answer.truth.split == split]
        shown = tables.views(own)
        compared = [*shown, *tables.guesses(shown)]
        for line in tables.coverage(own):
            console.print(f"{split}: {line}")
        console.print(tables.detection_table(compared, f"{split}: detection"))
        console.print(tables.localization_table(compared, f"{split}: localization"))
        console.print(tables.published_table(own, f"{split}: research tools, as published"))
        console.print(tables.time_table(shown, f"{split}: time"))
        for line in tables.mistakes(own) if options.list else ():
            console.print(line)


def report_repairs(found: Sequence[Outcome], console: Console, options: argparse.Namespace) -> None:
    """The tables of each split apart."""
    console.print(repair_tables.NOTES)
    console.print(repair_tables.PEER)
    told = answers.read(options.answers)
    for split in sorted({outcome.truth.split for outcome in found}):
        own = [outcome for outcome in found if outcome.truth.split == split]
        for line in repair_tables.coverage(own):
            console.print(f"{split}: {line}")
        console.print(repair_tables.repair_table(own, f"{split}: repair"))
        if told:
            console.print(repair_tables.found_table(own, told, f"{split}: detection"))
        for line in repair_tables.mistakes(own) if options.list else ():
            console.print(line)


def report_searches(found: Sequence[Comparison], console: Console, options: argparse.Namespace) -> None:
    """One table of all: the published figures are not split."""
    console.print(repair_tables.SEARCH_NOTES)
    console.print(repair_tables.search_table(found, "gain recovered"))
    for line in repair_tables.search_counts(found):
        console.print(line)
    for comparison in found if options.list else ():
        console.print(f"{comparison.truth.id}: {' | '.join(comparison.changes)}")


QUESTIONS: Mapping[str, Question[Any]] = {
    "find": Question(lambda _: True, runner.run_one, answers.read, report_answers),
    "repair": Question(repairs.concerns, repairs.run_one, repairs.read, report_repairs),
    "search": Question(searches.concerns, searches.run_one, searches.read, report_searches),
}


if __name__ == "__main__":
    main()
