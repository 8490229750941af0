"""Rules on signals and gradients fire where theory says, and are silent just beside it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmend as gm
from deep import BATCH, CE, HE, LECUN, X, Y, batches, found, judged, mlp, profile, scaled
from gradmend.causes import Cause
from gradmend.diagnosis import Finding, Severity
from gradmend.disturbance import Disturbance, Echo
from gradmend.profile import Profile
from helpers import ADAM, SGD, Net, Table, blobs, plain

SEEDS = range(3)
BN = partial(nn.BatchNorm1d, 64)


def errors(setup: gm.Setup, batch: Any = BATCH) -> set[Cause]:
    return {cause for cause, finding in found(setup, batch).items() if finding.severity is Severity.ERROR}


# ---- through depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("model", "causes"),
    [
        (partial(mlp, 20, nn.Sigmoid), {Cause.CONTRACTING_ACTIVATION, Cause.VANISHING_GRADIENT}),
        (partial(mlp, 20, nn.ReLU), {Cause.WEIGHTS_TOO_SMALL, Cause.VANISHING_GRADIENT}),
        (partial(mlp, 20, nn.Tanh), {Cause.WEIGHTS_TOO_SMALL, Cause.INFORMATION_COLLAPSE}),
        (partial(mlp, 30, nn.ReLU, scaled(4.0)), {Cause.WEIGHTS_TOO_LARGE, Cause.EXPLODING_GRADIENT}),
        (partial(mlp, 6, nn.Tanh, scaled(900.0)), {Cause.WEIGHTS_TOO_LARGE, Cause.SATURATED_UNITS}),
        (partial(mlp, 50, nn.Tanh, scaled(4.0)), {Cause.WEIGHTS_TOO_LARGE, Cause.CHAOS}),
    ],
    ids=["sigmoid", "ReLU", "tanh", "ReLU, large", "tanh, huge", "tanh, chaotic"],
)
def test_signals_that_die_or_explode(
    model: Callable[..., nn.Sequential], causes: set[Cause], seed: int
) -> None:
    causes_found = errors(gm.Setup(model(seed=seed), CE, SGD))
    assert causes <= causes_found
    shrinking = {Cause.WEIGHTS_TOO_SMALL, Cause.VANISHING_GRADIENT, Cause.INFORMATION_COLLAPSE}
    growing = {Cause.WEIGHTS_TOO_LARGE, Cause.EXPLODING_GRADIENT, Cause.SATURATED_UNITS, Cause.CHAOS}
    assert not (causes_found & shrinking and causes_found & growing)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "model",
    [
        partial(mlp, 3, nn.Sigmoid, nn.init.xavier_normal_),
        partial(mlp, 3, nn.ReLU),
        partial(mlp, 20, nn.ReLU, HE),
        partial(mlp, 20, nn.SELU, LECUN),
        partial(mlp, 30, nn.Tanh, nn.init.xavier_normal_),
        partial(mlp, 10, nn.ReLU, extra=BN),
        partial(mlp, 20, nn.ReLU, scaled(2.3)),
    ],
    ids=["sigmoid", "shallow", "He", "SELU", "Xavier", "batch norm", "a little large"],
)
def test_networks_that_keep_their_signal(model: Callable[..., nn.Sequential], seed: int) -> None:
    assert not found(gm.Setup(model(seed=seed), CE, SGD))


def test_the_sites_of_a_vanishing_gradient_are_the_far_ones() -> None:
    finding = found(gm.Setup(mlp(20, nn.Sigmoid), CE, SGD))[Cause.VANISHING_GRADIENT]
    assert finding.sites[0] == "0"
    assert "40" not in finding.sites  # the output layer
    assert finding.measured is not None
    # 0.02 per layer in the square (mean field: 1/3 of 0.0588) over 20 layers
    assert finding.measured == pytest.approx(20 * math.log10(0.02) / 2, abs=2)


def line_of(function: Callable[..., Any], text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    offset = next(i for i, line in enumerate(lines) if text in line)
    return f"{Path(__file__)}:{first + offset}"


def test_lines_of_a_vanishing_gradient() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(12)])
            self.out = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.sigmoid(layer(x))
            return self.out(x)

    finding = found(gm.Setup(Deep(), CE, SGD))[Cause.CONTRACTING_ACTIVATION]
    assert finding.where == (line_of(Deep, "torch.sigmoid"),)
    assert finding.measured == pytest.approx(0.152827, abs=1e-5)


def test_collapsed_information() -> None:
    """ReLU at its critical weights keeps its gradient and draws all inputs together: 1 - c ~ 44 / depth^2."""
    causes = judged(gm.measure(gm.Setup(mlp(150, nn.ReLU, HE, width=128), CE, SGD), BATCH))
    assert Cause.INFORMATION_COLLAPSE in causes
    assert Cause.VANISHING_GRADIENT not in causes


@pytest.mark.parametrize(
    ("depth", "phi", "severity"),
    [(17, nn.Tanh, Severity.ERROR), (12, nn.Tanh, Severity.WARNING), (16, nn.ReLU, Severity.WARNING)],
)
def test_bounded_units_need_inputs_further_apart(
    depth: int, phi: Callable[[], nn.Module], severity: Severity
) -> None:
    """After 300 steps of Adam, 17 layers of tanh guess; 12 of them, and 16 of ReLU, have learnt."""
    model = mlp(depth, phi, width=64 if phi is nn.Tanh else 128)
    assert found(gm.Setup(model, CE, ADAM))[Cause.INFORMATION_COLLAPSE].severity is severity


def test_adaptive_optimizers_outlive_a_vanishing_gradient() -> None:
    """Ten layers with torch's initialization train with Adam, so there is a warning, and no error."""
    for optimizer, healthy in ((ADAM, True), (partial(torch.optim.SGD, lr=0.1), False)):
        causes = found(gm.Setup(mlp(10, nn.ReLU, width=128), CE, optimizer))
        assert (causes[Cause.VANISHING_GRADIENT].severity < Severity.ERROR) is healthy


