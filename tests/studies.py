"""Studies that take a moment, and what must be the same of two runs."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmend.data import Data
from gradmend.journal import JournalError
from gradmend.setup import Setup
from gradmend.study.design import Study
from gradmend.study.engine import run
from gradmend.study.outcome import Outcome
from gradmend.study.store import read_study
from helpers import blobs

TIMES = ("seconds", "step_seconds")


def rows() -> Data:
    x, y = blobs(160)
    return Data(x[:128], y[:128], x[128:], y[128:], "blobs", 3)


def small(**changes: Any) -> Study:
    """Twelve trials of two structures, of 40 steps each."""
    plan = {
        "factors": {"activation": ["relu", "tanh"], "learning_rate": [0.1, 0.02]},
        "settings": {"width": 8, "depth": 2},
        "data": rows(),
        "batch_size": 16,
        "epochs": 5,
        "seeds": range(3),
        "name": "small",
    }
    return Study("deep", **{**plan, **changes})


def longer() -> Study:
    """Of three structures, so that two processes do not end at once."""
    return small(epochs=50, factors={"activation": ["relu", "tanh", "elu"], "learning_rate": [0.1, 0.02]})


def outcomes(study: Study, path: Path, workers: str = "local") -> Sequence[Outcome]:
    return run(study, path, workers, progress=False).outcomes


def untimed(outcome: Outcome) -> tuple[Any, ...]:
    """All of an outcome but its times."""
    measures = {name: value for name, value in outcome.measures.items() if name not in TIMES}
    rest = (outcome.status, outcome.reason, outcome.losses, outcome.accuracies, outcome.findings)
    return dict(outcome.arm), outcome.seed, measures, *rest


def stored(path: Path) -> Mapping[str, Outcome]:
    return read_study(path).outcomes


def wait_for_trials(path: Path, going: Callable[[], bool]) -> None:
    """Until some trials are in the journal of a study that is going on."""
    while going():
        with suppress(JournalError):
            if stored(path):
                return
        time.sleep(0.02)
    raise AssertionError("it ended before")


def own(step: Callable[[nn.Module, Any], Tensor], seeds: Sequence[int] = range(6)) -> Study:
    """Trials of one setup, whose step is the user's."""

    def make(seed: int) -> Setup:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        return Setup(model, optimizer=partial(torch.optim.SGD, lr=0.1), step=step)

    return Study({"mine": make}, data=rows(), epochs=1, seeds=seeds, name="own")


def plain(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def is_cursed(model: nn.Module) -> bool:
    """Whether it is the network of seed 3, before any step."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        weight = nn.Linear(8, 8).weight
    first = next(model.parameters())
    return torch.equal(first, weight)
