"""What mean-field theory predicts for a whole network: a directed acyclic graph of known pieces."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gradmend.errors import SetupError
from gradmend.theory.convolution import Convolution
from gradmend.theory.quadrature import require_nonnegative
from gradmend.theory.rules import Linear, Rule, Sum
from gradmend.theory.signals import Field, Gradient, Signal, held

SOURCE = -1
"""Stands for the network's input where a node's inputs are named."""

UNKNOWN = "its input is not known"
"""Why a rule does not apply behind a node of which nothing is known."""


@dataclass(frozen=True)
class Node:
    """One piece of a network, and what it reads.

    Args:
        rule: what the piece does; None if there is no formula for it.
        inputs: the nodes that it reads, by position, -1 for the network's input; None: the one before.
        measured: the signal that comes out, if it is known. Prediction goes on from it where the rule does
            not apply.
        factors: E|J^T v|^2 / |v|^2 for each input, if it is known. Gradients go on by it where the rule does
            not apply; else none is predicted beyond.
        weights: the name of the weights that the piece multiplies by, if it has some that others share.
        lengths: the second moment of what it reads, of each sample, if they were measured. Each sample's
            gradient then goes back by its own, for at a repelling length samples part by chance.
    """

    rule: Rule | None
    inputs: tuple[int, ...] | None = None
    measured: Signal | None = None
    factors: tuple[float, ...] | None = None
    weights: Hashable | None = None
    lengths: Field | None = None

    @property
    def weighted(self) -> bool:
        """Whether it multiplies by weights."""
        return self.weights is not None or isinstance(self.rule, (Linear, Convolution))


@dataclass(frozen=True)
class Prediction:
    """What theory says of the output of every node.

    Args:
        signals: None where neither theory nor a measurement tells.
        gradients: None where theory cannot tell.
        refused: the nodes whose rule does not apply, and why.
    """

    signals: tuple[Signal | None, ...]
    gradients: tuple[Gradient | None, ...]
    refused: Mapping[int, str]

    @property
    def lengths(self) -> tuple[float, ...]:
        """The second moment of one value, NaN where it is not known."""
        return tuple(signal.length if signal else math.nan for signal in self.signals)

    @property
    def cosines(self) -> tuple[float, ...]:
        """Between two samples, NaN where it is not known."""
        return tuple(1 - signal.gap if signal else math.nan for signal in self.signals)

    @property
    def log_gradients(self) -> tuple[float, ...]:
        """ln of the gradient's squared norm, NaN where theory cannot tell."""
        return tuple(gradient.log if gradient else math.nan for gradient in self.gradients)


def propagate(
    nodes: Sequence[Node | Rule], source: Signal | None, measured: Mapping[int, Gradient] | None = None
) -> Prediction:
    """Follow lengths and angles forward, and gradients backward, through a network.

    Where a node has several readers, the gradients that come from them add up as independent ones do.

    Args:
        nodes: in the order of execution. A bare rule reads the node before it.
        source: the network's input; None if it is no signal, such as a batch of words.
        measured: gradients that are known, by node. They hold behind the last weights, where theory begins;
            before those they stand in where theory cannot tell, until it has told of some weights. Without
            them the gradient of the last node is 1.

    Raises:
        SetupError: if there is no node, or if one reads what is not before it.

    Examples:
        >>> import torch
        >>> from gradmend.theory.rules import Elementwise
        >>> found = propagate([Linear(2.0), Elementwise(torch.relu)] * 50, Signal(0.5, gap=1.0))
        >>> round(found.lengths[98], 6), round(found.cosines[98], 3)
        (1.0, 0.987)
        >>> round(found.log_gradients[0] - found.log_gradients[98], 6)
        0.0

    Source: Schoenholz et al., Deep information propagation, 2017, https://arxiv.org/abs/1611.01232, and those
    of the rules.
    """
    if not nodes:
        raise SetupError("A prediction needs one node at least. Give `[Linear(2.0)]`.")
    if source is not None:
        require_nonnegative(q=float(np.min(source.q)), gap=source.gap)
        source = replace(source, q=held(source.q))
    graph = [_checked(node, index) for index, node in enumerate(nodes)]
    signals, refused = _forward(graph, source)
    known = {len(graph) - 1: Gradient()} if measured is None else measured
    gradients = _backward(graph, signals, refused, known)
    return Prediction(tuple(signals[i] for i in range(len(graph))), tuple(gradients), refused)


