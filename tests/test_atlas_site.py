"""The atlas as a site: it is written where it may be, and works in a browser, from a disk."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browsing import opened, seen, violations
from gradmend.atlas import QUICK, build
from gradmend.atlas.site import INDEX, LEAVES, MARKER, room
from gradmend.errors import GradmendError
from gradmend.study.file import shipped

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = [leaf.name for leaf in LEAVES]
TURNING = "select:has(option:nth-child(2)), input:not([max='0'])"
"""Dials with more than one choice."""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "atlas"
    told: list[str] = []
    written = build(folder, report=told.append, sizes=QUICK)
    assert [page.name for page in written] == [INDEX, *(f"{name}.html" for name in NAMES)]
    assert len(told) == len(NAMES)
    return folder


def test_plotly_is_there_once(site: Path) -> None:
    assert {each.name for each in site.iterdir()} == {
        MARKER,
        "plotly.js",
        INDEX,
        *(f"{n}.html" for n in NAMES),
    }
    assert max(page.stat().st_size for page in site.glob("*.html")) < 1_000_000


def test_a_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(GradmendError, match="holds something that is no atlas"):
        build(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(GradmendError, match="is a file"):
        build(tmp_path / "out")
    with pytest.raises(GradmendError, match="cannot be made"):
        build(tmp_path / "out" / "atlas")


def test_a_language_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(GradmendError, match="no language 'zg'"):
        build(tmp_path / "atlas", lang="zg")
    assert not (tmp_path / "atlas").exists()


def test_an_atlas_and_an_empty_folder_have_room(site: Path, tmp_path: Path) -> None:
    room(site)
    room(tmp_path)
    room(tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one").is_dir()


def test_links_lead_from_page_to_page(browser: Browser, site: Path) -> None:
    with opened(browser, site / INDEX) as page:
        for leaf in LEAVES:
            page.get_by_role("navigation").get_by_role("link", name=leaf.title, exact=True).click()
            page.wait_for_url(f"**/{leaf.name}.html")
            assert page.locator("[aria-current=page]").inner_text() == leaf.title
            assert page.locator("h1").count() == 1
        page.goto((site / INDEX).as_uri())
        for leaf, link in zip(LEAVES, page.locator(".links a").all(), strict=True):
            assert (link.inner_text(), link.get_attribute("href")) == (leaf.title, f"{leaf.name}.html")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_drawn_and_everybody_can_use_it(browser: Browser, site: Path, name: str) -> None:
    with opened(browser, site / f"{name}.html", width=400, dark=name < "o") as page:
        seen(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert violations(page) == []
        for box in page.locator(".plot").all():
            assert box.evaluate("(box) => box.data.length") > 0


@pytest.mark.parametrize("name", NAMES)
def test_dials_change_the_picture(browser: Browser, site: Path, name: str) -> None:
    with opened(browser, site / f"{name}.html") as page:
        seen(page)
        for dial in page.locator(".dial").filter(has=page.locator(TURNING)).all():
            box, control = dial.locator(".plot"), dial.locator(TURNING).first
            before, words = box.get_attribute("data-shown"), dial.locator("figcaption").inner_text()
            control.focus()
            page.keyboard.press("ArrowRight" if control.get_attribute("type") == "range" else "ArrowDown")
            assert box.get_attribute("data-shown") != before
            assert dial.locator("figcaption").inner_text() != words
            assert box.get_attribute("aria-label").startswith(dial.locator("h3").inner_text())


@pytest.mark.parametrize("name", NAMES)
def test_code_of_a_page_runs(site: Path, name: str) -> None:
    blocks = re.findall(r"<pre[^>]*><code>(.*?)</code>", (site / f"{name}.html").read_text(), re.DOTALL)
    assert blocks
    for block in map(html.unescape, blocks):
        if block.startswith("gradmend study"):
            assert block.split()[-1] in shipped()
        elif not block.startswith("gradmend"):
            exec(block, {})
