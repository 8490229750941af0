"""Inside: what goes on within recurrent, attention and batch normalization calls of a measured step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradmend import attention, recurrence
from gradmend.anatomy import INPUT, Site
from gradmend.kinds import bound, elementwise, tensors_in
from gradmend.ledger import Key, Ledger, Numbers
from gradmend.readings import DriftReading
from gradmend.recorder import Call

_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_ON_THE_WAY = frozenset(("scale", "sum", "dropout"))
"""Kinds that may stand between the product of queries and keys and its softmax."""


class Inside:
    """Looks into calls while they are made, and at what the backward pass brings to their inputs."""

    def __init__(self, ledger: Ledger, sites: Sequence[Site]) -> None:
        self._ledger = ledger
        self._sites = sites
        self._layouts: dict[int, recurrence.Layout] = {}
        self._inputs: dict[int, Tensor] = {}
        self._running: tuple[Tensor, Tensor] | None = None
        self._steps = 0

    def before(self, call: Call) -> None:
        """Look at the arguments of a call; a recurrent one is given an input whose gradient can be seen."""
        index = len(self._sites)
        if call.kind == "recurrent":
            self._recurrent(call, index)
        elif call.kind == "attention":
            self._ledger.add("attention", [index], _attention(call)[None])
        elif call.kind == "softmax" and self._is_attention(call):
            dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else -1)
            numbers = attention.observe_logits(call.signal.detach(), -1 if dim is None else dim)
            self._ledger.add("attention", [index], numbers[None])
        elif call.name == "batch_norm":
            self._running = _running(call)

    def after(self, call: Call, site: Site, output: Tensor) -> None:
        """Compare the statistics of the batch with the running ones from before it."""
        if call.name != "batch_norm" or self._running is None:
            return
        batch = _batch_statistics(output)
        if batch is not None:
            self._ledger.add(
                "drift", [site.index], _drift(*batch, *self._running, site.settings["eps"])[None]
            )

    @property
    def watched(self) -> list[Tensor]:
        """The tensors whose gradients are wanted."""
        return list(self._inputs.values())

    def after_backward(self, gradients: Sequence[Tensor | None]) -> None:
        """Take the gradients of the watched tensors."""
        for index, gradient in zip(self._inputs, gradients, strict=True):
            if gradient is not None:
                numbers = recurrence.observe_gradient(gradient, self._layouts[index])
                self._ledger.add("through time", [index], numbers[None])
        self._inputs.clear()

    def time(self, numbers: Numbers, index: int) -> recurrence.TimeReading | None:
        """What happens along time in a recurrent call."""
        if index not in numbers["gates"]:
            return None
        gradients = numbers["through time"].get(index, [])
        return recurrence.read(self._layouts[index], numbers["gates"][index], gradients)

    def _recurrent(self, call: Call, index: int) -> None:
        """Of a cell in a loop every call is a step: the 1st, 2nd, 4th, 8th ... are looked into."""
        if call.name.endswith("_cell"):
            self._steps += 1
            if self._steps & (self._steps - 1):
                return
        elif any(tensor.requires_grad for tensor in tensors_in(call.args)):  # else nothing is recorded
            given = call.args[0]
            seen = given.view_as(given) if given.requires_grad else given.detach().requires_grad_()
            call.args = (seen, *call.args[1:])
            self._inputs[index] = seen
        self._layouts[index] = recurrence.layout(call.name, call.args)
        self._ledger.add("gates", [index], recurrence.observe(call.name, call.args)[None])

    def _is_attention(self, call: Call) -> bool:
        """Whether the softmax is over the product of two signals."""
        waiting = [index for index in call.inputs if index != INPUT]
        for _ in range(8):  # scaled, masked, biased: no chain between them is longer
            if not waiting or call.signal.dim() < 3:
                return False
            site = self._sites[waiting.pop()]
            if site.kind == "product" and not elementwise(site.function):
                return True
            waiting += [i for i in site.inputs if site.kind in _ON_THE_WAY and i != INPUT]
        return False


def _attention(call: Call) -> Tensor:
    if call.name == "multi_head_attention_forward":
        return attention.observe_multi_head(call.args, call.kwargs)
    given: Mapping[str, Any] = {**dict(zip(_ATTENTION, call.args, strict=False)), **call.kwargs}
    used = {key: value for key, value in given.items() if key not in ("value", "dropout_p")}
    return attention.observe(**used)


def _running(call: Call) -> tuple[Tensor, Tensor] | None:
    try:
        given = bound("batch_norm", call.args, call.kwargs)
    except TypeError:  # `torch.batch_norm` has other arguments
        return None
    mean, variance = given.get("running_mean"), given.get("running_var")
    return None if mean is None or variance is None else (mean.clone(), variance.clone())


def _batch_statistics(output: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and 1 / deviation per channel, which torch keeps for the backward pass anyway."""
    mean = getattr(output.grad_fn, "_saved_result1", None)
    scale = getattr(output.grad_fn, "_saved_result2", None)
    if not isinstance(mean, Tensor) or not isinstance(scale, Tensor) or not mean.numel():
        return None
    return mean, scale


def _drift(mean: Tensor, scale: Tensor, running_mean: Tensor, running_var: Tensor, eps: float) -> Tensor:
    deviation = (running_var.double() + eps).sqrt()
    shift = ((mean.double() - running_mean.double()).abs() / deviation).mean()
    ratio = -(scale.double() * deviation).log().mean()
    return torch.stack([shift, ratio.exp()])


def drift(numbers: Numbers, index: Key) -> DriftReading | None:
    """How far the running statistics of a batch normalization are from those of the batch."""
    found = numbers["drift"].get(index)
    return DriftReading(*found) if found and not math.isnan(found[0]) else None


def attended(numbers: Numbers, index: Key) -> attention.AttentionReading | None:
    """What an attention call, or the softmax of one, attends to."""
    found = numbers["attention"].get(index)
    return attention.read(found) if found else None
