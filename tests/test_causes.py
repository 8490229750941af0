"""What there is to say of each cause, and the page that says it."""

from pathlib import Path

import pytest

from gradmend.causes import PARTS, Cause
from gradmend.causes.page import page

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("cause", Cause)
def test_each_cause_has_all_there_is_to_say(cause: Cause) -> None:
    illness = cause.illness
    assert illness.part in PARTS
    assert illness.sentence.endswith(".")
    assert illness.why
    assert illness.signs
    assert illness.cure
    assert illness.reference
    assert "\n" not in illness.why + illness.signs + illness.cure + illness.reference


def test_the_page_is_up_to_date() -> None:
    """If not: `make docs`."""
    assert (ROOT / "docs" / "causes.md").read_text(encoding="utf-8") == page()


def test_the_page_has_each_cause_once_and_its_links_lead_there() -> None:
    lines = page().splitlines()
    for cause in Cause:
        assert lines.count(f"### {cause.title}") == 1
        assert f"](#{cause.title.replace(' ', '-')})" in page()
