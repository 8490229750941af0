"""A page in a browser: nothing breaks it, everybody can use it, and it asks nobody for anything."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from plotly.graph_objects import Figure, Heatmap, Scatter
from plotly.offline import get_plotlyjs

from browsing import opened, seen, until, violations
from gradmend.errors import GradmendError
from gradmend.look import Look, swapped
from gradmend.report.page import Card, Code, Dial, Page, Section, Table, content, render

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HOSTILE = "</script><script>alert(1)</script><img src=http://example.com onerror=alert(2)>\"' & 层"
LOOK = Look()
COLOUR = "document.querySelector('.plot').data[0].line.color"
UNCUT = "[...document.querySelectorAll('.scroll, pre')].every((e) => e.scrollHeight <= e.clientHeight + 1)"


def line(values: list[float], name: str = "measured", title: str = "Gradient norm") -> Figure:
    figure = Figure(Scatter(y=values, name=name, line={"color": LOOK.colours[0]}))
    figure.update_yaxes(title=name)
    return LOOK.finish(figure, title, words=f"It ends at {values[-1]:g}." if values else "")


def whole(name: str = "net.py", layers: int = 12) -> Page:
    """A page with a part of each kind, all of which show the name."""
    found = Card(
        name, "error", (f"{name} is ill.", "It shrinks."), (f"{name}:3",), (("Why", name),), (("At", name),)
    )
    numbers = tuple((f"{name} {at}", f"{at / 7:.3g}", "-") for at in range(layers))
    turned = {
        (depth, what): line([float(depth)] * 3, what, f"{what} of {depth}")
        for depth in ("2", "4")
        for what in (name, "relu")
    }
    return Page(
        name,
        f"{name} will hardly train.",
        "error",
        (
            Section("Findings", (f"Of {name}.", found, Card("Small", "note"))),
            Section(
                "Pictures",
                (
                    line([1.0, 2.0, 3.0], name),
                    Dial({"depth": ("2", "4"), "activation": (name, "relu")}, turned),
                ),
            ),
            Section("Code", (Code(f"model = {name}\n", name),)),
            Section("Layers", (Table(("layer", "rms", "dead"), numbers, name),)),
            Section(name, (name,)),
        ),
        (name,),
        f"gradmend check {name}",
    )


def written(folder: Path, page: Page, lang: str = "en") -> Path:
    path = folder / "page.html"
    path.write_text(render(page, lang), "utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True])
def test_everybody_can_use_a_page_and_nothing_outside_is_asked(
    browser: Browser, tmp_path: Path, dark: bool
) -> None:
    with opened(browser, written(tmp_path, whole()), dark=dark) as page:
        seen(page)
        assert page.locator(".plot .main-svg").count()
        assert violations(page) == []
        levels = [
            int(tag[1]) for tag in page.eval_on_selector_all("h1,h2,h3", "all => all.map((e) => e.tagName)")
        ]
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        names = page.eval_on_selector_all(".plot", "all => all.map((e) => [e.role, e.ariaLabel])")
        assert names == [["img", "Gradient norm. It ends at 3."], ["img", "net.py of 2. It ends at 2."]]


def test_hostile_names_are_text(browser: Browser, tmp_path: Path) -> None:
    path = written(tmp_path, whole(HOSTILE))
    scripts = 2 + 1 + 5  # ours and plotly's, the style, the figures
    assert len(re.findall("<script", path.read_text())) == scripts
    with opened(browser, path) as page:
        page.on("dialog", lambda dialog: pytest.fail(f"it ran: {dialog.message}"))
        seen(page)
        assert page.locator("h1").inner_text() == HOSTILE
        assert page.locator("img").count() == 0
        assert "<script>alert(1)" in page.locator(".plot").first.inner_text()


def test_the_keyboard_reaches_everything(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, written(tmp_path, whole())) as page:
        reached = []
        for _ in range(30):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate("document.activeElement.className || document.activeElement.tagName")
            )
            if reached[-1] == "BODY":
                break
        assert reached[:2] == ["skip", "BUTTON"]
        assert {"A", "SUMMARY", "INPUT", "SELECT", "copy", "PRE", "scroll"} <= set(reached)


def test_dials_choose_the_figure(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, written(tmp_path, whole())) as page:
        seen(page)
        slider = page.locator("input[type=range]")
        slider.focus()
        page.keyboard.press("ArrowRight")
        page.locator("select").select_option(label="relu")
        assert page.locator(".dial h3").inner_text() == "relu of 4"
        assert page.locator(".dial output").inner_text() == slider.get_attribute("aria-valuetext") == "4"
        assert page.evaluate("document.querySelector('.dial .plot').data[0].y[0]") == 4


def test_numbers_of_a_figure_are_told_to_those_who_do_not_hover(browser: Browser, tmp_path: Path) -> None:
    heat = LOOK.finish(Figure(Heatmap(z=[[1.0, 2.0], [3.0, 4.0]], y=["a", "b"])), "Heat")
    parts = (line([0.5, 1.25e-9], "measured"), heat)
    with opened(browser, written(tmp_path, Page("", "", "good", (Section("s", parts),)))) as page:
        told = []
        for summary in page.locator(".numbers summary").all():
            summary.press("Enter")
        until(page, "document.querySelectorAll('.numbers table').length === 2")
        for table in page.locator(".numbers table").all():
            told.append([row.locator("td").all_inner_texts() for row in table.locator("tr").all()])
        assert told[0] == [["measured", "0", "0.5", ""], ["measured", "1", "1.25e-9", ""]]
        assert told[1] == [["a", "0", "1"], ["a", "1", "2"], ["b", "0", "3"], ["b", "1", "4"]]


def test_a_choice_without_a_figure_says_so(browser: Browser, tmp_path: Path) -> None:
    dial = Dial({"depth": ("2", "4", "8")}, {("2",): line([1.0]), ("8",): line([8.0])})
    with opened(browser, written(tmp_path, Page("", "", "good", (Section("s", (dial,)),)))) as page:
        seen(page)
        page.locator("input").press("ArrowRight")
        assert page.locator(".dial h3").inner_text() == "There is no picture of this choice."
        assert page.locator(".main-svg").count() == 0
        page.locator("input").press("ArrowRight")
        assert page.evaluate("document.querySelector('.dial .plot').data[0].y[0]") == 8


@pytest.mark.parametrize("allowed", [True, False])
def test_code_is_copied(browser: Browser, tmp_path: Path, allowed: bool) -> None:
    """Where the clipboard is forbidden, the text is selected and copied as by hand."""
    with opened(
        browser, written(tmp_path, whole()), permissions=["clipboard-read", "clipboard-write"]
    ) as page:
        if not allowed:
            page.evaluate("void (navigator.clipboard.writeText = () => Promise.reject())")
        page.locator(".copy").click()
        page.get_by_text("Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()").strip() == "model = net.py"


def test_the_theme_is_chosen_and_remembered(browser: Browser, tmp_path: Path) -> None:
    def look() -> tuple[str, str, str]:
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return page.locator("#theme").inner_text(), ground, page.evaluate(COLOUR)

    light, night = "rgb(255, 255, 255)", "rgb(17, 17, 17)"
    with opened(browser, written(tmp_path, whole())) as page:
        seen(page)
        assert look() == ("Theme: auto", light, "#0072B2")
        page.emulate_media(color_scheme="dark")
        until(page, f"{COLOUR} === '#56B4E9'")
        assert look() == ("Theme: auto", night, "#56B4E9")
        page.locator("#theme").click()
        assert look() == ("Theme: light", light, "#0072B2")
        page.locator("#theme").click()
        page.emulate_media(color_scheme="light")
        page.reload()
        seen(page)
        until(page, f"{COLOUR} === '#56B4E9'")
        assert look() == ("Theme: dark", night, "#56B4E9")


def test_paper_is_light_and_shows_all(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, written(tmp_path, whole(layers=60)), dark=True) as page:
        page.emulate_media(media="print")
        until(page, "document.querySelectorAll('.js-plotly-plot').length === 2")
        until(page, f"{COLOUR} === '#0072B2'")
        widths = "[...document.querySelectorAll('.main-svg')].map((e) => e.getBoundingClientRect().width)"
        until(page, f"Math.max(...{widths}) <= 680")
        assert not page.locator("#theme").is_visible()
        assert not page.locator(".copy").is_visible()
        assert page.evaluate(UNCUT)
        assert page.locator("dd", has_text="net.py").last.is_visible()
        page.emulate_media(media="screen")
        until(page, f"{COLOUR} === '#56B4E9'")


def test_nothing_moves_while_figures_are_drawn(browser: Browser, tmp_path: Path) -> None:
    with opened(browser, written(tmp_path, whole()), width=400) as page:
        before = page.evaluate("document.body.scrollHeight")
        seen(page)
        assert page.evaluate("document.body.scrollHeight") == before
        assert page.evaluate("document.documentElement.scrollWidth") == 400


def test_new_content_is_swapped_in_where_the_reader_is(browser: Browser, tmp_path: Path) -> None:
    def told(values: list[float]) -> Page:
        parts = (Card("Ill", "error", more=(("Why", "So."),)), line(values), line([5.0], title="Still"))
        return Page("run", "It runs.", "good", (Section("All", ("text " * 2000, *parts)),))

    with opened(browser, written(tmp_path, told([1.0, 2.0])), width=700) as page:
        seen(page)
        page.locator(".card summary").click()
        page.locator(".card summary").focus()
        before = page.evaluate("scrollY")
        page.evaluate("window.still = document.querySelectorAll('.plot')[1].firstElementChild")
        page.evaluate("told => gradmend.show(told)", content(told([1.0, 2.0, 9.0])))
        assert page.evaluate("[...document.querySelector('.plot').data[0].y]") == [1, 2, 9]
        assert page.evaluate("window.still === document.querySelectorAll('.plot')[1].firstElementChild")
        assert page.evaluate("scrollY") == before > 0
        assert page.locator("details[open]").count() == 1
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        assert page.locator(".plot").first.get_attribute("aria-label") == "Gradient norm. It ends at 9."


@pytest.mark.parametrize(
    "page",
    [
        Page("", "", "good", ()),
        whole("x" * 10_000, layers=1),
        whole(layers=5_000),
        Page(
            "n",
            "NaN",
            "error",
            (Section("NaN", (line([math.nan] * 3), Figure(), Figure(Heatmap(z=[[math.inf]])))),),
        ),
    ],
    ids=["empty", "long", "many", "nan"],
)
def test_odd_pages_render(browser: Browser, tmp_path: Path, page: Page) -> None:
    path = written(tmp_path, page)
    assert path.stat().st_size < 6e6
    with opened(browser, path, width=400) as shown:
        seen(shown)
        assert shown.evaluate("document.documentElement.scrollWidth") == 400
        assert shown.locator("h1").count() == 1


def test_a_page_needs_neither_network_nor_permission() -> None:
    text = render(whole())
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert "default-src &#39;none&#39;" in policy[1]
    assert "unsafe-eval" not in policy[1]
    assert "script-src &#39;sha256-" in policy[1]
    assert not re.findall(r'(?:src|href)="(?!#|data:)', re.sub(r"<script>.*?</script>", "", text, flags=re.S))


def test_the_code_of_plotly_may_lie_beside_the_page(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "plotly.js").write_text(get_plotlyjs(), "utf-8")
    (tmp_path / "page.html").write_text(render(whole(), plotly="plotly.js"), "utf-8")
    assert (tmp_path / "page.html").stat().st_size < 50_000
    with opened(browser, tmp_path / "page.html") as page:
        seen(page)


def test_figures_share_one_template_and_keep_their_numbers() -> None:
    figure = line([0.5, 1e-9, math.nan])
    ((id, text),) = content(Page("", "", "good", (Section("s", (figure,)),)))["figures"].items()
    held = json.loads(text)
    assert id == "figure-gradient-norm"
    assert held["data"][0]["y"] == [0.5, 1e-9, None]
    assert held["title"] == "Gradient norm"
    assert not {"template", "title", "width"} & set(held["layout"])
    assert figure.layout.title.text  # the figure itself stays


def test_every_light_colour_has_its_dark_one() -> None:
    pairs = swapped()
    for name in ("ink", "pale", "ground", "grid"):
        assert pairs[getattr(LOOK, name)] == getattr(Look(dark=True), name)
    assert [pairs[colour] for colour in LOOK.colours] == list(Look(dark=True).colours)
    assert len(pairs) == len(set(pairs.values()))


def test_ids_stay_when_a_part_comes_before() -> None:
    pictures = (line([1.0], title="One"), line([2.0], title="Two"))
    few = content(Page("", "", "good", (Section("s", pictures[1:]),)))["figures"]
    more = content(Page("", "", "good", (Section("s", (Card("new", "note"), *pictures)),)))["figures"]
    assert set(few) == {"figure-two"} < set(more)


def test_a_page_speaks_chinese() -> None:
    page = Page(
        "net.py", "Healthy: nothing found.", "good", (Section("s", (Card("vanishing gradient", "error"),)),)
    )
    text = render(page, "zh")
    assert '<html lang="zh-Hans">' in text
    assert "梯度消失" in text
    with pytest.raises(GradmendError, match="no language 'xx'"):
        render(page, "xx")


def test_numbers_are_aligned_and_names_are_not() -> None:
    rows = (("0", "1.5e-9", "10.0 % [9, 11]", "relu"), ("1", "-", "NaN", "3 layers"))
    html = content(Page("", "", "good", (Section("s", (Table(("layer", "a", "b", "c"), rows),)),)))["html"]
    assert re.findall(r"<td( class=\"n\")?>", html)[:4] == ["", ' class="n"', ' class="n"', ""]


def test_large_arrays_stay_small() -> None:
    figure = LOOK.finish(Figure(Scatter(x=np.arange(10_000.0), y=np.ones(10_000))), "Steps")
    data = content(Page("", "", "good", (Section("s", (figure,)),)))["figures"]["figure-steps"]
    assert len(data) < 250_000
