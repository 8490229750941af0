"""A training on two processes is watched as one: statistics over all ranks, findings once, with their rank.

This file is also the script of both; what each training showed is written as JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gradmend.journal import Journal
from gradmend.watch import Watch
from gradmend.watch.pace import SHARES, Pace
from gradmend.watch.ranks import ROUND, First, Other, Safe
from gradmend.watch.stream import Table
from running import ROOT, script

STEPS, EVERY, FAULT = 40, 5, 21
LAYERS = {"DDP": ("module.1", "module.3", "module.4"), "FSDP2": ("1", "3", "4")}
Run = dict[str, Any]


class Book:
    """A journal in memory."""

    def __init__(self) -> None:
        self.losses: list[float | None] = []
        self.tables: list[tuple[int, str, tuple[str, ...], list[list[float]]]] = []

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if kind == "step":
            self.losses.append(values["loss"])
        if kind == "reading":
            self.tables.append((step, values["table"], values["rows"], values["values"].tolist()))


def network() -> nn.Sequential:
    """Its 33 rows do not divide by two."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 33), nn.ReLU(), nn.Linear(33, 5))


def replicated() -> nn.Module:
    return DistributedDataParallel(network())


def sharded() -> nn.Module:
    model = network()
    fully_shard(model[4])
    return fully_shard(model)


def mean(x: Tensor) -> Tensor:
    """Over all ranks; the script's own way, by a collective."""
    x = x.detach().double()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def rms(x: Tensor) -> float:
    whole = x.full_tensor() if hasattr(x, "full_tensor") else x
    return whole.detach().square().mean().sqrt().item()


def train(
    build: Callable[[], nn.Module],
    attached: bool = True,
    fault: int = 0,
    until: int = STEPS,
) -> Run:
    """What a training was like, and what its watch said of it."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    book, said = Book(), []
    watch = Watch(
        model,
        optimizer,
        every=EVERY,
        journal=book,
        report=lambda n: said.append((n.began, str(n.finding.sentence))),
    )
    outputs: list[Tensor] = []
    relu = next(m for m in model.modules() if isinstance(m, nn.ReLU))
    relu.register_forward_hook(lambda *given: outputs.append(given[-1].detach()))
    torch.manual_seed(dist.get_rank())
    seen: Run = {"losses": [], "own": [], "gradients": [], "layer": []}
    if attached:
        watch.attach()
    for step in range(1, STEPS + 1):
        x = torch.randn(16, 20)
        if step == fault and dist.get_rank() == 1:
            x[3, 4] = torch.nan
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(16) % 5)
        loss.backward()
        optimizer.step()
        seen["own"].append(loss.item())
        seen["losses"].append(mean(loss).item())
        seen["gradients"].append([rms(p.grad) for p in model.parameters()])
        seen["layer"].append(mean(outputs.pop().square().mean()).sqrt().item())
        if step == until:
            watch.detach()
    watch.detach()
    weights = [rms(p) for p in model.parameters()]
    return {**seen, "book": vars(book), "said": said, "weights": weights, "steps": watch.step}


def all_trainings() -> dict[str, Run]:
    first = dist.get_rank() == 0
    return {
        "DDP": train(replicated),
        "FSDP2": train(sharded),
        "DDP unwatched": train(replicated, attached=False),
        "FSDP2 unwatched": train(sharded, attached=False),
        "DDP with NaN": train(replicated, fault=FAULT),
        "FSDP2 with NaN": train(sharded, fault=FAULT),
        "one ends early": train(replicated, until=STEPS if first else 20),
        "only rank 0": train(replicated, attached=first),
        "only rank 1": train(replicated, attached=not first, fault=FAULT),
    }


def start(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'tests'}"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=150
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Run]]:
    """By rank and name of the training."""
    folder = tmp_path_factory.mktemp("ranks")
    done = start(__file__, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "gradmend" not in done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_statistics_are_those_of_all_ranks(runs: list[dict[str, Run]], kind: str) -> None:
    run = runs[0][kind]
    assert run["book"]["losses"] == pytest.approx(run["losses"], rel=1e-5)
    assert run["losses"] != pytest.approx(run["own"], rel=1e-3)
    tables = run["book"]["tables"]
    assert {tuple(rows) for _, name, rows, _ in tables if name == "layers"} == {LAYERS[kind]}
    layers = {step: values[0][0] for step, name, _, values in tables if name == "layers"}
    assert list(layers) == list(range(EVERY, STEPS + 1, EVERY))
    assert layers == pytest.approx({step: run["layer"][step - 1] for step in layers}, rel=1e-5)
    gradients = {step: [row[0] for row in values] for step, name, _, values in tables if name == "gradients"}
    assert len(gradients) >= 2
    for step, found in gradients.items():
        assert found == pytest.approx(run["gradients"][step - 1], rel=1e-4)


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_nothing_changes_for_being_watched(runs: list[dict[str, Run]], kind: str) -> None:
    for run in runs:
        assert run[kind]["own"] == run[f"{kind} unwatched"]["own"]
        assert run[kind]["weights"] == run[f"{kind} unwatched"]["weights"]
        assert run[kind]["steps"] == STEPS
        assert run[kind]["said"] == []


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_a_finding_is_said_once_with_its_rank(runs: list[dict[str, Run]], kind: str) -> None:
    first, second = (run[f"{kind} with NaN"] for run in runs)
    ((began, sentence),) = first["said"]
    assert began == FAULT
    assert sentence.startswith(f"The loss of step {FAULT} is nan, after ")
    assert sentence.endswith("On rank 1: The batch holds values that are not finite.")
    assert second["said"] == []


def test_only_the_first_rank_writes_the_journal(runs: list[dict[str, Run]]) -> None:
    assert all(
        run["book"] == {"losses": [], "tables": []} for name, run in runs[1].items() if name != "only rank 1"
    )


def test_a_rank_that_ends_early_is_not_waited_for(runs: list[dict[str, Run]]) -> None:
    run = runs[0]["one ends early"]
    losses = run["book"]["losses"]
    assert len(losses) == STEPS
    assert losses[:20] == pytest.approx(run["losses"][:20], rel=1e-5)
    assert losses[20:] == pytest.approx(run["own"][20:STEPS], rel=1e-5)


def test_only_some_ranks_may_be_watched(runs: list[dict[str, Run]]) -> None:
    alone = runs[0]["only rank 0"]
    assert alone["book"]["losses"] == pytest.approx(alone["own"], rel=1e-5)
    ((began, sentence),) = runs[1]["only rank 1"]["said"]
    assert began == FAULT
    assert "The batch holds values" in sentence


TRAINING = """
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(1, 41):
    x = torch.randn(8, 4)
    if step == 20 and dist.get_rank() == 1:
        x[0, 0] = torch.inf
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), torch.arange(8) % 3).backward()
    optimizer.step()
