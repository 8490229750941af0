"""One thread: small nets run many times faster on it, and sums are the same in every run."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from browsing import browser

__all__ = ["browser"]

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell does that to what it begins in the background, and the scripts of the tests would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test runs in a folder of its own; files there are imported as in a process of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name, module in list(sys.modules.items()):
        if tmp_path in Path(getattr(module, "__file__", None) or "/").absolute().parents:
            del sys.modules[name]
