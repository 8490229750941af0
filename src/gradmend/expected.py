"""What mean-field theory expects of a model as read, from its measured weights and input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from gradmend import theory
from gradmend.anatomy import INPUT, Activation, Anatomy, Site
from gradmend.readings import Expected, InputReading, ParameterReading, Reading
from gradmend.theory.network import UNKNOWN
from gradmend.theory.signals import Field

Factors = Mapping[tuple[int, int], float]
"""(site, one of its inputs) -> E|J^T v|^2 / |v|^2, measured where theory has no formula."""

Lengths = Mapping[int, Field]
"""Activation site -> the mean square of what it reads, of each sample."""

_LARGEST = 709.0
"""A number of which exp is one too."""

_FEWEST_UNITS = 8
"""Of so few units together, the deviation is no longer that of the mean field."""


def expect(
    anatomy: Anatomy,
    sites: Sequence[Reading],
    inputs: InputReading | None,
    parameters: Sequence[ParameterReading] = (),
    factors: Factors | None = None,
    lengths: Lengths | None = None,
) -> tuple[dict[int, Expected], str | None]:
    """What theory expects at each site, and why not at every site with weights if so.

    Behind the last weights the gradients are the measured ones. Where a site has no formula, lengths and
    angles go on from the measured ones, and gradients by the measured factor; without one, no gradient is
    predicted before it. If that leaves no site with weights at all, theory begins before the gap instead.

    Args:
        anatomy: the model as read.
        sites: the readings of its sites.
        inputs: what the first site gets, if that is a batch of vectors.
        parameters: the readings of its parameters, for gains and biases of normalizations.
        factors: measured for sites without a formula.
        lengths: measured before activations. Each sample's gradient then follows its own lengths.
    """
    if not all(reading.finite for reading in sites):
        return {}, "values are not finite"
    model = _Model(
        anatomy,
        {r.site.index: r for r in sites},
        {p.name: p for p in parameters},
        factors or {},
        lengths or {},
    )
    nodes = [model.node(site) for site in anatomy.sites]
    if not any(node.weighted for node in nodes):
        return {}, "no layer with weights"
    measured = model.gradients(nodes)
    prediction = theory.propagate(nodes, _source(inputs), measured)
    taken = {index for index, gradient in measured.items() if prediction.gradients[index] is gradient}
    nothing_new = taken & (_before_weights(nodes) | prediction.refused.keys())
    reached = {reading.site.index for reading in sites if reading.gradient is not None}
    new = reached - nothing_new
    found = {
        index: _expected(signal, gradient)
        for index, (signal, gradient) in enumerate(zip(prediction.signals, prediction.gradients, strict=True))
        if signal and gradient and index in new
    }
    missed = [index for index in reached if nodes[index].weighted and index not in found]
    return found, _reason(anatomy, nodes, prediction.refused) if missed or not found else None


def _expected(signal: theory.Signal, gradient: theory.Gradient) -> Expected:
    return Expected(math.sqrt(signal.length), 1 - signal.gap, math.exp(min(gradient.log / 2, _LARGEST)))


def _before_weights(nodes: Sequence[theory.Node]) -> set[int]:
    """The nodes from which some way leads to weights."""
    found: set[int] = set()
    for index, node in reversed(list(enumerate(nodes))):
        if node.weighted or index in found:
            found.update(node.inputs or ())
    return found


def _source(inputs: InputReading | None) -> theory.Signal | None:
    if inputs is None or math.isnan(inputs.cosine):
        return None
    return theory.Signal(inputs.rms**2, gap=max(1 - inputs.cosine, 0.0), mean=inputs.mean)


def _reason(anatomy: Anatomy, nodes: Sequence[theory.Node], refused: Mapping[int, str]) -> str:
    """Names the first site that gradients cannot be followed through, one that reads others if there is."""
    last = max(index for index, node in enumerate(nodes) if node.weighted)
    closed = [i for i, why in refused.items() if i <= last and nodes[i].factors is None and why != UNKNOWN]
    if not closed:
        return "the input is not a batch of real vectors"
    index = min(closed, key=lambda i: (set(anatomy.sites[i].inputs) <= {INPUT}, i))
    site = anatomy.sites[index]
    if site.direct != site.inputs:
        return f"{site.name} reads what comes before it through operations without a formula"
    return f"no formula for {site.function} at {site.name}" + (
        f": {refused[index]}" if nodes[index].rule else ""
    )


@dataclass(frozen=True)
class _Model:
    """A model as read and measured, of which the nodes of the theory are made."""

    anatomy: Anatomy
    readings: Mapping[int, Reading]
    parameters: Mapping[str, ParameterReading]
    factors: Factors
    lengths: Lengths
    activations: dict[Activation, theory.Elementwise] = field(default_factory=dict)

    def node(self, site: Site) -> theory.Node:
        """A site with its rule, if it has one, and with what stands in where that does not apply."""
        readable = site.direct == site.inputs and len(site.inputs) == (2 if site.kind == "sum" else 1)
        reading = self.readings.get(site.index)
        factors = [self._factor(site, source) for source in site.inputs]
        known = tuple(factor for factor in factors if factor is not None)
        return theory.Node(
            rule=_rule(self, site, reading) if readable and reading else None,
            inputs=site.inputs,
            measured=_signal(reading, self._cosine(site)) if reading else None,
            factors=known if len(known) == len(factors) else None,
            weights=_weights(site),
            lengths=self.lengths.get(site.index),
        )

    def gradients(self, nodes: Sequence[theory.Node]) -> dict[int, theory.Gradient]:
        """The measured ones; with their cosines where batch normalization needs them."""
        pairs = any(isinstance(node.rule, theory.BatchNormalization) for node in nodes)
        return {index: _gradient(reading, pairs) for index, reading in self.readings.items()}

    def gain_and_bias(self, site: Site) -> tuple[float, float]:
        """Root mean squares of a normalization's parameters."""
        found = [self.parameters[name].rms for name in site.parameters if name in self.parameters]
        gain, bias = [*found, *(1.0, 0.0)[len(found) :]][:2]
        return gain, bias

    def elementwise(self, phi: Activation) -> theory.Elementwise:
        """One rule per activation, so that each is tabulated once."""
        if phi not in self.activations:
            self.activations[phi] = theory.Elementwise(phi)
        return self.activations[phi]

    def shape(self, index: int) -> tuple[int, ...]:
        """Of a site's output; nothing is known of the batch's."""
        return () if index == INPUT else self.anatomy.sites[index].shape

    @cached_property
    def _weighted_readers(self) -> dict[int, int]:
        weighted = reversed(self.anatomy.weighted())
        return {source: site.index for site in weighted for source in site.direct}

    def _cosine(self, site: Site) -> float:
        """The site's own, else that of the first weights that read it, for they keep angles."""
        places = (site.index, self._weighted_readers.get(site.index, site.index))
        found = [self.readings[place].cosine for place in places if place in self.readings]
        return next((cosine for cosine in found if not math.isnan(cosine)), math.nan)

    def _factor(self, site: Site, source: int) -> float | None:
        measured = self.factors.get((site.index, source))
        if measured is not None or site.direct != (source,):
            return measured
        zero = self.readings[site.index].zero if site.index in self.readings else None
        if site.function == "relu" and zero is not None:
            return 1 - zero
        if site.kind != "pool" or source == INPUT:
            return None
        return self._overlap(site, source) or _pool_factor(site, self.shape(source))

    def _overlap(self, site: Site, source: int) -> float | None:
        """Where windows of a mean overlap their gradients add up, alike or not: by how much is measured."""
        windows = zip(site.settings.get("kernel", ()), site.settings.get("stride", ()), strict=True)
        ends = [self.readings[i].gradient_norm or 0.0 for i in (source, site.index) if i in self.readings]
        only = len(self.anatomy.readers(source)) == 1 and len(ends) == 2 and all(ends)
        return (ends[0] / ends[1]) ** 2 if only and any(size > step for size, step in windows) else None


