"""The numbers of the atlas: against theory, against torch, and against plain autograd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim import lr_scheduler as schedulers

from gradmend import theory
from gradmend.atlas import (
    QUICK,
    Sizes,
    jacobians,
    landscapes,
    normalization,
    optimizers,
    phases,
    residual,
    schedules,
    starts,
    times,
)
from gradmend.atlas.activations import growth, named, shape
from gradmend.atlas.landscapes import CLIFF, OPTIMIZERS, RAVINE, cliff, path
from gradmend.atlas.meanfield import course
from gradmend.atlas.networks import code
from gradmend.remedies.schedule import SCHEDULES
from gradmend.report.parts import Dial

ACTIVATIONS = Sizes().activations
WIDE = Sizes(width=400, rows=32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_are_differences(name: str) -> None:
    found = shape(named(name), 2401)
    away = np.abs(found.z[1:-1]) > 0.01  # from the kinks
    differences = (found.value[2:] - found.value[:-2]) / (found.z[2:] - found.z[:-2])
    np.testing.assert_allclose(found.slope[1:-1][away], differences[away], atol=1e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_are_small_where_it_is_flat(name: str) -> None:
    found = shape(named(name), 601)
    low, high = found.steep
    flat = (found.z < low) | (found.z > high)
    assert (np.abs(found.slope[flat]) <= 0.01 * np.abs(found.slope).max() + 1e-12).all()


@pytest.mark.parametrize("name", ["tanh", "relu", "gelu"])
def test_measured_factors_are_those_of_theory(name: str) -> None:
    found = growth(Sizes(width=256, points=31), name)
    np.testing.assert_allclose(found.measured, found.expected, rtol=0.06)  # one network, 12 layers


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "gelu"])
def test_a_course_is_the_maps_over_and_over(name: str) -> None:
    phi, (weights, biases), (q, c) = named(name), (1.7, 0.1), (1.7 * 0.8 + 0.1, 0.5)
    found = course(phi, 5, weights, biases, square=0.8, cosine=(q * c - biases) / (weights * 0.8))
    lengths, cosines, squares = [q], [c], []
    for _ in range(4):
        squares.append(theory.gradient_factor(phi, lengths[-1], weights))
        cosines.append(theory.correlation_map(phi, cosines[-1], lengths[-1], weights, biases))
        lengths.append(theory.length_map(phi, lengths[-1], weights, biases))
    np.testing.assert_allclose(found.lengths, lengths, rtol=1e-6)
    np.testing.assert_allclose(found.cosines, cosines, rtol=1e-6)
    np.testing.assert_allclose(found.gradients[0] ** 2, math.prod(squares), rtol=1e-6)


@pytest.mark.parametrize("name", ["tanh", "relu", "sigmoid"])
def test_norms_are_those_of_theory(name: str) -> None:
    found = jacobians.norms(WIDE, name, 1.5, depth=8)
    np.testing.assert_allclose(found.measured.mean(0), found.expected, rtol=0.15)  # two networks


@pytest.mark.parametrize("phi", [nn.Tanh(), nn.ReLU(), nn.Identity()], ids=["tanh", "relu", "identity"])
def test_a_jacobian_is_that_of_autograd(phi: nn.Module) -> None:
    torch.manual_seed(0)
    weights, x = list(torch.randn(4, 6, 6, dtype=torch.float64)), torch.randn(6, dtype=torch.float64)

    def network(x: torch.Tensor) -> torch.Tensor:
        held = weights[0] @ x
        for weight in weights[1:]:
            held = weight @ phi(held)
        return held

    exact = torch.autograd.functional.jacobian(network, x)
    torch.testing.assert_close(jacobians.jacobian(weights, phi, x), exact)


def test_orthogonal_weights_stretch_nothing() -> None:
    even = jacobians.singular_values(QUICK, "none", "orthogonal")[64]
    uneven = jacobians.singular_values(QUICK, "none", "Gaussian")[64]
    np.testing.assert_allclose(even, 1.0)
    assert uneven[0] > 1e6 * uneven[-1]


def test_starts_say_what_they_show() -> None:
    lost = starts.start(QUICK, depth=12, activation="sigmoid", init="zero")
    kept = starts.start(QUICK, depth=4, activation="relu", init="he")
    assert starts.told(lost).startswith("The outputs shrink")
    assert starts.told(lost).endswith("the gradients of the first layer are lost.")
    assert starts.told(kept).startswith("The outputs of the last layer are still spread")
    assert "lost" not in starts.told(kept)
    np.testing.assert_allclose(kept.outputs.sum(0), 1.0)


def test_batch_normalization_explodes_as_theory_says() -> None:
    factor = theory.norm_factor(named("relu"), "batch", 64) ** 0.5
    held = normalization.gradients(Sizes(width=256), "relu", "batch", 64, depth=16)
    assert (held[0] / held[-1]) ** (1 / 15) == pytest.approx(factor, rel=0.03)


def test_normalized_inputs_stay_while_training() -> None:
    sizes = Sizes(width=32, rows=64, steps=60)
    last = {norm: normalization.drift(sizes, norm)[-1] for norm in (None, "batch")}
    assert last["batch"].deviation == pytest.approx(1.0, abs=0.2)
    assert np.ptp(last["batch"].deviation) < np.ptp(last[None].deviation)


def test_sgd_on_the_ravine_is_as_on_paper() -> None:
    found = path(RAVINE, "SGD", rate=0.03, steps=20)
    steps = np.arange(21)[:, None]
    np.testing.assert_allclose(found.points, np.array(RAVINE.start) * np.array([0.97, 0.25]) ** steps)
    np.testing.assert_allclose(found.losses, (found.points**2 @ [1.0, 25.0]) / 2)


def test_clipping_bounds_the_step() -> None:
    wild, tame = (path(CLIFF, "SGD", rate=2.0, steps=60, clip=clip) for clip in (None, 0.1))
    longest = [np.linalg.norm(np.diff(each.points, axis=0), axis=1).max() for each in (wild, tame)]
    assert longest[1] <= 2.0 * 0.1 + 1e-9 < longest[0]


def test_the_cliff_is_a_recurrent_network() -> None:
    cell = nn.Linear(1, 1).double()
    w, b = 5.0, -2.5
    nn.init.constant_(cell.weight, w), nn.init.constant_(cell.bias, b)
    h = torch.full((1,), 0.5, dtype=torch.float64)
    for _ in range(25):
        h = cell(torch.sigmoid(h))
    assert cliff(torch.tensor([w, b])).item() == pytest.approx((torch.sigmoid(h).item() - 0.7) ** 2, rel=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_down_the_ravine(name: str) -> None:
    found = path(RAVINE, name, rate=0.03, steps=60)
    assert found.losses[-1] < found.losses[0]


def test_without_correction_the_first_step_is_too_long() -> None:
    assert optimizers.step_lengths(True, 1)[0] == pytest.approx(1.0, rel=1e-4)
    assert optimizers.step_lengths(False, 1)[0] == pytest.approx(0.1 / 0.001**0.5, rel=1e-4)
    late = [optimizers.step_lengths(corrected, 2000)[-1] for corrected in (True, False)]
    assert late[0] == pytest.approx(late[1], rel=0.2)  # 0.999^2000 is left


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_torch(name: str) -> None:
    kind, options = SCHEDULES[name](30)
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule: Any = getattr(schedulers, kind)(optimizer, **options)
    expected = []
    for _ in range(30):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(schedules.rates(name, 30), expected)


@pytest.mark.parametrize("variance", [1.0, 1.5, 3.0])
def test_cosines_are_those_of_theory(variance: float) -> None:
    found = phases.cosines(Sizes(width=128), "tanh", variance, depth=10)
    np.testing.assert_allclose(found.measured, found.expected, atol=0.05)  # one network of 512 units


def test_the_pair_has_its_cosine() -> None:
    x = phases.pair(4096, 8, seed=0)
    np.testing.assert_allclose(x.square().mean(1), 1.0)
    cosines = (x @ x.T / 4096).numpy()[np.triu_indices(8, 1)]
    assert cosines.mean() == pytest.approx(0.6, abs=0.02)


def test_the_critical_line_parts_the_phases() -> None:
    weights, biases = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0), (0.05, 0.2)
    figure = phases.diagram("tanh", theory.phase_diagram(torch.tanh, weights, biases))
    heat, line = figure.data[0], figure.data[1]
    for row, edge in zip(np.asarray(heat.z), np.asarray(line.x), strict=True):
        assert [value > 0 for value in row] == [weight > edge for weight in weights]


def test_slopes_are_even_in_size() -> None:
    angles, found = residual.slopes("plain", depth=2, points=50, seed=0)
    assert np.mean(found**2) == pytest.approx(1.0)
    assert angles[[0, -1]] == pytest.approx([0.0, math.pi])


def test_plain_gradients_shatter_and_residual_ones_do_not() -> None:
    near = {}
    for kind in residual.KINDS:
        rows = [residual.alike(residual.slopes(kind, 40, 257, seed)[1], 5)[4] for seed in range(2)]
        near[kind] = float(np.mean(rows))
    plain, _, scaled = near.values()
    assert plain < 0.5 < 0.75 < scaled


@pytest.mark.parametrize("radius", [0.5, 0.9])
def test_time_passes_as_theory_says(radius: float) -> None:
    held = [times.plain("Gaussian", radius, 30, seed).norms[-1] for seed in range(4)]
    factor = np.exp(np.mean(np.log(held)) / 29)
    assert factor == pytest.approx(
        theory.rnn_factor(torch.tanh, radius**2, times.drive(30, 0)) ** 0.5, rel=0.1
    )


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_open_gates_remember(cell: str) -> None:
    ways = ("torch's own", "bias 1", "bias 2", "bias 4")
    norms = [times.gated(cell, gates, 20, seed=0).norms[-1] for gates in ways]
    assert norms == sorted(norms)


def test_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(code(QUICK, "print(len(profile.sites))", depth=2), {})
    assert capsys.readouterr().out == "5\n"


def test_ground_is_the_loss() -> None:
    x, y, z = landscapes.ground(RAVINE, 5)
    assert z[1, 2] == pytest.approx((x[2] ** 2 + 25 * y[1] ** 2) / 2)


def test_the_same_seed_gives_the_same_picture() -> None:
    def drawn() -> list[str]:
        torch.rand(3)  # what is drawn elsewhere does not matter
        parts = [part for section in times.page(QUICK).sections for part in section.parts]
        return [
            figure.to_json() for part in parts if isinstance(part, Dial) for figure in part.figures.values()
        ]

    assert drawn() == drawn()
