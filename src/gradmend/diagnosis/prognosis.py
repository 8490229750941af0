"""Prognosis: how probable it is that a setup trains as it stands, and what speaks for and against.

A setup *trains* if within 200 steps it closes at least half of the gap between the best constant answer and a
plain, well-set network of the same data; counted is the share of right answers, or of the variance explained,
on the training rows. The probability is that of the random networks of `benchmarks/prognosis`: of all kinds,
sound ones and broken ones, on small data sets, of which about a quarter trains.

"Best" and "gain" are of the samples after six steps and, if better, further on, as if the last three steps
were repeated. Own targets fit better than others' if exchanging targets between samples raises the loss.
Outputs follow the targets as far as their cosine with them goes, each less its mean.

It is the sum of what the features contribute, each by a curve that never falls, as log-odds (an additive
logistic model). The curves are data: `prognosis.json`, fitted and calibrated there.

Source: Hastie, Tibshirani, Generalized additive models, 1986, https://doi.org/10.1214/ss/1177013604; Ramsay,
Monotone regression splines in action, 1988, https://doi.org/10.1214/ss/1177012761 (here piecewise linear);
Platt, Probabilistic outputs for support vector machines, 1999, of the calibration.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.text import Text

from gradmend.console import PlainTable, Printable, number, plain_data
from gradmend.profile import Profile
from gradmend.readout import lower
from gradmend.response import Outlook
from gradmend.terminal import GREEN, RED

STEPS: Final = 200
"""Within so many steps."""


@dataclass(frozen=True)
class Reason:
    """What one feature says.

    Args:
        name: of the feature, in words.
        value: what was measured: the larger, the better; NaN where it could not be.
        log_odds: how much it speaks for (above zero) or against, compared with an average setup.
    """

    name: str
    value: float
    log_odds: float


@dataclass(frozen=True)
class Prognosis(Printable):
    """The probability that a setup trains, and why.

    Args:
        base: the log-odds of an average setup.
        reasons: what each feature adds to them, the weightiest first.
    """

    base: float
    reasons: tuple[Reason, ...]

    @property
    def log_odds(self) -> float:
        """The logarithm of the probability that it trains over the one that it does not."""
        return self.base + math.fsum(reason.log_odds for reason in self.reasons)

    @property
    def probability(self) -> float:
        """That it trains within 200 steps."""
        return 1 / (1 + math.exp(-self.log_odds))

    @property
    def sentence(self) -> str:
        """The probability in words."""
        return f"It trains within {STEPS} steps with a probability of {self.probability:.0%}."

    @property
    def speaks_for(self) -> tuple[Reason, ...]:
        """The reasons to expect that it trains, the weightiest first."""
        return tuple(reason for reason in self.reasons if reason.log_odds > 0)

    @property
    def speaks_against(self) -> tuple[Reason, ...]:
        """The reasons to expect that it does not, the weightiest first."""
        return tuple(reason for reason in self.reasons if reason.log_odds < 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: numbers, strings, lists; NaN becomes None."""
        return {"probability": self.probability, "log_odds": self.log_odds, **plain_data(self)}

    def __rich__(self) -> RenderableType:
        table = PlainTable()
        for heading in ("log-odds", "measured"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("of what")
        for reason in self.reasons:
            style = GREEN if reason.log_odds > 0 else RED
            table.add_row(Text(f"{reason.log_odds:+.2f}", style), number(reason.value, 2), reason.name)
        return Group(
            Text(self.sentence, "bold"), table, Text(f"{self.base:+.2f} for an average setup", "dim")
        )


def prognose(profile: Profile, outlook: Outlook) -> Prognosis:
    """How probable it is that a setup trains, from one measured step and the first few tried on a copy.

    Args:
        profile: of a setup with an optimizer.
        outlook: of the same setup, by `response.look_ahead`.

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from torch import nn
        >>> from gradmend.probe import measure
        >>> from gradmend.response import look_ahead
        >>> from gradmend.setup import Setup
        >>> batches = [(x, x.argmax(1)) for x in torch.randn(4, 64, 3)]
        >>> adam = partial(torch.optim.Adam, lr=1e-2)
        >>> sound = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> setup = Setup(sound, nn.CrossEntropyLoss(), adam)
        >>> prognose(measure(setup, batches[0]), look_ahead(setup, batches)).probability > 0.8
        True
    """
    model = _model()
    reasons = [
        Reason(name, value, model.curves[name](value))
        for name, value in features(profile, outlook).items()
        if name in model.curves
    ]
    return Prognosis(model.base, tuple(sorted(reasons, key=lambda reason: -abs(reason.log_odds))))


def features(profile: Profile, outlook: Outlook) -> dict[str, float]:
    """All features by their names; the larger one is, the better. NaN where it cannot be measured."""
    ahead = {name: read(outlook) for name, read in _OF_OUTLOOK.items()}
    return {**ahead, **{name: read(profile) for name, read in _OF_PROFILE.items()}}


@dataclass(frozen=True)
class Curve:
    """What a feature contributes: straight lines between knots, level outside, nothing where it is NaN."""

    knots: tuple[float, ...]
    log_odds: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """The contribution to the log-odds.

        >>> [Curve((0.0, 1.0), (-1.0, 1.0))(x) for x in (-5.0, 0.5, 2.0, math.nan)]
        [-1.0, 0.0, 1.0, 0.0]
        """
        if math.isnan(value):
            return 0.0
        if not self.knots[0] < value < self.knots[-1]:
            return self.log_odds[0 if value <= self.knots[0] else -1]
        k = bisect_right(self.knots, value)
        share = (value - self.knots[k - 1]) / (self.knots[k] - self.knots[k - 1])
        return self.log_odds[k - 1] + share * (self.log_odds[k] - self.log_odds[k - 1])


@dataclass(frozen=True)
class _Model:
    base: float
    curves: Mapping[str, Curve]


@lru_cache(maxsize=1)
def _model() -> _Model:
    data = json.loads(files(__package__).joinpath("prognosis.json").read_text())
    curves = {
        name: Curve(tuple(curve["knots"]), tuple(curve["log_odds"])) for name, curve in data["curves"].items()
    }
    return _Model(data["base"], curves)


def _best_told_apart(outlook: Outlook) -> float:
    return max(outlook.after.told_apart, outlook.ahead.told_apart)


def _gain_told_apart(outlook: Outlook) -> float:
    return _best_told_apart(outlook) - outlook.before.told_apart


def _best_alignment(outlook: Outlook) -> float:
    return max(outlook.after.alignment, outlook.ahead.alignment)


def _gain_alignment(outlook: Outlook) -> float:
    return _best_alignment(outlook) - outlook.before.alignment


def _gain_on_the_way(outlook: Outlook) -> float:
    return outlook.second.told_apart - outlook.first.told_apart


def _told_apart_everywhere(outlook: Outlook) -> float:
    return outlook.everywhere.told_apart


def _alignment_everywhere(outlook: Outlook) -> float:
    return outlook.everywhere.alignment


def _more_than_new(outlook: Outlook) -> float:
    return outlook.everywhere.alignment - outlook.after.alignment


def _fall(outlook: Outlook) -> float:
    return lower(outlook.everywhere.own, outlook.first.own)


def _readable(outlook: Outlook) -> float:
    return outlook.readable


def _moved(outlook: Outlook) -> float:
    return _log10(outlook.moved)


def _moderation_of_moves(outlook: Outlook) -> float:
    return -_log10(outlook.moved)


def _rate(outlook: Outlook) -> float:
    return math.nan if math.isnan(outlook.rate) else _log10(outlook.rate)


def _first_update(profile: Profile) -> float:
    return next(iter(_updates(profile)), math.nan)


def _smallest_update(profile: Profile) -> float:
    return min(_updates(profile), default=math.nan)


def _moderation_of_updates(profile: Profile) -> float:
    return -max(_updates(profile), default=math.nan)


def _updates(profile: Profile) -> list[float]:
    """Decimal logarithms of the next update over the present size, of weights, in their order."""
    weights = (p for p in profile.parameters if len(p.shape) > 1)
    return [_log10(ratio) for p in weights if (ratio := p.update_ratio) is not None]


def _steepness(profile: Profile) -> float:
    return 1 - max((reading.saturation or 0.0 for reading in profile.sites), default=0.0)


def _alive(profile: Profile) -> float:
    return 1 - max((reading.dead for reading in profile.sites), default=0.0)


def _samples_apart(profile: Profile) -> float:
    """Decimal logarithm of 1 - cosine where samples are most alike; float32 can tell no less than 1e-12."""
    return min(
        (_log10(max(1 - r.cosine, 1e-12)) for r in profile.weighted()[:-1] if math.isfinite(r.cosine)),
        default=math.nan,
    )


def _evenness(profile: Profile) -> float:
    """Minus the decades between the gradients at the first and the last weights."""
    norms = [norm for r in profile.weighted() if (norm := r.gradient_norm) is not None]
    if len(norms) < 2 or not norms[-1]:
        return math.nan
    return -abs(_log10(norms[0] / norms[-1]))


def _moderation_of_signals(profile: Profile) -> float:
    """Minus the decimal logarithm of the largest rms of any signal."""
    return -max((_log10(reading.rms) for reading in profile.sites), default=math.nan)


def _moderation_of_input(profile: Profile) -> float:
    return math.nan if profile.inputs is None else -max(0.0, _log10(profile.inputs.rms))


def _log10(value: float) -> float:
    """Within float32's range, where infinite or no number as its largest."""
    return math.log10(max(value, 1e-38)) if value < 1e38 else 38.0


_OF_OUTLOOK: Final[Mapping[str, Callable[[Outlook], float]]] = {
    "new samples: own targets fit better than others' (best)": _best_told_apart,
    "new samples: own targets fit better than others' (gain)": _gain_told_apart,
    "new samples: outputs follow the targets (best)": _best_alignment,
    "new samples: outputs follow the targets (gain)": _gain_alignment,
    "trained samples: own targets fit better (gain in 3 steps)": _gain_on_the_way,
    "all samples: own targets fit better (after 6 steps)": _told_apart_everywhere,
    "all samples: outputs follow the targets (after 6 steps)": _alignment_everywhere,
    "trained samples are fitted more than new ones": _more_than_new,
    "the loss falls (by 6 steps)": _fall,
    "targets can be read from the last layer's input (linearly)": _readable,
    "6 steps change the weights enough (log10)": _moved,
    "6 steps do not change the weights too much (-log10)": _moderation_of_moves,
    "learning rate is high enough (log10)": _rate,
}
_OF_PROFILE: Final[Mapping[str, Callable[[Profile], float]]] = {
    "first layer's step is long enough (log10)": _first_update,
    "every layer's step is long enough (log10)": _smallest_update,
    "no layer's step is too long (-log10)": _moderation_of_updates,
    "activations respond (share of inputs where not flat)": _steepness,
    "units are alive (share)": _alive,
    "samples look different inside the network (log10)": _samples_apart,
    "gradient is as large at the first layer as at the last": _evenness,
    "signals are not too large (-log10)": _moderation_of_signals,
    "inputs are not too large (-log10)": _moderation_of_input,
}

FEATURES: Final[tuple[str, ...]] = (*_OF_OUTLOOK, *_OF_PROFILE)
"""The names of all features; the model uses those that proved to be of use."""
