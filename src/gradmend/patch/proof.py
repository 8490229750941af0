"""Proof: whether a patched file gives the mended model, found by running it without writing it."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gradmend.harmless import undisturbed
from gradmend.setup import Batch, Setup

_CLOSE = 1e-5
"""A function and its module may add up in another order."""


def gives(after: bytes, file: str, name: str, wanted: Setup, batch: Batch, seed: int = 0) -> bool:
    """Whether a file would give a model of the same weights and the same loss.

    Args:
        after: the bytes of the patched file.
        file: where it will stand.
        name: of the target in it.
        wanted: the mended setup.
        batch: to compare the losses on.
        seed: with which the original was made.
    """
    try:
        model = _load(after, file, name, seed)
        device = next(wanted.model.parameters()).device
        return same_model(model.to(device), wanted, batch)
    except (Exception, SystemExit):  # the user's code may raise anything
        return False


def same_model(model: nn.Module, wanted: Setup, batch: Batch) -> bool:
    """Whether a model has the weights of the wanted one, in their order, and its loss on a batch.

    >>> layer = nn.Linear(2, 1)
    >>> same_model(nn.Sequential(layer), Setup(layer, nn.MSELoss()), (torch.ones(3, 2), torch.ones(3, 1)))
    True
    """
    states = [list(m.state_dict().values()) for m in (model, wanted.model)]
    tensors = [[value for value in state if isinstance(value, torch.Tensor)] for state in states]
    if len(tensors[0]) != len(tensors[1]):
        return False
    if not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(*tensors, strict=True)):
        return False
    losses = [_loss(replace(wanted, model=m), batch) for m in (model, wanted.model)]
    return torch.allclose(losses[0], losses[1], rtol=_CLOSE, equal_nan=True)


def _loss(setup: Setup, batch: Batch) -> torch.Tensor:
    with undisturbed(setup.model), torch.no_grad():
        setup.model.eval()
        return setup.loss(batch)


def _load(after: bytes, file: str, name: str, seed: int) -> nn.Module:
    """The model that the target of a file is, has, or returns."""
    module = ModuleType(Path(file).stem)
    module.__file__ = file
    with _as_imported(module), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        exec(compile(after, file, "exec", dont_inherit=True), vars(module))
        value: Any = getattr(module, name)
        made = value if isinstance(value, (nn.Module, Setup)) else value()
    model: nn.Module = made.model if isinstance(made, Setup) else made
    return model


@contextlib.contextmanager
def _as_imported(module: ModuleType) -> Iterator[None]:
    """Inside, a module is the one that is imported by its name, and what it prints is not shown."""
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        del sys.modules[module.__name__]
        if before is not None:
            sys.modules[module.__name__] = before
