"""Pictures of a study show its numbers: points with their intervals, all extremes of a curve."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plotly.graph_objects import Figure, Heatmap

from gradmend.errors import GradmendError
from gradmend.look import WIDTH, Look
from gradmend.study.analysis import Results
from gradmend.study.curves import BINS, MOST_ARMS, band, table
from gradmend.study.heatmap import Axis, axes
from gradmend.study.outcome import Outcome
from outcomes import arms, outcomes, results, trial

TWO = ("no", "yes")
FACTORS = {"relu": TWO, "skip": TWO, "depth": ("2", "8")}


def truth(relu: str, skip: str, depth: str) -> float:
    return 0.4 + 0.2 * (relu == "yes") + 0.1 * (skip == "yes") * (depth == "8")


def whole(steps: int = 30) -> Results:
    """A study with all measures and curves; one trial diverged."""
    rng = np.random.default_rng(0)
    made = []
    for t in outcomes(FACTORS, truth):
        accuracy = t.measures["test_accuracy"]
        more = {
            "seconds": 1 + float(rng.random()),
            "step_seconds": 1e-3 * (1 + float(rng.random())),
            "parameters": 100.0 * int(t.arm["depth"]),
            "gradient_ratio": 10.0 ** -int(t.arm["depth"]) * math.exp(rng.standard_normal()),
        }
        losses = tuple((2 * np.exp(-np.arange(steps) * accuracy / 9)).tolist())
        curve = tuple(np.linspace(0.1, accuracy, 5).tolist())
        made.append(Outcome(t.arm, t.seed, "done", "", {**t.measures, **more}, losses, curve))
    lost = (2.0, 5.0, math.nan)
    made[2] = Outcome(made[2].arm, made[2].seed, "diverged", "", {}, lost, (0.1,))
    return results(made, FACTORS)


WHOLE = whole()


def trace(figure: Figure, name: str) -> object:
    return next(t for t in figure.data if t.name == name)


def points(figure: Figure) -> dict[float, tuple[float, float, float]]:
    """Value -> its interval, of all marks with error bars to the sides."""
    found = {}
    for t in figure.data:
        bars = t.error_x
        for x, high, low in zip(t.x, bars.array or (), bars.arrayminus or (), strict=True):
            found[round(x, 6)] = (x - low, x, x + high)
    return found


def test_a_study_gives_all_pictures() -> None:
    assert list(WHOLE.figures()) == [
        "ranking",
        "test_accuracy over seconds",
        "test_accuracy over parameters",
        "loss",
        "accuracy",
        "gradient ratio",
        "effects",
        "interactions",
    ]


@pytest.mark.parametrize("dark", [False, True])
def test_pictures_are_plain_plotly_of_one_width(dark: bool) -> None:
    for name, figure in WHOLE.figures(dark).items():
        held = json.loads(figure.to_json())
        assert held["layout"]["title"]["text"], name
        assert figure.layout.width == WIDTH
        ground = figure.layout.template.layout.plot_bgcolor
        assert (ground == "white") is not dark


@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out(dark: bool) -> None:
    """Contrast with the background as WCAG 2.1 defines it; 2 is enough for lines of two pixels."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    look, ground = Look(dark), light("#111111" if dark else "#ffffff")
    assert len(set(look.colours)) == 8
    for colour in (*look.colours, look.ink, look.pale):
        high, low = sorted((light(colour), ground), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 2


def test_a_forest_has_every_effect_with_its_interval() -> None:
    found = points(WHOLE.plot("effects"))
    for effect in WHOLE.effects:
        for held in (effect.average, effect.alone):
            assert held is not None
            ends = tuple(100 * v for v in (held.low, held.value, held.high))
            assert found[round(ends[1], 6)] == pytest.approx(ends)


def test_the_ranking_has_every_arm_in_order_with_its_interval() -> None:
    figure = WHOLE.plot("ranking")
    found = points(figure)
    assert [100 * p.mean.high for p in WHOLE.ranking] == pytest.approx(
        [found[round(100 * p.mean.value, 6)][2] for p in WHOLE.ranking]
    )
    words = [text.split(" · ")[0] for text in figure.layout.yaxis.ticktext]
    assert words == [place.label for place in WHOLE.ranking]


def test_the_front_is_told_from_what_is_dominated() -> None:
    figure = WHOLE.plot("test_accuracy over parameters")
    front = [p for p in WHOLE.pareto["parameters"] if p.front]
    assert list(trace(figure, "worth its cost").y) == pytest.approx([100 * p.gives.value for p in front])
    assert len(trace(figure, "dominated").y) == 8 - len(front)


def test_interactions_are_coloured_only_where_they_are_shown() -> None:
    (cells,) = WHOLE.plot("interactions").data
    assert isinstance(cells, Heatmap)
    drawn = {
        (row, column): (cells.z[i][j], cells.text[i][j])
        for i, row in enumerate(cells.y)
        for j, column in enumerate(cells.x)
    }
    for each in WHOLE.interactions:
        value, text = drawn[tuple(each.words.split(" with "))]
        assert (value != 0) is bool(each.change.shown)
        assert text.startswith("(") is not bool(each.change.shown)


def test_gradient_ratios_are_those_of_the_arms() -> None:
    figure = WHOLE.plot("gradient ratio")
    assert figure.layout.xaxis.type == "log"
    (marks,) = figure.data
    logs = np.log(WHOLE.grid.values("gradient_ratio"))
    assert np.log(np.array(marks.x)).tolist() == pytest.approx(np.nanmean(logs, axis=1).tolist())


def test_a_picture_that_is_not_there_is_named() -> None:
    with pytest.raises(GradmendError, match=r"'efects'.*Did you mean 'effects'"):
        WHOLE.plot("efects")


def test_every_picture_says_what_is_to_be_seen() -> None:
    for name, figure in WHOLE.figures().items():
        assert figure.layout.meta["words"], name


def test_one_page_shows_all_pictures() -> None:
    page = WHOLE.html()
    for name, figure in WHOLE.figures().items():
        assert f"<h3>{figure.layout.title.text}</h3>" in page, name
    assert "Effects on test accuracy" in page


# ---- curves


@given(st.integers(1, 5), st.integers(1, 700), st.integers(0, 99))
def test_a_band_hides_no_extreme(seeds: int, steps: int, seed: int) -> None:
    curves = np.random.default_rng(seed).standard_normal((seeds, steps))
    seen = band(curves)
    assert len(seen.steps) == min(BINS, steps)
    assert (seen.low <= seen.middle).all()
    assert (seen.middle <= seen.high).all()
    at = np.abs(np.arange(1, steps + 1)[:, None] - seen.steps).argmin(1)
    inner = np.abs(np.arange(1, steps + 1) - seen.steps[at]) < steps / len(seen.steps) / 2 - 0.5
    assert (curves <= seen.high[at] + np.where(inner, 0, np.inf)).all()
    assert (curves.min(), curves.max()) == (seen.low.min(), seen.high.max())
    assert (np.diff(seen.steps) > 0).all()


def test_short_curves_are_drawn_as_they_are() -> None:
    curves = np.array([[3.0, 1.0], [4.0, 2.0], [8.0, 0.0]])
    seen = band(curves)
    assert seen.steps.tolist() == [1, 2]
    assert seen.middle.tolist() == [4, 1]


def test_lost_trials_do_not_flatter_a_curve() -> None:
    """The median of the survivors alone would fall where most trials were lost."""
    cells = [
        Outcome({}, 0, "done", "", {}, (2.0, 1.0, 0.5), (0.5, 0.9)),
        *(Outcome({}, s, "diverged", "", {}, (2.0, math.inf), (0.2,)) for s in (1, 2)),
        trial({}, 3, "failed"),
        None,
    ]
    assert band(table(cells)).middle.tolist() == [2.0, math.inf, math.inf]
    assert table(cells, accuracy=True).tolist() == [[0.5, 0.9], [0.2, 0.0], [0.2, 0.0]]


def test_a_diverged_trial_is_marked_where_it_was_lost() -> None:
    figure = WHOLE.plot("loss")
    shown = {t.legendgroup for t in figure.data}
    assert len(shown) <= MOST_ARMS
    marks = trace(figure, "diverged")
    assert (marks.legendgroup, list(marks.x), list(marks.y)) == ("base", [2], [5.0])


# ---- the heatmap

GRID = {"weight_variance": ("1.0", "2.0", "4.0"), "depth": ("5", "20", "80")}


def test_a_heatmap_has_the_mean_of_each_cell_and_the_line() -> None:
    made = outcomes(GRID, lambda weight_variance, depth: float(weight_variance) / 10 + int(depth) / 200)
    line = ((1.0, 10.0), (2.0, 50.0))
    found = Results("depths", "", made, levels=GRID, predicted=line)
    figure = found.plot("heatmap")
    cells, halo, drawn = figure.data
    for row, arm in enumerate(found.grid.arms):
        place = GRID["depth"].index(arm[1]), GRID["weight_variance"].index(arm[0])
        assert cells.z[place] == pytest.approx(100 * found.grid.values("test_accuracy")[row].mean())
    assert list(zip(drawn.x, drawn.y, strict=True)) == list(line)
    assert list(halo.x) == list(drawn.x)
    assert (figure.layout.yaxis.type, figure.layout.xaxis.type) == ("log", "linear")


@given(st.lists(st.integers(-50, 500), min_size=3, max_size=8, unique=True).map(sorted))
def test_levels_lie_within_their_cells(levels: list[int]) -> None:
    edges = Axis("depth", [float(level) for level in levels]).edges
    assert (edges[:-1] < levels).all()
    assert (levels < edges[1:]).all()


def test_only_two_numeric_factors_give_a_heatmap() -> None:
    made = [trial(arm, 0, test_accuracy=0.5) for arm in arms({**GRID, "skip": TWO})]
    assert axes(results(made).grid) is None
    assert "heatmap" not in results(made).figures()
