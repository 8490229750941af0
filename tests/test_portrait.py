"""What nouns draw: their own numbers, in the pictures that suit the network."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradmend as gm
from gradmend.diagnosis import look
from gradmend.errors import GradmendError
from gradmend.portrait import layers
from gradmend.spread import compared, spread
from helpers import ADAM, SGD, Convolutional, Functional, blobs, images, plain


class Sequence(nn.Module):
    """A recurrent layer behind a linear one; the last step decides."""

    def __init__(self, kind: Callable[..., nn.Module], **settings: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.recurrent = kind(12, 16, batch_first=True, **settings)
        self.head = nn.Linear(16 * (1 + settings.get("bidirectional", False)), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embed(x))[0][:, -1])


class Loop(nn.Module):
    """The same with a cell in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 16)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


def sequences(steps: int = 20) -> tuple[Tensor, Tensor]:
    return torch.randn(32, steps, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3


def profile(model: nn.Module, batch: tuple[Tensor, Tensor]) -> gm.Profile:
    return gm.measure(gm.Setup(model, nn.CrossEntropyLoss(), SGD), batch)


def values(figure: Any, name: str) -> list[Any]:
    return [trace.y for trace in figure.data if trace.name == name and "lines" in trace.mode]


def test_a_profile_draws_what_it_holds_beside_what_theory_expects() -> None:
    found = profile(plain(6, nn.Tanh), blobs())
    figure = found.figures()["depth"]
    shown, expected = found.weighted(), found.expected
    gradient, rms, cosine = values(figure, "measured")
    np.testing.assert_array_equal(gradient, [r.gradient_norm for r in shown])
    np.testing.assert_array_equal(rms, [r.rms for r in shown])
    np.testing.assert_array_equal(cosine, [r.cosine for r in shown])
    guesses = [expected[r.site.index].gradient_norm for r in shown]
    np.testing.assert_array_equal(values(figure, "predicted")[0], guesses)
    assert list(figure.layout.xaxis3.ticktext) == [r.site.name for r in shown]


def test_dead_and_saturated_shares_stand_at_the_layer_before_the_activation() -> None:
    model = plain(2, nn.ReLU)
    nn.init.constant_(model[2].bias, -100.0)
    dead = values(profile(model, blobs()).figures()["depth"], "measured")[2]
    np.testing.assert_array_equal(dead, [0.0, 1.0, np.nan])
    model = plain(2, nn.Tanh)
    nn.init.normal_(model[2].weight, std=50.0)
    saturated = values(profile(model, blobs()).figures()["depth"], "measured")[2]
    assert saturated[1] > 0.8
    assert np.isnan(saturated[2])


@pytest.mark.parametrize("sites", [("2",), ("3",), ("2.weight",)])
def test_findings_at_layers_activations_and_parameters_are_placed(sites: tuple[str, ...]) -> None:
    from gradmend.causes import Cause
    from gradmend.diagnosis import Diagnosis, Finding, Severity

    finding = Finding(Cause.DEAD_UNITS, Severity.ERROR, "", sites=sites)
    found = Diagnosis(profile(plain(3, nn.ReLU), blobs()), (finding,))
    (lane,) = [trace for trace in found.plot("depth").data if trace.name == "dead units · error"]
    np.testing.assert_allclose(lane.x[:2], [0.6, 1.4])


@pytest.mark.parametrize(("kind", "ways"), [(nn.LSTM, 1), (partial(nn.GRU, bidirectional=True), 2)])
def test_recurrent_layers_draw_the_gradient_through_time(kind: Callable[..., nn.Module], ways: int) -> None:
    found = profile(Sequence(kind) if ways == 1 else Sequence(nn.GRU, bidirectional=True), sequences())
    figure = found.figures()["time"]
    reading = next(r for r in found.sites if r.time)
    assert reading.time is not None
    names = ["recurrent"] if ways == 1 else ["recurrent, forward", "recurrent, backward"]
    for name, points, path in zip(names, reading.time.gradients, reading.time.paths, strict=True):
        (line,) = [trace for trace in figure.data if trace.name == name]
        np.testing.assert_array_equal(np.stack([line.x, line.y], axis=1), points)
        band = next(y for y in values(figure, "predicted") if y[0] == pytest.approx(line.y[0]))
        np.testing.assert_allclose(band[1] / band[0], path.growth)


def test_a_cell_in_a_loop_draws_its_calls_from_the_last_on() -> None:
    found = profile(Loop(), sequences(steps=12))
    (line,) = found.figures()["time"].data
    calls = found.repeated["cell"]
    np.testing.assert_array_equal(line.y, [call.gradient for call in reversed(calls)])
    assert line.x.tolist() == list(range(12))


def test_the_gradient_through_time_comes_first_in_shallow_networks() -> None:
    assert list(profile(Sequence(nn.LSTM), sequences()).figures()) == ["time", "depth"]


def test_layers_lie_in_the_plane_at_their_measured_variances() -> None:
    found = profile(plain(4, nn.Tanh), blobs())
    (dots,) = [trace for trace in found.figures()["phase"].data if trace.name == "layers"]
    inner = found.weighted()[1:]
    np.testing.assert_array_equal(dots.x, [r.weight_variance for r in inner])
    np.testing.assert_array_equal(dots.y, [r.bias_variance for r in inner])


def test_dropout_acts_as_larger_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.75), nn.Linear(32, 3))
    found = profile(model, blobs())
    (dots,) = [trace for trace in found.figures()["phase"].data if trace.name == "layers"]
    assert dots.x[0] == pytest.approx(4 * found.weighted()[-1].weight_variance)


