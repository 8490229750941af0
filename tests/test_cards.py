"""What there is to say of each remedy, and the page that says it."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from gradmend.causes import Cause
from gradmend.remedies import REMEDIES
from gradmend.remedies.card import INTRUSION, Card, cards
from gradmend.remedies.page import page

ROOT = Path(__file__).parent.parent
CARDS = cards()
each_card = pytest.mark.parametrize("card", CARDS, ids=[card.name for card in CARDS])


@each_card
def test_each_card_says_what_when_and_what_it_costs(card: Card) -> None:
    assert card.what.endswith(".")
    assert set(card.treats) <= {cause.title for cause in Cause}
    assert re.search(r"\bcosts?\b", card.about, re.I)
    assert card.changes.startswith(INTRUSION)


@each_card
def test_each_source_has_an_author_and_a_year_or_is_a_manual(card: Card) -> None:
    assert re.search(r"\b(19|20)\d\d\b", card.source) or re.match(r"(PyTorch|NumPy), .*https://", card.source)
    assert "\n" not in card.source


@each_card
def test_each_parameter_is_explained(card: Card) -> None:
    remedy = next(remedy for remedy in REMEDIES if type(remedy).__name__ == card.name)
    told = {*card.parameters} if card.parameters else set()
    assert told <= {field.name for field in fields(remedy)}  # type: ignore[arg-type]
    assert all(card.parameters.values())


def test_there_is_one_card_for_each_kind_of_remedy() -> None:
    assert [card.name for card in CARDS] == list(dict.fromkeys(type(r).__name__ for r in REMEDIES))
    assert {card.changes[-7] for card in CARDS} >= {"1", "7"}


def test_the_page_is_up_to_date() -> None:
    """If not: `make docs`."""
    assert (ROOT / "docs" / "remedies.md").read_text(encoding="utf-8") == page()


def test_the_page_has_each_remedy_once_and_its_links_lead_there() -> None:
    lines = page().splitlines()
    for card in CARDS:
        assert lines.count(f"### {card.name}") == 1
        assert f"](#{card.name.lower()})" in page()
