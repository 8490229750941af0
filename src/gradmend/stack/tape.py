"""Tape: the kernels that a function calls, written down while it runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


def trace(function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> GraphModule:
    """Run a function once and write down its kernels, those beneath transforms of `torch.func`.

    torch's own `make_fx` does the same in six times as long, as it keeps for each kernel where it was called
    and a tensor without values.

    Args:
        function: of the tensors, and of nothing else that changes between calls.
        tensors: to run it on.

    Returns:
        A module that takes tensors of the same shapes and strides. `meta["val"]` of its nodes has their
        shape and dtype, on the meta device.

    Examples:
        >>> both = trace(lambda x: (torch.func.vmap(torch.sum)(x),), [torch.ones(2, 3)])
        >>> both(torch.full((2, 3), 2.0))
        (tensor([6., 6.]),)
    """
    tape = _Tape(tensors)
    with tape:
        found = function(*tensors)
    tape.graph.output(tuple(tape.node(tensor) for tensor in found))
    return GraphModule(tape.constants, tape.graph)


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes every kernel that is called into a graph, and runs it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self.constants: dict[str, Tensor] = {}
        self._nodes: dict[int, Node] = {}
        self._kept: list[Tensor] = []  # no other tensor may take the place of one in memory
        for place, tensor in enumerate(tensors):
            self._note(tensor, self.graph.placeholder(f"given_{place}"))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        given, named = tree_map(self._as_node, (tuple(args), dict(kwargs or {})))
        node = self.graph.call_function(func, given, named)
        if isinstance(found, Tensor):
            self._note(found, node)
        elif isinstance(found, (tuple, list)):
            for place, part in enumerate(found):
                if isinstance(part, Tensor):
                    self._note(part, self.graph.call_function(operator.getitem, (node, place)))
        return found

    def node(self, tensor: Tensor) -> Node:
        """Where a tensor comes from; one that came from outside is a constant."""
        if id(tensor) not in self._nodes:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = tensor
            self._note(tensor, self.graph.get_attr(name))
        return self._nodes[id(tensor)]

    def _as_node(self, value: Any) -> Any:
        return self.node(value) if isinstance(value, Tensor) else value

    def _note(self, tensor: Tensor, node: Node) -> None:
        node.meta["val"] = torch.empty_like(tensor, device="meta")
        self._nodes[id(tensor)] = node
        self._kept.append(tensor)
