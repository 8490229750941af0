"""The live view: a real server and a real browser while a training is watched."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from plotly.graph_objects import Figure
from torch import nn

from browsing import opened, seen, violations
from gradmend.errors import GradmendError, MissingExtraError
from gradmend.journal import JournalError
from gradmend.view import serve
from gradmend.view.live import Followed, Kept, Live
from gradmend.view.server import application
from gradmend.watch import Watch
from recordings import HOSTILE, begun, found, recorded, steps
from studies import small

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

TOKEN = "a-token"


@contextmanager
def serving(*paths: Path) -> Iterator[str]:
    """The address of a server of these journals."""
    live = Live(paths)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        config = uvicorn.Config(
            application(live, TOKEN, port), log_level="critical", lifespan="off", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}/{TOKEN}/"
        finally:
            server.should_exit = True
            thread.join()
            live.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server of a journal with two runs."""
    path = tmp_path_factory.mktemp("served") / "run.gradmend"
    recorded(path, "python one.py")
    recorded(path, "python two.py", 40, {"began": 3})
    with serving(path) as address, httpx.Client(base_url=address, trust_env=False) as client:
        yield client


@pytest.mark.parametrize(
    "place", ["/", "/content", "/a-tokem/", "/a-token", "/a-token/x", "/a-token/../server.py"]
)
def test_without_the_token_there_is_nothing(served: httpx.Client, place: str) -> None:
    root = str(served.base_url).removesuffix(f"{TOKEN}/").rstrip("/")
    answer = served.get(root + place)
    assert (answer.status_code, answer.text) == (404, "There is nothing here.")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example"])