def _checked(node: Node | Rule, index: int) -> Node:
    node = node if isinstance(node, Node) else Node(node)
    node = node if node.inputs is not None else replace(node, inputs=(index - 1,))
    wanted = 2 if isinstance(node.rule, Sum) else 1
    if any(not SOURCE <= i < index for i in _inputs(node)) or (node.rule and len(_inputs(node)) != wanted):
        raise SetupError(
            f"Node {index} reads {list(_inputs(node))}. A node reads nodes before it, or {SOURCE}, the "
            "network's input: a `Sum` two of them, any other rule one."
        )
    return node


def _inputs(node: Node) -> tuple[int, ...]:
    return node.inputs or ()


def _forward(graph: Sequence[Node], source: Signal | None) -> tuple[dict[int, Signal | None], dict[int, str]]:
    signals: dict[int, Signal | None] = {SOURCE: source}
    names: dict[Hashable, int] = {}
    refused = {}
    for index, node in enumerate(graph):
        inputs = [signals[i] for i in _inputs(node)]
        outcome = _outcome(node, inputs)
        if isinstance(outcome, str):
            refused[index] = outcome
        signal = node.measured if isinstance(outcome, str) else outcome
        weights = _weights(node, index, inputs, names)
        signals[index] = signal if signal is None else replace(signal, weights=weights)
    return signals, refused


def _outcome(node: Node, inputs: Sequence[Signal | None]) -> Signal | str:
    known = [signal for signal in inputs if signal is not None]
    if node.rule is None:
        return "there is no formula for it"
    if len(known) < len(inputs):
        return UNKNOWN
    return node.rule.forward(known)


def _weights(node: Node, index: int, inputs: Sequence[Signal | None], names: dict[Hashable, int]) -> int:
    """The weights that the output was last multiplied by, as bits: those of the inputs, or the node's own."""
    passed = 0
    for signal in inputs:
        passed |= signal.weights if signal else 1
    if passed and not node.weighted:
        return passed
    name = index if node.weights is None else (node.weights,)
    return names.setdefault(name, 2 << len(names))


def _backward(
    graph: Sequence[Node],
    signals: Mapping[int, Signal | None],
    refused: Mapping[int, str],
    measured: Mapping[int, Gradient],
) -> list[Gradient | None]:
    arrivals: dict[int, list[Gradient | None]] = {index: [] for index in signals}
    before_weights = dict.fromkeys(signals, False)
    gradients: list[Gradient | None] = [None] * len(graph)
    told = False
    for index in reversed(range(len(graph))):
        node, signal, gradient = graph[index], signals[index], _total(arrivals[index])
        if not before_weights[index] or not (gradient or told):
            gradient = measured.get(index, gradient)
        elif gradient and gradient.log > -math.inf:
            told |= node.weighted
        if gradient and signal:
            gradient = gradient.over(np.shape(signal.q))
        gradients[index] = gradient
        arrived = _arrived(node, gradient, [signals[i] for i in _inputs(node)], index in refused)
        for i, part in zip(_inputs(node), arrived, strict=True):
            arrivals[i].append(part)
            before_weights[i] |= node.weighted or before_weights[index]
    return gradients


def _arrived(
    node: Node, gradient: Gradient | None, inputs: Sequence[Signal | None], refused: bool
) -> Sequence[Gradient | None]:
    """The gradient at each input, from that at the output."""
    known = [signal for signal in inputs if signal is not None]
    if gradient and node.rule and not refused:
        if node.lengths is not None and not known[0].batch:
            gradient = gradient.over(node.lengths.shape)
            known = [replace(known[0], q=held(node.lengths))]
        return node.rule.backward(gradient, known)
    if gradient and node.factors is not None:
        plain = Gradient(gradient.log, gradient.cosine)
        return [plain.times(factor) for factor in node.factors]
    return [None] * len(inputs)


def _total(arrivals: Sequence[Gradient | None]) -> Gradient | None:
    """The sum of independent gradients; None if one of them is not known, or if there is none."""
    known = [gradient for gradient in arrivals if gradient is not None]
    if len(known) < len(arrivals) or not known:
        return None
    some = [gradient for gradient in known if gradient.log > -math.inf]
    return _added(some) if len(some) > 1 else (*some, *known)[0]


def _added(gradients: Sequence[Gradient]) -> Gradient:
    top = max(gradient.log for gradient in gradients)
    sizes = np.exp([gradient.log - top for gradient in gradients])
    numbers = np.array([(g.cosine, g.twist, g.pair_twist) for g in gradients])
    cosine, twist, pair_twist = (sizes @ numbers / sizes.sum()).tolist()
    shapes = {np.shape(gradient.share) for gradient in gradients} - {()}
    shares = [gradient.share if len(shapes) == 1 else 1.0 for gradient in gradients]
    share = sum(size * part for size, part in zip(sizes, shares, strict=True)) / sizes.sum()
    return Gradient(top + math.log(sizes.sum()), cosine, share, twist, pair_twist)