def _signal(reading: Reading, cosine: float) -> theory.Signal | None:
    """As measured; without a cosine only if all is zero."""
    if math.isnan(cosine) and reading.rms:
        return None
    gap = 0.0 if math.isnan(cosine) else max(1 - cosine, 0.0)
    return theory.Signal(reading.rms**2, gap, reading.mean, gaussian=reading.site.weighted)


def _gradient(reading: Reading, pairs: bool) -> theory.Gradient:
    norm, cosine = reading.gradient_norm, reading.gradient_cosine
    log = 2 * math.log(norm) if norm else -math.inf
    return theory.Gradient(log, cosine) if pairs and cosine is not None else theory.Gradient(log)


def _weights(site: Site) -> str | None:
    """The name of the weights that mix the site's units."""
    mixes = site.weighted or site.kind in ("embedding", "recurrent", "attention")
    return next(iter(site.parameters), None) if mixes else None


def _rule(model: _Model, site: Site, reading: Reading) -> theory.Rule | None:
    if site.weighted and reading.weight_variance is not None:
        variances = reading.weight_variance, reading.bias_variance
        if site.kind == "linear":
            return theory.Linear(*variances, site.fan_in, reading.shift)
        return replace(_convolution(model, site, variances), shift=reading.shift)
    match site.kind:
        case "activation" if site.activation:
            return model.elementwise(site.activation)
        case "normalization":
            return _normalization(model, site)
        case "sum":
            return theory.Sum(-1.0 if "sub" in site.function else 1.0)
        case "scale":
            return theory.Scale(site.settings["factor"])
        case "dropout" if "alpha" not in site.function:
            return theory.Dropout(1 - site.settings["p"])
    return None


def _convolution(model: _Model, site: Site, variances: tuple[float, float]) -> theory.Convolution:
    kernel, stride, padding, dilation = (
        tuple(site.settings[key]) for key in ("kernel", "stride", "padding", "dilation")
    )
    transposed, outputs = "transpose" in site.function, site.shape[-len(kernel) :]
    before = model.shape(site.direct[0])
    inputs = before[-len(kernel) :] if len(before) == len(site.shape) else None
    if inputs is None:  # as far as the outputs tell
        reach = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(kernel, padding, dilation, strict=True)]
        sides = zip(outputs, stride, reach, strict=True)
        inputs = tuple((o - r) // s + 1 if transposed else (o - 1) * s + r for o, s, r in sides)
    return theory.Convolution(*variances, inputs, outputs, kernel, stride, padding, dilation, transposed)


def _normalization(model: _Model, site: Site) -> theory.Rule | None:
    gain, bias = model.gain_and_bias(site)
    eps, together = site.settings["eps"], site.units // site.settings["groups"]
    if site.function == "batch_norm":
        samples = site.shape[0]
        positions = math.prod(site.shape) // site.units // samples
        return theory.BatchNormalization(samples, gain, bias, eps, positions)
    if site.function == "instance_norm" or together < _FEWEST_UNITS:
        return None
    return theory.Normalization(site.function != "rms_norm", gain, bias, eps)


def _pool_factor(site: Site, before: tuple[int, ...]) -> float | None:
    """Of windows that do not overlap: each of the n values of a mean gets 1 / n of the gradient."""
    if "max" in site.function:
        return 1.0
    if "avg" in site.function or site.function == "mean":
        return math.prod(site.shape) / math.prod(before)
    return None
