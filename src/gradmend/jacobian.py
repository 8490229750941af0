"""Jacobians of single blocks, where theory has no formula: what a block does to a random gradient."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradmend.anatomy import INPUT, Site
from gradmend.harmless import undisturbed
from gradmend.recorder import Call, Recorder
from gradmend.setup import Batch, Setup


def block_factors(setup: Setup, batch: Batch, sites: Collection[int]) -> dict[tuple[int, int], float]:
    """The growth of a random gradient's squared norm through single sites, going backward.

    E |J^T v|^2 / |v|^2 over Gaussian v, the averaged partial Jacobian norm times outputs over inputs, by
    Hutchinson's estimate: one random v and one backward pass through the block. The path from the output of
    the site before is taken as one block with the site, with all that lies between. v is the same for every
    call.

    Args:
        setup: what trains. It is left exactly as it was.
        batch: one batch.
        sites: indices of sites in the anatomy of the model.

    Returns:
        By (index of the site, index of the site before it). Where the batch itself is read there is none.

    Raises:
        BatchError: if model, batch and loss do not fit.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> setup = Setup(model, nn.CrossEntropyLoss())
        >>> factors = block_factors(setup, (torch.randn(256, 4), torch.randint(2, (256,))), sites=[2])
        >>> exact = (model[2].weight.norm() ** 2 / 2).item()
        >>> abs(factors[2, 1] / exact - 1) < 0.3
        True

    Source: Doshi, He, Gromov, Critical initialization of wide and deep neural networks through partial
    Jacobians, 2021, https://arxiv.org/abs/2111.12143; Hutchinson, A stochastic estimator of the trace of the
    influence matrix, 1990, https://doi.org/10.1080/03610919008812866
    """
    blocks = _Blocks(frozenset(sites))
    recorder = Recorder(setup.model, after=blocks.after)
    with undisturbed(setup.model):
        torch.manual_seed(0)
        with recorder.watching(batch):
            setup.loss(batch)
    keys, values = list(blocks.factors), list(blocks.factors.values())
    return dict(zip(keys, torch.stack(values).tolist() if values else [], strict=True))


@dataclass
class _Blocks:
    """Cuts the graph behind every site, so that each block can be differentiated by itself."""

    wanted: frozenset[int]
    factors: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    leaves: dict[int, Tensor] = field(default_factory=dict)

    def after(self, call: Call, site: Site, output: Tensor) -> Tensor | None:
        """Measure the block of a site, and put a leaf in place of its output."""
        if not output.is_floating_point():
            return None
        if site.index in self.wanted and output.requires_grad:
            self._measure(site, output)
        leaf = output.detach().requires_grad_()
        self.leaves[site.index] = leaf
        return leaf

    def _measure(self, site: Site, output: Tensor) -> None:
        before = [index for index in site.inputs if index != INPUT and index in self.leaves]
        if not before:
            return
        probe = torch.randn_like(output)
        inputs = [self.leaves[index] for index in before]
        gradients = torch.autograd.grad(output, inputs, probe, allow_unused=True)
        size = probe.double().square().sum()
        for index, gradient in zip(before, gradients, strict=True):
            if gradient is not None:
                self.factors[site.index, index] = gradient.double().square().sum() / size
