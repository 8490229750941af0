"""Programs with known faults: which there are, what is known of each, and how one is made to run.

The cases are a file of JSON lines with a module `build.py` beside it, which offers `load(path)`,
`build(row, seed, data_root)`, `parts_of(row)` and the exception `CannotBuild`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Json = dict[str, Any]

CONTROLS = ("fixed", "normal", "clean")
"""Verdicts of programs without a known fault. What is unlabelled counts nowhere."""

SYMPTOMS = frozenset({"vanishing_gradient", "dying_relu", "oscillating_loss"})
"""Labels that name what is seen and not its cause; many parts can cure them."""

HIDDEN = frozenset(
    {
        "missing_regularisation",
        "suboptimal_weight_regularisation",
        "validation_on_training_data",
        "wrong_augmentation",
        "wrong_dropout_rate",
        "wrong_epochs",
        "wrong_labels",
        "wrong_layer_properties",
        "wrong_layers",
    }
)
"""Faults that neither the network, the loss, the optimizer, the batch size nor the values of a batch show.

They appear in a whole training, or beside a better one: how long to train, how many units, how much
dropout, which rows validate, whether augmented images or shuffled labels still mean what they say.
"""

VISIBLE = (
    f"some labelled fault is none of {', '.join(sorted(HIDDEN))}; not all are symptoms\n"
    f"({', '.join(sorted(SYMPTOMS))}); and an injected fault does not act at inference only"
)
"""Which buggy cases have a fault that is visible in the setup."""


@dataclass(frozen=True)
class Truth:
    """What is known of a case.

    Args:
        group: programs of one group are variants of one program, and count as one.
        split: the side that is tuned on (`dev`) or reported on (`test`).
        verdict: buggy, one of `CONTROLS`, or unlabelled.
        faults: the published labels.
        parts: the parts of the setup that they blame.
        injected: where an injected fault acts: config, data, loss, update, inference.
        published: what the research tools said of it, as published.
    """

    id: str
    corpus: str
    group: str
    split: str
    verdict: str
    faults: tuple[str, ...]
    parts: tuple[str, ...]
    injected: str
    published: Json

    @property
    def located(self) -> bool:
        """Whether the labels blame a part, and not only a symptom."""
        return self.verdict == "buggy" and bool(self.parts) and not self.symptomatic

    @property
    def symptomatic(self) -> bool:
        return self.verdict == "buggy" and bool(self.faults) and SYMPTOMS.issuperset(self.faults)

    @property
    def visible(self) -> bool:
        """Whether its fault can be seen in the setup: see `VISIBLE`."""
        return self.located and self.injected != "inference" and not HIDDEN.issuperset(self.faults)


def builder(cases: Path) -> ModuleType:
    """The module that makes these cases run."""
    name = "benchmarks_corpora_build"
    spec = spec_from_file_location(name, cases.parent / "build.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"There is no build.py beside {cases}.")
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def select(cases: Path, split: str | None = None, ids: Collection[str] = ()) -> list[tuple[Json, Truth]]:
    """The labelled cases of a split, or those named, each with what is known of it."""
    module = builder(cases)
    rows: list[Json] = module.load(cases)
    if unknown := set(ids) - {row["id"] for row in rows}:
        raise SystemExit(f"There is no case {', '.join(sorted(unknown))} in {cases}.")
    found = [(row, truth(row, module)) for row in rows]
    return [
        (row, known)
        for row, known in found
        if (known.id in ids or not ids) and split in (known.split, None) and known.verdict != "unlabelled"
    ]


def truth(row: Json, module: ModuleType) -> Truth:
    """What a line of the cases says of the program; its field `static_contradictions` is never read."""
    verdict = row["labels"]["verdict"]
    return Truth(
        id=row["id"],
        corpus=row["corpus"],
        group=row["group"],
        split=row["split"],
        verdict=verdict if verdict in ("buggy", *CONTROLS) else "unlabelled",
        faults=tuple(row["labels"].get("faults") or ()),
        parts=tuple(module.parts_of(row)),
        injected=(row.get("fault_injection") or {}).get("in", ""),
        published=row.get("peer_results") or {},
    )


def penalized(case: Any) -> bool:
    """Whether the program adds a penalty of the weights to its loss."""
    return any(l1 or l2 for _, l1, l2 in case.model.penalties)


def batches(case: Any, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as the program would feed them: its own size, the training rows shuffled, epoch after epoch.

    A last batch of a single row is left out where batches are larger, as batch normalization needs two.
    """
    order = torch.Generator().manual_seed(seed)
    least = min(2, case.batch_size, len(case.x_train))
    while True:
        shuffled = torch.randperm(len(case.x_train), generator=order)
        for rows in torch.split(shuffled, case.batch_size):
            if len(rows) >= least:
                yield case.x_train[rows], case.y_train[rows]


def draw(case: Any, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The first few of these batches."""
    return list(islice(batches(case, seed), count))
