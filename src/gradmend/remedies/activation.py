"""Other activations in the place of those that shrink, saturate or die."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn

from gradmend import rewrite, surgery
from gradmend.anatomy import INPUT, Anatomy, Site
from gradmend.causes import Cause
from gradmend.errors import SetupError, suggest
from gradmend.layers import Tailored
from gradmend.remedies.base import Remedy, is_output, weighted_layers
from gradmend.remedies.drawing import (
    Init,
    activation_before,
    first_layers,
    input_rms,
    learning_layers,
    orthogonal,
    written,
)
from gradmend.setup import Batch, Setup
from gradmend.surgery import Edit
from gradmend.theory import leaky_slope, tailor
from gradmend.weights import absorb

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "LeakyReLU": nn.LeakyReLU,
    "PReLU": nn.PReLU,
    "ELU": nn.ELU,
    "SELU": nn.SELU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "Tanh": nn.Tanh,
}

_GATES = ("sigmoid", "hardsigmoid", "tanh", "hardtanh", "softsign")


_SMOOTH = {"Tanh": "tanh", "Softplus": "softplus", "GELU": "gelu", "SiLU": "silu", "Mish": "mish"}
_BENT = 0.3
"""The curvature of one layer that every smooth activation can be given."""

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LINEAR: Init = partial(nn.init.kaiming_normal_, nonlinearity="linear")
_SHAPE = frozenset({Cause.CONTRACTING_ACTIVATION, Cause.VANISHING_GRADIENT, Cause.INFORMATION_COLLAPSE})


@dataclass(frozen=True)
class SwapActivation(Remedy):
    """Replace every hidden activation by another one of torch's; the weights stay as they are.

    Only what stands between layers is replaced: no gates (bounded activations whose output is multiplied with
    another signal), no output activations, and no module that is one of these in another place. Functions in
    the user's own `forward` become modules where torch.fx can trace it, and else are named with their line.
    For saturated, contracting or dead units; a learned function changes. Costs about nothing: smooth ones
    such as GELU take some time more than ReLU.

    Args:
        to: ReLU, LeakyReLU, PReLU, ELU, SELU, GELU, SiLU or Tanh.

    Source: Nair, Hinton 2010, https://icml.cc/Conferences/2010/papers/432.pdf (ReLU); Maas et al. 2013,
    https://ai.stanford.edu/~amaas/papers/relu_hybrid_icml2013_final.pdf (leaky ReLU); He et al. 2015,
    https://arxiv.org/abs/1502.01852 (PReLU); Clevert et al. 2016, https://arxiv.org/abs/1511.07289 (ELU);
    Klambauer et al. 2017, https://arxiv.org/abs/1706.02515 (SELU); Hendrycks, Gimpel 2016,
    https://arxiv.org/abs/1606.08415 (GELU, SiLU).
    """

    treats: ClassVar[frozenset[Cause]] = _SHAPE | {
        Cause.SATURATED_UNITS,
        Cause.DEAD_UNITS,
        Cause.DYING_UNITS,
    }
    intrusion: ClassVar[int] = 5
    summary: ClassVar[str] = "{to} activations"
    to: str = "ReLU"

    def __post_init__(self) -> None:
        if self.to not in ACTIVATIONS:
            raise SetupError(f"There is no activation {self.to!r} here. {suggest(self.to, ACTIVATIONS)}")

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is another activation between layers, and a way to it."""
        return bool(self._modules(setup, anatomy) or _reachable(setup, anatomy, self._calls(setup, anatomy)))

    def by_hand(self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]) -> tuple[str, ...]:
        """Why functions in the user's forward stay."""
        return _obstacles(setup, anatomy, self._calls(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Put the new activation in the place of each."""
        paths, calls = self._modules(setup, anatomy), self._calls(setup, anatomy)
        return setup, self, _swap(setup, anatomy, batches, paths, calls, ACTIVATIONS[self.to])

    def _modules(self, setup: Setup, anatomy: Anatomy) -> list[str]:
        new = type(ACTIVATIONS[self.to]())
        return [p for p in _hidden(setup, anatomy) if type(setup.model.get_submodule(p)) is not new]

    def _calls(self, setup: Setup, anatomy: Anatomy) -> list[Site]:
        name = _function_name(self.to)
        return [site for site in _hidden_calls(setup, anatomy) if site.function != name]


@dataclass(frozen=True)
class SelfNormalizing(Remedy):
    """SELU with what belongs to it: weights of variance 1/fan_in, and alpha dropout in the place of dropout.

    Signals come to mean 0 and variance 1 at every layer without normalization, if the input is standardized.
    Going backward the squared gradient still grows by 1.0716 a layer: for some tens of layers, not hundreds.
    Learned weights are lost; costs one drawing.

    Source: Klambauer, Unterthiner, Mayr, Hochreiter, Self-normalizing neural networks, 2017,
    https://arxiv.org/abs/1706.02515
    """

    treats: ClassVar[frozenset[Cause]] = SwapActivation.treats | {
        Cause.WEIGHTS_TOO_SMALL,
        Cause.WEIGHTS_TOO_LARGE,
        Cause.SYMMETRIC_WEIGHTS,
    }
    intrusion: ClassVar[int] = 5
    summary: ClassVar[str] = "self-normalizing network (SELU, LeCun initialization, alpha dropout)"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is an activation between layers, and a way to it."""
        return bool(_hidden(setup, anatomy) or _reachable(setup, anatomy, _hidden_calls(setup, anatomy)))

    def by_hand(self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]) -> tuple[str, ...]:
        """Why functions in the user's forward stay."""
        return _obstacles(setup, anatomy, _hidden_calls(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Swap activations and dropout, and draw new weights."""
        paths, calls = _hidden(setup, anatomy), _hidden_calls(setup, anatomy)
        dropouts = _dropouts_of(setup.model, anatomy, {*paths})
        edits = _swap(setup, anatomy, batches, paths, calls, nn.SELU)
        for path, p in dropouts.items():
            edit = surgery.replace(setup.model, path, nn.AlphaDropout(p))
            edits += [edit] if edit else []
        for site, _ in learning_layers(setup, anatomy):
            edits.append(surgery.fill(setup.model, site.module, _LINEAR, written(_LINEAR)))
        return setup, self, edits


@dataclass(frozen=True)
class Tailor(Remedy):
    """Activations shaped for the depth of this network, with the orthogonal weights that belong to them.

    They are as nearly linear as it takes for two orthogonal samples to come out with the given cosine after
    the last layer, whatever the depth: a leaky ReLU by its slope, smooth ones by scales and shifts before and
    after. The mean of the leaky ReLU is taken out by the biases after it, so that samples stay as far apart
    as they were; the squared gradient then grows by e or two over all layers. Plain networks of a thousand
    layers train so, without skips or normalization, if the layers between the first and the last learn more
    slowly (`DepthRates`). Learned weights are lost. Costs a forward pass.

    Args:
        to: LeakyReLU, Tanh, Softplus, GELU, SiLU or Mish.
        cosine: less is more linear; for the leaky ReLU as if its mean were left in.
        depth: how many activations one after the other; None counts them.

    Source: Zhang, Botev, Martens, Deep learning without shortcuts: shaping the kernel with tailored
    rectifiers, 2022, https://arxiv.org/abs/2203.08120; Martens et al., Rapid training of deep neural networks
    without skip connections or normalization layers using deep kernel shaping, 2021,
    https://arxiv.org/abs/2110.01765
    """

    treats: ClassVar[frozenset[Cause]] = SelfNormalizing.treats | {
        Cause.EXPLODING_GRADIENT,
        Cause.SHATTERED_GRADIENTS,
        Cause.CHAOS,
    }
    intrusion: ClassVar[int] = 5
    summary: ClassVar[str] = "tailored {to} activations with orthogonal weights"
    to: str = "LeakyReLU"
    cosine: float = 0.7
    depth: int | None = None

    def __post_init__(self) -> None:
        known = ("LeakyReLU", *_SMOOTH)
        if self.to not in known:
            raise SetupError(f"{self.to!r} cannot be tailored. {suggest(self.to, known)}")

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is an activation between layers, and a way to it."""
        return bool(_hidden(setup, anatomy) or _reachable(setup, anatomy, _hidden_calls(setup, anatomy)))

    def by_hand(self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]) -> tuple[str, ...]:
        """Why functions in the user's forward stay."""
        return _obstacles(setup, anatomy, _hidden_calls(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Swap the activations and draw new weights."""
        paths = _hidden(setup, anatomy)
        calls = _reachable(setup, anatomy, _hidden_calls(setup, anatomy))
        places = {s.index for s in anatomy.sites if s in calls or s.module in paths}
        swapped = {index for index in places if anatomy.sites[index].kind == "activation"}
        made = replace(self, depth=self.depth or _longest(anatomy, swapped))
        layers = [site for site, _ in learning_layers(setup, anatomy)]
        sizes = input_rms(setup, batches[0], [site.module for site in first_layers(anatomy, layers)])
        shape = made._shape()
        edits = _swap(setup, anatomy, batches, paths, calls, shape.make)
        for site in layers:
            reads = activation_before(anatomy, site) in swapped
            size = sizes.get(site.module) or 1.0
            edits += _draw(setup.model, site, shape if reads else None, size)
        return setup, made, edits

    def _shape(self) -> _Shape:
        depth = self.depth or 1
        if self.to == "LeakyReLU":
            slope = round(leaky_slope(depth, self.cosine), 6)
            mean = (1 - slope) / math.sqrt(2 * math.pi)
            return _Shape(partial(nn.LeakyReLU, slope), mean, (1 + slope**2) / 2)
        name = _SMOOTH[self.to]
        curvature = 2 * self.cosine / (1 - self.cosine)  # 1/(1 - cosine) grows by half of it in all layers
        shape = tailor(getattr(F, name), depth, min(curvature, _BENT * depth))
        return _Shape(partial(Tailored, name, *(round(value, 7) for value in vars(shape).values())), 0.0, 1.0)


@dataclass(frozen=True)
class _Shape:
    """A tailored activation: what makes it, the mean to take out of it, and E f^2 under unit Gaussians."""

    make: Callable[[], nn.Module]
    mean: float
    square: float


def _draw(model: nn.Module, site: Site, read: _Shape | None, size: float) -> list[Edit]:
    """Orthogonal weights for what a layer reads: a tailored activation without its mean, or a signal."""
    layer: Any = model.get_submodule(site.module)
    mean = read.mean if read and isinstance(layer, _PLAIN) and layer.bias is not None else 0.0
    gain = 1 / math.sqrt(read.square - mean**2) if read else 1 / size
    init = orthogonal(site, gain, delta=True)
    edits = [surgery.fill(model, site.module, init, written(init))]
    if mean:
        edits.append(surgery.change(model, site.module, absorb, "the mean taken out", shift=-mean))
    return edits


@dataclass(frozen=True)
class SigmoidAsTanh(Remedy):
    """Write sigmoid(z) as (1 + tanh(z / 2)) / 2, constants absorbed by the layers around: the same function.

    So a network of sigmoids becomes one of tanh, for which there are good initial weights, while all that was
    learned stays. Only between two layers that nothing else reads, linear or convolutions without padding.
    Costs nothing.

    Source: LeCun, Bottou, Orr, Müller, Efficient BackProp, 1998, section 4.4, on symmetric sigmoids,
    https://doi.org/10.1007/3-540-49430-8_2
    """

    treats: ClassVar[frozenset[Cause]] = _SHAPE | {Cause.SATURATED_UNITS}
    intrusion: ClassVar[int] = 5
    summary: ClassVar[str] = "sigmoid written as tanh"

    def applies_to(self, setup: Setup, anatomy: Anatomy) -> bool:
        """Whether there is a sigmoid module between two layers that can absorb its constants."""
        return bool(_between_two(setup, anatomy))

    def edit(
        self, setup: Setup, anatomy: Anatomy, batches: Sequence[Batch]
    ) -> tuple[Setup, Remedy, list[Edit]]:
        """Swap each sigmoid and change the layers around it."""
        edits: list[Edit | None] = []
        for before, path, following in _between_two(setup, anatomy):
            text = "half of what it gave"
            edits.append(surgery.change(setup.model, before, absorb, text, after=0.5))
            edits.append(surgery.replace(setup.model, path, nn.Tanh()))
            text = "reads tanh where it read sigmoid"
            for layer in following:
                edits.append(surgery.change(setup.model, layer, absorb, text, before=0.5, shift=0.5))
        return setup, self, [edit for edit in edits if edit]


def _swap(
    setup: Setup,
    anatomy: Anatomy,
    batches: Sequence[Batch],
    paths: Sequence[str],
    calls: Sequence[Site],
    make: Callable[[], nn.Module],
) -> list[Edit]:
    """Put new modules in the place of modules and of reachable function calls."""
    edits = [edit for path in paths if (edit := surgery.replace(setup.model, path, make()))]
    sites = _reachable(setup, anatomy, calls)
    if sites:
        edits += rewrite.put(setup.model, anatomy, sites, lambda _: make(), lambda: setup.loss(batches[0]))
    return edits


def _hidden(setup: Setup, anatomy: Anatomy) -> list[str]:
    """The paths of the activation modules that stand between layers wherever they are called."""
    modules = dict(setup.model.named_modules())
    calls: dict[str, list[Site]] = {}
    for site in anatomy.sites:
        calls.setdefault(site.module, []).append(site)
    inside = [p for p, sites in calls.items() if p and all(_between_layers(anatomy, s) for s in sites)]
    tailored = [p for p in calls if isinstance(modules[p], Tailored)]
    return [*(p for p in inside if _is_activation_layer(modules[p])), *tailored]


def _hidden_calls(setup: Setup, anatomy: Anatomy) -> list[Site]:
    """The activation functions between layers that the user's own forward calls."""
    own = [s for s in anatomy.sites if s.kind == "activation" and rewrite.calls(setup.model, s)]
    return [s for s in own if _between_layers(anatomy, s) and not isinstance(_module(setup, s), Tailored)]


def _module(setup: Setup, site: Site) -> nn.Module:
    return setup.model.get_submodule(site.module)


def _reachable(setup: Setup, anatomy: Anatomy, calls: Sequence[Site]) -> list[Site]:
    return [site for site in calls if rewrite.obstacle(setup.model, anatomy, [site]) is None]


def _obstacles(setup: Setup, anatomy: Anatomy, calls: Sequence[Site]) -> tuple[str, ...]:
    found = (rewrite.obstacle(setup.model, anatomy, [site]) for site in calls)
    return tuple(dict.fromkeys(text for text in found if text))


def _function_name(kind: str) -> str:
    """`leaky_relu` for LeakyReLU."""
    return {"LeakyReLU": "leaky_relu"}.get(kind, kind.lower())


def _longest(anatomy: Anatomy, counted: set[int]) -> int:
    """How many of the counted sites lie one after the other on the longest way."""
    depth: list[int] = []
    for site in anatomy.sites:
        before = max((depth[i] for i in site.inputs if i != INPUT), default=0)
        depth.append(before + (site.index in counted))
    return max(depth, default=0)


def _dropouts_of(model: nn.Module, anatomy: Anatomy, activations: set[str]) -> dict[str, float]:
    """The paths of the dropout modules that read these activations, with their p."""
    found = {}
    for site in anatomy.sites:
        module: Any = model.get_submodule(site.module)
        if type(module) is nn.Dropout and any(anatomy.sites[i].module in activations for i in site.direct):
            found[site.module] = module.p
    return found


def _between_two(setup: Setup, anatomy: Anatomy) -> list[tuple[str, str, list[str]]]:
    """Per sigmoid module: the layer before it, itself, and the layers after it, each called once."""
    called = [site.module for site in anatomy.sites]
    once = {path for path in called if called.count(path) == 1}
    layers = {s.module for s, _ in weighted_layers(setup, anatomy) if isinstance(_module(setup, s), _PLAIN)}
    plain = layers & once & _own_weights(setup.model)
    found = []
    for site in anatomy.sites:
        readers = anatomy.readers(site.index)
        before = [anatomy.sites[i] for i in site.direct if i != INPUT]
        alone = len(before) == 1 and anatomy.readers(before[0].index) == [site]
        fits = alone and all(
            s.module in plain and isinstance(_module(setup, s), _PLAIN) for s in (*before, *readers)
        )
        absorbed = fits and all(r.direct == (site.index,) and _shiftable(setup, r) for r in readers)
        sigmoid = site.module in once and type(_module(setup, site)) is nn.Sigmoid
        if sigmoid and readers and absorbed:
            found.append((before[0].module, site.module, [reader.module for reader in readers]))
    return found


def _own_weights(model: nn.Module) -> set[str]:
    """The paths of the modules whose parameters belong to no other module."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return {
        path
        for path, module in model.named_modules()
        if all(counts[id(p)] == 1 for p in module._parameters.values() if p is not None)
    }


def _shiftable(setup: Setup, site: Site) -> bool:
    """Whether the layer's bias can take up a constant that is added to all its inputs."""
    layer: Any = _module(setup, site)
    padded = site.kind == "convolution" and any(site.settings["padding"])
    return layer.bias is not None and not padded


def _between_layers(anatomy: Anatomy, site: Site) -> bool:
    """Whether its input comes straight from layers, and its output is neither the model's nor a gate."""
    before = [anatomy.sites[i].kind for i in site.direct if i >= 0]
    follows = any(kind in ("linear", "convolution", "normalization", "sum") for kind in before)
    return follows and not is_output(anatomy, site) and not _is_gate(anatomy, site)


def _is_gate(anatomy: Anatomy, site: Site) -> bool:
    """Whether a bounded activation multiplies another signal, or is mixed with one before the next site."""
    readers = anatomy.readers(site.index)
    mixed = [set(r.inputs) if r.kind == "product" else set(r.inputs) - set(r.direct) for r in readers]
    return site.function in _GATES and any(site.index in signals and len(signals) > 1 for signals in mixed)


def _is_activation_layer(module: nn.Module) -> bool:
    return (
        type(module).__module__ == "torch.nn.modules.activation"
        and "inplace" not in inspect.signature(type(module).forward).parameters
    )
