"""Pictures hold the numbers that they are given, however few, many, broken or hostile these are."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plotly.graph_objects import Figure

from gradmend import theory
from gradmend.look import Look
from gradmend.pictures.curves import Curve, history, trials
from gradmend.pictures.depth import Mark, Track, aligned, depth
from gradmend.pictures.labels import safe, ticks
from gradmend.pictures.phase import Place, phase
from gradmend.pictures.ridges import Ridges, ridges
from gradmend.pictures.thinning import extremes, thinned
from gradmend.pictures.time import Series, through_time
from gradmend.theory.plane import plane

HOSTILE = "<script>alert('1')</script>"
NUMBERS = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0])
SERIES = st.lists(NUMBERS, max_size=300)


def traces(figure: Figure, name: str) -> list[Any]:
    return [trace for trace in figure.data if trace.name == name]


def colours(data: Any) -> Iterator[str]:
    """All that a figure says of colours."""
    if isinstance(data, dict):
        for key, value in data.items():
            if key.endswith("color") and isinstance(value, str):
                yield value
            elif key == "colorscale":
                yield from (colour for _, colour in value)
            else:
                yield from colours(value)
    elif isinstance(data, list):
        for value in data:
            yield from colours(value)


def finite(values: list[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


@given(SERIES, st.integers(1, 50))
def test_thinned_keeps_extremes_order_and_what_is_lost(values: list[float], most: int) -> None:
    found = thinned(values, most)
    assert len(found.at) == min(len(values), most)
    assert (np.diff(found.at) > 0).all()
    assert np.array_equal(found.lost.any(), len(finite(values)) < len(values))
    if known := finite(values):
        assert np.nanmin(found.low) == min(known)
        assert np.nanmax(found.high) == max(known)
    full = ~np.isnan(found.middle)
    assert (found.low[full] <= found.middle[full]).all()
    assert (found.middle[full] <= found.high[full]).all()
    if len(values) <= most:
        np.testing.assert_array_equal(found.middle, [v if math.isfinite(v) else math.nan for v in values])


@given(SERIES, st.integers(1, 50))
def test_a_band_holds_every_value_of_its_bin(values: list[float], most: int) -> None:
    found = thinned(values, most)
    for index, value in enumerate(values):
        place = np.abs(found.at - index).argmin()
        near = slice(max(0, place - 1), place + 2)
        if math.isfinite(value):
            assert np.nanmin(found.low[near]) <= value <= np.nanmax(found.high[near])


@given(SERIES, st.integers(4, 60))
def test_extremes_draw_the_same_outline(values: list[float], most: int) -> None:
    kept = extremes(values, most)
    assert len(kept) <= most
    assert (np.diff(kept) > 0).all()
    if values:
        assert (kept[0], kept[-1]) == (0, len(values) - 1)
    if known := finite(values):
        left = finite([values[place] for place in kept])
        assert (min(left), max(left)) == (min(known), max(known))


@given(st.text(max_size=60), st.integers(3, 40))
def test_names_are_short_and_without_markup(name: str, most: int) -> None:
    shown = safe(name, most)
    assert "<" not in shown
    assert len(shown) <= 5 * most


@pytest.mark.parametrize("count", [1, 5, 20, 21, 1000, 5000])
def test_labels_are_few_and_at_their_layers(count: int) -> None:
    axis = ticks([f"layer.{place}" for place in range(count)])
    assert len(axis["tickvals"]) <= 21
    assert (axis["tickvals"][0], axis["tickvals"][-1]) == (0, count - 1)
    assert axis["ticktext"] == [f"layer.{place}" for place in axis["tickvals"]]


@given(st.lists(st.sampled_from("abcdef"), unique=True), st.lists(st.sampled_from("abcdef"), unique=True))
def test_layers_of_two_networks_share_an_axis(first: list[str], second: list[str]) -> None:
    names, places = aligned([tuple(first), tuple(second)])
    for layers, at in zip((first, second), places, strict=True):
        assert len(at) == len(layers)
        assert (np.diff(at) > 0).all()
    assert [names[place] for place in places[0]] == first
    assert set(np.concatenate(places).tolist()) == set(range(len(names)))
    common = [name for name in first if name in second]
    if first == second or [name for name in second if name in first] == common == first:
        assert [names[place] for place in places[1]] == second


def test_depth_shows_measured_and_predicted() -> None:
    measured = {"gradient": [1e-8, 1e-4, 1.0], "cosine": [0.1, None, 0.9]}
    track = Track(("a", "b", "c"), measured, {"gradient": [2e-8, None, 1.0]})
    figure = depth({"": track})
    gradient, cosine = traces(figure, "measured")
    np.testing.assert_array_equal(gradient.y, [1e-8, 1e-4, 1.0])
    np.testing.assert_array_equal(cosine.y, [0.1, math.nan, 0.9])
    np.testing.assert_array_equal(traces(figure, "predicted")[0].y, [2e-8, math.nan, 1.0])
    assert (
        figure.layout.meta["words"]
        == "The norm of the gradient goes from 1 at the last layer to 1e-08 at the first."
    )


def test_values_that_no_axis_holds_are_marked_at_its_edges() -> None:
    values = [0.0, 0.0, 1.0, math.nan, math.inf, None]
    figure = depth({"": Track(tuple("abcdef"), {"gradient": values})})
    _, *marks = traces(figure, "measured")
    told = {trace.hovertext[0].split("<br>")[1]: trace.x.tolist() for trace in marks}
    assert told == {"0 measured": [0, 1], "NaN measured": [3], "inf measured": [4]}
    low, high = figure.layout.yaxis.range
    assert [math.log10(trace.y[0]) for trace in marks] == pytest.approx([low, high, high])
    assert [sum(bool(word) for word in trace.text) for trace in marks] == [1, 1, 1]


def test_findings_stand_above_their_layers() -> None:
    marks = [
        Mark("dead units", "warning", frozenset({"b", "c"})),
        Mark("elsewhere", "error", frozenset({"z"})),
    ]
    figure = depth({"": Track(tuple("abcd"), {"rms": [1.0] * 4})}, marks)
    (lane,) = traces(figure, "dead units · warning")
    np.testing.assert_allclose(lane.x[:2], [0.6, 2.4])
    assert not traces(figure, "elsewhere · error")


def test_before_is_pale_and_after_strong_on_one_axis() -> None:
    before = Track(("a", "b"), {"rms": [1.0, 2.0]})
    after = Track(("a", "new", "b"), {"rms": [1.0, 1.5, 3.0]})
    figure = depth({"before": before, "after": Track(after.layers, after.measured, after.measured)})
    assert not traces(figure, "predicted")
    (pale,), (strong,) = traces(figure, "before"), traces(figure, "after")
    assert pale.x.tolist() == [0, 2]
    assert strong.x.tolist() == [0, 1, 2]
    assert (pale.line.color, strong.line.color) == (Look().pale, Look().colours[0])


def test_panels_without_news_are_left_out() -> None:
    titles = [
        [note.text.partition(":")[0] for note in depth({"": Track(("a",), measured)}).layout.annotations]
        for measured in ({"rms": [1.0], "dead": [0.0]}, {"rms": [1.0], "dead": [0.5]})
    ]
    assert titles == [
        ["size of the output (root mean square)"],
        ["size of the output (root mean square)", "dead"],
    ]


@pytest.mark.parametrize("values", [[], [math.nan], [0.0], [1.0], [None]])
def test_few_and_broken_layers_are_drawn(values: list[float | None]) -> None:
    names = tuple("ab"[: len(values)])
    for statistic in ("gradient", "saturated", "cosine"):
        assert json.loads(depth({"": Track(names, {statistic: values})}).to_json())["layout"]["height"] > 0


def test_five_thousand_layers_keep_their_extremes_in_a_small_picture() -> None:
    generator = np.random.default_rng(0)
    values = np.exp(generator.standard_normal(5000)).tolist()
    values[1234], values[3456] = 1e9, 0.0
    names = tuple(f"encoder.layers.{place}.attention.projection" for place in range(5000))
    statistics = ("gradient", "rms", "saturated", "dead", "cosine")
    track = Track(names, dict.fromkeys(statistics, values), dict.fromkeys(statistics, values))
    figure = depth({"before": track, "after": track})
    assert len(figure.to_json()) < 1e6
    line, zero, *_ = traces(figure, "after")
    assert len(line.x) <= 1001
    assert 1234 in line.x
    assert zero.x.tolist() == [3456]
    assert (
        "Of 5000 layers the lines keep the least and the greatest of every 10." in figure.layout.meta["words"]
    )


def test_the_gradient_through_time_and_its_band() -> None:
    series = Series("rnn", (0, 2, 4), (1.0, 0.3, 0.04), factor=0.5)
    figure = through_time({"": [series]})
    np.testing.assert_allclose(traces(figure, "predicted")[0].y, [1.0, 0.25, 0.0625])
    (line,) = traces(figure, "rnn")
    assert line.x.tolist() == [0, 2, 4]
    assert line.y.tolist() == [1.0, 0.3, 0.04]
    assert figure.layout.yaxis.type == "log"


def test_of_many_layers_the_worst_are_drawn() -> None:
    series = [Series(f"rnn{place}", (0, 1, 2), (1.0, 0.5, 0.9**place)) for place in range(20)]
    series.append(Series("lost", (0, 1, 2), (1.0, 0.0, 0.0)))
    figure = through_time({"": series})
    assert [trace.name for trace in figure.data if trace.showlegend] == [f"rnn{n}" for n in range(15, 20)] + [
        "lost"
    ]
    assert "6 of 21 layers" in figure.layout.meta["words"]


@pytest.mark.parametrize("factor", [0.0, math.nan, math.inf, 1e-300])
@pytest.mark.parametrize("size", [0.0, math.nan, 1e-40])
def test_broken_gradients_through_time_are_drawn(size: float, factor: float) -> None:
    figure = through_time({"": [Series(HOSTILE, (0, 1, 900), (size,) * 3, factor)]})
    assert "<script" not in figure.to_json()


@pytest.mark.parametrize(
    "phi", [torch.tanh, torch.relu, torch.sigmoid, torch.selu], ids=lambda phi: phi.__name__
)
def test_the_critical_line_is_that_of_theory(phi: theory.Activation) -> None:
    found = plane(phi, 0.4)
    for bias_variance, line in list(zip(found.bias_variances, found.critical, strict=True))[::8]:
        expected = theory.critical(phi, float(bias_variance))
        if expected is not None:
            assert expected.stable
            assert line == pytest.approx(expected.weight_variance, rel=5e-3)
        else:  # of ReLU: every length grows there without end
            assert line == pytest.approx(2.0)


@pytest.mark.parametrize("phi", [torch.tanh, torch.nn.functional.gelu], ids=["tanh", "gelu"])
def test_the_plane_is_that_of_theory(phi: theory.Activation) -> None:
    found = plane(phi, 0.3)
    rows, columns = slice(4, None, 14), slice(10, None, 30)
    expected = theory.phase_diagram(
        phi, found.weight_variances[columns].tolist(), found.bias_variances[rows].tolist()
    )
    np.testing.assert_allclose(found.chi[rows, columns], expected.chi, rtol=5e-3)


def test_layers_lie_at_their_variances_and_beyond_the_view_at_its_edge() -> None:
    figure = phase(torch.tanh, "tanh", {"": [Place("a", 1.5, 0.02), Place("b", 0.0, 0.0)]})
    (dots,) = traces(figure, "layers")
    assert dots.x[0] == 1.5
    assert math.log10(dots.x[1]) == pytest.approx(figure.layout.xaxis.range[0], abs=0.01)
    assert list(dots.y) == [0.02, 0.0]
    assert list(dots.text) == ["a: 1.5, 0.02", "b: 0, 0"]


def test_ridges_hold_the_shares_of_evenly_chosen_layers() -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(11), size=100).T
    figure = ridges([Ridges("outputs", tuple(map(str, range(100))), shares, (-1.0, 1.0))], "Layers")
    assert len(figure.data) == 40
    for trace in figure.data:
        np.testing.assert_array_equal(trace.customdata[1:-2], shares[:, int(trace.name)])
    assert (figure.data[0].name, figure.data[-1].name) == ("0", "99")
    assert "40 of 100 layers are drawn." in figure.layout.meta["words"]


def test_ridges_have_the_shape_of_the_shares_and_spikes_of_zeros_are_cut() -> None:
    shares = np.array([[0.1, 0.04, 0.6, 0.08, 0.18], [0.1, 0.2, 0.4, 0.2, 0.1]]).T
    values, sizes = (
        ridges([Ridges("a", ("x", "y"), shares, (-1.0, 1.0), decades)], "Layers").data
        for decades in (False, True)
    )
    peak = values[0].y[3]
    np.testing.assert_allclose(values[0].y[1:6] / peak, [1.25 / 1.4, 0.5 / 1.4, 1.0, 1.0 / 1.4, 1.0])
    np.testing.assert_allclose(np.array(sizes[0].y[1:6]) / sizes[0].y[3], shares[:, 0] / 0.6)


def test_ridges_that_are_compared_have_one_axis_and_say_where_all_is_nan() -> None:
    known, lost = np.full((3, 1), 1 / 3), np.zeros((3, 1))
    columns = [Ridges("a", ("x",), known, (-20.0, 0.0), True), Ridges("b", ("x",), lost, (-3.0, 2.0), True)]
    figure = ridges(columns, "Layers")
    assert figure.layout.xaxis.range == figure.layout.xaxis2.range == (-20.0, 2.0)
    assert [note.text for note in figure.layout.annotations] == ["a", "b", "NaN"]


def test_trials_are_thinned_with_a_band_and_their_end_is_marked() -> None:
    losses = np.linspace(2.0, 0.0, 6000) + np.tile([0.0, 0.5], 3000)
    figure = trials([Curve("untreated", [2.0, 3.0, math.nan], "first"), Curve("a", losses, "chosen")])
    assert "the median of up to 50 steps" in figure.layout.meta["words"]
    band, line = traces(figure, "a · chosen")
    assert len(line.x) == 120
    assert max(band.y) == losses.max()
    (mark,) = traces(figure, "NaN")
    assert (mark.x[0], mark.y[0]) == (2, 3.0)
    assert (
        "untreated: The loss went from 2 to 3 in 3 steps and then was no number."
        in figure.layout.meta["words"]
    )


def test_of_many_trials_the_chosen_and_the_longest_are_drawn() -> None:
    curves = [Curve(str(steps), [1.0] * steps) for steps in range(1, 30)]
    figure = trials([Curve("untreated", [1.0], "first"), *curves, Curve("a", [1.0], "chosen")])
    names = [trace.name for trace in figure.data]
    assert names == ["untreated", *map(str, range(24, 30)), "a · chosen"]
    assert "8 of 31 trials are drawn." in figure.layout.meta["words"]


@pytest.mark.parametrize("losses", [[1.0], [math.nan], [math.inf, 1.0], [0.0, -1.0], [1e30, 1e-30, math.nan]])
def test_broken_losses_are_drawn(losses: list[float]) -> None:
    for figure in (history(losses, []), trials([Curve(HOSTILE, losses), Curve("none", [])])):
        assert "<script" not in figure.to_json()


def test_a_history_shows_losses_and_accuracies() -> None:
    figure = history([4.0, 3.0, 2.0, 1.0], [0.5, 0.75], tested=0.7)
    np.testing.assert_array_equal(traces(figure, "loss")[0].y, [4.0, 3.0, 2.0, 1.0])
    assert list(traces(figure, "accuracy")[0].x) == [2, 4]
    assert list(traces(figure, "test accuracy")[0].y) == [0.7]


def everything(dark: bool) -> list[Figure]:
    track = Track((HOSTILE, "b"), {"gradient": [1.0, 0.0], "rms": [math.nan, 1.0], "dead": [0.1, 0.2]})
    expected = Track(track.layers, track.measured, track.measured)
    marks = [Mark(HOSTILE, tone, frozenset({"b"})) for tone in ("error", "warning", "note")]
    series, places = Series(HOSTILE, (0, 1), (1.0, 2.0), 2.0), [Place(HOSTILE, 1.0, 1.0)]
    column = Ridges("a", (HOSTILE,), np.full((3, 1), 1 / 3), (0.0, 1.0))
    return [
        depth({"before": track, "after": expected}, marks, dark),
        ridges([column, Ridges("b", ("b",), column.shares, (0.0, 1.0), pale=True)], "Layers", dark),
        through_time({"before": [Series("a", (0, 1), (1.0, 0.0))], "after": [series]}, dark),
        phase(torch.tanh, HOSTILE, {"before": places, "after": places}, dark),
        trials([Curve("u", [1.0], "first"), Curve("a", [2.0], "chosen"), Curve(HOSTILE, [1.0] * 500)], dark),
        history(np.arange(5000.0), [0.5], 0.5, dark),
    ]


@pytest.mark.parametrize("dark", [False, True])
def test_all_colours_are_those_of_the_look_and_all_say_what_is_to_be_seen(dark: bool) -> None:
    look = Look(dark)
    known = {*look.colours, look.ink, look.pale, *(colour for _, colour in look.scale)}
    for figure in everything(dark):
        data = json.loads(figure.to_json())
        del data["layout"]["template"]
        assert set(colours(data)) <= known
        assert data["layout"].pop("meta")["words"]  # plain text
        assert "<script" not in json.dumps(data)
