"""Run the benchmarks named on the command line, else all, and print one line per ratio."""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module

import benchmarks

HELPERS = {"__main__", "timing"}


def main(names: list[str]) -> None:
    modules = names or [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in HELPERS]
    print(f"{'':<48} {'measured (quartiles)':<26} to reach")
    for name in modules:
        for row in import_module(f"benchmarks.{name}").run():
            print(f"{row.name:<48} {row.measured!s:<26} <= {row.reach:g}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
