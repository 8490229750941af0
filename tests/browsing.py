"""Pages in a real browser: nothing may go wrong in it, and nothing be asked of anybody outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
_QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_PATIENCE = 120_000
"""Milliseconds that a busy machine may take."""

_PAUSE = 50
_ALONE = ("file:", "data:", "blob:")
_COMPLAINTS = ("error", "warning")
_BAD = ("serious", "critical")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    if not CHROMIUM.exists():
        pytest.fail(f"These tests need Chromium at {CHROMIUM}. Type: apt-get install chromium")
    with chromium() as found:
        yield found


@contextmanager
def chromium() -> Iterator[Browser]:
    """The same without a test."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=_QUIET, timeout=_PATIENCE)
        yield found
        found.close()


@contextmanager
def opened(
    browser: Browser,
    address: str | Path,
    *,
    dark: bool = False,
    width: int = 1280,
    inside: tuple[str, ...] = _ALONE,
    **context: Any,
) -> Iterator[Page]:
    """A page, and at its end the proof that it neither complained nor asked for anything outside.

    Args:
        browser: the fixture.
        address: a file, or what begins with a scheme.
        dark: whether the system asks for dark pages.
        width: of the window, in pixels.
        inside: how the addresses begin that it may ask for.
        context: for `Browser.new_context`.
    """
    theme = "dark" if dark else "light"
    window = browser.new_context(color_scheme=theme, viewport={"width": width, "height": 900}, **context)
    window.set_default_timeout(_PATIENCE)
    page = window.new_page()
    complaints: list[str] = []
    page.on(
        "console", lambda told: complaints.append(told.text) if told.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(inside) else complaints.append(asked.url))
    page.goto(address.absolute().as_uri() if isinstance(address, Path) else address)
    yield page
    window.close()
    assert not complaints


def seen(page: Page) -> None:
    """Scroll through the page until all its figures are drawn."""
    for box in page.locator(".plot:visible").all():
        box.scroll_into_view_if_needed()
        box.locator(".main-svg").first.wait_for(state="attached")


def until(page: Page, condition: str) -> None:
    """Wait until an expression of JavaScript is true; pages forbid the `eval` of `Page.wait_for_function`."""
    for _ in range(_PATIENCE // _PAUSE):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(_PAUSE)
    pytest.fail(f"it did not become true: {condition}")


def violations(page: Page, **options: Any) -> list[str]:
    """What keeps some people from using the page: rules of axe-core, and where they are broken."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, **options).response["violations"]
    return [
        f"{broken['id']}: {node['html'][:200]} {node.get('failureSummary', '')}"
        for broken in found
        if broken["impact"] in _BAD
        for node in broken["nodes"]
    ]
