"""Predictions through graphs of known pieces: reference values, where theory ends, and any graph at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmend import theory
from gradmend.errors import SetupError
from gradmend.theory import (
    BatchNormalization,
    Convolution,
    Dropout,
    Elementwise,
    Gradient,
    Linear,
    Node,
    Normalization,
    Rule,
    Scale,
    Signal,
    Sum,
    propagate,
)
from gradmend.theory.angles import AngleMap

RELU, TANH, GELU, ERF = (Elementwise(phi) for phi in (torch.relu, torch.tanh, F.gelu, torch.erf))
SELU, SIGMOID = Elementwise(torch.selu), Elementwise(torch.sigmoid)
ACTIVATIONS = (RELU, TANH, GELU, SELU, SIGMOID, ERF)

Graph = Sequence[Node | Rule]


def square(inputs: int, outputs: int, padding: int = 1) -> Convolution:
    """A convolution of square maps with a 3 x 3 kernel."""
    pairs = [(n, n) for n in (inputs, outputs, 3, 1, padding, 1)]
    return Convolution(1.0, 0.0, *pairs)


# -- reference values ---------------------------------------------------------------------------------------


def rate(graph: Graph, period: int, at: int) -> float:
    """The growth of the squared gradient norm over one period of a graph, far from its ends."""
    found = propagate(graph, Signal(1.0, gap=1.0), {len(graph) - 1: Gradient(cosine=0.0)})
    return math.exp(found.log_gradients[at * period] - found.log_gradients[(at + 1) * period])


@pytest.mark.parametrize(
    ("samples", "chi"), [(8, 1.7882), (16, 1.5900), (32, 1.5220), (64, 1.4931), (256, 1.4732)]
)
def test_batch_normalization_explodes(samples: int, chi: float) -> None:
    assert rate([Linear(1.7), BatchNormalization(samples), RELU] * 30, 3, 15) == pytest.approx(chi, abs=5e-5)
    linear = [Linear(1.7), BatchNormalization(samples)] * 30
    assert rate(linear, 2, 15) == pytest.approx((samples - 2) / (samples - 3))


@pytest.mark.parametrize("phi", ACTIVATIONS, ids=lambda rule: rule.phi.__name__)
def test_normalization_keeps_what_theory_says(phi: Elementwise) -> None:
    """Before the activation; and layer normalization after it, which explodes like that of large batches."""
    for norm in (Normalization(), Normalization(centred=False)):
        chi = theory.norm_factor(phi.phi, "layer")
        assert rate([Linear(0.3), norm, phi] * 10, 3, 5) == pytest.approx(chi, rel=1e-6)
    moments = theory.tabulate(phi.phi).moments(1.0)
    after = moments.slope / (moments.output - moments.mean**2)
    assert rate([Linear(1.0), phi, Normalization()] * 10, 3, 5) == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize(("size", "loss"), [(4, 0.762), (8, 0.921), (32, 0.994)])
def test_zero_padding_takes_its_share(size: int, loss: float) -> None:
    exact = ((1 + 2 * math.cos(math.pi / (size + 1))) / 3) ** 2
    found = propagate([square(size, size)] * 800, Signal(1.0, gap=1.0))
    factor = math.exp(found.log_gradients[400] - found.log_gradients[401])
    assert (round(factor, 3), factor) == (loss, pytest.approx(exact, rel=1e-5))
    assert found.lengths[401] / found.lengths[400] == pytest.approx(exact, rel=1e-5)
    assert exact == pytest.approx(theory.padding_factor((size, size)))


@pytest.mark.parametrize("norm", [None, "pre", "post"])
@pytest.mark.parametrize("phi", [RELU, TANH], ids=["relu", "tanh"])
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.0])
def test_residual_blocks(phi: Elementwise, scale: float, norm: str | None) -> None:
    graph: list[Node | Rule] = [Linear(1.0)]
    before = [Normalization()] if norm == "pre" else []
    for _ in range(20):
        stream = len(graph) - 1
        graph += [*before, phi, Linear(2.0), Scale(scale)]
        graph += [Node(Sum(), (stream, len(graph) - 1)), *([Normalization()] if norm == "post" else [])]
    found = propagate(graph, Signal(1.0, gap=1.0))
    growth = theory.residual_growth(phi.phi, 20, 2.0, scale, norm)
    assert found.log_gradients[0] - found.log_gradients[-1] == pytest.approx(growth.log_gradient, abs=1e-9)
    if norm is None:
        assert math.log(found.lengths[-1]) == pytest.approx(growth.log_length, abs=1e-9)


def test_a_loop_over_a_cell_is_a_deep_network() -> None:
    """h = tanh(W x + U h): at the fixed point q, chi per step is Var(U) x width x E phi'^2."""
    graph: list[Node | Rule] = [Node(Linear(0.05), (-1,), weights="W"), TANH]
    for _ in range(60):
        state = len(graph) - 1
        graph += [Node(Linear(0.05), (-1,), weights="W"), Node(Linear(1.0), (state,), weights="U")]
        graph += [Node(Sum(), (state + 1, state + 2)), TANH]
    found = propagate(graph, Signal(1.0, gap=1.0))
    q = theory.fixed_point(torch.tanh, 1.0, 0.05)
    chi = theory.gradient_factor(torch.tanh, q, 1.0)
    assert not found.refused
    assert math.exp(found.log_gradients[97] - found.log_gradients[101]) == pytest.approx(chi, rel=1e-5)
    assert chi == pytest.approx(0.759, abs=5e-4)


