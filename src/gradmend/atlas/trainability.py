"""Trainability: networks of many depths and weights, trained, beside what theory foretells."""

from __future__ import annotations

from typing import Final

from plotly.graph_objects import Figure

from gradmend.atlas import trainings
from gradmend.atlas.sizes import Sizes
from gradmend.atlas.words import sheet, sources
from gradmend.report.parts import Code, Dial, Page, Section
from gradmend.study.analysis import Results
from gradmend.study.design import Study

_BIAS: Final = 0.05
_WEIGHTS: Final = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
_DEPTHS: Final = (5, 10, 20, 30, 50)
_RATES: Final = {"tanh": 0.01, "relu": 0.003}
_WORDS: Final = (
    "Bright networks have learnt, dark ones guess. Below the line theory expects them to learn: its depth is "
    "six times the depth scale of the correlation."
)


def study(sizes: Sizes, activation: str) -> Study:
    """Networks of many depths and weights, trained for a few hundred steps, once each."""
    small = max(sizes.depths) < max(_DEPTHS)
    return Study(
        "deep",
        factors={
            "depth": [2, 4, 6] if small else list(_DEPTHS),
            "weight_variance": list(_WEIGHTS[::3] if small else _WEIGHTS),
        },
        settings={"activation": activation, "bias_variance": _BIAS, "learning_rate": _RATES[activation]},
        steps=sizes.steps,
        seeds=[sizes.seed],
    )


def plane(activation: str, results: Results) -> Figure:
    """The accuracy on new rows over depth and weights, with the depth that theory gives."""
    figure = results.figures()["heatmap"]
    figure.update_layout(title_text=f"{activation}: what is right on new rows")
    figure.layout.meta = {"words": _WORDS}
    return figure


def page(sizes: Sizes) -> Page:
    """Trainability."""
    shown = tuple(name for name in _RATES if name in sizes.activations)
    pictures = {(name,): plane(name, trainings.run(study(sizes, name))) for name in shown}
    return sheet(
        "What trains",
        "How deep a network can be trained is foretold by two numbers of its initialization, before the "
        "first step.",
        Section(
            "Depth and weights, trained",
            (
                f"Each cell is a network of 64 units per layer that was trained for {sizes.steps} steps "
                "on handwritten digits. The line was computed without any training, from the activation "
                "and the variances alone.",
                Dial({"activation": shown}, pictures),
                "On the left gradients vanish; the networks are too deep for their weights. On the right "
                "they explode, and samples that are alike become strangers. At the edge of chaos between "
                "them the deepest networks learn.",
                Code("gradmend study trainable-depth", "The same with more seeds"),
            ),
        ),
        Section(
            "So what is to be done?",
            (
                "Draw the weights at the edge: He for rectifiers, the critical variance for tanh, "
                "orthogonal if it is deep. Or let the gradient pass by: skips with small branches. Or "
                "normalize, together with skips. Gates do the same through time. Clipping, schedules and "
                "adaptive optimizers help to walk, but they bring no gradient back that is gone.",
                Code(
                    "gradmend check net.py:model\ngradmend mend net.py:model",
                    "Which of these your own network needs",
                ),
            ),
        ),
        sources(
            ("Schoenholz et al., Deep information propagation, 2017", "https://arxiv.org/abs/1611.01232"),
            (
                "Xiao et al., Dynamical isometry and a mean field theory of CNNs, 2018",
                "https://arxiv.org/abs/1806.05393",
            ),
            (
                "Hanin, Rolnick, How to start training: the effect of initialization and architecture, 2018",
                "https://arxiv.org/abs/1803.01719",
            ),
        ),
    )
