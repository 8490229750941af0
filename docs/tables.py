"""The measured tables of docs/choose.md: `python docs/tables.py FOLDER` runs their studies, journals there.

A table stands between `<!-- study: NAME -->` and `<!-- end -->`; its rows are the levels of one factor, its
columns those of the other.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from gradmend.study.analysis import Results
from gradmend.studying import plan_study

PAGE = Path(__file__).parent / "choose.md"
_MARKED = re.compile(r"(<!-- study: (\S+) -->\n).*?(<!-- end -->)", re.S)


def table(results: Results) -> str:
    """Mean test accuracies in percent; trials that diverged count as 0, as in the study's own report."""
    rows, columns = sorted(results.levels, key=lambda factor: -len(results.levels[factor]))
    head = (
        f"| {rows.replace('_', ' ')} | "
        + " | ".join(_head(columns, c) for c in results.levels[columns])
        + " |"
    )
    lines = [f"| {row} | {_row(results, rows, row, columns)} |" for row in results.levels[rows]]
    return "\n".join((head, "|---" + "|--:" * len(results.levels[columns]) + "|", *lines))


def _head(factor: str, label: str) -> str:
    return label if not re.match(r"[\d.]+$", label) else f"{factor.replace('_', ' ')} {label}"


def _row(results: Results, factor: str, label: str, columns: str) -> str:
    return " | ".join(_cell(results, {factor: label, columns: c}) for c in results.levels[columns])


def _cell(results: Results, arm: dict[str, str]) -> str:
    found = [one for one in results.outcomes if dict(one.arm) == arm]
    values = [one.measures.get("test_accuracy", 0.0) if one.status == "done" else 0.0 for one in found]
    diverged = sum(one.status == "diverged" for one in found)
    return f"{100 * sum(values) / len(values):.1f}" + (
        f" ({diverged} of {len(found)} diverged)" if diverged else ""
    )


def main(folder: Path) -> None:
    """Write the tables anew."""

    def filled(found: re.Match[str]) -> str:
        results = plan_study(found[2]).run(folder / f"{found[2]}.gradmend")
        return f"{found[1]}{table(results)}\n\n`gradmend study {found[2]}`\n{found[3]}"

    PAGE.write_text(_MARKED.sub(filled, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