@pytest.mark.parametrize("phi", [*ACTIVATIONS, Elementwise(F.hardtanh)], ids=lambda rule: rule.phi.__name__)
@pytest.mark.parametrize("q", [1e-8, 1.0, 300.0])
def test_angles_are_those_of_the_quadrature(phi: Elementwise, q: float) -> None:
    """From the second time on they come from a curve."""
    table = theory.tabulate(phi.phi)
    moments, angles = table.moments(q), AngleMap(table)
    for gap in (0.5, 0.5, 1e-9, 3e-4, 0.02, 0.97, 1.0, 1.7, 2.0):
        spread, slope = table.spread(q, gap), table.pair_slope(q, gap)
        assert angles.gap(q, moments, gap) == pytest.approx(spread / moments.output, rel=1e-5)
        assert angles.slope(q, moments, gap) == pytest.approx(slope / moments.slope, rel=2e-4, abs=1e-9)
    assert angles.gap(q, moments, 0.0) == 0.0
    assert angles.gap(q, moments, 1e-30) == pytest.approx(
        1e-30 * q * moments.slope / moments.output, rel=0.01
    )


# -- where theory ends --------------------------------------------------------------------------------------

SEEN = Signal(4.0, gap=0.2, gaussian=True)


def known(found: theory.Prediction) -> list[bool]:
    return [gradient is not None for gradient in found.gradients]


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        ([TANH], "not Gaussian"),
        ([Linear(1.0), RELU, RELU], "not Gaussian"),
        ([Linear(1.0), RELU, Node(Sum(), (0, 1))], "same weights"),
        ([Linear(1.0), Normalization(), Node(Sum(), (0, 1))], "same weights"),
        ([Scale(2.0), Node(Sum(), (-1, 0))], "same weights"),
        (
            [Node(Linear(1.0), (-1,), weights="W"), Node(Linear(1.0), weights="W"), Node(Sum(), (0, 1))],
            "same",
        ),
        ([Linear(1.0), BatchNormalization(3)], "fewer than 4"),
        ([Linear(1.0), RELU, BatchNormalization(16)], "fewer than 32"),
        ([Linear(1.0), Dropout(0.0)], "keeps nothing"),
        ([Node(None)], "no formula"),
    ],
)
def test_a_rule_that_does_not_hold_says_so(graph: Graph, why: str) -> None:
    found = propagate(graph, Signal(1.0, gap=1.0))
    (said,) = found.refused.values()
    assert why in said


def test_without_a_formula_lengths_go_on_from_the_measured_ones() -> None:
    graph = [Linear(1.0), RELU, Node(None, measured=SEEN), TANH, Linear(2.0)]
    found = propagate(graph, Signal(1.0, gap=1.0))
    assert found.lengths[3] == pytest.approx(theory.output_moment(torch.tanh, 4.0))
    assert known(found) == [False, False, True, True, True]
    unknown = propagate([Linear(1.0), Node(None), Linear(2.0)], Signal(1.0, gap=1.0))
    assert [signal is None for signal in unknown.signals] == [False, True, True]
    assert unknown.refused[2] == "its input is not known"


