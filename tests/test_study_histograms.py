"""Histograms of every layer before the first step, against hooks and autograd by hand."""

from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from gradmend.data import Data
from gradmend.errors import SetupError
from gradmend.setup import Setup
from gradmend.spread import Spread, spread
from gradmend.study.design import Study
from gradmend.study.histograms import RANGES
from gradmend.study.start import first_batch
from gradmend.zoo import Recipe, recipe
from helpers import SGD, Functional, assert_same, blobs, trace

EDGES = {"outputs": np.linspace(-2, 2, 48), "gradients": np.linspace(-14, 2, 48)}


def at_start(made: Recipe, seed: int) -> Spread:
    return spread(made.setup, first_batch(made, seed), RANGES)


def by_hand(made: Recipe, kind: type[nn.Module]) -> dict[str, np.ndarray[Any, Any]]:
    """The same from module hooks, `retain_grad` and numpy's histogram."""
    model, kept = made.setup.model, []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    hooks = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, kind)]
    made.setup.loss(first_batch(made, 3)).backward()
    for hook in hooks:
        hook.remove()
    outputs = [one.detach().numpy() for one in kept]
    with np.errstate(divide="ignore"):
        gradients = [np.log10(np.abs(one.grad.numpy())) for one in kept if one.grad is not None]
    values = {"outputs": outputs, "gradients": gradients}
    return {
        what: np.stack(
            [np.histogram(np.clip(one, *edges[[0, -1]]), edges)[0] / one.size for one in values[what]], 1
        )
        for what, edges in EDGES.items()
    }


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"activation": "tanh", "init": "large"}, nn.Tanh),
        ({"activation": "relu", "init": "he", "norm": "batch"}, nn.ReLU),
        ({"activation": "sigmoid", "init": "small"}, nn.Sigmoid),
        ({"activation": "tanh", "init": "zero"}, nn.Tanh),
    ],
)
def test_histograms_are_those_of_hooks(changes: dict[str, Any], kind: type[nn.Module]) -> None:
    made = recipe("deep", depth=5, width=16, **changes)
    found, expected = at_start(made, 3), by_hand(recipe("deep", depth=5, width=16, **changes), kind)
    assert found.outputs.shape == (47, 5)
    # a value on the edge of a bin may be counted on either side of it
    np.testing.assert_allclose(found.outputs, expected["outputs"], atol=3e-3)
    np.testing.assert_allclose(found.gradients, expected["gradients"], atol=3e-3)


def test_models_of_ones_own_and_recurrent_ones_are_read() -> None:
    setup = Setup(Functional(), nn.CrossEntropyLoss(), SGD)
    own = Recipe("own", setup, _data(), 16, 1)
    recurrent = recipe("residual-gru", cell="gru", data="recall-10")
    for made, layers in ((own, 4), (recurrent, 1)):
        found = at_start(made, 0)
        assert found.outputs.shape == found.gradients.shape == (47, layers)
        np.testing.assert_allclose(found.outputs.sum(axis=0), 1)


def test_looking_leaves_no_trace() -> None:
    made = recipe("deep", depth=3, norm="batch")
    before = trace(made.setup)
    at_start(made, 0)
    assert_same(trace(made.setup), before)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("what", ["outputs", "gradients"])
def test_every_arm_has_a_panel(what: str, dark: bool) -> None:
    factors = {"init": ["zero", "he"], "activation": ["tanh", "relu", "sigmoid"]}
    study = Study("deep", factors=factors, settings={"depth": 4, "width": 8}, data=_data())
    figure = study.plot(what, dark)
    assert [one.text for one in figure.layout.annotations] == [
        f"{init} · {bend}" for init in factors["init"] for bend in factors["activation"]
    ]
    assert [one.z.shape for one in figure.data] == [(47, 4)] * 6
    for arm, panel in zip(study.arms(), figure.data, strict=True):
        shares = getattr(at_start(study.build(arm, 0), 0), what)
        np.testing.assert_allclose(np.square(panel.z), shares)


def test_an_arm_that_cannot_be_has_an_empty_panel() -> None:
    study = Study("deep", remedies=["ForgetBias()"], settings={"depth": 2}, data=_data())
    figure = study.plot()
    assert len(figure.data) == 1
    assert len(figure.layout.annotations) == 2


def test_other_pictures_are_refused() -> None:
    with pytest.raises(SetupError, match="Did you mean 'gradients'"):
        Study("deep").plot("gradient")


def _data() -> Data:
    x, y = blobs()
    return Data(x, y, x[:0], y[:0], "blobs", 3)
