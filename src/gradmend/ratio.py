"""Ratio: how much smaller the gradient is at the first layer than at the last, measured and predicted."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from gradmend.errors import SetupError
from gradmend.expected import expect
from gradmend.harmless import undisturbed, untouched
from gradmend.jacobian import block_factors
from gradmend.probe import measure
from gradmend.profile import Profile
from gradmend.readings import Expected, Reading
from gradmend.recorder import Call, Recorder
from gradmend.setup import Batch, Setup
from gradmend.theory import Layer, finite_width_deviation, gradient_deviation


@dataclass(frozen=True)
class GradientRatio:
    """log10(|d_1| / |d_L|), d_l the gradient with respect to all that the layer l puts out.

    Args:
        first: name of the first layer with weights.
        last: name of the last one.
        measured: -inf if nothing is left of the gradient.
        predicted: from the measured weights, and from the length that each sample has before each activation;
            None if neither theory nor the blocks themselves tell.
        from_input: predicted from the measured weights and input alone; None if theory does not tell.
        deviation: how far one network of this width strays from `predicted`, by theory.
        reason: why nothing is predicted, if so.
    """

    first: str
    last: str
    measured: float
    predicted: float | None
    from_input: float | None
    deviation: float
    reason: str | None


def gradient_ratio(setup: Setup, batch: Batch) -> GradientRatio:
    """Measure one step, and put beside the ratio of its gradients what mean-field theory predicts.

    Where the length map repels, as for GELU with He weights, the length that a sample has far behind the
    input is chance: from the input alone nobody can tell it, so `predicted` takes it as measured.
    Blocks without a formula are let through by what they do to random gradients. Below 1e-38 a gradient is
    lost in float32: there only models in float64 can be measured.

    Raises:
        SetupError: if gradients reach fewer than two layers with weights.
        BatchError: if model, batch and loss do not fit, or no gradient reaches any parameter.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from gradmend.zoo import mlp
        >>> model = mlp(64, 2, width=256, depth=20, activation="relu", init="xavier")
        >>> batch = torch.randn(32, 64), torch.arange(32) % 2
        >>> ratio = gradient_ratio(Setup(model, nn.CrossEntropyLoss()), batch)
        >>> abs(ratio.measured - ratio.predicted) < 4 * ratio.deviation
        True

    Source: Schoenholz et al., Deep information propagation, 2017, https://arxiv.org/abs/1611.01232; for the
    deviation Hanin, Nica, Products of many large random matrices and gradients in deep neural networks, 2018,
    https://arxiv.org/abs/1812.05994
    """
    profile = measure(setup, batch)
    layers = [reading for reading in profile.weighted() if reading.gradient is not None]
    if len(layers) < 2:
        raise SetupError(f"A ratio needs two layers with weights that gradients reach, not {len(layers)}.")
    first, last = layers[0], layers[-1]
    expected, reason = _expected(setup, batch, profile)
    return GradientRatio(
        first=first.site.name,
        last=last.site.name,
        measured=_decades(first.gradient_norm or 0.0, last.gradient_norm or 0.0),
        predicted=_between(first, last, expected),
        from_input=_between(first, last, profile.expected),
        deviation=_deviation(profile, layers[:-1]),
        reason=reason,
    )


def sample_lengths(
    setup: Setup, batch: Batch, sites: Collection[int]
) -> dict[int, Float64[np.ndarray, " samples"]]:
    """The mean square of what an activation reads, of each sample.

    At a length that repels, samples part by chance. The gradient of the batch is then that of the few whose
    lengths last, and no mean over samples tells what becomes of it.

    Args:
        setup: what trains. It is left exactly as it was.
        batch: one batch.
        sites: indices of activations that read [samples, units], in the anatomy of the model.

    Returns:
        By the index of the site.

    Raises:
        BatchError: if model, batch and loss do not fit.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> setup = Setup(nn.Sequential(nn.Tanh(), nn.Linear(2, 2)), nn.MSELoss())
        >>> sample_lengths(setup, (torch.tensor([[3.0, 1.0]]), torch.ones(1, 2)), sites=[0])[0].tolist()
        [5.0]
    """
    found: dict[int, Tensor] = {}

    def note(call: Call) -> None:
        if (index := len(recorder.sites)) in sites:
            found[index] = call.signal.detach().double().square().mean(1)

    recorder = Recorder(setup.model, before=note)
    batch = untouched(batch)
    with undisturbed(setup.model), recorder.watching(batch):
        setup.loss(batch)
    return {index: length.cpu().numpy() for index, length in found.items()}


def _expected(setup: Setup, batch: Batch, profile: Profile) -> tuple[dict[int, Expected], str | None]:
    sites = range(len(profile.anatomy.sites))
    factors = block_factors(setup, batch, sites) if profile.unpredictable else None
    active = {r.site.index for r in profile.sites if r.site.activation and len(r.site.shape) == 2}
    lengths = sample_lengths(setup, batch, active)
    return expect(profile.anatomy, profile.sites, profile.inputs, profile.parameters, factors, lengths)


def _between(first: Reading, last: Reading, expected: Mapping[int, Expected]) -> float | None:
    ends = [expected[r.site.index].gradient_norm for r in (first, last) if r.site.index in expected]
    return _decades(*ends) if len(ends) == 2 else None


def _decades(a: float, b: float) -> float:
    """log10(a / b), NaN if both are 0."""
    logs = [math.log10(x) if x > 0 else -math.inf for x in (a, b)]
    return logs[0] - logs[1]


def _deviation(profile: Profile, layers: Sequence[Reading]) -> float:
    """Of log10 |d|, half of that of log10 |d|^2, with the lengths as measured."""
    known, others = [], []
    rms = {reading.site.index: reading.rms for reading in profile.sites}
    for reading in layers:
        after = profile.anatomy.activation_after(reading.site)
        if after and after.activation:
            q = rms.get(after.direct[0] if after.direct else reading.site.index, reading.rms) ** 2
            known.append(Layer(after.activation, q, reading.site.units))
        else:
            others.append(finite_width_deviation(1, reading.site.units))
    return math.hypot(gradient_deviation(known, measured=True), *others) / math.log(100)