def test_without_a_formula_gradients_go_on_by_the_measured_factor() -> None:
    graph = [Linear(1.0), Node(None, measured=SEEN, factors=(0.25,)), Linear(2.0)]
    found = propagate(graph, Signal(1.0, gap=1.0))
    assert found.log_gradients == pytest.approx((math.log(0.5), math.log(2.0), 0.0))


def test_each_sample_follows_its_own_lengths() -> None:
    """The gradient of all is the sum of theirs, and most of it that of the longest sample."""
    first, second = np.array([2.0, 0.01, 5.0, 1.0]), np.array([2.0, 1e-5, 9.0, 0.3])
    rest = [Linear(2.0), Node(GELU, lengths=second), Linear(2.0)]
    found = propagate([Linear(2.0), Node(GELU, lengths=first), *rest], Signal(1.0, gap=1.0))
    each = [
        math.prod(theory.gradient_factor(F.gelu, q, 2.0) for q in lengths)
        for lengths in zip(first, second, strict=True)
    ]
    assert found.gradients[0] is not None
    assert found.log_gradients[0] == pytest.approx(math.log(np.mean(each)))
    assert found.gradients[0].share == pytest.approx(np.array(each) / np.mean(each))
    assert found.lengths == propagate([Linear(2.0), GELU, *rest], Signal(1.0, gap=1.0)).lengths


def test_samples_keep_apart_only_where_they_are_the_same() -> None:
    """Not where a batch is normalized, not from four rows to two, and not through positions."""
    four, two = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0])
    graph = [Linear(2.0), Node(GELU, lengths=two), Linear(2.0), Node(GELU, lengths=four), Linear(2.0)]
    halves = [theory.gradient_factor(F.gelu, q, 2.0) for q in two]
    all_four = [theory.gradient_factor(F.gelu, q, 2.0) for q in four]
    found = propagate(graph, Signal(1.0, gap=1.0)).log_gradients[0]
    assert found == pytest.approx(math.log(np.mean(halves) * np.mean(all_four)))
    normed = [Linear(1.0), BatchNormalization(4), GELU, Linear(1.0)]
    known = [*normed[:2], Node(GELU, lengths=four), normed[3]]
    assert propagate(known, Signal(1.0, gap=1.0)) == propagate(normed, Signal(1.0, gap=1.0))
    image = Signal(four, gap=1.0)
    assert Linear(1.0).backward(Gradient(share=four / 2.5), [image]) == [Gradient()]


def test_theory_begins_at_the_last_weights() -> None:
    """Behind them gradients are what was measured, whatever rules say."""
    behind = {2: Gradient(1.0), 3: Gradient(5.0), 4: Gradient(7.0)}
    found = propagate([Linear(1.0), TANH, Linear(2.0), TANH, Node(None)], Signal(1.0, gap=1.0), behind)
    assert found.log_gradients[1:] == pytest.approx((math.log(2) + 1, 1, 5, 7))


def test_theory_begins_before_a_gap_if_nothing_lies_behind_it() -> None:
    graph = [Linear(1.0), RELU, Linear(2.0), Node(None, measured=SEEN), Linear(1.0)]
    measured = {index: Gradient(float(index)) for index in range(5)}
    found = propagate(graph, Signal(1.0, gap=1.0), measured)
    assert found.log_gradients == pytest.approx((2, math.log(2) + 2, 2, 4, 4))
    twice = propagate([*graph, Linear(1.0)], Signal(1.0, gap=1.0), measured | {5: Gradient(5.0)})
    assert known(twice) == [False, False, False, True, True, True]


