"""Running a script as users do, with and without `gradmend run`."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Done = subprocess.CompletedProcess[str]


def plain(arguments: Sequence[str], **options: Any) -> Done:
    """`python ARGUMENTS`, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)


def watched(arguments: Sequence[str], *, journal: Path | None = None, **options: Any) -> Done:
    """`gradmend run ARGUMENTS`, on one thread."""
    record = [] if journal is None else ["--journal", str(journal)]
    return plain(["-m", "gradmend", "run", *record, *arguments], **options)


def script(folder: Path, code: str, name: str = "train.py") -> str:
    """The path of a new file with this code."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    return str(path)


def theirs(done: Done) -> str:
    """What the script itself said on stderr."""
    return "".join(line for line in done.stderr.splitlines(True) if not line.startswith("gradmend"))
