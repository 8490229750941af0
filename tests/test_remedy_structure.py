"""Weights, activations, normalization, skips: what each remedy says of itself, measured."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from gradmend.errors import NoEffectWarning, SetupError
from gradmend.layers import Residual
from gradmend.remedies import (
    LSUV,
    AddSkips,
    BatchNorm,
    He,
    LayerNorm,
    LeCun,
    Orthogonal,
    Remedy,
    SwapActivation,
    UseOptimizer,
    UseSchedule,
    Xavier,
)
from gradmend.setup import Batch, Setup
from gradmend.training.loop import Stepper
from helpers import SGD, Functional, blobs, images, plain, setups

CE = nn.CrossEntropyLoss()
Make = Callable[[], nn.Module]


def treated(remedy: Remedy, model: nn.Module, batch: Batch | None = None, loss: Any = CE) -> nn.Module:
    return remedy.apply(Setup(model, loss, SGD), batch or blobs()).setup.model


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules() if not list(module.children())]


# Initialization


def wide(activation: Make) -> nn.Sequential:
    """Layers large enough that a sample variance is known to two percent."""
    return nn.Sequential(
        nn.Linear(8, 400), activation(), nn.Linear(400, 200), activation(), nn.Linear(200, 3)
    )


@pytest.mark.parametrize(
    ("remedy", "activation", "variance"),
    [
        (Xavier(), nn.Tanh, 2 / 600),
        (LeCun(), nn.SELU, 1 / 400),
        (He(), nn.ReLU, 2 / 400),
        (He(), nn.GELU, 2 / 400),
        (He(), partial(nn.LeakyReLU, 0.5), 2 / (1 + 0.5**2) / 400),
        (He(), partial(nn.PReLU, init=0.5), 2 / (1 + 0.5**2) / 400),
        (He(), nn.Tanh, 1 / 400),
        (Orthogonal(), nn.Tanh, 1 / 400),
        (Orthogonal(), nn.ReLU, 2 / 400),
    ],
)
def test_variance_of_the_weights(remedy: Remedy, activation: Make, variance: float) -> None:
    model = treated(remedy, wide(activation))
    assert model[2].weight.var().item() == pytest.approx(variance, rel=0.02)
    assert model[2].bias.abs().max() == 0


def test_he_gives_the_output_layer_variance_one_over_fan_in() -> None:
    model = treated(He(), nn.Sequential(nn.Linear(8, 500), nn.ReLU(), nn.Linear(500, 3)))
    assert model[2].weight.var().item() == pytest.approx(1 / 500, rel=0.1)  # of 1,500 values


def test_fan_in_of_a_convolution_counts_its_window() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.LazyLinear(3)
    )
    x, y = images()
    model(x)
    after = treated(He(), model, (x, y))
    assert after[0].weight.var().item() == pytest.approx(2 / 9, rel=0.15)  # of 288 values
    assert after[2].weight.var().item() == pytest.approx(1 / (32 * 9), rel=0.02)


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (24, 96), (96, 24)])
def test_orthogonal_weights_are_and_keep_the_size_of_the_signal(rows: int, columns: int) -> None:
    model = nn.Sequential(
        nn.Linear(8, columns), nn.Tanh(), nn.Linear(columns, rows), nn.Tanh(), nn.Linear(rows, 3)
    )
    weight = treated(Orthogonal(), model)[2].weight.double()
    gram = weight @ weight.T if rows <= columns else weight.T @ weight
    scale = max(1.0, rows / columns)  # an expanding layer keeps the size of each value, not the norm
    torch.testing.assert_close(gram / scale, torch.eye(min(rows, columns)).double(), atol=1e-5, rtol=0)
    x = torch.randn(2000, columns).double()
    assert (x @ weight.T).square().mean().item() == pytest.approx(1.0, rel=0.02)


def deviations_of_the_layers(model: nn.Module, batch: Batch) -> list[float]:
    deviations: list[float] = []
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [m.register_forward_hook(lambda *a: deviations.append(a[2].std().item())) for m in layers]
    model(batch[0])
    for handle in handles:
        handle.remove()
    return deviations


@pytest.mark.parametrize("name", ["plain", "convolutional", "functional", "weight norm", "double"])
def test_lsuv_gives_unit_variance_at_every_layer(name: str) -> None:
    known = setups()
    if name == "weight norm":
        known[name] = (Setup(nn.Sequential(*map(weight_norm_if_linear, plain(3, nn.Tanh))), CE, SGD), blobs())
    if name == "double":
        known[name] = (Setup(plain(12, nn.Tanh).double(), CE, SGD), (blobs()[0].double(), blobs()[1]))
    setup, batch = known[name]
    if name == "convolutional":
        setup.model[6].p = 0.0  # another mask of dropout would change the variance after it
    made = LSUV().apply(setup, batch).setup.model
    first_calls = deviations_of_the_layers(made, batch)
    if name == "functional":
        first_calls = [first_calls[0], first_calls[1], first_calls[3]]  # the second layer is called twice
    assert first_calls == pytest.approx([1.0] * len(first_calls), abs=1e-4)


def weight_norm_if_linear(module: nn.Module) -> nn.Module:
    return weight_norm(module) if isinstance(module, nn.Linear) else module


@pytest.mark.parametrize("remedy", [Xavier(), He(), LeCun(), Orthogonal(), LSUV()])
def test_initialization_keeps_frozen_layers(remedy: Remedy) -> None:
    model = plain(3, nn.ReLU)
    model[2].requires_grad_(False)
    after = treated(remedy, model)
    assert torch.equal(after[2].weight, model[2].weight)
    assert not torch.equal(after[4].weight, model[4].weight)


def test_lsuv_leaves_running_statistics_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    assert treated(LSUV(), model)[1].num_batches_tracked.item() == 0


# Activations


class Gated(nn.Module):
    """A gate, a candidate, an output activation, and hidden ones: all modules."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 1)
        self.hidden, self.gating, self.candidate = nn.Sigmoid(), nn.Sigmoid(), nn.Tanh()
        self.squash = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(self.inner(x))
        h = h + self.gating(self.gate(h)) * self.candidate(self.value(h))
        return self.squash(self.out(h)).squeeze(1)


