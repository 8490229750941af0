"""Journals as trainings leave them, written by hand."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gradmend.journal import Journal, Recording, Sink

FOUND = {
    "cause": "dead_units",
    "severity": "error",
    "sentence": "No unit of 1 gets any gradient.",
    "sites": ("1",),
    "where": ("train.py:5",),
    "measured": 1.0,
    "expected": 0.0,
    "unit": "share of the units",
    "evidence": (),
}
HOSTILE = "<script>alert(1)</script>"
LAYERS = ("0", "1", "2")


def begun(path: Path, name: str = "python train.py") -> Recording:
    return Journal(path).run("", name)


def steps(
    sink: Sink, losses: Iterable[float | None], begin: int = 1, layers: tuple[str, ...] = LAYERS
) -> None:
    """Steps with these losses; every fifth reads layers and weights."""
    for step, loss in enumerate(losses, start=begin):
        if step % 5 == 1:
            values = np.outer(np.geomspace(1e-6, 1, len(layers)), [1.0, 1.0]).astype(np.float32) / step
            read = {"table": "layers", "rows": layers, "statistics": ("rms", "gradient"), "values": values}
            sink.write("reading", step, read)
            rows = tuple(f"{layer}.weight" for layer in layers)
            weights = {"table": "weights", "rows": rows, "statistics": ("value", "update"), "values": values}
            sink.write("reading", step, weights)
        sink.write("step", step, {"loss": loss, "gradient": 1.0 / step, "rate": 0.1 / step})


def found(sink: Sink, began: int, ended: int | None = None, **changes: Any) -> None:
    sink.write("finding", began, {"id": began, "began": began, "ended": ended, **FOUND, **changes})


def falling(count: int) -> list[float]:
    return [2.0 * math.exp(-step / count) for step in range(count)]


def recorded(
    path: Path, name: str = "python train.py", count: int = 30, *findings: dict[str, Any]
) -> Journal:
    """A journal with one more run, which has ended."""
    with begun(path, name) as recording:
        sink = recording.sink("Net")
        steps(sink, falling(count))
        for finding in findings:
            found(sink, **finding)
    return Journal(path)
