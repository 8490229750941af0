"""Schedules: the learning rate over the steps, and what it does to a training."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Final

import numpy as np
import torch
from jaxtyping import Float64
from plotly.graph_objects import Figure
from torch import nn
from torch.optim import SGD

from gradmend.atlas import trainings
from gradmend.atlas.drawing import LOOK, Line, Panel, chart
from gradmend.atlas.sizes import Sizes
from gradmend.atlas.words import sheet, sources
from gradmend.remedies import UseSchedule
from gradmend.remedies.schedule import SCHEDULES
from gradmend.report.parts import Code, Dial, Page, Section
from gradmend.setup import Setup
from gradmend.study.design import Study
from gradmend.training.loop import Stepper

_SHOWN: Final = 1000
_OPTIMIZERS: Final = ("SGD:0.5", "SGD:0.1", "SGD:1.0", "Adam:0.01")
_ORDER: Final = ("cosine", *(name for name in SCHEDULES if name != "cosine"))


def rates(name: str, steps: int) -> Float64[np.ndarray, " steps"]:
    """The learning rate of each step under one of the remedies' schedules, for a rate of 1.

    Examples:
        >>> rates("linear", 4).tolist()
        [1.0, 0.75, 0.5, 0.25]
    """
    setup = Setup(nn.Linear(1, 1), nn.MSELoss(), partial(SGD, lr=1.0))
    batch = (torch.zeros(1, 1), torch.zeros(1, 1))
    step = Stepper(UseSchedule(name, steps=steps).apply(setup, batch).setup)
    found = []
    for _ in range(steps):
        found.append(step.optimizer.param_groups[0]["lr"])
        step([batch])
    return np.array(found, dtype=np.float64)


def overview(steps: int) -> Figure:
    """All schedules in one picture."""
    held = {name: rates(name, steps) for name in SCHEDULES}
    colours = (LOOK.pale, *LOOK.colours[:6], LOOK.ink)
    dashes = ("dash", "solid", "solid", "solid", "solid", "dot", "dot", "solid")
    lines = [
        Line(name, np.arange(steps), values, colour, dash=dash)
        for (name, values), colour, dash in zip(held.items(), colours, dashes, strict=True)
    ]
    words = "All but the warm-up begin at the full rate; how soon they let go of it is where they differ."
    return chart(
        [Panel(lines, "step", "learning rate, full = 1", reach=(-0.03, 1.06))], "Schedules", words, height=340
    )


def _shown(sizes: Sizes) -> tuple[str, ...]:
    return _ORDER[: 2 * sizes.rates]


def study(sizes: Sizes) -> Study:
    """Networks of five layers, trained with every schedule."""
    return Study(
        "deep",
        factors={"schedule": list(_shown(sizes)), "optimizer": list(_OPTIMIZERS[: sizes.rates])},
        settings={"depth": 5, "activation": "relu", "init": "he"},
        steps=sizes.steps,
        seeds=range(sizes.seed, sizes.seed + sizes.seeds),
    )


def training(
    name: str, optimizer: str, curves: trainings.Curves, accuracy: trainings.Values, steps: int
) -> Figure:
    """The rate, and below it the loss, beside that of the constant rate."""
    along = np.arange(steps)
    kinds = {"constant": LOOK.pale, name: LOOK.colours[0]}
    above = [Line(kind, along, rates(kind, steps), colour) for kind, colour in kinds.items()]
    below = [
        Line(kind, along[: len(row)], trainings.smooth(row), colour, opacity=0.8, width=1.5)
        for kind, colour in kinds.items()
        for row in curves[kind, optimizer]
    ]
    panels = [
        Panel(above, "", "rate, full = 1", reach=(-0.05, 1.1)),
        Panel(below, "step", "loss", log=True, reach=(-3.2, 1.2)),
    ]
    right, usual = (_right(accuracy[kind, optimizer]) for kind in (name, "constant"))
    beside = "" if name == "constant" else f" With a constant rate {usual}."
    return chart(panels, f"{name}, {_said(optimizer)}", f"On new rows {right}.{beside}", height=220)


def _right(accuracy: Float64[np.ndarray, " seeds"]) -> str:
    held = accuracy[np.isfinite(accuracy)]
    ends = f"{held.mean():.1%} are right" if held.size else "nothing is right"
    lost = accuracy.size - held.size
    return ends + (f", for {lost} of {accuracy.size} seeds diverge" if lost else "")


def _said(optimizer: str) -> str:
    name, _, rate = optimizer.partition(":")
    return f"{name} at {rate}"


def page(sizes: Sizes) -> Page:
    """Schedules."""
    results = trainings.run(study(sizes))
    curves, accuracy = trainings.losses(results), trainings.measured(results, "test_accuracy")
    pictures = {
        (name, _said(optimizer)): training(name, optimizer, curves, accuracy, sizes.steps)
        for name, optimizer in product(_shown(sizes), _OPTIMIZERS[: sizes.rates])
    }
    return sheet(
        "Schedules",
        "A high rate travels, a low rate settles. A schedule does one after the other.",
        Section(
            "The rate over the steps",
            (
                "All schedules that the remedies carry, over as many steps as are planned. A warm-up "
                "begins with a hundredth of the rate: the first steps are taken with weights that know "
                "nothing, and for adaptive optimizers with averages that know little.",
                overview(_SHOWN),
                Code(_RATES.format(steps=_SHOWN), "One of the curves"),
            ),
        ),
        Section(
            "What it does to a training",
            (
                f"Five ReLU layers on handwritten digits, {sizes.steps} steps, {sizes.seeds} seeds each; "
                "the loss is smoothed over 15 steps. Grey is the constant rate.",
                Dial(
                    {"schedule": _shown(sizes), "optimizer": tuple(map(_said, _OPTIMIZERS[: sizes.rates]))},
                    pictures,
                ),
                "Where the rate is too high, a falling schedule brings the loss down at the end, and a "
                "warm-up may save the beginning. Where it is too low, falling makes it worse.",
                Code("gradmend study schedules", "With intervals over seeds"),
            ),
        ),
        sources(
            (
                "Robbins, Monro, A stochastic approximation method, 1951",
                "https://doi.org/10.1214/aoms/1177729586",
            ),
            (
                "Loshchilov, Hutter, SGDR: stochastic gradient descent with warm restarts, 2017",
                "https://arxiv.org/abs/1608.03983",
            ),
            ("Goyal et al., Accurate, large minibatch SGD, 2017", "https://arxiv.org/abs/1706.02677"),
        ),
    )


_RATES = """from gradmend.atlas.schedules import rates

print(rates("cosine", {steps})[::100])"""
