"""Make mutants of sound programs, each trained beside its original; then say how gradmend does on them.

python -m benchmarks.mutations make FOLDER
python -m benchmarks.corpora --cases FOLDER/cases.jsonl --split dev --tools gradmend --out found.jsonl
python -m benchmarks.corpora --cases FOLDER/cases.jsonl --split dev --ask repair --out mended.jsonl
python -m benchmarks.mutations show --answers found.jsonl --outcomes mended.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.corpora import answers, repairs
from benchmarks.mutations import tables
from benchmarks.mutations.making import EACH, SEEDS, original_row, plan, row_of

_BUILD = '"""Written by `python -m benchmarks.mutations`."""\n\nfrom benchmarks.mutations.build import *\n'


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    console = Console(width=150, highlight=False, markup=False, soft_wrap=True)
    if options.do == "make":
        make(options.folder, options.each, console)
    else:
        show(options.answers, options.outcomes, console)


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser(
        prog="python -m benchmarks.mutations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ways = it.add_subparsers(dest="do", required=True)
    new = ways.add_parser(
        "make", help=f"train originals and mutants with {SEEDS} seeds, go on where it stopped"
    )
    new.add_argument("folder", type=Path, help="gets cases.jsonl and build.py")
    new.add_argument(
        "--each", type=int, default=EACH, help="programs of a side that an operator is applied to"
    )
    old = ways.add_parser("show", help="a line for each operator, the sides apart")
    old.add_argument("--answers", type=Path, nargs="+", required=True, help="files of `--ask find`")
    old.add_argument("--outcomes", type=Path, nargs="+", default=[], help="files of `--ask repair`")
    return it


def make(folder: Path, each: int, console: Console) -> None:
    """Write the cases that the file lacks, each as soon as it is trained."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.py").write_text(_BUILD)
    file = folder / "cases.jsonl"
    known = (
        {row["id"]: row for row in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    )
    planned = list(plan(each))
    for count, (split, program, operator) in enumerate(planned, 1):
        name = program.name if operator is None else f"{program.name}: {operator}"
        if name in known:
            continue
        console.print(f"{count} of {len(planned)}: {name}")
        original = known.get(program.name)
        row = original_row(split, program) if original is None else row_of(original, program, operator or "")
        known[name] = row
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


def show(found: Sequence[Path], mended: Sequence[Path], console: Console) -> None:
    """The tables of each side."""
    told, done = answers.read(found), repairs.read(mended)
    console.print(tables.NOTES)
    for split in sorted({answer.truth.split for answer in told}):
        own = [answer for answer in told if answer.truth.split == split]
        console.print(tables.operator_table(own, [o for o in done if o.truth.split == split], split))


if __name__ == "__main__":
    main()
