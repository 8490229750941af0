"""Whether the inputs say anything about the targets, by two guessers that need no training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradmend.readings import LearnableReading

_FEWEST, _MOST, _VALUES = 96, 256, 512
"""Samples that are needed, and that are looked at; values of each."""

_PERMUTATIONS = 20

_PENALTY = 1.0
"""Of the ridge regression on standardized columns: the mean square of a sample."""


def read_learnable(x: Tensor, y: Tensor, classes: bool) -> LearnableReading | None:
    """Guess each sample's target from the others, and compare with permuted targets.

    The guessers are the nearest neighbour and a ridge regression with the sample left out, both in closed
    form; the score is the correlation with the target, or with the indicators of the classes.

    Args:
        x: inputs, [B, ...]; columns are standardized.
        y: class numbers or amounts, [B].
        classes: whether targets are classes.

    Returns:
        None where samples are too few or all alike.

    Examples:
        >>> x = torch.rand(128, 4)
        >>> found = read_learnable(x, x[:, 0], classes=False)
        >>> found.score > found.chance + 5 * found.spread
        True
    """
    x = _standardized(x[:_MOST].flatten(1))
    y = y[: len(x)]
    if len(x) < _FEWEST or not x.shape[1] or bool((y == y[0]).all()):
        return None
    apart = torch.cdist(x, x)
    distances, nearest = apart.masked_fill(torch.eye(len(x), dtype=torch.bool), math.inf).min(1)
    clustered = float(distances.median() / apart.median().clamp_min(1e-30))
    wanted = _indicators(y) if classes else _standardized(y[:, None])
    draw = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(x), generator=draw) for _ in range(_PERMUTATIONS)]
    targets = torch.stack([wanted, *(wanted[order] for order in orders)])
    guesses = (targets[:, nearest], _left_out(x, targets))
    scores = torch.stack([_scores(guess, targets) for guess in guesses])
    chance, spread = scores[:, 1:].mean(1), scores[:, 1:].std(1).clamp_min(1e-9)
    best = int(((scores[:, 0] - chance) / spread).argmax())
    score, mean, deviation = (float(values[best]) for values in (scores[:, 0], chance, spread))
    return LearnableReading(score, mean, deviation, clustered, samples=len(x))


def _standardized(x: Tensor) -> Tensor:
    x = x[:, :: max(1, -(-x.shape[1] // _VALUES))].double()
    x = x - x.mean(0)
    deviations = x.std(0)
    return (x[:, deviations > 0] / deviations[deviations > 0]).float()


def _left_out(x: Tensor, targets: Tensor) -> Tensor:
    """What a ridge regression says of each sample that has not seen it, by its hat matrix."""
    gram = x @ x.T / x.shape[1]
    hat = torch.linalg.solve(gram + _PENALTY * torch.eye(len(x), dtype=x.dtype), gram)
    own = hat.diagonal()[:, None]
    left: Tensor = (hat @ targets - own * targets) / (1 - own).clamp_min(1e-6)
    return left


def _indicators(y: Tensor) -> Tensor:
    kinds: Tensor = torch.unique(y)
    found = (y[:, None] == kinds[None]).float()
    return found - found.mean(0)


def _scores(guesses: Tensor, targets: Tensor) -> Tensor:
    """The correlation of each set of guesses with its targets, which are centred."""
    apart = guesses - guesses.mean(1, keepdim=True)
    return torch.nn.functional.cosine_similarity(apart.flatten(1), targets.flatten(1)).double()
