"""What nouns look like: 80 columns, no NaN, plain data, HTML."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rich.text import Text
from torch import nn

import gradmend as gm
from gradmend.causes import Cause
from gradmend.console import Printable, bar, number, plain, plain_data
from helpers import ADAM, setups

KINDS = list(setups())
CE = nn.CrossEntropyLoss()


def nouns(kind: str) -> list[Any]:
    setup, batch = setups()[kind]
    diagnosis = gm.diagnose(gm.Setup(setup.model, setup.loss_fn, ADAM), batch)
    return [diagnosis.profile, diagnosis]


def broken() -> list[Any]:
    """Weights of NaN, sixty layers, long names that look like markup: all that may go wrong at once."""
    model = nn.Sequential()
    for i in range(60):
        model.add_module(f"[bold]{i} is a layer with quite a long name", nn.Linear(8, 8))
    nn.init.constant_(model[30].weight, math.nan)
    diagnosis = gm.diagnose(gm.Setup(model, CE, ADAM), (torch.randn(64, 8), torch.arange(64) % 3))
    assert Cause.NON_FINITE in diagnosis.causes
    return [diagnosis.profile, diagnosis, *diagnosis.findings]


@pytest.mark.parametrize("kind", [*KINDS, "broken"])
def test_nouns_print_plainly(kind: str) -> None:
    for noun in broken() if kind == "broken" else nouns(kind):
        text = str(noun)
        assert max(map(len, text.splitlines())) <= 80
        assert not re.search(r"\bnan\b", text.lower())
        data = json.loads(json.dumps(noun.to_dict(), allow_nan=False))
        assert data
        html = noun._repr_html_()
        assert html.startswith("<pre")
        assert html.rstrip().endswith("</pre>")


def test_names_are_not_taken_for_markup() -> None:
    assert "[bold]0 is a" in str(broken()[0])


def test_a_profile_of_nothing_prints() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.square() + self.w).sum(1)

    setup = gm.Setup(Bare(), nn.MSELoss(), ADAM)
    diagnosis = gm.diagnose(setup, (torch.randn(32, 8), torch.randn(32)))
    assert diagnosis.profile.sites == ()
    assert str(diagnosis)


@dataclass(frozen=True)
class Pair(Printable):
    value: float
    cause: Cause

    def __rich__(self) -> Text:
        return Text("<pair> & [x]")


def test_plain_data_of_records() -> None:
    pair = Pair(math.inf, Cause.NO_GRADIENT)
    assert pair.to_dict() == {"value": None, "cause": "no_gradient"}
    assert plain_data({1: (pair, frozenset([2])), "f": math.sqrt}) == {
        "1": [pair.to_dict(), [2]],
        "f": "sqrt",
    }
    assert str(pair) == "<pair> & [x]"
    assert "&lt;pair&gt; &amp; [x]" in pair._repr_html_()


def test_plain_text_is_as_wide_as_told() -> None:
    assert max(map(len, plain(Text("word " * 50), width=40).splitlines())) <= 40


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3, 1.0, 2.0, math.nan, math.inf])
def test_bars_are_as_wide_as_told(value: float) -> None:
    assert len(bar(value, 0.0, 1.0, width=7)) == 7
    assert bar(value, 1.0, 1.0, width=7) == " " * 7


def test_numbers() -> None:
    assert [number(v, 2) for v in (None, math.nan, 0.0, -1234.5)] == ["-", "-", "0", "-1.2e+03"]
