import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import Adam

from gradmend.data import Data
from gradmend.errors import SetupError, TargetError
from gradmend.layers import Residual
from gradmend.remedies import DepthRates, Tailor, UseSchedule
from gradmend.setup import Setup
from gradmend.training import train
from gradmend.zoo import RECIPES, mlp, recipe

ACTIVATIONS = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}
WIDTH = 200
DEVIATIONS = {
    "zero": 0.0,
    "small": 0.01,
    "large": 1.0,
    "xavier": 1 / math.sqrt(WIDTH),
    "he": math.sqrt(2 / WIDTH),
    "lecun": 1 / math.sqrt(WIDTH),
    "orthogonal": 1 / math.sqrt(WIDTH),
}


def images(rows: int = 12, *shape: int, classes: int | None = 10) -> Data:
    x = torch.linspace(0, 1, rows * math.prod(shape)).reshape(rows, *shape)
    y = torch.arange(rows) % 10 if classes else x.flatten(1)[:, :3].contiguous()
    return Data(x, y, x[:2], y[:2], "images", classes)


@pytest.mark.parametrize(("name", "kind"), ACTIVATIONS.items())
def test_mlp_is_what_one_would_write(name: str, kind: type[nn.Module]) -> None:
    model = mlp(5, 3, width=7, depth=2, activation=name, norm="batch")
    kinds = [nn.Linear, nn.BatchNorm1d, kind]
    assert [type(layer) for layer in model] == [*kinds, *kinds, nn.Linear]
    assert model(torch.randn(4, 5)).shape == (4, 3)


@pytest.mark.parametrize(("name", "deviation"), DEVIATIONS.items())
def test_weights_have_the_deviation_of_their_init(name: str, deviation: float) -> None:
    torch.manual_seed(0)
    model = mlp(WIDTH, WIDTH, width=WIDTH, depth=1, init=name)
    for layer in (model[0], model[2]):
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.02)
        assert not layer.bias.any()


def test_orthogonal_weights_are_orthogonal() -> None:
    weight = mlp(8, 2, width=8, depth=1, init="orthogonal")[0].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(8))


def test_constant_weights_are_equal_and_default_ones_are_torchs_own() -> None:
    assert mlp(4, 2, depth=1, init="constant")[0].weight.unique().numel() == 1
    torch.manual_seed(0)
    ours = mlp(4, 2, width=3, depth=1)
    torch.manual_seed(0)
    torch.testing.assert_close(ours[0].weight, nn.Linear(4, 3).weight, rtol=0, atol=0)
    assert ours[0].bias.any()


def test_skip_adds_the_input_of_each_layer_that_keeps_the_width() -> None:
    model = mlp(5, 3, width=7, depth=3, norm="layer", skip=True)
    assert [type(layer) for layer in model[:3]] == [nn.Linear, nn.LayerNorm, nn.Sigmoid]
    assert [type(layer) for layer in model[3:]] == [Residual, Residual, nn.Linear]
    x = torch.randn(4, 7)
    torch.testing.assert_close(model[3](x), x + model[3].body(x))
    assert isinstance(mlp(7, 3, width=7, depth=1, skip=True)[0], Residual)


def test_no_hidden_layer_is_a_linear_model() -> None:
    assert [type(layer) for layer in mlp(5, 3, depth=0)] == [nn.Linear]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "rleu"}, "no activation 'rleu'. Did you mean 'relu'"),
        ({"init": "xaver"}, "no init 'xaver'. Did you mean 'xavier'"),
        ({"norm": "bath"}, "no norm 'bath'. Did you mean 'batch'"),
    ],
)
def test_unknown_names_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        mlp(5, 3, depth=1, **settings)


def test_the_mnist_recipe() -> None:
    made = recipe("mnist", data=images(12, 784))
    model = made.setup.model
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(layer) for layer in model] == [*kinds, *kinds, nn.Linear]
    assert [list(layer.weight.shape) for layer in model[::3]] == [[128, 784], [128, 128], [10, 128]]
    assert isinstance(made.setup.loss_fn, nn.CrossEntropyLoss)
    optimizer = made.setup.build_optimizer()
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["lr"] == 1e-3
    assert (made.batch_size, made.epochs) == (32, 10)


