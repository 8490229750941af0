"""The table of examples: what was set up, what was measured before training, and what became of it.

One JSON object per line, compressed. By its features the prognosis is fitted again without training anything.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.prognosis.networks import Description
from benchmarks.prognosis.outcome import Outcome

TABLE = Path(__file__).with_name("table.jsonl.gz")


@dataclass(frozen=True)
class Example:
    """One setup that was really trained.

    Args:
        features: by name, as `gradmend.diagnosis.prognosis.features` gives them.
        again: the score of the same initial network trained with other batches, if that was done.
    """

    setup: Description
    features: dict[str, float]
    outcome: Outcome
    again: Outcome | None = None


def read(path: Path = TABLE) -> list[Example]:
    """All examples; none if there is no such file yet."""
    if not path.exists():
        return []
    with gzip.open(path, "rt") as lines:
        return [_example(json.loads(line)) for line in lines]


def write(examples: Iterable[Example], path: Path = TABLE, mode: str = "wt") -> None:
    with gzip.open(path, mode) as file:
        file.writelines(json.dumps(_plain(asdict(example))) + "\n" for example in examples)


def append(example: Example, path: Path = TABLE) -> None:
    """Safe at once, but each takes as much room as two that are written together."""
    write([example], path, "at")


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """Numbers with five digits, so that the file stays small, and null for NaN."""
    features = {
        name: None if math.isnan(value) else float(f"{value:.5g}") for name, value in data["features"].items()
    }
    return {**data, "features": features}


def _example(data: dict[str, Any]) -> Example:
    features = {name: math.nan if value is None else value for name, value in data["features"].items()}
    again = data["again"] and Outcome(**data["again"])
    return Example(Description(**data["setup"]), features, Outcome(**data["outcome"]), again)