def test_weights_that_begin_at_zero_hide_what_lies_before() -> None:
    """At the first step nothing reaches what decides on a scale that begins at one."""

    def forward(self: Net, x: Tensor) -> Tensor:
        scale = 1 + self.scale(self.condition(x))
        return self.out(scale * self.value(x))

    parts = {"condition": mlp(4, nn.ReLU, HE), "scale": nn.Linear(10, 64), "value": nn.Linear(64, 64)}
    for parameter in parts["scale"].parameters():
        nn.init.zeros_(parameter)
    model = Net(forward, **parts, out=nn.Linear(64, 10))
    assert Cause.VANISHING_GRADIENT not in found(gm.Setup(model, CE, SGD))
    nn.init.constant_(model.scale.weight, 1e-6)  # too small to be meant
    assert Cause.VANISHING_GRADIENT in found(gm.Setup(model, CE, SGD))


def test_an_input_that_forward_does_not_use() -> None:
    model = Net(lambda self, x: self.body(torch.ones_like(x)), body=plain(3, nn.ReLU))
    finding = found(gm.Setup(model, CE, SGD), blobs())[Cause.INPUT_LOST]
    assert finding.sites == ("body.0",)
    one_column = (torch.rand(96, 1) + 1, torch.arange(96) % 3)  # parallel vectors of different lengths
    assert Cause.INPUT_LOST not in found(gm.Setup(plain(2, nn.ReLU, features=1), CE, SGD), one_column)


def test_one_unit_has_no_angles() -> None:
    x = torch.rand(96, 8) + 5
    model = Net(lambda self, x: self.out(self.cell(x)), cell=nn.GRUCell(8, 8), out=nn.Linear(8, 1))
    assert Cause.INPUT_LOST not in found(gm.Setup(model, nn.MSELoss(), SGD), (x, x[:, :1]))


# ---- units ------------------------------------------------------------------------------------------------


def test_dead_units() -> None:
    model = mlp(2, nn.ReLU)
    nn.init.constant_(model[2].bias, -50.0)
    finding = found(gm.Setup(model, CE, SGD))[Cause.DEAD_UNITS]
    assert (finding.severity, finding.sites, finding.measured) == (Severity.ERROR, ("3",), 1.0)


