"""The reference networks of two classes and of sequences, and the recipes that train them."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmend.data import Data
from gradmend.diagnosis import diagnose
from gradmend.errors import DataError, SetupError
from gradmend.training import train
from gradmend.zoo import Recipe, mlp, recipe, recurrent

HEALTHY = ("two-class", "neuron", "residual-gru")
VARIANTS = [{}, {"activation": "relu"}, {"skip": True}, {"activation": "relu", "skip": True}]


def doubled(made: Recipe) -> Recipe:
    """The same recipe in float64."""
    data = made.data
    parts = {part: getattr(data, part).double() for part in ("x", "y", "x_test", "y_test")}
    model = made.setup.model.double()
    return replace(made, setup=replace(made.setup, model=model), data=replace(data, **parts))


def slopes(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of the mean cross-entropy of one sigmoid unit, by the chain rule: (p - y) x, and p - y."""
    p = 1 / (1 + torch.exp(-(x @ weight.T + bias)))
    return ((p - y) * x).mean(0, keepdim=True), (p - y).mean(0)


# Two classes


def test_the_two_class_recipe() -> None:
    made = recipe("two-class")
    kinds = [type(layer) for layer in made.setup.model]
    assert kinds == [nn.Linear, nn.Sigmoid, nn.Linear, nn.Sigmoid, nn.Linear, nn.Sigmoid]
    assert [list(layer.weight.shape) for layer in made.setup.model[::2]] == [[64, 30], [64, 64], [1, 64]]
    assert isinstance(made.setup.loss_fn, nn.BCELoss)
    optimizer = made.setup.build_optimizer()
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.Adam, 1e-3)
    assert (made.data.name, made.batch_size, made.epochs) == ("breast-cancer", len(made.data.x), 100)
    assert train(made, device="cpu").steps == 100


@pytest.mark.parametrize("changes", VARIANTS, ids=["plain", "relu", "residual", "both"])
def test_all_variants_tell_tumours_apart(changes: dict[str, object]) -> None:
    assert train(recipe("two-class", **changes), device="cpu").test_accuracy > 0.9


def test_random_labels_are_learnt_by_heart() -> None:
    made = recipe("two-class", data="random-labels", activation="relu", epochs=400)
    assert list(made.setup.model[0].weight.shape) == [64, 32]
    history = train(made, device="cpu")
    assert history.accuracy[-1] > 0.9
    assert abs(history.test_accuracy - 0.5) < 4 * math.sqrt(0.25 / 250)


def test_class_numbers_become_targets_of_one_unit_once() -> None:
    made = recipe("two-class", data="random-labels")
    assert made.data.y.shape == (1000, 1)
    assert made.data.y.dtype == torch.float32
    again = recipe("two-class", data=made.data)
    torch.testing.assert_close(again.data.y, made.data.y)


@pytest.mark.parametrize("name", ["two-class", "neuron"])
def test_one_unit_takes_two_classes(name: str) -> None:
    with pytest.raises(DataError, match=f"{name} tells two classes apart, and digits has 10"):
        recipe(name, data="digits")
    x, y = torch.randn(6, 3), torch.randn(6, 1)
    with pytest.raises(DataError, match="and toy has none"):
        recipe(name, data=Data(x, y, x, y, "toy", None))


# One neuron


def test_gradients_of_the_neuron_are_those_written_by_hand() -> None:
    made = doubled(recipe("neuron"))
    layer, squash = made.setup.model
    assert (list(layer.weight.shape), type(squash)) == ([1, 2], nn.Sigmoid)
    made.setup.loss((made.data.x, made.data.y)).backward()
    with torch.no_grad():
        wanted = slopes(layer.weight, layer.bias, made.data.x, made.data.y)
    torch.testing.assert_close((layer.weight.grad, layer.bias.grad), wanted, rtol=1e-12, atol=1e-12)


def test_the_neuron_descends_as_by_hand() -> None:
    made = doubled(recipe("neuron"))
    layer, x, y = made.setup.model[0], made.data.x, made.data.y
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    for _ in range(20):
        by_weight, by_bias = slopes(weight, bias, x, y)
        weight, bias = weight - by_weight, bias - by_bias
    history = train(made, steps=20, device="cpu")
    torch.testing.assert_close((layer.weight.data, layer.bias.data), (weight, bias), rtol=1e-12, atol=1e-12)
    assert history.accuracy[-1] == 1.0
    assert history.loss[-1] < history.loss[0] / 5


# Sequences


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru", "residual-gru"])
@pytest.mark.parametrize("depth", [1, 2])
def test_every_cell_gives_one_output_per_sequence(cell: str, depth: int) -> None:
    model = recurrent(3, 5, cell=cell, width=7, depth=depth, memory=20)
    assert model(torch.randn(4, 20, 3)).shape == (4, 5)
    assert (model.body.hidden_size, model.body.num_layers) == (7, depth)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru", "residual-gru"])
def test_all_parameters_are_reached_and_so_is_the_first_step(cell: str) -> None:
    model = recurrent(3, 5, cell=cell, width=7)
    x = torch.randn(4, 6, 3, requires_grad=True)
    F.cross_entropy(model(x), torch.arange(4)).backward()
    assert all(p.grad.any() for p in model.parameters())
    assert x.grad[:, 0].any()


def test_the_residual_block_adds_its_projected_input_before_normalization() -> None:
    model = recurrent(3, 5, width=7)
    residual, norm = model.block
    x = torch.randn(4, 3, 6)
    torch.testing.assert_close(residual(x), residual.skip(x) + residual.body(x))
    assert isinstance(norm, nn.BatchNorm1d)
    assert model.block(x).shape == (4, 7, 6)


