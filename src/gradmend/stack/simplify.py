"""Simplify: a traced graph without what changes nothing, and with kernels that suit many small matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten

_VIEWS: Final = (aten.expand.default, aten.view.default, aten._unsafe_view.default)
_NARROW: Final = 64
"""The softmax of torch works along rows of fewer classes number by number; across them, many at a time."""


def simplify(graph: GraphModule) -> GraphModule:
    """The same numbers, but for rounding, from fewer and faster kernels; changes the graph in place."""
    for rewrite in _REWRITES:
        for node in list(graph.graph.nodes):
            if node.op == "call_function":
                rewrite(node)
        graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _drop_views(node: Node) -> None:
    """Views of the same shape, products with 1, and marks for autograd."""
    first = _first(node)
    if first is None:
        return
    idle = node.target in _VIEWS and _shape(first) == _shape(node)
    once = node.target is aten.mul.Scalar and node.args[1] == 1 and _dtype(first) == _dtype(node)
    if idle or once or node.target is aten.detach.default:
        _replace(node, first)


def _drop_turns(node: Node) -> None:
    """A transposition of a transposition."""
    first = _first(node)
    twice = first is not None and first.target is node.target is aten.transpose.int
    if first is not None and twice and set(first.args[1:]) == set(node.args[1:]):
        _replace(node, first.args[0])


def _drop_kept(node: Node) -> None:
    """A sum that keeps its dimension, and a view without it."""
    first = _first(node)
    if node.target is not aten.view.default or first is None or first.target is not aten.sum.dim_IntList:
        return
    places, *kept = first.args[1:]
    left = tuple(n for place, n in enumerate(_shape(first)) if place not in places)  # type: ignore[operator]
    if kept == [True] and not first.kwargs and len(first.users) == 1 and left == _shape(node):
        _replace(node, _insert(node, aten.sum.dim_IntList, first.args[0], places))


def _fuse_bias(node: Node) -> None:
    """A product and the bias added to it, in one kernel."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return
    nodes = [part for part in node.args if isinstance(part, Node)]
    for bias, product in zip(nodes, reversed(nodes), strict=True):
        alone = product.target is aten.bmm.default and len(product.users) == 1
        if len(nodes) == 2 and alone and _shape(product) == _shape(node):
            _replace(node, _insert(node, aten.baddbmm.default, bias, *product.args))
            return


def _turn_softmax(node: Node) -> None:
    if node.target is aten._log_softmax.default and _is_narrow(node, node.args[1]):
        last = len(_shape(node)) - 1
        turned = _insert(node, aten._log_softmax.default, _turned(node, node.args[0]), last - 1, False)
        _replace(node, _insert(node, aten.transpose.int, turned, last - 1, last))


def _turn_softmax_slope(node: Node) -> None:
    if node.target is aten._log_softmax_backward_data.default and _is_narrow(node, node.args[2]):
        last = len(_shape(node)) - 1
        slope, output = (_turned(node, tensor) for tensor in node.args[:2])
        found = _insert(node, node.target, slope, output, last - 1, node.args[3])
        _replace(node, _insert(node, aten.transpose.int, found, last - 1, last))


_IN_PLACE: Final[dict[Any, Any]] = {
    aten.relu.default: aten.relu_.default,
    aten.tanh.default: aten.tanh_.default,
}


def _write_in_place(node: Node) -> None:
    """An activation writes over the product that nothing else reads."""
    first = _first(node)
    product = first is not None and first.target is aten.baddbmm.default and len(first.users) == 1
    if product and node.target in _IN_PLACE:
        node.target = _IN_PLACE[node.target]


_REWRITES: Final = (
    _drop_views,
    _drop_turns,
    _drop_kept,
    _fuse_bias,
    _turn_softmax,
    _turn_softmax_slope,
    _write_in_place,
)
"""In this order: what one leaves is what the next looks for."""


def _first(node: Node) -> Node | None:
    """The first argument, if it comes from another kernel."""
    return node.args[0] if node.args and isinstance(node.args[0], Node) else None


def _turned(node: Node, tensor: Any) -> Node:
    """A copy whose last two dimensions are exchanged in memory."""
    last = len(_shape(node)) - 1
    view = _insert(node, aten.transpose.int, tensor, last - 1, last)
    return _insert(node, aten.clone.default, view, memory_format=torch.contiguous_format)


def _is_narrow(node: Node, dimension: Any) -> bool:
    shape = _shape(node)
    return len(shape) > 1 and dimension in (-1, len(shape) - 1) and shape[-1] < _NARROW


def _insert(node: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, args, kwargs)
    made.meta = dict(node.meta)
    return made


def _replace(node: Node, other: Any) -> None:
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _dtype(node: Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)