def test_swap_leaves_gates_and_the_output_alone() -> None:
    x, y = blobs()
    after = treated(SwapActivation("ReLU"), Gated(), (x, (y == 0).float()), nn.BCELoss())
    assert type(after.hidden) is nn.ReLU
    assert (type(after.gating), type(after.candidate), type(after.squash)) == (
        nn.Sigmoid,
        nn.Tanh,
        nn.Sigmoid,
    )


class OneForAll(nn.Module):
    """The same module as hidden and as output activation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out, self.act = nn.Linear(8, 8), nn.Linear(8, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.out(self.act(self.inner(x)))).squeeze(1)


def test_swap_leaves_a_module_that_is_the_output_activation_as_well() -> None:
    x, y = blobs()
    with pytest.warns(NoEffectWarning):
        after = treated(SwapActivation("ReLU"), OneForAll(), (x, (y == 0).float()), nn.BCELoss())
    assert type(after.act) is nn.Sigmoid


def test_swap_replaces_past_normalization_and_in_residual_sums() -> None:
    block = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 16))
    model = nn.Sequential(nn.Linear(8, 16), Residual(block), nn.Tanh(), nn.Linear(16, 3))
    assert kinds(treated(SwapActivation("GELU"), model)).count("GELU") == 2


def test_swap_rewrites_activations_that_are_functions() -> None:
    model = treated(SwapActivation("GELU"), Functional())
    assert kinds(model).count("GELU") == 4
    assert isinstance(model, Functional)


class Branching(nn.Module):
    """Its forward looks at values, so that it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        return self.out(h if h.sum() > 0 else -h)


def test_swap_names_the_line_of_what_it_cannot_reach() -> None:
    with pytest.warns(NoEffectWarning, match=r"test_remedy_structure.py:\d+: torch.fx cannot trace"):
        made = SwapActivation("ReLU").apply(Setup(Branching(), CE, SGD), blobs())
    assert __file__ in made.by_hand[0]


@pytest.mark.parametrize("wrong", ["relu", "Sigmoid"])
def test_unknown_names_are_refused(wrong: str) -> None:
    with pytest.raises(SetupError, match=f"There is no activation '{wrong}'"):
        SwapActivation(wrong)
    with pytest.raises(SetupError, match="torch has no optimizer 'Optimizer'"):
        UseOptimizer("Optimizer")
    with pytest.raises(SetupError, match="There is no schedule 'cosin' here"):
        UseSchedule("cosin")


# Normalization and structure


def order(model: nn.Module, batch: Batch) -> list[str]:
    """The layers in the order in which they are called."""
    called: list[str] = []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, *_: called.append(type(m).__name__))
    model(batch[0])
    return called


def test_normalization_stands_between_layer_and_activation() -> None:
    for remedy, norm in ((BatchNorm(), "BatchNorm1d"), (LayerNorm(), "LayerNorm")):
        after = treated(remedy, plain(2, nn.Tanh))
        assert order(after, blobs()) == ["Linear", norm, "Tanh", "Linear", norm, "Tanh", "Linear"]


def test_normalization_stands_before_an_activation_that_is_a_function() -> None:
    model = treated(BatchNorm(), Functional())
    assert kinds(model).count("BatchNorm1d") == 2  # `x @ weight` is no module, and `out` has no activation


def test_convolutions_get_two_dimensional_batch_norm_and_no_layer_norm() -> None:
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 8), nn.ReLU(), nn.Linear(8, 3)]
    assert order(treated(BatchNorm(), nn.Sequential(*layers), images()), images())[:2] == [
        "Conv2d",
        "BatchNorm2d",
    ]
    assert kinds(treated(LayerNorm(), nn.Sequential(*layers), images())).count("LayerNorm") == 1


def test_a_layer_that_is_normalized_already_gets_no_second_normalization() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    with pytest.warns(NoEffectWarning):
        treated(BatchNorm(), model)


@pytest.mark.parametrize(("scale", "used"), [(None, 1 / math.sqrt(3)), (1.0, 1.0), (0.0, 0.0)])
def test_skips_add_the_input_of_activation_and_layer(scale: float | None, used: float) -> None:
    model, (x, _) = plain(4, nn.Tanh), blobs()
    after = treated(AddSkips(scale), model)
    h = model[0](x)
    for i in (2, 4, 6):
        h = h + used * model[i](torch.tanh(h))
    torch.testing.assert_close(after(x), model[8](torch.tanh(h)))


def test_learned_scales_are_parameters_of_the_optimizer() -> None:
    model = plain(3, nn.Tanh)
    setup = Setup(model, CE, torch.optim.SGD(model.parameters(), lr=0.1))
    made = AddSkips(scale=0.0, learned=True).apply(setup, blobs()).setup
    scales = [p for name, p in made.model.named_parameters() if name.endswith("scale")]
    Stepper(made)([blobs()])
    assert len(scales) == 2
    assert all(scale.item() != 0 for scale in scales)