def test_torchs_gru_is_the_one_described() -> None:
    gru = recurrent(3, 5, cell="gru", width=7).body
    x, h = torch.randn(4, 6, 3), torch.zeros(4, 7)
    for step in x.unbind(1):
        given = (step @ gru.weight_ih_l0.T + gru.bias_ih_l0).chunk(3, 1)
        asked = (h @ gru.weight_hh_l0.T + gru.bias_hh_l0).chunk(3, 1)
        r, z = (given[0] + asked[0]).sigmoid(), (given[1] + asked[1]).sigmoid()
        h = (1 - z) * (given[2] + r * asked[2]).tanh() + z * h
    torch.testing.assert_close(gru(x)[0][:, -1], h)


@pytest.mark.parametrize("cell", ["lstm", "gru", "residual-gru"])
def test_memory_keeps_the_first_step(cell: str) -> None:
    def reach(memory: int | None) -> float:
        torch.manual_seed(0)
        model = recurrent(3, 5, cell=cell, width=16, memory=memory).eval()  # else batch statistics mix steps
        x = torch.randn(8, 80, 3, requires_grad=True)
        model(x).square().sum().backward()
        return x.grad[:, 0].norm().item()

    assert reach(80) > 1e6 * reach(None)


def test_the_input_gate_of_an_lstm_lets_in_what_the_forget_gate_makes_room_for() -> None:
    body = recurrent(3, 5, cell="lstm", width=7, memory=9).body
    let_in, keep, *_ = (body.bias_ih_l0 + body.bias_hh_l0).chunk(4)
    torch.testing.assert_close(let_in, -keep)


def test_a_plain_rnn_has_no_gates_to_set() -> None:
    torch.manual_seed(0)
    plain = recurrent(3, 5, cell="rnn", width=7)
    torch.manual_seed(0)
    torch.testing.assert_close(
        recurrent(3, 5, cell="rnn", width=7, memory=9).state_dict(), plain.state_dict()
    )


def test_a_residual_gru_recalls_what_a_plain_rnn_has_lost() -> None:
    accuracy = {
        cell: train(recipe("residual-gru", data="recall-60", cell=cell), epochs=4, device="cpu").test_accuracy
        for cell in ("rnn", "residual-gru")
    }
    assert accuracy["residual-gru"] > 0.95
    assert accuracy["rnn"] < 0.5


def test_images_are_read_row_by_row() -> None:
    made = recipe("residual-gru", data="digits-rows")
    assert train(made, epochs=4, device="cpu").test_accuracy > 0.9


def test_the_gates_remember_as_many_steps_as_there_are_unless_told_otherwise() -> None:
    def longest(**changes: int | None) -> float:
        gru = recipe("residual-gru", data="recall-40", cell="gru", width=400, **changes).setup.model.body
        return (gru.bias_ih_l0 + gru.bias_hh_l0)[400:800].exp().max().item() + 1

    assert longest() == pytest.approx(40, rel=0.02)
    assert longest(memory=20) == pytest.approx(20, rel=0.02)
    assert longest(memory=None) < 3


def test_sequences_may_be_as_short_as_one_step_and_have_any_target() -> None:
    x, y = torch.randn(6, 1, 3), torch.randn(6, 2)
    made = recipe("residual-gru", data=Data(x, y, x, y, "toy", None))
    assert isinstance(made.setup.loss_fn, nn.MSELoss)
    assert made.setup.loss(made.data.head(6)).isfinite()


def test_impossible_sequences_are_refused() -> None:
    with pytest.raises(DataError, match=r"digits has rows of \[64\]\. Type for example: --data digits-rows"):
        recipe("residual-gru", data="digits")
    with pytest.raises(SetupError, match=r"no cell 'grru'\. Did you mean 'gru'"):
        recurrent(3, 5, cell="grru")
    with pytest.raises(SetupError, match="2 steps or more, not 1"):
        recurrent(3, 5, memory=1)
    with pytest.raises(SetupError, match="no network setting 'cell'"):
        recipe("two-class", cell="gru")


# All


@pytest.mark.parametrize("name", HEALTHY)
def test_the_recipes_that_learn_are_found_healthy(name: str) -> None:
    short = {"data": "recall-20", "width": 16} if name == "residual-gru" else {}
    made = recipe(name, **short)
    batches = list(made.data.batches(made.batch_size, generator=torch.Generator().manual_seed(0), epochs=1))
    assert diagnose(made.setup, batches[:4]).healthy


# Variances


def test_weights_and_biases_have_the_variances_asked_for() -> None:
    model = mlp(100, 400, width=400, depth=1, init="he", weight_variance=1.7, bias_variance=0.3)
    for layer in (model[0], model[2]):
        assert layer.weight.var().item() * layer.in_features == pytest.approx(1.7, rel=0.05)
        assert layer.bias.var().item() == pytest.approx(0.3, rel=0.25)
    assert not mlp(10, 4, depth=1, weight_variance=1.0)[0].bias.any()


def test_biases_alone_leave_the_weights_as_they_were() -> None:
    torch.manual_seed(0)
    plain = mlp(10, 4, depth=1, init="orthogonal")
    torch.manual_seed(0)
    model = mlp(10, 4, depth=1, init="orthogonal", bias_variance=1.0)
    assert torch.equal(model[0].weight, plain[0].weight)
    assert model[0].bias.any()
    assert not mlp(10, 4, depth=1, bias_variance=0.0)[0].bias.any()


@pytest.mark.parametrize("variance", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["weight_variance", "bias_variance"])
def test_impossible_variances_are_refused(name: str, variance: float) -> None:
    with pytest.raises(SetupError, match="A variance is a number from 0 on"):
        mlp(10, 4, depth=1, **{name: variance})
