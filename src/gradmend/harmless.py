"""Harmless: run a training step and leave everything of the user's as it was, whatever happens."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a training step inside and leave the model and all random generators as they were."""
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    buffers = [(module._buffers, dict(module._buffers)) for module in modules]
    values = [(tensor, tensor.clone()) for tensor in map(_once, _changed_by_forward(modules))]
    grads = [(p, p.grad) for p in _parameters(modules)]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), _gradients_on():
            model.train()
            for p, _ in grads:
                p.grad = None
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, training in modes:
            module.training = training
        for p, grad in grads:
            p.grad = grad
        for now, before in buffers:
            now.clear()
            now.update(before)
        for tensor, value in values:
            tensor.copy_(value)


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


def _changed_by_forward(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    """Buffers, and the weights of embeddings with `max_norm`, which forward itself shortens."""
    for module in modules:
        yield from (buffer for buffer in module._buffers.values() if buffer is not None)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            yield module.weight


def _once(tensor: Tensor) -> Tensor:
    """The tensor with each of its values once: an expanded one repeats them and cannot be written to."""
    tensor = tensor.detach()
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim]:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
