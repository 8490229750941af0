"""Run the benchmarks named on the command line, else all, and print one table."""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module
from types import ModuleType

from rich.console import Console
from rich.text import Text

import benchmarks
from benchmarks.timing import Row

WIDTH = 100
NAME, MEASURED = 48, 26


def main(names: list[str]) -> None:
    known = all_names()
    if unknown := set(names) - set(known):
        raise SystemExit(
            f"There is no benchmark {', '.join(sorted(unknown))}. Choose from {', '.join(known)}."
        )
    console = Console(width=WIDTH, highlight=False)
    console.print(f"{'':<{NAME}} {'measured (quartiles)':<{MEASURED}} to reach", style="bold")
    for module in map(_module, names or known):
        for row in module.run():
            console.print(Text(row, "bold") if isinstance(row, str) else line(row))


def all_names() -> list[str]:
    """The modules here that hold a benchmark, which is a function `run`."""
    names = [info.name for info in pkgutil.iter_modules(benchmarks.__path__) if info.name != "__main__"]
    return [name for name in names if hasattr(_module(name), "run")]


def _module(name: str) -> ModuleType:
    return import_module(f"benchmarks.{name}")


def line(row: Row) -> Text:
    """One row as a line of text; what is missed, in red."""
    measured, reach = _measured(row), _reach(row)
    text = f"  {row.name:<{NAME - 2}} {measured:<{MEASURED}}"[: WIDTH - len(reach) - 1]
    shown = Text(f"{text} ").append(reach, None if row.reached else "red")
    shown.rstrip()
    return shown


def _measured(row: Row) -> str:
    return f"{row.measured:#.4g}" if isinstance(row.measured, float) else str(row.measured)


def _reach(row: Row) -> str:
    if row.reach is None:
        return ""
    wanted = f"{row.reach[0]:g} to {row.reach[1]:g}" if isinstance(row.reach, tuple) else f"<= {row.reach:g}"
    return wanted if row.reached else f"{wanted}, missed"


if __name__ == "__main__":
    main(sys.argv[1:])
