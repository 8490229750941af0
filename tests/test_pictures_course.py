"""Pictures of a training: they hold the numbers that were read, and every extreme of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly.graph_objects import Figure

from gradmend.look import Look
from gradmend.pictures.course import Curves, Span, course, multiples, overlay
from gradmend.pictures.heat import Heat, Scale, heatmap, heatmaps, reduced
from gradmend.pictures.training import SCALES, Training, comparison, pictures

GRADIENT, DEAD = SCALES["gradient"], SCALES["dead"]
HOSTILE = "<script>alert(1)</script>"


def curves(loss: Sequence[float], **others: Sequence[float]) -> Curves:
    steps, unread = np.arange(1, len(loss) + 1), np.full(len(loss), np.nan)
    known = np.array(others.pop("known", np.ones(len(loss), bool)), bool)
    read = {name: np.array(others.get(name, unread), float) for name in ("gradient", "rate")}
    return Curves(steps, np.array(loss, float), known, **read)


def heat(values: Any, names: Sequence[str] | None = None, **within: str) -> Heat:
    table = np.array(values, np.float32)
    names = names or [f"layers.{place}" for place in range(table.shape[1])]
    return Heat(tuple(names), np.arange(1, len(table) + 1), table, within)


def named(figure: Figure, name: str) -> list[Any]:
    return [trace for trace in figure.data if trace.name == name]


def texts(figure: Figure) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]


def test_the_course_shows_what_was_read() -> None:
    read = curves([3.0, 2.0, 1.0], gradient=[0.5, np.nan, 0.25], rate=[0.1, 0.1, 0.05])
    figure = course("net", read, [], Look())
    assert named(figure, "loss")[0].y.tolist() == [3.0, 2.0, 1.0]
    assert named(figure, "gradient norm")[0].x.tolist() == [1, 3]
    assert named(figure, "gradient norm")[0].y.tolist() == [0.5, 0.25]
    assert named(figure, "learning rate")[0].y.tolist() == [0.1, 0.1, 0.05]
    words = "The loss goes from 3 to 1 in 3 steps. Its least is 1, its greatest 3."
    assert figure.layout.meta["words"] == words


def test_what_was_never_read_and_what_never_changes_has_no_panel() -> None:
    figure = course("net", curves([3.0, 2.0], rate=[0.1, 0.1]), [], Look())
    assert [trace.name for trace in figure.data] == ["loss"]


@pytest.mark.parametrize(("lost", "words"), [(np.nan, "NaN from step 3"), (np.inf, "infinite from step 3")])
def test_losses_that_are_no_numbers_are_marked(lost: float, words: str) -> None:
    figure = course("net", curves([2.0, 1.0, lost, lost]), [], Look())
    (crosses,) = named(figure, words.split()[0])
    assert crosses.x.tolist() == [3, 4]
    assert words in texts(figure)


def test_a_loss_that_was_not_read_is_no_nan() -> None:
    figure = course("net", curves([2.0, np.nan, 1.0], known=[True, False, True]), [], Look())
    assert named(figure, "loss")[0].x.tolist() == [1, 3]
    assert not named(figure, "NaN")


@pytest.mark.parametrize("loss", [[], [1.0], [np.nan] * 5, [0.0] * 3, [-1.0, 1e30], [0.0, 1e-300, 1e300]])
def test_any_course_is_drawn(loss: list[float]) -> None:
    spans = [Span("divergence", 1, None), Span(HOSTILE, 2, 3, 1)]
    for figure in (course("net", curves(loss), spans, Look()), overlay({"a": curves(loss)}, Look(dark=True))):
        figure.to_json()
        for axis in (figure.layout.yaxis, figure.layout.xaxis):
            assert axis.range is None or np.isfinite(axis.range).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(601, 3000), st.integers(0, 2**32 - 1))
def test_a_long_course_keeps_every_extreme(steps: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_cauchy(steps).tolist()
    band, line = course("net", curves(values), [], Look()).data[:2]
    assert (min(band.y), max(band.y)) == (min(values), max(values))
    assert len(line.x) <= 600
    assert (np.diff(line.x) > 0).all()


def test_findings_lie_where_they_lasted() -> None:
    spans = [Span("dead units", 20, None, 1), Span("plateau", 5, 10), Span("plateau", 30, 40)]
    figure = course("net", curves(np.linspace(2, 1, 50).tolist()), spans, Look())
    assert [bar.x for bar in named(figure, "plateau")] == [(5, 10), (30, 40)]
    assert [bar.x for bar in named(figure, "dead units")] == [(20, 50)]
    assert {shape.x0 for shape in figure.layout.shapes} == {5, 20, 30}
    assert "Found meanwhile: plateau, dead units." in figure.layout.meta["words"]


def test_heat_is_the_exponent_and_zero_and_infinity_are_marked() -> None:
    figure = heatmap("net", heat([[1e-3, 0.0], [np.nan, 100.0], [np.inf, 1.0]]), GRADIENT, [], Look())
    main, zero, infinite = figure.data
    np.testing.assert_allclose(main.z, [[-3, np.nan, np.nan], [np.nan, 2, 0]], atol=1e-6)
    assert np.argwhere(zero.z == 1).tolist() == [[1, 0]]
    assert np.argwhere(infinite.z == 1).tolist() == [[0, 2]]
    assert "exactly zero" in figure.layout.meta["words"]
    assert "infinite" in figure.layout.meta["words"]


def test_shares_are_drawn_from_none_to_all() -> None:
    figure = heatmap("net", heat([[0.0, 0.5], [1.0, 0.25]]), DEAD, [], Look())
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    assert len(figure.data) == 1  # nothing is wrong with none
    np.testing.assert_allclose(figure.data[0].z, [[0, 1], [0.5, 0.25]])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 700), st.integers(2, 5000), st.integers(0, 2**32 - 1))
def test_a_large_table_keeps_its_extremes(rows: int, steps: int, room: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.uniform(0, 1, (steps, rows)).astype(np.float32)
    cells = reduced(heat(values), Scale("any", powers=False), room)
    down, across = (
        np.arange(count + 1) * size // count
        for count, size in zip(cells.values.shape, (rows, steps), strict=True)
    )
    for row, column in random.integers(cells.values.shape, size=(20, 2)):
        here = values[across[column] : across[column + 1], down[row] : down[row + 1]]
        unusual = np.abs(here - np.median(values)).max()
        assert abs(cells.values[row, column] - np.median(values)) == pytest.approx(unusual)
    assert cells.values.shape == (len(cells.names), len(cells.steps))
    assert cells.values.size <= max(room, 2 * steps, 2 * rows)
    assert (np.diff(cells.steps) > 0).all()


def test_frames_lie_at_the_layers_of_findings() -> None:
    """Also where the layer stands for a site within, or the row is a parameter of the layer."""
    names = ["0.weight", "2.weight", "4.weight", "6.weight"]
    spans = [Span("dead units", 1, None, 2, ("2", "4")), Span("note", 1, None, 0, ("0",))]
    (frame,) = heatmap("net", heat(np.ones((9, 4)), names), GRADIENT, spans, Look()).layout.shapes
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (1, 9, 0.5, 2.5)
    within = heat(np.ones((9, 2)), ["1", "3"], **{"0": "1", "2": "3"})
    (frame,) = heatmap("net", within, GRADIENT, [Span("chaos", 3, 5, 2, ("2",))], Look()).layout.shapes
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (3, 5, 0.5, 1.5)


def test_rows_named_like_numbers_or_alike_stay_rows() -> None:
    figure = heatmap("net", heat(np.ones((2, 3)), ["10", "x" * 300, "x" * 299 + "x"]), GRADIENT, [], Look())
    assert len(set(figure.data[0].y)) == 3
    assert not any(name.isdigit() for name in figure.data[0].y)


def test_hostile_names_stay_text() -> None:
    spans = (Span(HOSTILE, 1, None, 2, (HOSTILE,)),)
    drawn = pictures(
        Training(HOSTILE, curves([2.0, 1.0]), spans, {"gradient": heat([[1.0], [2.0]], [HOSTILE])}), Look()
    )
    assert all("<script" not in figure.to_json() for figure in drawn.values())


def test_runs_side_by_side_share_axes() -> None:
    runs = {f"run {place}": curves([2.0 + place, 1.0]) for place in range(14)}
    spans = {"run 13": [Span("plateau", 2, None)]}
    small, large = multiples(runs, spans, Look()), overlay(runs, Look())
    assert len([trace for trace in small.data if trace.mode]) == 12
    assert len({tuple(axis.range) for axis in small.select_yaxes()}) == 1
    assert len(large.data) == 8
    assert "The last 8 of 14 are shown." in large.layout.meta["words"]
    places = sorted(annotation.y for annotation in large.layout.annotations)
    assert (np.diff(places) > 0.05).all()  # no name covers another


def test_heats_side_by_side_share_their_colours() -> None:
    figure = heatmaps({"a": heat([[1e-9, 1.0]]), "b": heat([[1.0, 1e3]])}, GRADIENT, Look())
    assert [trace.coloraxis for trace in figure.data] == ["coloraxis"] * 2
    assert figure.layout.coloraxis.cmax - figure.layout.coloraxis.cmin >= 12


def test_all_pictures_and_a_comparison() -> None:
    heats = {name: heat(np.full((3, 2), 0.5)) for name in SCALES}
    one = Training("one", curves([2.0, 1.0, 0.5]), (), heats)
    assert list(pictures(one, Look())) == ["course", *SCALES]
    assert list(comparison([one, Training("two", one.curves)], Look())) == ["losses", "runs", "gradients"]


def test_5000_layers_and_10000_steps() -> None:
    values = 10 ** np.random.default_rng(0).uniform(-9, 0, (300, 5000)).astype(np.float32)
    figure = heatmap("net", heat(values), GRADIENT, [], Look())
    long = course("net", curves(np.linspace(2, 1, 10_000).tolist()), [], Look())
    assert len(figure.to_json()) < 500_000
    assert len(long.to_json()) < 100_000
    assert "up to 42 layers" in figure.layout.meta["words"]
    assert "Each point stands for up to 17 steps" in long.layout.meta["words"]