def test_a_plain_recurrent_network_lies_in_the_plane_by_what_enters_at_each_step() -> None:
    model = Sequence(nn.RNN)
    x, y = sequences()
    figure = profile(model, (x, y)).figures()["phase"]
    (dots,) = [trace for trace in figure.data if trace.name == "layers"]
    layer = model.recurrent
    entering = model.embed(x).square().mean() * 12 * layer.weight_ih_l0.square().mean()
    entering = entering + layer.bias_ih_l0.square().mean() + layer.bias_hh_l0.square().mean()
    assert dots.x[0] == pytest.approx(16 * layer.weight_hh_l0.square().mean().item(), rel=1e-5)
    assert dots.y[0] == pytest.approx(entering.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (Convolutional(), images()),  # pools
        (Functional(), blobs()),  # several activations, a residual sum
        (nn.Sequential(nn.Linear(8, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)), blobs()),
        (nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 3)), blobs()),
        (nn.Linear(8, 3), blobs()),
        (Sequence(nn.LSTM), sequences()),
    ],
    ids=["pools", "residual", "normalized", "linear", "one layer", "gated"],
)
def test_other_networks_have_no_phases(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    found = profile(model, batch).figures()
    assert "phase" not in found
    assert "depth" in found


def test_broken_networks_are_drawn() -> None:
    model = plain(3, nn.ReLU)
    nn.init.constant_(model[0].weight, torch.nan)
    for dark in (False, True):
        figure = look(gm.Setup(model, nn.CrossEntropyLoss(), SGD), blobs()).figures(dark)["depth"]
        assert "The gradient is no number at 4 of 4 layers." in figure.layout.meta["words"]


def test_frozen_layers_have_no_gradient_and_no_mark() -> None:
    model = plain(3, nn.ReLU)
    model[0].requires_grad_(False)
    figure = profile(model, blobs()).figures()["depth"]
    gradient = values(figure, "measured")[0]
    assert np.isnan(gradient[0])
    assert np.isfinite(gradient[1:]).all()
    assert not [trace for trace in figure.data if trace.mode == "markers+text"]


def test_a_model_without_sites_draws_nothing() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.value.expand(len(x), 3)

    found = profile(Constant(), blobs())
    assert not found.sites
    assert found.figures() == {}
    with pytest.raises(GradmendError, match="nothing here"):
        found.plot()


def test_attention_is_called_by_its_module() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(8 * 20, 3))
    figure = profile(model, sequences()).figures()["depth"]
    names = figure.layout.xaxis3.ticktext or figure.layout.xaxis4.ticktext
    assert names[0] == "0.self_attn"


