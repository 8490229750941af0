"""Initial weights: each remedy draws new weights for all linear and convolutional layers, biases zero.

Frozen layers keep theirs; else learned weights are lost, so these are for setups that have not trained yet.
Variances are given for a layer with `fan_in` inputs per unit.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradmend import surgery, theory
from gradmend.anatomy import INPUT, Activation, Anatomy, Site
from gradmend.causes import Cause
from gradmend.harmless import undisturbed
from gradmend.remedies.base import SIGNAL, Remedy, is_output
from gradmend.remedies.branches import residual_branches
from gradmend.remedies.drawing import (
    Init,
    activation_before,
    centred,
    first_layers,
    input_rms,
    learning_layers,
    orthogonal,
    rectified,
    rectifier_gain,
    slope,
    written,
)
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit
from gradmend.weights import looks_linear_, set_weight

_ZERO: Init = partial(nn.init.zeros_)


class Initialization(Remedy):
    """What all initializations share: where they draw. Each says what it draws."""

    treats: ClassVar[frozenset[Cause]] = SIGNAL | {Cause.SYMMETRIC_WEIGHTS}
    intrusion: ClassVar[int] = 3

    @abstractmethod
    def inits(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> Mapping[str, tuple[Init, Init]]:
        """What draws the weight and the bias of each layer, by the layer's path."""

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is a layer with weights that are not frozen."""
        return bool(learning_layers(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Draw new weights, layer by layer in the order of execution."""
        inits = self.inits(setup, anatomy, batches)
        return setup, self, [_fill(setup.model, path, *pair) for path, pair in inits.items()]