dist.destroy_process_group()
"""


def test_torchrun_of_gradmend_run(tmp_path: Path) -> None:
    file, journal = script(tmp_path, TRAINING), tmp_path / "run.gradmend"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = start(*torchrun, "-m", "gradmend", "run", "--journal", str(journal), file, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stderr.split())
    assert words.count("On rank 1: The batch holds values that are not finite.") == 1
    assert words.count("gradmend: Sequential, 40 steps") == 1
    (run,) = Journal(journal).runs()
    ((_, steps),) = Journal(journal).steps(run["id"]).items()
    assert len(steps["loss"]) == 40
    assert [finding["began"] for finding in Journal(journal).findings(run["id"])] == [20]


def reading(step: int, value: float, name: str = "loss") -> Table:
    return Table(step, ("",), (name,), np.array([[value]], np.float32))


def pair() -> tuple[First, Other]:
    """Two ranks in this process, just begun."""
    store = dist.HashStore()
    return First(Safe(store, "x"), 2, Pace(0.02)), Other(Safe(store, "x"), 1, Pace(0.02))


def test_numbers_of_different_kinds_are_put_together() -> None:
    first, other = pair()
    names = ("mean", "gradient")
    tables = [
        np.array([[1.0, 3.0], [5.0, np.nan]], np.float32),
        np.array([[4.0, 6.0], [np.nan, 2.0]], np.float32),
    ]
    taken: list[Table] = []
    for end, values, share in zip((first, other), tables, (2.0, 1.0), strict=True):
        table = Table(1, ("a", "b"), names, values)
        end.take("weights", table, np.full(2, share, np.float32), taken.append)
    assert not taken
    other.end_step(ROUND, Pace(0.02))
    first.end_step(ROUND, Pace(0.02))
    expected = [[2.0, np.sqrt((2 * 9 + 36) / 3)], [5.0, 2.0]]
    np.testing.assert_allclose(taken[0].values, expected, rtol=1e-6)


def test_what_does_not_come_is_waited_for_for_some_steps_only() -> None:
    first, _ = pair()
    taken: list[int] = []
    for step in range(1, 200):
        first.take("losses", reading(step, 1.0), None, lambda table: taken.append(table.step))
        if step <= 4 * ROUND:
            assert not taken
    assert taken == list(range(1, 200))


def test_letters_that_nobody_reads_stay_few() -> None:
    store = dist.HashStore()
    other = Other(Safe(store, "x"), 1, Pace(0.02))
    for step in range(1, 5000):
        other.take("losses", reading(step, 1.0), None, lambda _: None)
        other.end_step(step, Pace(0.02))
    assert other.alone
    assert store.num_keys() <= 65


def test_all_ranks_look_at_the_same_steps() -> None:
    (first, other), clock = pair(), iter(range(10**9))
    pace = Pace(0.02, clock=lambda: float(next(clock)))
    looks: list[list[tuple[int, tuple[str, ...]]]] = [[], []]
    for step in range(1, 2000):
        for end, seen in zip((first, other), looks, strict=True):
            if found := end.plan(step, tuple(SHARES), pace if end.first else Pace(0.02)):
                seen.append((step, found))
        pace.note(looks[0][-1][1] if looks[0] and looks[0][-1][0] == step else ())
        other.end_step(step, pace)
        first.end_step(step, pace)
    assert looks[0] == looks[1]
    assert len(looks[0]) > 20


class Gone:
    """A store whose process has ended."""

    def set_timeout(self, _: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        def fail(*_: object) -> None:
            raise RuntimeError("Broken pipe")

        return fail


def test_a_store_that_is_gone_is_empty() -> None:
    other = Other(Safe(Gone(), "x"), 1, Pace(0.02))
    other.take("losses", reading(1, np.nan), None, lambda _: None)
    other.end_step(ROUND, Pace(0.02))
    assert other.alone
    other.finish()


def join(first: bool, port: Connection) -> None:
    """Be one of two processes; the first one tells the other where to find it."""
    store = dist.TCPStore("localhost", 0 if first else port.recv(), 2, first, wait_for_workers=False)
    if first:
        port.send(store.port)
    dist.init_process_group("gloo", store=store, rank=int(not first), world_size=2)


def main() -> int:
    """Two processes, for the price of importing torch once."""
    torch.set_num_threads(1)
    ends = Pipe()
    child = os.fork()
    join(child != 0, ends[child == 0])
    Path(f"{dist.get_rank()}.json").write_text(json.dumps(all_trainings()))
    dist.destroy_process_group()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0


if __name__ == "__main__":
    sys.exit(main())
