"""Rules on regularization: whether weight decay and dropout leave room for learning."""

from __future__ import annotations

import math
from statistics import fmean

from gradmend.causes import Cause
from gradmend.diagnosis.finding import Finding, Severity
from gradmend.profile import Profile

_PULLED, _HELD = 0.7, 0.4
"""cos(-update, weights): the decay is as large as the gradient, or half of it, were the two orthogonal.

Two and three ReLU layers on digits, SGD and Adam, 300 steps: penalties with a cosine up to 0.5 cost at most
2 % accuracy, with 0.7 about 5 %, above 0.75 a third to all of it.
"""

_FEW, _SLOW = 100, 1e-4
"""Of fewer weights the cosine is high by chance; a pull that takes 10,000 steps does no harm."""

_DROWNED, _SWOLLEN = 4000.0, 1.5
"""Rows that average the noise of dropout in the gradient; how often the loss without dropout it swells to.

ReLU layers on digits, Adam, 300 steps: where the loss swells by half, accuracy is 0.1 to 0.65 instead of 1.
"""


def too_much_weight_decay(profile: Profile) -> Finding | None:
    """The next update of all weights together points back at zero, in a network that has not learnt yet.

    Silent where halving all weights would double the loss: then the data holds them against the pull. The
    gradient of data is of low rank and nearly orthogonal to random weights; that of a penalty, in the
    optimizer or in the loss, is the weights themselves (L2) or their signs (L1, cosine 0.8).
    """
    regime = profile.regime
    if regime is None or regime.learnt or regime.weights < _FEW or regime.shrinking < _HELD:
        return None
    before, halved = regime.tried.get("half the weights", (0.0, 0.0))
    if halved > 2 * before:
        return None
    weights = [p for p in profile.parameters if len(p.shape) > 1 and p.update is not None]
    step = math.sqrt(sum((p.update or 0.0) ** 2 * math.prod(p.shape) for p in weights))
    size = math.sqrt(sum(p.rms**2 * math.prod(p.shape) for p in weights))
    if not size or step / size < _SLOW:
        return None
    text = (
        f"The next step is {regime.shrinking:.0%} in line with shrinking all weights, and takes away "
        f"{regime.shrinking * step / size:.2g} of them."
    )
    severity = Severity.ERROR if regime.shrinking >= _PULLED else Severity.WARNING
    return Finding(
        Cause.TOO_MUCH_WEIGHT_DECAY, severity, text, regime.shrinking, 0.0, "cosine of update and -weights"
    )


def too_much_dropout(profile: Profile) -> Finding | None:
    """Steps with dropout end above where those without it begin, by half, or its noise fills the gradient.

    Without it three steps have to lower the loss by a tenth: then it is dropout that stands in the way. The
    loss with dropout is higher at first anyway, and a noisy gradient alone only asks for patience.

    Behind the last weights it is one in any case: it then strikes out what the network answers.
    """
    if found := _on_the_output(profile):
        return found
    regime = profile.regime
    if regime is None or regime.dropout_scale is None:
        return None
    noisy, calm = regime.tried.get("dropout"), regime.tried.get("no dropout")
    if not noisy or not calm or not calm[-1] <= 0.9 * calm[0]:
        return None
    end, least = fmean(noisy[-3:]), calm[0] * (1.0 if regime.dropout_scale >= _DROWNED else _SWOLLEN)
    if not end >= least:
        return None
    sites = [s for s in profile.anatomy.sites if s.kind == "dropout" and s.settings.get("p")]
    text = (
        f"{len(noisy) - 1} steps take the loss of one batch from {noisy[0]:.3g} to {end:.3g}, without "
        f"dropout {len(calm) - 1} take it from {calm[0]:.3g} to {calm[-1]:.3g}."
    )
    return Finding(
        Cause.TOO_MUCH_DROPOUT,
        Severity.ERROR,
        text,
        regime.dropout_scale,
        float(profile.samples),
        "rows to average the noise of dropout",
        sites=tuple(site.name for site in sites),
        where=tuple(dict.fromkeys(site.line for site in sites if site.line)),
    )


def _on_the_output(profile: Profile) -> Finding | None:
    last = max((site.index for site in profile.anatomy.weighted()), default=math.inf)
    after = [
        s for s in profile.anatomy.sites if s.index > last and s.kind == "dropout" and s.settings.get("p")
    ]
    if not after or profile.contract is None or profile.contract.loss is None:
        return None
    share = float(after[0].settings["p"])
    text = f"Dropout behind the last weights strikes out {share:.0%} of the answers. Leave it out."
    return Finding(
        Cause.TOO_MUCH_DROPOUT,
        Severity.ERROR,
        text,
        share,
        0.0,
        "share of the outputs that are struck out",
        sites=tuple(site.name for site in after),
        where=tuple(dict.fromkeys(site.line for site in after if site.line)),
    )


RULES = (too_much_weight_decay, too_much_dropout)