class _LayerByLayer(Initialization):
    """Of those that look at no more than a layer and its activation, with biases of zero."""

    @abstractmethod
    def init(self, site: Site, after: Site | None) -> Init:
        """What draws one layer's weight in place; `after` is the activation that follows the layer."""

    def inits(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> Mapping[str, tuple[Init, Init]]:
        """What draws the weight and the bias of each layer, by the layer's path."""
        layers = learning_layers(setup, anatomy)
        return {site.module: (self.init(site, after), _ZERO) for site, after in layers}


@dataclass(frozen=True)
class Xavier(_LayerByLayer):
    """Variance 2/(fan_in + fan_out): for tanh, softsign and linear layers.

    A compromise between signals, which ask for 1/fan_in, and gradients, which ask for 1/fan_out. For weights
    that are too small or too large in networks of some ten layers. Learned weights are lost; costs one
    drawing.

    Source: Glorot, Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010,
    https://proceedings.mlr.press/v9/glorot10a.html
    """

    summary: ClassVar[str] = "Xavier initialization"

    def init(self, site: Site, after: Site | None) -> Init:
        """What draws one layer's weight."""
        return partial(nn.init.xavier_normal_)


@dataclass(frozen=True)
class He(_LayerByLayer):
    """Variance 2/fan_in before a rectifier (2/(1 + slope^2)/fan_in if leaky), 1/fan_in elsewhere.

    A rectifier halves the mean square of what it gets, and the weights make up for it. For weights that are
    too small or too large; angles between samples still shrink with depth. Learned weights are lost; costs
    one drawing.

    Source: He, Zhang, Ren, Sun, Delving deep into rectifiers, 2015, https://arxiv.org/abs/1502.01852
    """

    summary: ClassVar[str] = "He initialization"

    def init(self, site: Site, after: Site | None) -> Init:
        """What draws one layer's weight."""
        return _he(after)


@dataclass(frozen=True)
class LeCun(_LayerByLayer):
    """Variance 1/fan_in: for SELU, tanh and linear layers.

    Signals keep their size through linear layers. For weights that are too small or too large; not before
    rectifiers. Learned weights are lost; costs one drawing.

    Source: LeCun, Bottou, Orr, Müller, Efficient BackProp, 1998, https://doi.org/10.1007/3-540-49430-8_2
    """

    summary: ClassVar[str] = "LeCun initialization"

    def init(self, site: Site, after: Site | None) -> Init:
        """What draws one layer's weight."""
        return partial(nn.init.kaiming_normal_, nonlinearity="linear")


@dataclass(frozen=True)
class Orthogonal(_LayerByLayer):
    """Orthogonal weights with gain sqrt(2/(1 + slope^2)) before a rectifier, 1 elsewhere.

    Linear layers turn signals and gradients without stretching any direction, so that depth does not thin
    them out as with independent weights. torch's `orthogonal_` shrinks the signal where a layer has more
    outputs than inputs; here the gain makes up for it by sqrt(fan_out/fan_in). Learned weights are lost;
    costs a QR decomposition per layer.

    Source: Saxe, McClelland, Ganguli, Exact solutions to the nonlinear dynamics of learning in deep linear
    neural networks, 2014, https://arxiv.org/abs/1312.6120
    """

    summary: ClassVar[str] = "orthogonal initialization"

    def init(self, site: Site, after: Site | None) -> Init:
        """What draws one layer's weight."""
        return orthogonal(site, rectifier_gain(after))


@dataclass(frozen=True)
class DeltaOrthogonal(_LayerByLayer):
    """Kernels that are orthogonal over channels at their centre and zero around it; other layers orthogonal.

    A signal goes through such convolutions as through a fully connected network: nothing is lost to zero
    padding, which costs 3x3 kernels up to a quarter of the squared gradient per layer on small maps. For
    deep plain convolutional networks. Learned weights are lost; costs one drawing.

    Source: Xiao et al., Dynamical isometry and a mean field theory of CNNs: how to train 10,000-layer vanilla
    convolutional neural networks, 2018, https://arxiv.org/abs/1806.05393
    """

    summary: ClassVar[str] = "delta-orthogonal initialization"

    def init(self, site: Site, after: Site | None) -> Init:
        """What draws one layer's weight."""
        return orthogonal(site, rectifier_gain(after), delta=True)

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a convolution with weights that are not frozen can be delta-orthogonal."""
        return any(centred(site) for site, _ in learning_layers(setup, anatomy))


@dataclass(frozen=True)
class Critical(Initialization):
    """Weights and biases at the edge of chaos of this activation, where gradients keep their norm.

    Mean-field theory gives the variance of the weights, and the first layer's is such that signals start at
    the length to which they would come. Layers without an activation, or with one that has no such point, get
    variance 1/fan_in. For deep networks of smooth activations. Learned weights are lost; costs a forward
    pass.

    Args:
        bias_variance: None takes the first of 0.05, 0.2, 0.5, 1 and 0 at which lengths are stable.

    Source: Schoenholz, Gilmer, Ganguli, Sohl-Dickstein, Deep information propagation, 2017,
    https://arxiv.org/abs/1611.01232
    """

    summary: ClassVar[str] = "critical initialization"
    bias_variance: float | None = None

    def inits(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> Mapping[str, tuple[Init, Init]]:
        """What draws the weight and the bias of each layer, by the layer's path."""
        layers = learning_layers(setup, anatomy)
        first = [site.module for site in first_layers(anatomy, [site for site, _ in layers])]
        sizes = input_rms(setup, batches[0], first)
        return {site.module: self._pair(site, after, sizes.get(site.module)) for site, after in layers}

    def _pair(self, site: Site, after: Site | None, size: float | None) -> tuple[Init, Init]:
        phi = after.activation if after else None
        point = _critical_point(phi, self.bias_variance) if phi else None
        if point is None:
            return partial(nn.init.kaiming_normal_, nonlinearity="linear"), _ZERO
        variance = (point.q - point.bias_variance) / size**2 if size else point.weight_variance
        deviation = math.sqrt(max(variance, 0.0) / (site.fan_in or site.units))
        bias = partial(nn.init.normal_, std=math.sqrt(point.bias_variance)) if point.bias_variance else _ZERO
        return partial(nn.init.normal_, std=deviation), bias


@dataclass(frozen=True)
class LooksLinear(Initialization):
    """Mirrored orthogonal weights [[w, -w], [-w, w]], under which a plain rectifier network is an isometry.

    relu(u) - relu(-u) is u, and so it is for GELU and SiLU: at first the network is linear and orthogonal, at
    any depth, and each unit still bends. Layers of odd width, or without a rectifier, get orthogonal weights.
    For deep plain networks of rectifiers. Learned weights are lost; costs a QR decomposition per layer.

    Source: Balduzzi et al., The shattered gradients problem: if resnets are the answer, then what is the
    question?, 2017, https://arxiv.org/abs/1702.08591; Burkholz, Dubatovka, Initialization of ReLUs for
    dynamical isometry, 2019, https://arxiv.org/abs/1806.06362
    """

    treats: ClassVar[frozenset[Cause]] = Initialization.treats | {Cause.SHATTERED_GRADIENTS}
    summary: ClassVar[str] = "looks-linear initialization"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether two layers follow each other that can mirror."""
        return any(_reads_mirrored(anatomy, site) for site, _ in learning_layers(setup, anatomy))

    def inits(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> Mapping[str, tuple[Init, Init]]:
        """What draws the weight and the bias of each layer, by the layer's path."""
        layers = learning_layers(setup, anatomy)
        return {site.module: (self._mirrored(anatomy, site, after), _ZERO) for site, after in layers}

    def _mirrored(self, anatomy: Anatomy, site: Site, after: Site | None) -> Init:
        reads, writes = _reads_mirrored(anatomy, site), _mirrors(anatomy, site)
        if not (reads or writes) or (site.kind == "convolution" and not centred(site)):
            return orthogonal(site, rectifier_gain(after))
        kernel = math.prod(site.settings.get("kernel", ()))
        rows, columns = site.units / (1 + writes), (site.fan_in or site.units) / kernel / (1 + reads)
        expansion = math.sqrt(max(1.0, rows / columns))
        before = anatomy.sites[activation_before(anatomy, site)] if reads else None
        return partial(looks_linear_, gain=expansion / (1 + slope(before)), reads=reads, writes=writes)


@dataclass(frozen=True)
class Fixup(Initialization):
    """For residual networks without normalization: He, each branch smaller with depth, and zero at its end.

    All but the last layer of a branch of m layers are scaled by L^(-1 / (2m - 2)), L branches; the last layer
    of each branch and the output layer begin at zero. So one step changes the output by an amount that does
    not depend on L. The paper's scalar biases and multipliers, which help a little, are left out.
    Learned weights are lost; costs one drawing.

    Source: Zhang, Dauphin, Ma, Fixup initialization: residual learning without normalization, 2019,
    https://arxiv.org/abs/1901.09321
    """

    treats: ClassVar[frozenset[Cause]] = frozenset(
        {Cause.RESIDUAL_GROWTH, Cause.EXPLODING_GRADIENT, Cause.WEIGHTS_TOO_LARGE, Cause.CHAOS}
    )
    summary: ClassVar[str] = "Fixup initialization"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether a residual branch has a layer whose weights are not frozen."""
        learning = {site.module for site, _ in learning_layers(setup, anatomy)}
        return any(branch.layers[-1].module in learning for branch in residual_branches(anatomy))

    def inits(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> Mapping[str, tuple[Init, Init]]:
        """What draws the weight and the bias of each layer, by the layer's path."""
        branches = residual_branches(anatomy)
        last, gains = {branch.layers[-1].index for branch in branches}, dict[int, float]()
        for branch in branches:
            m = len(branch.layers)
            gain = len(branches) ** (-1 / (2 * m - 2)) if m > 1 else 1.0
            gains |= dict.fromkeys((site.index for site in branch.layers[:-1]), gain)
        found = {}
        for site, after in learning_layers(setup, anatomy):
            calls = [other.index for other in anatomy.weighted() if other.module == site.module]
            zero = last.issuperset(calls) or is_output(anatomy, site)
            init = _ZERO if zero else _scaled_he(site, after, gains.get(site.index, 1.0))
            found[site.module] = (init, _ZERO)
        return found


@dataclass(frozen=True)
class LSUV(Remedy):
    """Orthogonal weights, then scaled layer by layer until each output has unit variance on a batch.

    Because biases are zero, one forward pass scales all layers exactly. Unit variance keeps the gradient's
    size for ReLU-like activations; smooth ones drift by a few percent a layer. For layers of which no formula
    tells the gain. Learned weights are lost; costs a forward pass.

    Source: Mishkin, Matas, All you need is a good init, 2016, https://arxiv.org/abs/1511.06422
    """

    treats: ClassVar[frozenset[Cause]] = Initialization.treats
    intrusion: ClassVar[int] = 3
    summary: ClassVar[str] = "LSUV initialization"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is a layer with weights that are not frozen."""
        return bool(learning_layers(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Draw orthogonal weights, then measure and scale them in one forward pass."""
        _, _, edits = Orthogonal().edit(setup, anatomy, batches)
        paths = [edit.where for edit in edits]
        factors = _factors(setup, batches[0], paths)
        for path, factor in factors.items():
            set_weight(setup.model.get_submodule(path), partial(torch.Tensor.mul_, other=factor))
        return setup, self, [*edits, _scaling(factors)]


def _factors(setup: Setup, batch: Batch, paths: Sequence[str]) -> dict[str, float]:
    """What each layer has to be multiplied by for unit variance, if those before it are already."""
    found: dict[str, float] = {}

    def look(path: str, output: Tensor) -> Tensor:
        if path not in found and (spread := output.std().item()) > 0:
            found[path] = 1 / spread
        return output * found.get(path, 1.0)

    handles = [
        setup.model.get_submodule(path).register_forward_hook(lambda _, __, out, path=path: look(path, out))
        for path in paths
    ]
    try:
        with undisturbed(setup.model), torch.no_grad():
            setup.loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _scaling(factors: Mapping[str, float]) -> Edit:
    """The same as code, with the factors that were found."""
    rows = "".join(f"    {path!r}: {factor!r},\n" for path, factor in factors.items())
    code = (
        f"factors = {{\n{rows}}}\nfor name, factor in factors.items():\n"
        "    set_weight(model.get_submodule(name), partial(torch.Tensor.mul_, other=factor))"
    )
    return Edit("", code, "every layer scaled to unit variance on a batch")


def _fill(model: nn.Module, path: str, init: Init, bias: Init) -> Edit:
    if bias is _ZERO:
        return surgery.fill(model, path, init, written(init))
    return surgery.fill(model, path, init, written(init), bias=bias, bias_code=written(bias))


def _he(after: Site | None) -> Init:
    if not rectified(after):
        return partial(nn.init.kaiming_normal_, nonlinearity="linear")
    return partial(nn.init.kaiming_normal_, a=slope(after), nonlinearity="leaky_relu")


def _scaled_he(site: Site, after: Site | None, gain: float) -> Init:
    if gain == 1:
        return _he(after)
    return partial(nn.init.normal_, std=gain * rectifier_gain(after) / math.sqrt(site.fan_in or site.units))


@lru_cache(maxsize=256)
def _critical_point(phi: Activation, bias_variance: float | None) -> theory.Critical | None:
    choices = (0.05, 0.2, 0.5, 1.0, 0.0) if bias_variance is None else (bias_variance,)
    points = (theory.critical(phi, choice) for choice in choices)
    return next((point for point in points if point and point.stable and point.q > 0), None)


def _mirrors(anatomy: Anatomy, site: Site) -> bool:
    """Whether a layer can give [u, -u] to a rectifier, and the layers that read it can take the two apart."""
    after = anatomy.activation_after(site)
    even = site.units % 2 == 0 and rectified(after) and (site.kind == "linear" or centred(site))
    return even and after is not None and not is_output(anatomy, after)


def _reads_mirrored(anatomy: Anatomy, site: Site) -> bool:
    """Whether the second half of a layer's inputs mirrors the first."""
    index = activation_before(anatomy, site)
    if index < 0 or (site.kind == "convolution" and not centred(site)):
        return False
    before = anatomy.sites[index]
    while len(before.direct) == 1 and before.direct[0] != INPUT:
        before = anatomy.sites[before.direct[0]]
        if before.weighted:
            return _mirrors(anatomy, before)
        if before.kind not in ("normalization", "dropout"):
            break
    return False
