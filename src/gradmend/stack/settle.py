"""Settle: a graph for good, with its parameters built in and its gradients written where they are wanted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten

_VIEWS: Final = (aten.transpose.int, aten.view.default, aten.expand.default, aten.unsqueeze.default)

_OUT: Final[dict[Any, Any]] = {
    aten.bmm.default: aten.bmm.out,
    aten.sum.dim_IntList: aten.sum.IntList_out,
}


Settled = Callable[..., Sequence[Tensor]]


def settle(graph: GraphModule, still: Sequence[Tensor], slopes: Sequence[Tensor]) -> GraphModule:
    """The same computation, that takes what changes from step to step only.

    Args:
        graph: its first inputs are `still`, its first outputs gradients.
        still: tensors that stay where they are, such as parameters; views of them are taken once.
        slopes: of the shapes of the gradients; each call writes into them.

    Returns:
        A module of the other inputs, that returns the other outputs.
    """
    return _Settling(graph, still).done(slopes)


def scripted(graph: GraphModule, given: Sequence[Tensor]) -> Settled:
    """The same calls made by TorchScript's interpreter: Python takes as long for one as many kernels here do.

    Stacks of 8 to 16 networks are 1.2 to 1.9 times as fast with it. torch calls it deprecated, so a torch
    that has lost it goes without.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            script = torch.jit.trace(graph, tuple(given), check_trace=False)  # type: ignore[no-untyped-call]
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                script(*given)
        except (AttributeError, RuntimeError):
            return graph
    return script  # type: ignore[no-any-return]


class _Settling:
    def __init__(self, graph: GraphModule, still: Sequence[Tensor]) -> None:
        self._root, self._still = graph, iter(still)
        self._graph = Graph()
        self._values: dict[Node, Tensor] = {}
        self._copies: dict[Node, Node] = {}
        self._constants: dict[str, Tensor] = {}
        self._outputs: Any = ()
        for node in graph.graph.nodes:
            self._take(node)

    def done(self, slopes: Sequence[Tensor]) -> GraphModule:
        """What is settled, writing gradients into these."""
        for node, slope in zip(self._outputs, slopes, strict=False):
            self._write(self._copy(node), self._constant(slope))
        self._graph.output(tuple(map(self._copy, self._outputs[len(slopes) :])))
        return GraphModule(self._constants, self._graph)

    def _take(self, node: Node) -> None:
        still = next(self._still, None) if node.op == "placeholder" else None
        if still is not None:
            self._values[node] = still
        elif node.op == "get_attr":
            self._values[node] = getattr(self._root, str(node.target))
        elif node.target in _VIEWS and all(given in self._values for given in node.all_input_nodes):
            given = torch.fx.node.map_arg(node.args, self._values.__getitem__)
            self._values[node] = node.target(*given)
        elif node.op == "output":
            self._outputs = node.args[0]
        else:
            self._copies[node] = self._graph.node_copy(node, self._copy)

    def _copy(self, node: Node) -> Node:
        if node not in self._copies:
            self._copies[node] = self._constant(self._values[node])
        return self._copies[node]

    def _constant(self, tensor: Tensor) -> Node:
        name = f"constant_{len(self._constants)}"
        self._constants[name] = tensor
        return self._graph.get_attr(name)

    def _write(self, found: Node, slope: Node) -> None:
        """Let a kernel write its result into a tensor, or else copy it there."""
        if found.target in _OUT:
            found.target = _OUT[found.target]
            found.prepend(slope)
            found.kwargs = {**found.kwargs, "out": slope}
        else:
            self._graph.call_function(aten.copy_.default, (slope, found))
