"""Changes: what takes one possible cause of a sick signal away, while a batch runs through the network."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmend import theory
from gradmend.anatomy import Activation, Anatomy, Site
from gradmend.diagnosis.rerun import Change
from gradmend.diagnosis.weights import CONTRACTING, gain
from gradmend.recorder import Call

USUAL = (0.1, 10.0)
"""Between these a variance is one that people draw, and an rms one that people feed."""


class Standardized(Change):
    """The first layer gets every column with mean 0 and deviation 1."""

    def __init__(self) -> None:
        self._done = False

    def before(self, call: Call, index: int) -> None:
        """Change what the first layer with weights reads."""
        if call.weight is not None and not self._done:
            self._done = True
            units = 1 if call.kind == "convolution" else call.signal.dim() - 1
            dims = tuple(dim for dim in range(call.signal.dim()) if dim != units)
            _give(call, call.signal, standardized(call.signal, dims))


class Drawn(Change):
    """Weights are drawn anew for their activation, biases are zero; or for a leaky ReLU that replaces it."""

    def __init__(self, anatomy: Anatomy, leaky: bool = False) -> None:
        self._wanted = variances(anatomy, leaky)
        self._replaced = {site.index for site in hidden_activations(anatomy)} if leaky else set()
        self._weights: dict[int, Tensor] = {}
        self._signals: dict[int, Tensor] = {}

    def before(self, call: Call, index: int) -> None:
        """Draw the weight; where gradients went to the old one, they go to the new one."""
        if index in self._replaced:  # which may be about to overwrite its input
            self._signals[index], call.activation = call.signal.clone(), _leaky
        if index not in self._wanted or call.weight is None or not call.fan_in:
            return
        deviation = math.sqrt(self._wanted[index] / call.fan_in)
        if id(call.weight) not in self._weights:  # one that is used twice stays one
            drawn = torch.empty_like(call.weight, requires_grad=False).normal_(0.0, deviation)
            self._weights[id(call.weight)] = drawn.requires_grad_(call.weight.requires_grad)
        _give(call, call.weight, self._weights[id(call.weight)])
        for bias in [b for b in call.args if isinstance(b, nn.Parameter) and b.dim() == 1]:
            _give(call, bias, torch.zeros_like(bias, requires_grad=bias.requires_grad))

    def after(self, call: Call, site: Site, output: Tensor) -> Tensor | None:
        """The leaky ReLU of what the activation got."""
        return _leaky(self._signals.pop(site.index)) if site.index in self._replaced else None


class Normalized(Change):
    """Every pre-activation is standardized over the batch."""

    def after(self, call: Call, site: Site, output: Tensor) -> Tensor | None:
        """Zero mean and unit variance per unit."""
        dims = tuple(dim for dim in range(output.dim()) if dim != site.unit_dim)
        return standardized(output, dims) if site.weighted else None


class PerSample(Change):
    """What batch normalization gets is normalized sample by sample."""

    def before(self, call: Call, index: int) -> None:
        """Keep what it gets."""
        self._signal = call.signal

    def after(self, call: Call, site: Site, output: Tensor) -> Tensor | None:
        """Over all but the batch."""
        if site.function != "batch_norm":
            return None
        return standardized(self._signal, tuple(range(1, output.dim())))


class Scaled(Change):
    """The branches of a residual network are scaled by 1/sqrt(their number)."""

    def __init__(self, branches: frozenset[int]) -> None:
        self._branches = branches

    def after(self, call: Call, site: Site, output: Tensor) -> Tensor | None:
        """Scale the last site of each branch."""
        return output / math.sqrt(len(self._branches)) if site.index in self._branches else None


def standardized(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Zero mean and unit variance over some dimensions; what does not vary becomes zero.

    >>> standardized(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), (0,))
    tensor([[-1.,  0.],
            [ 1.,  0.]])
    """
    apart = x - x.mean(dims, keepdim=True)
    variance = apart.square().mean(dims, keepdim=True)
    return apart / variance.where(variance > 0, 1.0).sqrt()


def _give(call: Call, old: Tensor, new: Tensor) -> None:
    call.args = [new if argument is old else argument for argument in call.args]


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


def hidden_activations(anatomy: Anatomy) -> list[Site]:
    """Hidden activations that are no gates."""
    last = max((site.index for site in anatomy.weighted()), default=-1)
    found = [site for site in anatomy.sites if site.activation and site.index < last]
    return [s for s in found if all(reader.kind != "product" for reader in anatomy.readers(s.index))]


def variances(anatomy: Anatomy, leaky: bool) -> dict[int, float]:
    """fan-in x variance of the weights, by the index of their site."""
    hidden = {site.index for site in hidden_activations(anatomy)}
    found = {}
    for site in anatomy.weighted():
        after = anatomy.activation_after(site)
        phi = after.activation if after and after.index in hidden else None
        found[site.index] = wanted(_leaky if leaky else phi) if phi else 1.0
    return found


@lru_cache(maxsize=64)
def wanted(phi: Activation) -> float:
    """fan-in x variance of weights that suit an activation: at the edge of chaos, or keeping unit variance.

    One, as Xavier and LeCun have it, for an activation that shrinks every signal: no usual weights cure that.

    >>> round(wanted(torch.relu), 2), wanted(torch.sigmoid)
    (2.0, 1.0)
    """
    if gain(phi) < CONTRACTING:
        return 1.0
    point = theory.critical(phi)
    if point and point.stable and USUAL[0] < point.weight_variance < USUAL[1]:
        return point.weight_variance
    return 1 / theory.output_moment(phi, 1.0)