def test_another_name_of_this_machine_is_refused(served: httpx.Client, host: str) -> None:
    """A page elsewhere may have its name resolved to 127.0.0.1, but the browser sends the name."""
    assert served.get("content", headers={"Host": host}).status_code == 404
    port = served.base_url.port
    assert served.get("content", headers={"Host": f"localhost:{port}"}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"])
def test_it_can_only_be_read(served: httpx.Client, method: str) -> None:
    assert served.request(method, "content").status_code == 405


def test_what_the_browser_is_told(served: httpx.Client) -> None:
    page, content = served.get(""), served.get("content")
    policy = page.headers["content-security-policy"]
    (nonce,) = set(re.findall(r"'nonce-([^']+)'", policy))
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "script-src 'self' 'nonce-" in policy
    assert "frame-ancestors 'none'" in policy
    assert all(f'nonce="{nonce}"' in tag for tag in re.findall(r"<script(?! type)[^>]*>", page.text))
    assert served.get("").headers["content-security-policy"] != policy
    for answer in (page, content):
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
    assert page.headers["cache-control"] == "no-store"
    (plotly,) = re.findall(r'src="(plotly-[\d.]+\.js)"', page.text)
    assert "immutable" in served.get(plotly).headers["cache-control"]


def test_the_same_content_is_not_sent_twice(served: httpx.Client) -> None:
    first = served.get("content")
    again = served.get("content", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert [run["name"] for run in first.json()["runs"]] == ["python one.py", "python two.py"]
    assert first.json()["chosen"] == ["1.2"]
    both = served.get("content", params={"runs": "1.1,1.2"}, headers={"If-None-Match": first.headers["etag"]})
    assert both.json()["chosen"] == ["1.1", "1.2"]
    assert "Side by side" in both.json()["html"]
    assert served.get("content", params={"runs": "9.9,<b>"}).json()["chosen"] == ["1.2"]


def test_a_journal_that_is_written_or_replaced_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "run.gradmend"
    recorded(path)
    followed = Followed(path)
    before = followed.state()
    assert followed.state() == before
    recorded(path)
    assert (written := followed.state()) != before
    path.rename(tmp_path / "old.gradmend")
    with pytest.raises(JournalError):
        followed.state()
    recorded(path)
    assert followed.state() not in (before, written)
    followed.close()


def test_pictures_are_drawn_once_from_the_same_numbers() -> None:
    drawn: list[float] = []

    def draw(values: Any) -> Figure:
        drawn.append(float(values[0]))
        return Figure()

    kept = Kept()
    first = kept(draw, np.zeros(2))
    for _ in range(3):
        kept.forget()
        assert kept(draw, np.zeros(2)) is first
    kept(draw, np.ones(2))
    assert drawn == [0.0, 1.0]


def until(page: "Page", condition: str) -> None:
    """Wait for what a script says of the page, which itself may evaluate none."""
    end = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(100)


def train(count: int, model: nn.Module, optimizer: torch.optim.Optimizer, random: torch.Generator) -> None:
    for _ in range(count):
        x = torch.randn(16, 8, generator=random)
        optimizer.zero_grad()
        (model(x) - x[:, :1]).square().mean().backward()
        optimizer.step()


def made() -> tuple[nn.Module, torch.optim.Optimizer, torch.Generator]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.05), torch.Generator().manual_seed(1)


def test_the_page_follows_a_training_that_it_does_not_change(tmp_path: Path, browser: "Browser") -> None:
    path = tmp_path / "run.gradmend"
    training = made()
    with Watch(*training[:2], journal=path) as watch:
        train(30, *training)
        with serving(path) as address, opened(browser, address, inside=(address, "data:")) as page:
            page.get_by_text("Sequential, 30 steps").wait_for()
            seen(page)
            page.evaluate("window.marked = true; window.scrollTo(0, 300)")
            train(30, *training)
            page.get_by_text("Sequential, 60 steps").wait_for()
            until(page, "document.querySelector('.plot').calcdata[0].length === 60")
            assert page.evaluate("[window.marked, window.scrollY]") == [True, 300]
            assert "Live" in page.locator("#live [role=status]").inner_text()
            watch.detach()
            page.get_by_text("Ended: what was recorded is shown.").wait_for()
    alone = made()
    train(60, *alone)
    for watched, plain in zip(training[0].parameters(), alone[0].parameters(), strict=True):
        assert torch.equal(watched, plain)


@pytest.mark.parametrize("dark", [False, True])
def test_runs_are_chosen_by_boxes_and_stand_in_the_address(
    tmp_path: Path, browser: "Browser", dark: bool
) -> None:
    """Hostile names and losses that are all NaN among them."""
    path = tmp_path / "run.gradmend"
    recorded(path, "python one.py", 30, {"began": 3})
    with begun(path, HOSTILE) as recording:
        steps(recording.sink(HOSTILE), [float("nan")] * 12, layers=(HOSTILE, "b"))
        found(recording.sink(HOSTILE), 1, sentence=HOSTILE, sites=(HOSTILE,))
    with serving(path) as address, opened(browser, address, dark=dark, inside=(address, "data:")) as page:
        page.get_by_role("checkbox", name="python one.py").check()
        page.get_by_role("heading", name="Side by side", exact=True).wait_for()
        assert page.url.endswith("#runs=1.1,1.2")
        seen(page)
        assert not violations(page)
        page.get_by_role("checkbox", name=HOSTILE).uncheck()
        page.get_by_role("heading", name="Side by side", exact=True).wait_for(state="detached")
        page.reload()
        until(page, "document.querySelectorAll('#live input:checked').length === 1")
        assert page.get_by_role("checkbox", name="python one.py").is_checked()


def test_a_server_that_is_gone_is_said(tmp_path: Path, browser: "Browser") -> None:
    window = browser.new_context()
    page = window.new_page()
    recording = begun(tmp_path / "run.gradmend")
    with serving(tmp_path / "run.gradmend") as address:
        page.goto(address)
        page.get_by_text("Live: what is written is shown at once.").wait_for()
    page.get_by_text("The server is gone.").wait_for()
    recording.close()
    window.close()


def test_a_journal_of_a_study_shows_its_results(tmp_path: Path) -> None:
    path = tmp_path / "small.gradmend"
    results = small(seeds=range(2), epochs=1).run(path, progress=False)
    live = Live([path])
    page = live.content().page
    live.close()
    assert (page.verdict, page.tone) == (results.recommendation.sentence, results.page().tone)
    assert [section.title for section in page.sections] == [s.title for s in results.page().sections]


def test_the_command(tmp_path: Path) -> None:
    recorded(tmp_path / "run.gradmend")
    command = [sys.executable, "-m", "gradmend", "view", "--no-open", str(tmp_path / "run.gradmend")]
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ours) as server:
        assert server.stdout is not None
        try:
            address = server.stdout.readline().split()[0]
            assert httpx.get(address, trust_env=False).status_code == 200
            server.send_signal(signal.SIGINT)
            said = server.communicate(timeout=60)
        finally:
            server.kill()  # else leaving `with` waits for ever
    assert (server.returncode, *said) == (0, "", "")


def test_what_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="There is no journal"):
        serve([tmp_path / "none.gradmend"], browse=False)
    recorded(tmp_path / "run.gradmend")
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(GradmendError, match="cannot be used"),
    ):
        serve([tmp_path / "run.gradmend"], taken.getsockname()[1], browse=False)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradmend.view.server", None)
    with pytest.raises(MissingExtraError, match=r"gradmend\[view\]"):
        serve([tmp_path / "run.gradmend"], browse=False)
