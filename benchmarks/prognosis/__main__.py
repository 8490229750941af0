"""`python -m benchmarks.prognosis make | measure | fit | report`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.prognosis.fit import fit
from benchmarks.prognosis.make import make, measure_again
from benchmarks.prognosis.report import report
from benchmarks.prognosis.table import TABLE, read


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prognosis", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="draw setups, measure and train them, add them to the table")
    making.add_argument("--seconds", type=float, default=600.0)
    making.add_argument("--count", type=int, default=10**6)
    commands.add_parser("measure", help="measure the features of the table anew, without training")
    commands.add_parser("fit", help="fit and calibrate the curves, and write them into the package")
    commands.add_parser("report", help="how good the prognosis is on what it has not seen")
    for command in commands.choices.values():
        command.add_argument("--table", type=Path, default=TABLE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    match given.command:
        case "make":
            make(given.table, given.seconds, given.count)
        case "measure":
            measure_again(given.table)
        case "fit":
            fit(read(given.table))
        case _:
            report(read(given.table))


if __name__ == "__main__":
    main()
