"""Noise: in a stack each network draws from a generator of its own, as it would alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node


def own_noise(graph: GraphModule) -> bool:
    """Let every random kernel draw network by network; if there is one, generators become the last input.

    Returns:
        Whether that can be done with all of them.
    """
    random = [node for node in graph.graph.nodes if _is_random(node)]
    if not random or not all(map(_by_rows, random)):
        return not random
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    with graph.graph.inserting_after(last):
        generators = graph.graph.placeholder("generators")
    for node in random:
        node.args = (node.target, generators, *node.args)
        node.target = _drawn
    graph.recompile()
    return True


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _by_rows(node: Node) -> bool:
    """Whether its first argument holds a row for each network, and it takes a generator."""
    schema: Any = getattr(node.target, "_schema", None)
    takes = any(argument.name == "generator" for argument in schema.arguments)
    tensors = [argument for argument in node.args if isinstance(argument, Node)]
    return takes and len(tensors) == 1 and node.args[0] is tensors[0] and not schema.is_mutable


def _drawn(
    kernel: Callable[..., Tensor],
    generators: Sequence[torch.Generator],
    like: Tensor,
    *args: object,
    **kwargs: object,
) -> Tensor:
    rows = zip(like, generators, strict=True)
    return torch.stack([kernel(row, *args, **{**kwargs, "generator": own}) for row, own in rows])