def test_the_deep_recipe_and_its_changes() -> None:
    made = recipe("deep")
    assert sum(isinstance(layer, nn.Sigmoid) for layer in made.setup.model) == 30
    assert (made.data.name, made.batch_size, made.epochs) == ("digits", 64, 40)
    changed = recipe("deep", data="digits", depth=2, width=16, activation="tanh", norm="batch")
    assert [type(layer) for layer in changed.setup.model[:3]] == [nn.Linear, nn.BatchNorm1d, nn.Tanh]


def test_the_very_deep_recipe_is_what_the_remedies_make_of_a_plain_network() -> None:
    made = recipe("very-deep", depth=30, epochs=3, batch_size=100)
    batch = made.data.head(len(made.data.x))
    setup = Setup(mlp(64, 10, depth=30, activation="relu"), nn.CrossEntropyLoss(), partial(Adam, lr=1e-3))
    for remedy in (Tailor(), DepthRates(), UseSchedule("linear", 45)):
        setup = remedy.apply(setup, batch).setup
    pairs = zip(made.setup.model, setup.model, strict=True)
    for own, wanted in pairs:
        if isinstance(own, nn.Linear):
            gains = [torch.linalg.svdvals(layer.weight) for layer in (own, wanted)]
            torch.testing.assert_close(*gains, rtol=1e-4, atol=0)
            mean = [layer.bias / layer.weight.sum(1) for layer in (own, wanted)]
            torch.testing.assert_close(*mean, rtol=1e-3, atol=1e-5)
        else:
            assert own.negative_slope == pytest.approx(wanted.negative_slope, abs=1e-6)
    optimizers = [s.build_optimizer() for s in (made.setup, setup)]
    rates = [sorted((g["lr"], len(g["params"])) for g in o.param_groups) for o in optimizers]
    assert [pytest.approx(pair) for pair in rates[0]] == rates[1]
    assert made.setup.schedule.keywords == setup.schedule.keywords


def test_the_very_deep_recipe_learns_where_the_plain_network_does_not() -> None:
    assert recipe("very-deep").setup.model[0].in_features == 64
    made = recipe("very-deep", depth=100, epochs=4)
    assert train(made, batch_size=64, epochs=4, device="cpu").test_accuracy > 0.9
    plain = recipe("very-deep", depth=100, epochs=4, activation="relu", init="he")
    assert train(plain, batch_size=64, epochs=4, device="cpu").test_accuracy < 0.5


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_very_deep_recipe_may_be_shallow(depth: int) -> None:
    made = recipe("very-deep", depth=depth)
    held = [p for group in made.setup.build_optimizer().param_groups for p in group["params"]]
    assert {*held} == {*made.setup.model.parameters()}
    assert made.setup.loss(made.data.head(8)).isfinite()


def test_a_seed_decides_the_weights_and_disturbs_nothing() -> None:
    before = torch.get_rng_state()
    first, again, other = (recipe("deep", depth=1, seed=seed).setup.model[0].weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_images_are_flattened_and_targets_without_classes_take_the_squared_error() -> None:
    made = recipe("deep", data=images(6, 3, 4, classes=None), depth=1)
    assert isinstance(made.setup.loss_fn, nn.MSELoss)
    assert made.setup.loss(made.data.head(6)).isfinite()


def test_unknown_recipes_and_changes_are_refused() -> None:
    with pytest.raises(TargetError, match=r"Did you mean 'mnist'\? Possible: deep, mnist"):
        recipe("mnits")
    with pytest.raises(SetupError, match="Did you mean 'depth'"):
        recipe("deep", dpeth=3)
    assert set(RECIPES) == {"mnist", "deep", "very-deep", "two-class", "neuron", "residual-gru"}
