"""Statistics of layers over the steps, as a journal holds them."""

from pathlib import Path

import pytest
import torch
from torch import nn

import gradmend as gm
from gradmend.journal import Journal
from gradmend.journal.heats import heats
from gradmend.journal.series import read_series
from gradmend.watch.exam import tables


def test_the_saturation_of_each_activation_is_recorded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    nn.init.constant_(model[0].bias, 50.0)
    profile = gm.measure(gm.Setup(model, nn.MSELoss()), (torch.randn(32, 8), torch.randn(32, 1)))
    with Journal(tmp_path / "run.gradmend").run("new") as run:
        for step in (1, 5):
            for name, rows, statistics, values in tables(profile):
                reading = {"table": name, "rows": rows, "statistics": statistics, "values": values.numpy()}
                run.sink("net").write("reading", step, reading)
    found = heats(list(read_series(tmp_path / "run.gradmend", 1)))["saturated"]
    assert found.names == ("1", "3")
    assert found.values[:, 0] == pytest.approx(1.0)
    assert found.values[:, 1].max() < 0.1


def test_a_journal_from_before_it_was_recorded_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.gradmend"
    with Journal(path).run("old") as run:
        for step in (1, 5):
            rows = {"table": "sites", "rows": ("0",), "statistics": ("rms", "gradient", "cosine", "dead")}
            run.sink("net").write("reading", step, {**rows, "values": torch.ones(1, 4).numpy()})
    found = heats(list(read_series(path, 1)))
    assert "saturated" not in found
    assert found["dead"].values.tolist() == [[1.0], [1.0]]
