"""Statistics of layers over the steps, as a journal holds them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gradmend.journal import Journal
from gradmend.journal.heats import heats
from gradmend.journal.series import read_series
from gradmend.watch import Watch


def watched(path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    nn.init.constant_(model[0].bias, 50.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Watch(model, optimizer, journal=path, budget=100.0, report=list):
        for _ in range(80):
            optimizer.zero_grad()
            model(torch.randn(32, 8)).square().mean().backward()
            optimizer.step()
    return path


def test_the_saturation_of_each_activation_is_recorded(tmp_path: Path) -> None:
    found = heats(list(read_series(watched(tmp_path / "run.gradmend"), 1)))["saturated"]
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