def test_a_treatment_draws_before_and_after_and_its_trials() -> None:
    torch.manual_seed(0)
    model = plain(8, nn.Sigmoid)
    treatment = gm.mend(gm.Setup(model, nn.CrossEntropyLoss(), SGD), blobs(), gm.Budget(steps=10))
    assert treatment.changes
    found = treatment.figures()
    assert found["depth"].layout == treatment.plot().layout
    before, after = (values(found["depth"], when)[0] for when in ("before", "after"))
    np.testing.assert_array_equal(
        before, [r.gradient_norm for r in layers(treatment.before.profile.portrait)]
    )
    np.testing.assert_array_equal(after, [r.gradient_norm for r in layers(treatment.after.profile.portrait)])
    assert any(str(trace.name).endswith(", before · error") for trace in found["depth"].data)
    untreated = treatment.trials[0]
    (line,) = values(found["trials"], "untreated")
    np.testing.assert_allclose(line, untreated.losses)
    chosen = [trace for trace in found["trials"].data if str(trace.name).endswith("· chosen")]
    assert len(chosen) == 1


def test_a_history_draws_its_losses_and_its_wreck() -> None:
    history = gm.train("deep", steps=30, device="cpu")
    np.testing.assert_array_equal(values(history.plot(), "loss")[0], history.loss)
    setup = gm.Setup(plain(3, nn.ReLU), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=1e30))
    wrecked = gm.train(setup, [blobs()], steps=20, device="cpu")
    assert wrecked.wreck is not None
    assert list(wrecked.figures())[:2] == ["loss", "depth"]


def test_a_spread_fits_most_layers_and_counts_all_but_nan() -> None:
    setup = gm.Setup(plain(4, nn.Tanh), nn.CrossEntropyLoss(), SGD)
    found = spread(setup, blobs())
    assert found.layers == ("0", "2", "4", "6")
    assert found.ranges["outputs"] in ((-1.0, 1.0), (-2.0, 2.0))
    for shares in (found.outputs, found.gradients):
        np.testing.assert_allclose(shares.sum(axis=0), 1.0, rtol=1e-6)
    inside = found.gradients[1:-1].sum(axis=0)
    assert (inside > 0.9).all()
    assert [trace.name for trace in found.plot().data] == [*found.layers, *found.layers]
    with torch.no_grad():
        setup.model[2].weight[0] = torch.nan
    np.testing.assert_allclose(spread(setup, blobs()).outputs.sum(axis=0), [1, 31 / 32, 0, 0], rtol=1e-6)


def test_a_spread_of_large_layers_is_that_of_some_of_their_values() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4096), nn.Tanh(), nn.Linear(4096, 3))
    setup, batch = gm.Setup(model, nn.CrossEntropyLoss(), SGD), blobs(rows=192)
    found = spread(setup, batch)
    full = np.histogram(model[:2](batch[0]).detach().numpy(), bins=47, range=found.ranges["outputs"])[0]
    np.testing.assert_allclose(found.outputs[:, 0], full / full.sum(), atol=2e-3)


def test_spreads_are_compared_column_by_column() -> None:
    before, after = (
        spread(gm.Setup(plain(depth, nn.ReLU), nn.CrossEntropyLoss(), SGD), blobs()) for depth in (3, 4)
    )
    found = compared(before, after)
    assert list(found) == ["outputs", "gradients"]
    assert [trace.name for trace in found["outputs"].data] == [*before.layers, *after.layers]
    assert compared(spread(gm.Setup(nn.Linear(8, 3), nn.CrossEntropyLoss(), ADAM), blobs()), after) == {}
