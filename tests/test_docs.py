"""The documentation: its code runs and prints what it says, its pages are complete, and ask for nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest
from typer.main import get_command

import gradmend as gm
from browsing import opened, violations
from documents import alike, blocks, run
from gradmend.causes import Cause
from gradmend.cli import app
from gradmend.remedies.card import cards

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if any(b.language == "python" for b in blocks(page))]

sys.path.insert(0, str(DOCS))
import examples  # noqa: E402
import hooks  # noqa: E402

NO_EXAMPLE = {Cause.TOO_MANY_THREADS}
"""What depends on the machine."""

FEW = {"Reconnect", "CalmAttention", "BendLayers", "DepthRates"}
"""Remedies that have nothing to do in any of the small setups."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.usefixtures("own_folder")
def test_a_page_prints_what_it_says(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    wrong = list(run(page))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("loss 0.300\n...\nend", "loss 0.301\n1\n2\nend\n", True),
        ("loss 0.3", "loss 0.9", False),
        ("Adam 0.3", "SGD 0.3", False),
        ("0  ███▎ ◆ 2.0", "0  ████  ◆  2.1", True),
        ("97.3% of [64]", "97.1% of [64]", True),
        ("one\ntwo", "one", False),
        ("-17 (net.py:3)", "17 (net.py:3)", False),
    ],
)
def test_what_counts_as_the_same(expected: str, printed: str, same: bool) -> None:
    assert alike(expected, printed) is same


@pytest.mark.parametrize("cause", [cause for cause in Cause if cause not in NO_EXAMPLE])
def test_each_cause_is_found_in_its_example(cause: Cause) -> None:
    case = getattr(examples, cause.value)()
    if isinstance(case[0], gm.Setup):
        setup, batch, *steps = case
        case = gm.diagnose(setup, batch, steps=steps[0] if steps else None).findings
    assert cause in {finding.cause for finding in case}


def test_examples_run_as_they_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for make in (examples.softmax_before_logits_loss, examples.eval_mode, examples.divergence):
        exec(f"{hooks.shared_lines()}\n{hooks.shown(make)}", names)
    printed = capsys.readouterr().out
    assert all(title in printed for title in ("softmax before logits loss", "eval mode", "divergence"))


def test_every_public_name_and_every_command_has_its_place() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert all(f"::: gradmend.{home}.{name}\n" in text for name, home in gm._HOMES.items())
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert all(f"## {name}\n" in hooks.commands() for name in commands)
    assert "gradmend train mnist" in hooks.numbers()


def test_all_causes_and_remedies_are_in_how_to_choose_or_linked_from_it() -> None:
    """Every link of the page leads to a cause or a remedy that exists."""
    text = (DOCS / "choose.md").read_text(encoding="utf-8")
    causes = {cause.title.replace(" ", "-") for cause in Cause}
    remedies = {card.name.lower() for card in cards()}
    assert set(re.findall(r"causes\.md#([\w-]+)", text)) <= causes
    assert set(re.findall(r"remedies\.md#([\w-]+)", text)) <= remedies


# ---- the site ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages, built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr  # with --quiet, it would take no warning for one
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site on a server of this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Nothing to say."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_the_site_asks_for_nothing_outside_and_is_for_everybody(
    browser: Browser,
    address: str,
) -> None:
    for name, dark, width in (("index", False, 1280), ("theory", True, 1280), ("choose", False, 400)):
        with opened(browser, f"{address}{name}.html", dark=dark, width=width, inside=(address,)) as page:
            assert page.locator("h1").count() == 1
            assert not violations(page)
            wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
            assert not wide


def test_formulas_and_examples_are_drawn(browser: Browser, site: Path) -> None:
    with opened(browser, site / "theory.html") as page:
        assert page.locator("math").count() > 20
        assert page.locator("merror, .arithmatex").count() == 0
    with opened(browser, site / "causes.html") as page:
        assert page.locator("details.example").count() == len(Cause) - len(NO_EXAMPLE) + 1  # the shared lines
    with opened(browser, site / "remedies.html") as page:
        assert page.locator("details.example").count() == len(cards()) - len(FEW)
    with opened(browser, site / "api.html") as page:
        assert page.locator(".doc-contents .highlight").filter(has_text=">>>").count() > 10
        assert page.locator("blockquote").count() == 0  # what becomes of examples that are taken for prose


def test_search_finds_from_disk(browser: Browser, site: Path) -> None:
    with opened(browser, site / "index.html") as page:
        page.keyboard.press("/")
        page.keyboard.type("vanishing gradient")
        page.locator(".md-search-result__link").first.wait_for()
        assert "causes.html" in (page.locator(".md-search-result__link").first.get_attribute("href") or "")