def test_units_are_dead_only_if_no_batch_wakes_them() -> None:
    model = mlp(2, nn.ReLU)
    with torch.no_grad():
        model[2].bias -= 50 * (torch.arange(64) < 48)
    positive, negative = (X[label == Y][:96] for label in (0, 1))
    nn.init.constant_(model[0].bias, 0.0)
    given = [(positive, torch.zeros(96, dtype=torch.long)), (negative, torch.ones(96, dtype=torch.long))]
    alone = gm.measure(gm.Setup(model, CE), given[0])
    both = gm.measure(gm.Setup(model, CE), given)
    dead = [next(r.dead for r in seen.sites if r.site.name == "1") for seen in (alone, both)]
    assert dead[1] <= dead[0]
    assert judged(both)[Cause.DEAD_UNITS].measured == pytest.approx(0.75, abs=0.1)


def test_few_samples_say_nothing_of_dead_units() -> None:
    model = mlp(2, nn.ReLU)
    nn.init.constant_(model[2].bias, -50.0)
    assert Cause.DEAD_UNITS not in found(gm.Setup(model, CE, SGD), (X[:4], Y[:4]))


@pytest.mark.parametrize("phi", [nn.Tanh, nn.GELU, nn.SiLU, nn.ELU])
def test_zero_is_where_smooth_activations_live(phi: Callable[[], nn.Module]) -> None:
    model = mlp(2, phi)
    for parameter in model[2].parameters():
        nn.init.zeros_(parameter)
    assert Cause.DEAD_UNITS not in found(gm.Setup(model, CE, SGD))


@pytest.mark.parametrize(("gate", "fires"), [(True, False), (False, True)])
def test_gates_may_be_shut(gate: bool, fires: bool) -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        h = torch.sigmoid(30 * self.gate(x))
        return self.out(h * self.value(x) if gate else h)

    parts = {"gate": nn.Linear(64, 64), "value": nn.Linear(64, 64), "out": nn.Linear(64, 10)}
    assert (Cause.SATURATED_UNITS in found(gm.Setup(Net(forward, **parts), CE, SGD))) is fires


def constant(weight: Tensor) -> Tensor:
    return nn.init.constant_(weight, 0.1)


def test_symmetric_weights() -> None:
    model = plain(2, nn.Tanh)
    constant(model[2].weight)
    nn.init.constant_(model[2].bias, 0.0)
    constant(model[4].weight)
    finding = found(gm.Setup(model, CE, SGD), blobs(128))[Cause.SYMMETRIC_WEIGHTS]
    assert (finding.severity, finding.sites) == (Severity.ERROR, ("2.weight",))
    zeros = plain(2, nn.Tanh)
    nn.init.zeros_(zeros[4].weight)  # an output layer of zeros learns
    assert Cause.SYMMETRIC_WEIGHTS not in found(gm.Setup(zeros, CE, SGD), blobs(128))


@pytest.mark.parametrize("phi", [nn.Sigmoid, nn.Tanh, nn.ReLU])
def test_a_network_of_zeros_is_symmetric(phi: Callable[[], nn.Module]) -> None:
    assert Cause.SYMMETRIC_WEIGHTS in found(gm.Setup(mlp(2, phi, nn.init.zeros_), CE, SGD))


def test_branches_and_heads_of_zeros_are_not() -> None:
    """At the first step nothing reaches the branch, and after it all of them move."""
    model = Net(
        lambda self, x: self.out(x + self.last(F.relu(self.first(x)))),
        first=nn.Linear(64, 64),
        last=nn.Linear(64, 64),
        out=nn.Linear(64, 10),
    )
    for parameter in (*model.last.parameters(), *model.out.parameters()):
        nn.init.zeros_(parameter)
    assert Cause.SYMMETRIC_WEIGHTS not in found(gm.Setup(model, CE, SGD))


