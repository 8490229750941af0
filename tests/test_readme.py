"""The README's code runs, and it speaks of every command."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.main import get_command

from gradmend.cli import app
from helpers import blobs, plain

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]


@pytest.mark.usefixtures("own_folder")
def test_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    """In English; the other README has the same blocks, as the last test shows."""
    x, y = blobs(256)
    rows = torch.utils.data.TensorDataset(x, y)
    names = {"model": plain(16, nn.Sigmoid), "loader": torch.utils.data.DataLoader(rows, batch_size=64)}
    blocks = re.findall(r"```python\n(.*?)```", READMES[0].read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(block, names)
    assert "Mended by" in capsys.readouterr().out
    assert names["history"].loss[-1] < names["history"].loss[0]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_every_command_is_named(readme: Path) -> None:
    for command in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"`gradmend {command}" in readme.read_text()


def test_the_two_readmes_show_the_same_code_and_numbers() -> None:
    def facts(path: Path) -> list[list[str]]:
        text = path.read_text()
        code = re.findall(r"```.*?```", text, re.S)[1:]
        return [
            [re.sub(r"#.*", "", block) for block in code],
            re.findall(r"\d+\.\d+", text.split("`make bench`")[-1]),
        ]

    assert facts(READMES[0]) == facts(READMES[1])
