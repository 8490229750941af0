"""Disturb: measure what becomes of neighbouring inputs, by two passes over one batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmend import stats
from gradmend.anatomy import Anatomy, Site
from gradmend.diagnosis.rerun import Change, Trace, Traces, followed, rerun, samples_of
from gradmend.disturbance import Disturbance, Echo
from gradmend.recorder import Call
from gradmend.setup import Batch, Setup

SIZE = 0.01
"""A neighbour is this far away, in standard deviations of each input."""

_FEWEST = 5
"""Fewer layers than this have no depth to speak of."""


def disturb(setup: Setup, batch: Batch, anatomy: Anatomy) -> Disturbance | None:
    """Run a batch, and the same batch with every sample moved by one percent, through the network.

    Args:
        anatomy: of the model, as it was measured.

    Returns:
        What reaches the layers; None of a network of fewer than five, or where the passes differ in more
        than the disturbance.

    Examples:
        >>> from torch import nn
        >>> from gradmend.recorder import read
        >>> layers = [layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.Tanh())]
        >>> setup = Setup(nn.Sequential(*layers), nn.MSELoss())
        >>> x = torch.randn(64, 32)
        >>> echoes = disturb(setup, (x, x), read(setup.model, lambda: setup.model(x), x)).echoes
        >>> len(echoes), echoes[-1].apart < 1e-3
        (6, True)
    """
    weighted = anatomy.weighted()
    attention = [site for site in anatomy.sites if site.kind == "attention"]
    if len(weighted) < _FEWEST and len(attention) < 2:
        return None
    passes = (_passes(setup, rows, anatomy) for rows in samples_of(batch, anatomy, stats.SAMPLES))
    plain, moved = next((pair for pair in passes if pair), ({}, {}))
    if not plain:
        return None
    both = [site for site in weighted if site.index in plain and site.index in moved]
    echoes = tuple(_echo(site.index, plain[site.index], moved[site.index]) for site in both)
    tokens = tuple((i, trace.tokens.item()) for i, trace in plain.items() if trace.tokens is not None)
    return Disturbance(echoes, tokens)


def _passes(setup: Setup, batch: Batch, anatomy: Anatomy) -> tuple[Traces, Traces] | None:
    """Without the disturbance and with it; None where they differ in more than that."""
    plain = rerun(setup, batch, Change())
    if not plain or not followed(plain, anatomy.sites):
        return None
    moved = rerun(setup, batch, Moved())
    return (plain, moved) if moved and followed(moved, anatomy.sites) else None


class Moved(Change):
    """Every sample is moved by one percent of what samples differ by, in the batch or in its embedding."""

    def batch(self, batch: Batch) -> Batch:
        """The inputs with noise; targets stay, and so do whole numbers."""
        if isinstance(batch, (tuple, list)) and len(batch) > 1:
            return type(batch)([*map(_moved, batch[:-1]), batch[-1]])
        return batch

    def after(self, call: Call, site: Site, output: Tensor) -> Tensor | None:
        """Embedded tokens with noise."""
        return _moved(output) if site.kind == "embedding" else None


def _moved(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or len(x) < 2:
        return x
    with torch.no_grad():
        deviation = x.detach().std(0, keepdim=True)
        noise = SIZE * deviation * torch.randn(x.shape, generator=_generator()).to(x)
    return x + noise


def _generator() -> torch.Generator:
    """Its own, so that dropout draws the same noise in both passes."""
    return torch.Generator().manual_seed(0)


def _echo(index: int, plain: Trace, moved: Trace) -> Echo:
    if plain.rows is None or moved.rows is None:
        return Echo(index, math.nan, math.nan)
    a, b = plain.rows.double(), moved.rows.double()
    distance = (a - b).square().sum().item()
    scatter = 2 * (a - a.mean(0)).square().sum().item() * len(a) / max(1, len(a) - 1)
    return Echo(index, distance / scatter if scatter else math.nan, _agreement(plain, moved))


def _agreement(plain: Trace, moved: Trace) -> float:
    """Mean cosine between the gradients of a sample and of its neighbour, where there are any."""
    if plain.slopes is None or moved.slopes is None:
        return math.nan
    a, b = plain.slopes.double(), moved.slopes.double()
    reached = a.abs().amax(1) > 0
    cosine = F.cosine_similarity(a[reached], b[reached], dim=1, eps=1e-300)
    return cosine.mean().item() if reached.any() else math.nan