def test_gradients_of_all_readers_add_up() -> None:
    """Where one is not known, nor is the sum; one that is cut off brings nothing."""
    fork = [Linear(1.0), Node(Linear(2.0), (0,)), Node(Linear(3.0), (0,)), Node(None, (2,), SEEN)]
    ends = {1: Gradient(0.0, 0.5), 2: Gradient(0.0, -0.5)}
    both = propagate(fork, Signal(1.0, gap=1.0), ends).gradients[0]
    assert both is not None
    assert (math.exp(both.log), both.cosine) == pytest.approx((5.0, -0.1))
    fork.append(Node(Linear(1.0), (3,)))
    assert known(propagate(fork, Signal(1.0, gap=1.0), {1: Gradient(), 4: Gradient()}))[0] is False
    cut = propagate(fork, Signal(1.0, gap=1.0), {1: Gradient(), 3: Gradient(), 4: Gradient(-math.inf)})
    assert known(cut)[0] is False


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: propagate([], Signal(1.0, 1.0)), "one node at least"),
        (lambda: propagate([Linear(1.0)], Signal(-1.0, 1.0)), "`q` must be 0 or more"),
        (lambda: propagate([Linear(1.0)], Signal(1.0, -1.0)), "`gap` must be 0 or more"),
        (lambda: propagate([Node(Linear(1.0), (0,))], Signal(1.0, 1.0)), r"Node 0 reads \[0\]"),
        (lambda: propagate([Linear(1.0), Sum()], Signal(1.0, 1.0)), "two of them"),
        (lambda: Linear(-1.0), "`weight_variance`"),
        (lambda: replace(square(3, 3), bias_variance=-1.0), "`bias_variance`"),
    ],
)
def test_errors_say_what_was_given(call: theory.Activation, said: str) -> None:
    with pytest.raises(SetupError, match=said):
        call()  # type: ignore[call-arg]


# -- any graph ----------------------------------------------------------------------------------------------


def numbers(most: float) -> st.SearchStrategy[float]:
    return st.floats(0, most).map(partial(round, ndigits=9))  # squares of smaller ones are no numbers


unary = st.one_of(
    st.builds(Linear, numbers(30), numbers(2), st.sampled_from((None, 1, 8, 512))),
    st.sampled_from(ACTIVATIONS),
    st.builds(Normalization, st.booleans(), numbers(3), numbers(1), numbers(1)),
    st.builds(
        BatchNormalization, st.integers(2, 100), numbers(3), numbers(1), numbers(1), st.integers(1, 50)
    ),
    st.builds(Scale, numbers(3)),
    st.builds(Dropout, numbers(1)),
    st.sampled_from((square(5, 5), square(7, 5, padding=0))),
)


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[Rule, tuple[int, ...]]]:
    """Of rules and what they read."""
    nodes: list[tuple[Rule, tuple[int, ...]]] = []
    for index in range(draw(st.integers(1, 15))):
        read = st.integers(-1, index - 1)
        one = st.tuples(unary, st.tuples(read))
        nodes.append(draw(one | st.tuples(st.sampled_from((Sum(), Sum(-1.0))), st.tuples(read, read))))
    return nodes


@settings(max_examples=150, deadline=None)
@given(graphs(), st.floats(0, 1e6), st.floats(0, 2))
def test_every_graph_has_numbers(graph: list[tuple[Rule, tuple[int, ...]]], q: float, gap: float) -> None:
    nodes = [Node(rule, inputs, SEEN) for rule, inputs in graph]
    found = propagate(nodes, Signal(q, gap), {len(graph) - 1: Gradient(cosine=0.0)})
    for signal, gradient in zip(found.signals, found.gradients, strict=True):
        assert signal is not None
        assert np.isfinite(signal.q).all()
        assert np.all(np.asarray(signal.q) > 0)
        assert 0 <= signal.gap <= 2
        assert math.isfinite(signal.mean)
        if gradient is not None and gradient.log > -math.inf:
            assert math.isfinite(gradient.log)
            assert abs(gradient.cosine) <= 1 + 1e-6
            assert np.mean(gradient.share) == pytest.approx(1)
            assert 1 <= gradient.radial <= gradient.units


@settings(max_examples=50, deadline=None)
@given(st.lists(unary, min_size=2, max_size=8), st.integers(1, 7), st.floats(0.1, 10), st.floats(0, 1))
def test_a_chain_is_its_parts_one_after_the_other(rules: list[Rule], cut: int, q: float, gap: float) -> None:
    chain = [Linear(1.0), *rules, Linear(1.0)]
    whole = propagate(chain, Signal(q, gap))
    if whole.refused or cut >= len(chain):
        return
    rest = propagate(chain[cut:], whole.signals[cut - 1])
    assert rest.lengths == pytest.approx(whole.lengths[cut:], rel=1e-4)
    # The second time angles come from a curve, which is right to six digits, and layers enlarge what is off.
    assert rest.cosines == pytest.approx(whole.cosines[cut:], abs=1e-4)
    assert rest.log_gradients[0] == pytest.approx(whole.log_gradients[cut], abs=1e-3)
