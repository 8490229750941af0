"""Screenshots of every page that gradmend makes, to be looked at: `make pictures`.

python docs/pictures.py FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from playwright.sync_api import Browser

from browsing import chromium, opened, seen

LOOKS = {"light": {}, "dark": {"dark": True}, "narrow": {"width": 400}}

_ATLAS = 12_000_000
"""Bytes that it may take."""

TRAINING = """
import torch
from torch import nn

torch.manual_seed(0)
net = nn.RNN(8, 64, batch_first=True)
head = nn.Linear(64, 2)
nn.init.orthogonal_(net.weight_hh_l0, gain=1.15)
optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.05)
for step in range(300):
    x = torch.randn(32, 60, 8)
    loss = nn.functional.cross_entropy(head(net(x)[0][:, -1]), (x[:, 0, 0] > 0).long())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def main(folder: Path) -> None:
    """Make all pages in the folder, and three screenshots of each."""
    folder.mkdir(parents=True, exist_ok=True)
    _make(folder)
    with chromium() as browser:
        for page in sorted(folder.glob("*.html")) + sorted((folder / "atlas").glob("*.html")):
            _shoot(browser, page.absolute().as_uri(), folder / f"{page.parent.name}-{page.stem}")
        with _served(folder / "site") as address:
            for page in sorted((folder / "site").glob("*.html")):
                _shoot(browser, f"{address}/{page.name}", folder / f"site-{page.stem}", (address, "data:"))
        with _viewed(folder / "run.gradmend") as address:
            _shoot(browser, address, folder / "view", (address.rpartition("/")[0], "data:", "blob:"))


def _make(folder: Path) -> None:
    (folder / "train.py").write_text(TRAINING)
    for line in (
        "check deep --depth 30 --report check.html",
        "check deep --depth 30 --report zh.html --lang zh",
        "mend deep --depth 10 --report mend.html",
        "study neuron --report study.html",
        "run --journal run.gradmend --report run.html train.py",
        "atlas atlas",
    ):
        for old in folder.glob(line.partition("--report ")[2].split(" ")[0] or "-"):
            old.unlink()
        subprocess.run([sys.executable, "-m", "gradmend", *line.split()], cwd=folder, check=False)
    size = sum(each.stat().st_size for each in (folder / "atlas").iterdir())
    assert size < _ATLAS, f"The atlas takes {size} bytes."
    options = ["--strict", "--site-dir", str((folder / "site").absolute())]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run([sys.executable, "-m", "mkdocs", "build", *options], env=quiet, check=True)


def _shoot(
    browser: Browser, address: str, name: Path, inside: tuple[str, ...] = ("file:", "data:", "blob:")
) -> None:
    for look, options in LOOKS.items():
        with opened(browser, address, inside=inside, **options) as page:
            seen(page)
            page.screenshot(path=f"{name}-{look}.png", full_page=True)
    print(name)  # noqa: T201


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def _viewed(journal: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "gradmend", "view", "--no-open", str(journal)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        line = next(line for line in server.stdout if "http://" in line)
        yield next(word for word in line.split() if word.startswith("http://"))
        server.terminate()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
