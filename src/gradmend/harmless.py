"""Harmless: run a training step and leave everything of the user's as it was, whatever happens."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map_only

from gradmend.errors import BatchError
from gradmend.setup import Batch


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a training step inside and leave the model and all random generators as they were.

    A model in eval mode trains inside. In one that is in train mode already, parts in eval mode stay so:
    that is how a normalization is frozen.
    """
    modules = list(model.modules())
    grads = [(p, p.grad) for p in _parameters(modules)]
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    try:
        with torch.random.fork_rng(devices), _gradients_on(), _unwritten(modules), _kept(modules):
            if not model.training:
                model.train()
            for p, grad in grads:
                if grad is not None:
                    p.grad = None
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for p, grad in grads:
            if p.grad is not grad:
                p.grad = grad


def untouched(batch: Batch) -> Batch:
    """The batch with copies of its tensors, which forward may write to.

    >>> x = torch.zeros(2)
    >>> untouched((x, "text"))[0].add_(1).sum().item(), x.sum().item()
    (2.0, 0.0)
    """
    return tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), batch)


@contextmanager
def untrained(model: nn.Module) -> Iterator[None]:
    """Inside, an optimizer that is about to change the model raises instead."""

    def refuse(optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        own = {id(p) for p in model.parameters()}
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise BatchError("`step` returns the loss and does not train: leave out `optimizer.step()`.")

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def seed_noise(seed: int) -> None:
    """Seed torch's random numbers, those of an accelerator only once it is in use.

    `torch.manual_seed` notes a stack trace for each kind of accelerator that is not, which takes as long as a
    step of a small network, and keeps it.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


@contextmanager
def uncollected() -> Iterator[None]:
    """Spare Python's collector from walking over thousands of new records inside, again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def _gradients_on() -> Iterator[None]:
    """Record gradients inside, also when the user called within `no_grad` or `inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    found = (p for module in modules for p in module._parameters.values() if p is not None)
    return list({id(p): p for p in found}.values())


@contextmanager
def _kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore what modules hold; inside, their buffers and tensors that are attributes are copies.

    Writing the old values back would not do: the graph of a loss that the user holds may need these tensors.
    """
    held: list[Any] = []
    own: list[tuple[dict[str, Any], str, Any]] = []
    for module in modules:
        if not isinstance(module, torch.jit.ScriptModule):
            space, buffers = vars(module), module._buffers
            held += (space, buffers, module._parameters, module._modules, module._non_persistent_buffers_set)
            own += [(space, key, space[key]) for key in space.keys() - _STANDARD]
            if buffers:
                own += [(buffers, key, value) for key, value in buffers.items()]
    held += [value for _, _, value in own if type(value) in (list, dict, set)]
    before = [part.copy() for part in held]
    copies: dict[int, Tensor] = {}
    for space, key, value in own:
        if isinstance(value, Tensor) and not value.requires_grad and not isinstance(value, nn.Parameter):
            space[key] = copies.setdefault(id(value), value.clone())
    try:
        yield
    finally:
        for part, content in zip(held, before, strict=True):
            if part or content:
                part.clear()
                part.extend(content) if isinstance(part, list) else part.update(content)


_STANDARD = frozenset(vars(nn.Module()))
"""What every module has."""


@contextmanager
def _unwritten(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Write back what is not replaced by copies: embeddings that `max_norm` shortens, buffers of scripts."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    shortened = [m.weight for m in modules if isinstance(m, kinds) and m.max_norm is not None]
    scripted = [b for m in modules if isinstance(m, torch.jit.ScriptModule) for b in m.buffers(recurse=False)]
    tensors = (*shortened, *scripted)
    values = [tensor.detach().clone() for tensor in tensors]
    with torch.autograd._unsafe_preserve_version_counter(tensors):  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for tensor, value in zip(tensors, values, strict=True):
                tensor.detach().copy_(value)
