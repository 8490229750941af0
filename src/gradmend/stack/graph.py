"""Graph: the loss and the gradients of many networks at once, traced by torch and replayed without it.

torch's own `vmap` and `grad` say once, on real batches, which kernels they call; what is left of a step is
these calls, one after another, without autograd and without any transform in between.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import mkldnn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx import GraphModule

from gradmend.setup import Setup
from gradmend.stack.noise import own_noise
from gradmend.stack.settle import Settled, scripted, settle
from gradmend.stack.simplify import simplify
from gradmend.stack.tape import trace
from gradmend.training.evaluation import judge


class Graph:
    """One step of S networks of one structure on batches of one shape.

    Args:
        setup: one of them; its model is left as it is.
        parameters: names of those to differentiate by, with their values [S, ...].
        frozen: names and values [S, ...] of all other parameters.
        buffers: names and values [S, ...].
        batch: inputs and targets, [S, rows, ...] each.

    Raises:
        NotStackableError: if torch cannot trace it, or only network by network.
    """

    def __init__(
        self,
        setup: Setup,
        parameters: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        batch: Sequence[Tensor],
    ) -> None:
        kinds = (tuple(parameters.values()), tuple(frozen.values()), tuple(buffers.values()), tuple(batch))
        lengths = list(accumulate(map(len, kinds[:-1])))

        def step(*tensors: Tensor) -> tuple[Tensor, ...]:
            ends = [0, *lengths, len(tensors)]
            own, still, changing, given = (tensors[start:end] for start, end in pairwise(ends))

            def loss(own: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
                changed = {name: tensor.clone() for name, tensor in zip(buffers, changing, strict=True)}
                state = dict(zip((*parameters, *frozen), (*own, *still), strict=True)) | changed
                named = {f"model.{name}": tensor for name, tensor in state.items()}
                value, right = functional_call(_Loss(setup), named, (given,))
                return value, (right, *changed.values())

            gradients, (value, aside) = grad_and_value(loss, has_aux=True)(own)
            return *gradients, value, *aside

        self._graph = _traced(step, [*chain(*kinds)])

    def settled(
        self,
        still: Sequence[Tensor],
        slopes: Sequence[Tensor],
        given: Sequence[Tensor],
        generators: Sequence[torch.Generator],
    ) -> Settled:
        """One step as a function; call it without gradients being recorded.

        Args:
            still: parameters and frozen ones, which stay where they are in memory.
            slopes: where to write the gradients, [S, ...] for each parameter.
            given: buffers and batch, an example.
            generators: of each network's noise.

        Returns:
            A function of buffers and batch. It gives the losses [S], how many outputs were right, [S], NaN
            where nothing is classified, and the buffers after the step.
        """
        if not any(node.name == "generators" for node in self._graph.graph.nodes):
            return scripted(settle(self._graph, still, slopes), given)
        noisy = settle(self._graph, still, slopes)
        return lambda *tensors: noisy(*tensors, generators)


class NotStackableError(Exception):
    """Networks cannot be computed together."""


class _Loss(nn.Module):
    """A setup's loss of a batch, and how many outputs were right, as the forward of a module."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.model = setup.model
        self._setup = setup

    def forward(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        right, own = torch.tensor(math.nan), self._setup.loss_fn
        if own is None:
            return self._setup.loss(batch), right

        def loss_fn(output: Any, target: Any) -> Tensor:
            nonlocal right
            known = judge(own, output, target)
            if known is not None:
                right = known(output.detach(), target).sum(dtype=torch.float32)
            return own(output, target)

        return replace(self._setup, loss_fn=loss_fn).loss(batch), right


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Without oneDNN, whose recurrent layers torch cannot batch."""
    enabled, *_ = mkldnn.set_flags(_enabled=False)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        mkldnn.set_flags(_enabled=enabled)  # type: ignore[no-untyped-call]


def _traced(step: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> GraphModule:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _plain_kernels():
        warnings.filterwarnings("error", message="There is a performance drop")
        try:
            graph = trace(vmap(step, randomness="different"), tensors)
        except Exception as error:  # whatever a user's forward does that a transform cannot
            raise NotStackableError(str(error)) from error
    if not own_noise(graph):
        raise NotStackableError("It draws random numbers in a way that cannot be given to each network.")
    return simplify(graph)
