"""The pages of check, mend and study: what was found is there, and files of others are left alone."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from browsing import opened, seen, violations
from gradmend.cli import app
from gradmend.diagnosis import Diagnosis, diagnose, look
from gradmend.errors import GradmendError
from gradmend.journal import Journal
from gradmend.probe import measure
from gradmend.report.files import place, write
from gradmend.report.page import Card, Page, Part, Table, render
from gradmend.report.pages import ROWS, check_page, mend_page
from gradmend.setup import Budget, Setup
from gradmend.spread import spread
from gradmend.treatment import Treatment, mend
from outcomes import outcomes, results

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HOSTILE = "<script>alert(1)</script><img src=x>"
LEVELS = {"norm": ("none", "batch"), "depth": ("2", "8")}
RESULTS = results(outcomes(LEVELS, lambda **arm: 0.5 + 0.3 * (arm["norm"] == "batch")), LEVELS)


def deep(depth: int = 12, width: int = 16) -> Setup:
    """Sigmoids, whose gradient vanishes."""
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(width, 3))
    return Setup(model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1))


def batches(width: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(x := torch.randn(64, width), x[:, :3].argmax(1)) for _ in range(4)]


@pytest.fixture(scope="module")
def ill() -> Diagnosis:
    return diagnose(deep(), batches())


@pytest.fixture(scope="module")
def treated() -> Treatment:
    return mend(deep(), batches(), Budget(steps=20, seconds=30.0, trials=4))


def parts(page: Page, kind: type) -> list[Part]:
    return [part for section in page.sections for part in section.parts if isinstance(part, kind)]


def test_a_diagnosis_is_told_with_all_its_findings(ill: Diagnosis) -> None:
    page = check_page(ill, spread(deep(), batches()[0]), mend="gradmend mend net.py")
    cards = [card for card in parts(page, Card) if isinstance(card, Card)]
    assert [card.head for card in cards] == [finding.cause.title for finding in ill.findings]
    assert page.tone == cards[0].tone == "error"
    assert page.verdict == ill.verdict
    first, finding = cards[0], ill.findings[0]
    assert first.lines == (finding.sentence, *finding.evidence)
    assert dict(first.facts)["To treat it"] == finding.cause.illness.cure
    assert dict(first.more)["Source"] == finding.cause.illness.reference
    html = render(page)
    assert "gradmend mend net.py" in html
    assert ill.prognosis is not None
    assert ill.prognosis.sentence in html


def test_the_table_of_layers_holds_what_was_measured(ill: Diagnosis) -> None:
    table = parts(check_page(ill), Table)[-1]
    assert isinstance(table, Table)
    assert table.headings[:3] == ("layer", "gradient norm", "predicted")
    readings = ill.profile.weighted()
    assert [row[0] for row in table.rows] == [r.site.name for r in readings]
    for row, reading in zip(table.rows, readings, strict=True):
        assert float(row[1]) == pytest.approx(reading.gradient_norm, rel=0.01)
        assert float(row[2]) == pytest.approx(
            ill.profile.expected[reading.site.index].gradient_norm, rel=0.01
        )


def test_of_many_layers_the_extremes_are_kept() -> None:
    setup = deep(230, width=4)
    with torch.no_grad():
        setup.model[300].weight *= 50
    profile = measure(setup, batches(4)[0])
    table = parts(check_page(Diagnosis(profile, ())), Table)[-1]
    assert isinstance(table, Table)
    assert len(table.rows) <= ROWS
    assert f"{len(table.rows)} of 231 layers" in table.words
    readings = profile.weighted()
    loudest = max(readings, key=lambda r: r.rms).site.name
    assert {readings[0].site.name, readings[-1].site.name, loudest} <= {row[0] for row in table.rows}


def test_a_treatment_is_told_with_its_code_and_trials(treated: Treatment) -> None:
    page = mend_page(treated, "mine = 1")
    assert page.tone == ("good" if treated.after.healthy else "error")
    titles = [section.title for section in page.sections]
    assert titles[:2] == ["What was changed", "The same in your own code"]
    heads = [card.head for card in parts(page, Card) if isinstance(card, Card)]
    assert heads[: len(treated.changes)] == [change.text for change in treated.changes]
    tried = next(s.parts[0] for s in page.sections if s.title == "What was tried")
    assert isinstance(tried, Table)
    assert tried.rows[0][0] == treated.trials[0].label
    assert {row[0] for row in tried.rows} == {trial.label for trial in treated.trials}
    assert "mine = 1" in render(page)


def test_what_is_healthy_or_empty_has_a_page_too() -> None:
    sound = Setup(nn.Sequential(nn.Linear(16, 3)), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1))
    page = check_page(replace(look(sound, batches()), findings=()))
    assert page.tone == "good"
    assert "Nothing was found." in render(page)
    unchanged = mend(sound, batches())
    assert mend_page(unchanged).verdict == unchanged.verdict
    assert "No trials yet." in render(results([]).page())


def test_a_broken_network_with_hostile_names_has_a_page(browser: Browser, tmp_path: Path) -> None:
    named = {HOSTILE: nn.Linear(16, 16), "act": nn.Tanh(), "out": nn.Linear(16, 3)}
    setup = replace(deep(), model=nn.Sequential(OrderedDict(named)))
    with torch.no_grad():
        setup.model[0].weight.fill_(torch.nan)
    path = tmp_path / "nan.html"
    write(path, render(check_page(diagnose(setup, batches()), spread(setup, batches()[0]))))
    with opened(browser, path) as page:
        seen(page)
        assert "non finite" in page.locator(".verdict").inner_text()
        assert HOSTILE in page.locator("table").last.inner_text()


def test_a_study_is_told_with_pictures_and_tables() -> None:
    page = RESULTS.page()
    titles = [section.title for section in page.sections]
    assert titles[:4] == ["Why", "Which is best", "What each level does", "What two levels do together"]
    assert page.verdict == RESULTS.recommendation.sentence
    assert page.tone == "good"
    ranked = next(s.parts[1] for s in page.sections if s.title == "Which is best")
    assert isinstance(ranked, Table)
    assert [row[1] for row in ranked.rows] == [place.label for place in RESULTS.ranking]
    words = {
        cell for table in parts(page, Table) if isinstance(table, Table) for row in table.rows for cell in row
    }
    assert {"better", "not shown"} <= words
    assert not {"+", "-", "·"} & {
        row[0] for table in parts(page, Table) if isinstance(table, Table) for row in table.rows
    }


@pytest.mark.parametrize(("name", "dark"), [("check", True), ("mend", False), ("study", True)])
def test_real_pages_are_for_everybody(
    browser: Browser, tmp_path: Path, treated: Treatment, name: str, dark: bool
) -> None:
    before, after = (spread(setup, batches()[0]) for setup in (deep(), treated.setup))
    pages = {
        "check": check_page(treated.before, before),
        "mend": mend_page(treated, spread=(before, after)),
        "study": RESULTS.page(),
    }
    path = tmp_path / f"{name}.html"
    write(path, render(pages[name]))
    assert path.stat().st_size < 6e6
    with opened(browser, path, dark=dark, width=400 if dark else 1280) as page:
        seen(page)
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    notes, page = tmp_path / "notes.html", tmp_path / "page.html"
    notes.write_text("<p>mine</p>")
    with pytest.raises(GradmendError, match=r"no page of gradmend.*Choose another name"):
        place(notes)
    with pytest.raises(GradmendError, match="There is no folder"):
        place(tmp_path / "none" / "page.html")
    with pytest.raises(GradmendError, match=r"is a folder.*out\.html"):
        place(tmp_path)
    for title in ("first", "<second>"):
        write(page, render(Page(title, "", "good", ())))
    assert "&lt;second&gt;" in page.read_text("utf-8")
    assert notes.read_text() == "<p>mine</p>"


@pytest.mark.usefixtures("own_folder")
def test_the_command_line_writes_a_page() -> None:
    asked = ["check", "deep", "--depth", "3", "--report", "out.html", "--lang", "zh"]
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code in (0, 1)
    assert done.stdout.startswith("{")
    text = Path("out.html").read_text("utf-8")
    assert 'lang="zh-Hans"' in text
    assert f"<code>gradmend {' '.join(asked)}</code>" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "deep", "--report", "no/out.html"], "There is no folder 'no'"),
        (["mend", "deep", "--report", "theirs.html"], "no page of gradmend"),
        (["study", "neuron", "--report", "theirs.html"], "no page of gradmend"),
        (["check", "deep", "--report", "out.html", "--lang", "xx"], "no language 'xx'"),
    ],
)
@pytest.mark.usefixtures("own_folder")
def test_what_cannot_be_written_is_said_before_the_work(arguments: list[str], says: str) -> None:
    Path("theirs.html").write_text("mine")
    failed = CliRunner().invoke(app, arguments)
    assert isinstance(failed.exception, GradmendError)
    assert says in str(failed.exception)
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["theirs.html"]


@pytest.mark.usefixtures("own_folder")
def test_a_journal_has_a_page_too() -> None:
    with Journal("run.gradmend").run("first") as recording:
        recording.sink("net").write("step", 1, {"loss": 2.3})
    done = CliRunner().invoke(app, ["check", "run.gradmend", "--report", "out.html"])
    assert "The report is in out.html." in done.stdout
    assert "first" in Path("out.html").read_text("utf-8")


def test_pictures_are_found_by_name() -> None:
    assert RESULTS.plot().layout.title.text == RESULTS.plot("ranking").layout.title.text
    with pytest.raises(GradmendError, match=r"no picture 'rankin'.*'ranking'"):
        RESULTS.plot("rankin")
    with pytest.raises(GradmendError, match="nothing here that could be drawn"):
        results([]).plot()
