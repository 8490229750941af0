"""The trackers, each written by a real watch and read back by the tracker's own means."""

import json
import math
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradmend.integrations.trackers import MLflow, TensorBoard, WandB
from gradmend.watch import Sink, Watch

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
FINDING: dict[str, Any] = {
    "id": 4,
    "cause": "dead_units",
    "severity": "error",
    "sentence": "All units are dead.",
    "sites": ("relu",),
    "where": ("train.py:7",),
    "measured": math.nan,
    "expected": None,
    "unit": "",
    "evidence": ("A lower rate keeps them.",),
    "began": 3,
    "ended": None,
}
TOLD = "error: dead units, from step 3, at relu. All units are dead. A lower rate keeps them. (train.py:7)"


def write_all(sink: Sink) -> None:
    """Everything that a watch may write, with all that is not finite."""
    for step, loss in enumerate([1.5, math.nan, math.inf, None], 1):
        sink.write("step", step, {"loss": loss, "gradient": None if step == 2 else 0.5, "rate": 0.1})
    values = np.array([[1.0, math.nan], [math.inf, 4.0]], np.float32)
    table = {"table": "layers", "rows": ("net.0", "net#2"), "statistics": ("mean", "rms"), "values": values}
    sink.write("reading", 2, table)
    sink.write("finding", 3, FINDING)
    sink.write("note", 4, {"text": "The model is compiled."})


def trained(sink: Sink) -> None:
    """A watched training with a batch that is not finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, every=1, journal=sink, report=lambda _: None):
        for step in range(6):
            optimizer.zero_grad()
            model(X * torch.nan if step == 4 else X).square().mean().backward()
            optimizer.step()


def same(found: Any, expected: Any) -> bool:
    return bool(np.array_equal(np.array(found, float), np.array(expected, float), equal_nan=True))


# TensorBoard


@pytest.fixture
def board(tmp_path: Path) -> Iterator[tuple[Sink, Callable[[], Any]]]:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:

        def read() -> Any:
            writer.flush()
            return EventAccumulator(str(tmp_path)).Reload()

        yield TensorBoard(writer), read


def test_tensorboard_takes_all(board: Any) -> None:
    sink, read = board
    write_all(sink)
    events = read()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert same(scalars["gradmend/loss"], [1.5, math.nan, math.inf])
    assert [event.step for event in events.Scalars("gradmend/gradient norm")] == [1, 3, 4]
    assert scalars["gradmend/layers mean/net.0"] == [1.0]
    assert scalars["gradmend/layers rms/net#2"] == [4.0]
    assert "gradmend/layers rms/net.0" not in scalars
    texts = {tag: events.Tensors(tag)[0] for tag in events.Tags()["tensors"]}
    assert texts["gradmend/finding 4/text_summary"].tensor_proto.string_val[0].decode() == TOLD
    assert texts["gradmend/note/text_summary"].step == 4


def test_tensorboard_gets_a_training(board: Any) -> None:
    sink, read = board
    trained(sink)
    events = read()
    losses = [event.value for event in events.Scalars("gradmend/loss")]
    assert len(losses) == 6
    assert math.isnan(losses[4])
    assert any(tag.startswith("gradmend/layers rms/") for tag in events.Tags()["scalars"])
    told = events.Tensors("gradmend/finding 0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert told.startswith("error: non finite, from step 5")


# Weights & Biases


@pytest.fixture
def wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for kind in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path))
    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_meta=True)
    with wandb.init(project="gradmend", mode="offline", dir=str(tmp_path), settings=settings) as run:
        yield run


def written(run: Any, folder: Path) -> list[dict[str, Any]]:
    """What W&B has stored on disk, row by row."""
    from wandb.proto.wandb_internal_pb2 import Record

    run.finish()
    file, found = next(folder.glob("**/*.wandb")), [Record()]
    for _ in range(1000):  # W&B writes in another process, which may lag behind
        if found[-1].HasField("exit"):
            break
        time.sleep(0.02)
        found = [Record.FromString(data) for data in records(file.read_bytes())] or [Record()]
    histories = [record.history.item for record in found if record.HasField("history")]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        for items in histories
    ]


def records(stored: bytes, head: int = 7, block: int = 32768) -> Iterator[bytes]:
    """The records of a LevelDB log; checksum, length and kind (whole, first, middle, last) precede parts."""
    place, parts = head, b""
    while place + head <= len(stored):
        if block - place % block < head:
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", stored, place)
        parts += stored[place + head : place + head + length]
        place += head + length
        if kind in (1, 4):
            yield parts
            parts = b""


def test_wandb_takes_all(wandb_run: Any, tmp_path: Path) -> None:
    write_all(WandB(wandb_run))
    rows = written(wandb_run, tmp_path)
    assert [row["gradmend/step"] for row in rows] == [1, 2, 3, 4, 2, 3, 4]
    assert same([row["gradmend/loss"] for row in rows[:3]], [1.5, math.nan, math.inf])
    assert rows[4]["gradmend/layers rms/net#2"] == 4
    assert rows[5]["gradmend/finding 4"] == TOLD


def test_wandb_gets_a_training(wandb_run: Any, tmp_path: Path) -> None:
    trained(WandB(wandb_run))
    rows = written(wandb_run, tmp_path)
    assert sum("gradmend/loss" in row for row in rows) == 6
    assert any("gradmend/finding 0" in row for row in rows)


# MLflow


@pytest.fixture
def mlflow_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with mlflow.start_run() as run:
        yield run.info.run_id
    mlflow.set_tracking_uri(None)


def read_back(run_id: str) -> tuple[Callable[[str], list[tuple[int, float]]], dict[str, str], set[str]]:
    import mlflow

    mlflow.flush_async_logging()
    client = mlflow.MlflowClient()
    data = client.get_run(run_id).data

    def history(name: str) -> list[tuple[int, float]]:
        return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))

    return history, data.tags, set(data.metrics)


def test_mlflow_takes_all(mlflow_run: str) -> None:
    write_all(MLflow(mlflow_run))
    history, tags, metrics = read_back(mlflow_run)
    assert same(history("gradmend/loss"), [(1, 1.5), (2, math.nan), (3, math.inf)])
    assert history("gradmend/layers rms/net_2") == [(2, 4.0)]
    assert "gradmend/layers rms/net.0" not in metrics
    assert tags["gradmend/finding 4"] == TOLD
    assert tags["gradmend/note"] == "The model is compiled."


def test_mlflow_gets_a_training(mlflow_run: str) -> None:
    trained(MLflow(mlflow_run))
    history, tags, _ = read_back(mlflow_run)
    assert [step for step, _ in history("gradmend/loss")] == [1, 2, 3, 4, 5, 6]
    assert tags["gradmend/finding 0"].startswith("error: non finite")


def test_a_prefix_tells_parts_apart(board: Any) -> None:
    sink, read = board
    for part in ("generator", "critic"):
        TensorBoard(sink._writer, f"{part}/").write("step", 1, {"loss": 2.0, "gradient": None, "rate": None})
    assert set(read().Tags()["scalars"]) == {"generator/loss", "critic/loss"}
