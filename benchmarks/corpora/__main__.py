"""Run tools on programs with known faults, and print how well they do."""

from __future__ import annotations

import argparse
import os
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.corpora import tables, tools
from benchmarks.corpora.answers import Answer, read, to_line
from benchmarks.corpora.cases import select
from benchmarks.corpora.runner import Job, prepare, run_all

WIDTH = 160


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    console = Console(width=WIDTH, highlight=False, markup=False, soft_wrap=True)
    answers = read(options.read) if options.read else run(options, console)
    wanted = [a for a in answers if options.split in (a.truth.split, None)]
    wanted = [a for a in wanted if a.truth.id in options.ids or not options.ids]
    report([a for a in wanted if a.tool in options.tools], console, options.list)


def parser() -> argparse.ArgumentParser:
    known = sorted(info.name for info in pkgutil.iter_modules(tools.__path__))
    it = argparse.ArgumentParser(prog="python -m benchmarks.corpora", description=__doc__)
    source = it.add_mutually_exclusive_group(required=True)
    source.add_argument("--cases", type=Path, help="the file of cases, with build.py beside it")
    source.add_argument("--from", dest="read", type=Path, nargs="+", help="print from files of --out")
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


def run(options: argparse.Namespace, console: Console) -> list[Answer]:
    """Run each tool on each case; keep each answer as soon as it is there."""
    answers = kept(options.out) if options.resume else []
    done = {(answer.truth.id, answer.tool) for answer in answers}
    jobs = [
        Job(row, truth, options.cases.resolve(), tool, options.seed, options.data)
        for row, truth in select(options.cases, options.split, options.ids)
        for tool in options.tools
        if (truth.id, tool) not in done
    ]
    if options.out:
        options.out.write_text("".join(map(to_line, answers)))
    prepare(options.tools)
    with console.status("") as status:
        for count, answer in enumerate(run_all(jobs, options.limit, options.jobs), 1):
            answers.append(answer)
            status.update(f"{count} of {len(jobs)}: {answer.tool} on {answer.truth.id}")
            if options.out:
                with options.out.open("a") as file:
                    file.write(to_line(answer))
    return answers


def kept(out: Path | None) -> list[Answer]:
    """What an earlier run found, without its failures."""
    return [a for a in read([out]) if a.status != "failed"] if out and out.exists() else []


def report(answers: Sequence[Answer], console: Console, mistakes: bool) -> None:
    """The tables of each split apart."""
    console.print(tables.NOTES)
    for split in sorted({answer.truth.split for answer in answers}):
        own = [answer for answer in answers if answer.truth.split == split]
        shown = tables.views(own)
        compared = [*shown, *tables.guesses(shown)]
        for line in tables.coverage(own):
            console.print(f"{split}: {line}")
        console.print(tables.detection_table(compared, f"{split}: detection"))
        console.print(tables.localization_table(compared, f"{split}: localization"))
        console.print(tables.published_table(own, f"{split}: research tools, as published"))
        console.print(tables.time_table(shown, f"{split}: time"))
        for line in tables.mistakes(own) if mistakes else ():
            console.print(line)


if __name__ == "__main__":
    main()
