"""Start: what can be seen of a trial before its first step."""

from __future__ import annotations

from functools import partial
from statistics import median

import torch
from torch import Tensor

from gradmend.anatomy import Site
from gradmend.diagnosis import look
from gradmend.recorder import Call
from gradmend.setup import Batch, Setup
from gradmend.spread import passed
from gradmend.training.loop import Stepper, seeded, step_times
from gradmend.zoo import Recipe

_STEPS, _WARM = 6, 2
"""Steps that are timed, but for the first ones, which also make the optimizer's state."""


def first_batch(recipe: Recipe, seed: int) -> Batch:
    """A batch of the training rows, drawn by the seed of the trial."""
    return next(recipe.data.batches(recipe.batch_size, generator=torch.Generator().manual_seed(seed)))


def findings(setup: Setup, batch: Batch) -> tuple[str, ...]:
    """The names of the causes that the rules find, without steps on a copy."""
    return tuple(dict.fromkeys(finding.cause.name for finding in look(setup, batch).findings))


def first_over_last(setup: Setup, batch: Batch) -> float | None:
    """The norm of the gradient at the output of the first layer with weights, over that of the last one.

    As `gradmend.ratio` has it, but by one plain step, as each trial takes it. The setup stays as it is.

    Returns:
        None if gradients reach fewer than two such layers, or none is left of them at the last.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> _ = nn.init.eye_(model[0].weight), nn.init.constant_(model[1].weight, 0.5)
        >>> first_over_last(Setup(model, nn.MSELoss()), (torch.ones(1, 2), torch.zeros(1, 2)))
        1.0
    """
    norms: dict[int, Tensor] = {}

    def watch(_: Call, site: Site, output: Tensor) -> None:
        if site.weighted and output.requires_grad:
            note = partial(_note, norms, site.index)
            output.register_hook(note)  # type: ignore[no-untyped-call]

    passed(setup, batch, watch)
    places = sorted(norms)
    last = norms[places[-1]].item() if len(places) > 1 else 0.0
    return norms[places[0]].item() / last if last else None


def step_seconds(setup: Setup, batch: Batch) -> float:
    """Of one optimizer step of a copy, as somebody pays for it who trains this network alone."""
    step = Stepper(setup.copy())
    with seeded(0, torch.device("cpu")):
        return median(step_times(step, [batch] * setup.accumulate, _STEPS)[_WARM:])


def _note(norms: dict[int, Tensor], place: int, gradient: Tensor) -> None:
    norms[place] = gradient.double().norm()
