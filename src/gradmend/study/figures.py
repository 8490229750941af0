"""Pictures of what a study found, each a plotly figure; the functions here take what `analysis` holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from plotly.graph_objects import Figure, Heatmap, Scatter

from gradmend.look import Look, folded, logarithmic
from gradmend.study import wording
from gradmend.study.effects import Effect, Estimate, Interaction, comparable, judge, mean
from gradmend.study.grid import RATIOS, Grid
from gradmend.study.ranking import Place, Point

MOST_ROWS = 40
"""A picture has so many rows; tables and `to_dict` go on."""

_NAME = np.array([0.08, 0.4])  # the height and width of a name, as shares of the picture
_VERDICTS = {1: "better", -1: "worse", 0: "neither shown"}


def forest(effects: Sequence[Effect], measure: str, look: Look) -> Figure:
    """The effects of levels with their intervals: on average (filled), and alone (open, below).

    Args:
        effects: at least one.
        measure: that changes.
        look: of the picture.
    """
    held = effects[:MOST_ROWS]
    rows = {effect.words: row for row, effect in enumerate(held)}
    figure = Figure()
    for verdict, words in _VERDICTS.items():
        told = [effect for effect in held if effect.verdict == verdict]
        points = [(rows[effect.words], effect.average) for effect in told]
        figure.add_trace(_dots(points, measure, words, look.verdict(verdict)))
    alone = [(rows[e.words] + 0.3, e.alone) for e in held if e.alone is not None and e.contexts != 1]
    figure.add_trace(_dots(alone, measure, "alone", look.pale, "circle-open"))
    figure.add_vline(x=1 if measure in RATIOS else 0, line_color=look.ink, line_width=1)
    figure.update_xaxes(_axis(measure, [effect.average for effect in held], change=True))
    _rows(figure, list(rows))
    words = "Points are changes averaged over all else that is varied, lines their 95 % intervals over seeds."
    title = f"What each level does to {wording.name(measure)}"
    return look.finish(figure, title, len(held), words + _cut(held, effects))


def _dots(
    points: Sequence[tuple[float | int, Estimate]],
    measure: str,
    name: str,
    colour: str,
    symbol: str = "circle",
    change: bool = True,
) -> Scatter:
    estimates = [estimate for _, estimate in points]
    factor, words = wording.unit(measure, change)[1], wording.change if change else wording.value
    return Scatter(
        x=[factor * estimate.value for estimate in estimates],
        y=[place for place, _ in points],
        error_x=error(estimates, factor),
        mode="markers",
        name=name,
        marker={"color": colour, "size": 9, "symbol": symbol},
        hovertext=[words(estimate, measure) for estimate in estimates],
        hoverinfo="text",
    )


def error(estimates: Sequence[Estimate], factor: float = 1.0) -> dict[str, Any]:
    """The error bars of a row of estimates; none where there is no interval.

    >>> error([Estimate(2.0, 1.0, 4.0, 5)])["array"]
    [2.0]
    """
    high = [factor * (e.high - e.value) if e.bounded else 0.0 for e in estimates]
    low = [factor * (e.value - e.low) if e.bounded else 0.0 for e in estimates]
    return {
        "type": "data",
        "symmetric": False,
        "array": high,
        "arrayminus": low,
        "thickness": 1.8,
        "width": 4,
    }


def _rows(figure: Figure, words: Sequence[str]) -> None:
    """Labels from top to bottom, with room for a second row of marks below each."""
    figure.update_yaxes(
        tickvals=list(range(len(words))),
        ticktext=[folded(each) for each in words],
        range=[len(words) - 0.4, -0.6],
        zeroline=False,
    )


def _axis(measure: str, estimates: Sequence[Estimate], change: bool = False) -> dict[str, Any]:
    title = {"title": _titled(measure, change)}
    values = [estimate.value for estimate in estimates]
    return title | logarithmic(min(values), max(values)) if measure in RATIOS else title


def _titled(measure: str, change: bool = False) -> str:
    unit, _ = wording.unit(measure, change)
    return wording.name(measure) + (f", {unit}" if unit else "")


def matrix(interactions: Sequence[Interaction], measure: str, look: Look) -> Figure:
    """By how much two levels together differ from the sum of both; without colour, in brackets: not shown.

    Args:
        interactions: at least one.
        measure: that changes.
        look: of the picture.
    """
    across = list(dict.fromkeys(each.words.split(" with ")[1] for each in interactions))[:MOST_ROWS]
    down = list(dict.fromkeys(each.words.split(" with ")[0] for each in interactions))[:MOST_ROWS]
    found = {tuple(each.words.split(" with ")): each for each in interactions}
    cells = [[found.get((row, column)) for column in across] for row in down]
    values = [[_weight(cell) for cell in row] for row in cells]
    most = max((abs(value) for row in values for value in row if value is not None), default=1.0)
    figure = Figure(
        Heatmap(
            x=[folded(each) for each in across],
            y=[folded(each) for each in down],
            z=values,
            text=[[_cell(cell) for cell in row] for row in cells],
            texttemplate="%{text}",
            hovertext=[[_hover(cell) for cell in row] for row in cells],
            hoverinfo="text",
            colorscale=look.scale,
            zmin=-most,
            zmax=most,
            xgap=2,
            ygap=2,
            showscale=False,
        )
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(side="bottom", showgrid=False)
    title = f"Together beyond the sum of both: {_titled(measure, change=True)}"
    words = "In colour: what is shown, blue if better and orange if worse. In brackets: what is not shown."
    return look.finish(figure, title, max(6, len(down) + 3), words)


def _weight(cell: Interaction | None) -> float | None:
    """How much better, or worse if negative; 0 if neither is shown."""
    if cell is None:
        return None
    value = float(np.log(cell.change.value)) if cell.change.ratio else cell.change.value
    return abs(value) * judge(cell.change, cell.measure)


def _cell(cell: Interaction | None) -> str:
    if cell is None:
        return ""
    text = wording.bare(cell.change, cell.measure)
    return text if cell.change.shown else f"({text})"


def _hover(cell: Interaction | None) -> str:
    return "" if cell is None else f"{cell.words}: {wording.change(cell.change, cell.measure)}"


def ladder(places: Sequence[Place], measure: str, look: Look) -> Figure:
    """The arms, the best first, with their intervals and ranks; in colour what nothing is shown to beat.

    Args:
        places: the ranking, at least one arm with a value.
        measure: that is compared.
        look: of the picture.
    """
    held = [place for place in places if place.mean.seeds][:MOST_ROWS]
    figure = Figure()
    for best, words in ((True, "none shown to be better"), (False, "others")):
        points = [(row, p.mean) for row, p in enumerate(held) if (p.rank == 1) is best]
        colour = look.colours[0] if best else look.pale
        figure.add_trace(_dots(points, measure, words, colour, change=False))
    _rows(figure, [f"{place.label} · {_rank(place)}" for place in held])
    figure.update_xaxes(_axis(measure, [place.mean for place in held]))
    words = "Points are means over seeds, lines their 95 % intervals. Behind the name: the rank."
    title = f"Arms by {wording.name(measure)}, and their ranks"
    return look.finish(figure, title, len(held), words + _cut(held, places))


def _cut(held: Sequence[object], known: Sequence[object]) -> str:
    return f" Drawn are the first {len(held)} of {len(known)}." if len(held) < len(known) else ""


def _rank(place: Place) -> str:
    if place.rank is None:
        return "no rank"
    return f"{place.rank}" if place.rank == place.last else f"{place.rank} to {place.last}"


def front(points: Sequence[Point], measure: str, cost: str, look: Look) -> Figure:
    """A measure over a cost, with both intervals; named: the arms that nothing dominates.

    Args:
        points: at least one.
        measure: what an arm gives.
        cost: what it costs.
        look: of the picture.
    """
    figure = Figure()
    for best, words in ((False, "dominated"), (True, "worth its cost")):
        held = [point for point in points if point.front is best]
        colour = look.colours[0] if best else look.pale
        figure.add_trace(_cloud(held, measure, cost, words, colour, _apart(held, points) if best else ()))
    figure.update_xaxes(_axis(cost, [point.costs for point in points]))
    figure.update_yaxes(_axis(measure, [point.gives for point in points]))
    title = f"{wording.name(measure).capitalize()} over {wording.name(cost)}"
    words = "Named: arms that no other beats at the same cost or less. Lines are 95 % intervals over seeds."
    return look.finish(figure, title, words=words)


def _cloud(
    points: Sequence[Point], measure: str, cost: str, name: str, colour: str, named: Sequence[Point]
) -> Scatter:
    gives, costs = [point.gives for point in points], [point.costs for point in points]
    (_, up), (_, along) = wording.unit(measure), wording.unit(cost)
    return Scatter(
        x=[along * each.value for each in costs],
        y=[up * each.value for each in gives],
        error_x=error(costs, along),
        error_y=error(gives, up),
        mode="markers+text" if named else "markers",
        text=[folded(point.label) if point in named else "" for point in points],
        textposition=_inwards([each.value for each in costs]),
        name=name,
        marker={"color": colour, "size": 9},
        hovertext=[_point(point, measure, cost) for point in points],
        hoverinfo="text",
    )


def _inwards(costs: Sequence[float]) -> list[str]:
    """Names at the right lie to the left of their points, as an axis ends there."""
    logs = np.log(costs)
    middle = (logs.min() + logs.max()) / 2 if len(logs) else 0.0
    return ["top left" if at > middle else "top right" for at in logs.tolist()]


def _apart(points: Sequence[Point], around: Sequence[Point]) -> list[Point]:
    """Those whose names do not lie on each other, the best first; the others tell theirs when pointed at."""
    places, room = _places(points), _NAME * np.ptp(_places(around), axis=0)
    kept: list[int] = []
    for at in np.argsort(-places[:, 0], kind="stable").tolist():
        if all((np.abs(places[at] - places[other]) > room).any() for other in kept):
            kept.append(at)
    return [points[at] for at in kept]


def _places(points: Sequence[Point]) -> Float64[np.ndarray, "points 2"]:
    return np.array([[p.gives.value, np.log(p.costs.value)] for p in points]).reshape(-1, 2)


def _point(point: Point, measure: str, cost: str) -> str:
    numbers = f"{wording.value(point.gives, measure)}, {wording.value(point.costs, cost)}"
    return f"{folded(point.label)}<br>{numbers}"


def gradients(grid: Grid, look: Look) -> Figure:
    """The gradient of the first layer over that of the last, at the start, of each arm.

    Args:
        grid: the outcomes; some of them have the ratio.
        look: of the picture.
    """
    measure = "gradient_ratio"
    values = comparable(grid, measure)
    held = [row for row in range(len(grid.arms)) if not np.isnan(values[row]).all()][:MOST_ROWS]
    figure = Figure()
    points = [(at, mean(values[row], measure)) for at, row in enumerate(held)]
    figure.add_trace(_dots(points, measure, "", look.colours[0], change=False))
    figure.add_vline(x=1, line_color=look.ink, line_width=1)
    _rows(figure, [grid.label(row) for row in held])
    figure.update_xaxes(_axis(measure, [estimate for _, estimate in points]))
    figure.update_layout(showlegend=False)
    words = "At 1 the first layer gets as much gradient as the last. Lines are 95 % intervals over seeds."
    return look.finish(figure, "First over last gradient at the start", len(held), words)