@pytest.mark.parametrize(("units", "severity"), [(32, Severity.ERROR), (4, Severity.WARNING)])
def test_a_softmax_between_layers(units: int, severity: Severity) -> None:
    model = nn.Sequential(nn.Linear(64, units), nn.Softmax(dim=1), nn.Linear(units, 10))
    finding = found(gm.Setup(model, CE, SGD))[Cause.CONTRACTING_ACTIVATION]
    assert (finding.severity, finding.sites) == (severity, ("1",))


def test_a_softmax_that_weighs_or_ends_is_none() -> None:
    mixture = Net(
        lambda self, x: self.out(self.value(x) * torch.softmax(self.score(x), 1)),
        score=nn.Linear(64, 32),
        value=nn.Linear(64, 32),
        out=nn.Linear(32, 10),
    )
    end = nn.Sequential(nn.Linear(64, 10), nn.Softmax(dim=1))
    for model in (mixture, end):
        assert Cause.CONTRACTING_ACTIVATION not in found(gm.Setup(model, CE, SGD))


# ---- neighbours -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("variance", "rate"), [(4.0, 1.3424), (3.0, 1.209)])
def test_neighbours_part_at_the_rate_of_theory(variance: float, rate: float, seed: int) -> None:
    """chi of tanh at bias variance 0.05 (Schoenholz et al. 2017); the biases here are zero: a little more."""
    depth = 60
    finding = found(gm.Setup(mlp(depth, nn.Tanh, scaled(variance), width=256, seed=seed), CE, SGD))[
        Cause.CHAOS
    ]
    assert finding.measured == pytest.approx(rate, rel=0.12)
    total = (depth - 1) * math.log(finding.measured or 1.0)
    assert finding.severity is (Severity.ERROR if total > 12 else Severity.WARNING)


def test_no_strangers_where_theory_has_none() -> None:
    """Order, the edge of chaos, and a chaos too short to part neighbours."""
    for depth, variance in ((50, 1.0), (10, 4.0), (20, 2.0)):
        assert Cause.CHAOS not in found(gm.Setup(mlp(depth, nn.Tanh, scaled(variance)), CE, SGD))
    assert Cause.CHAOS not in found(gm.Setup(mlp(20, nn.ReLU, scaled(4.0)), CE, SGD))  # grows, keeps angles


def test_a_disturbance_draws_no_other_noise() -> None:
    model = mlp(6, nn.ReLU, HE, extra=partial(nn.Dropout, 0.5))
    seen = profile(gm.Setup(model.train(), CE)).disturbance
    assert seen is not None
    assert seen.echoes[-1].apart < 1e-3


def test_shattered_gradients() -> None:
    deep = found(gm.Setup(mlp(45, nn.ReLU, extra=BN), CE, SGD))
    assert deep[Cause.SHATTERED_GRADIENTS].severity is Severity.WARNING
    assert Cause.SHATTERED_GRADIENTS not in found(gm.Setup(mlp(45, nn.ReLU, HE), CE, SGD))


@pytest.mark.parametrize(
    ("cosines", "fires"), [((0.05, 0.4, 0.95), True), ((0.3, 0.4, 0.95), False), ((0.05, 0.3, 0.4), False)]
)
def test_gradients_shatter_from_much_in_common_to_nothing(cosines: tuple[float, ...], fires: bool) -> None:
    seen = gm.measure(gm.Setup(mlp(2, nn.Tanh), CE), BATCH)
    echoes = tuple(Echo(r.site.index, 1e-4, c) for r, c in zip(seen.weighted(), cosines, strict=True))
    assert (Cause.SHATTERED_GRADIENTS in judged(replace(seen, disturbance=Disturbance(echoes)))) is fires


# ---- what was not measured --------------------------------------------------------------------------------


def test_rules_are_silent_without_numbers() -> None:
    """A model without any site: nothing was measured."""

    row = torch.arange(64) % 10
    seen: Profile = profile(gm.Setup(Table(), CE), (row, row % 3))
    assert (seen.disturbance, judged(seen)) == (None, {})


def test_batches_are_averaged() -> None:
    finding: Finding = judged(gm.measure(gm.Setup(mlp(20, nn.Sigmoid), CE), batches()[:3]))[
        Cause.VANISHING_GRADIENT
    ]
    assert "20" not in finding.sites[-1:]
