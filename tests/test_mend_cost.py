"""Mending is cheap, changes no more than is needed, and leaves alone what trains."""

import pytest
import torch
from benchmarks.repair import GOOD, repairs
from torch import nn

from gradmend import mend
from gradmend.data import load
from gradmend.remedies import DropSquashing, SwapActivation
from gradmend.setup import Budget, Setup
from gradmend.training import Run, run_trial
from healthy import CASES
from healthy_data import Case
from helpers import SGD, blobs, plain

CE = nn.CrossEntropyLoss()
SLOW = {"gan_discriminator", "mobilenet_v3", "resnet18", "unet_dice"}
SAMPLE = [case for case in CASES[::7] if case.name not in SLOW]


def noisy() -> Setup:
    return Setup(nn.Sequential(plain(2, nn.ReLU), nn.Dropout(0.2)), CE, SGD)


def rows() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = blobs(256)
    return list(zip(x.split(64), y.split(64), strict=True))


def test_a_run_that_pauses_is_one_that_does_not() -> None:
    setup, given = noisy(), rows()
    run = Run(setup, given, seed=3)
    for steps in (1, 4, 4, 20):
        run.train(steps)
        torch.rand(5)  # others draw meanwhile
        assert len(run.trial("").losses) == steps
    assert run.trial("").losses == run_trial(setup, given, Budget(steps=20), seed=3).losses


def test_a_run_leaves_the_setup_and_the_random_numbers_of_others() -> None:
    setup = noisy()
    weights = [p.detach().clone() for p in setup.model.parameters()]
    drawn = torch.get_rng_state()
    Run(setup, rows(), seed=3).train(5)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(map(torch.equal, weights, setup.model.parameters()))


def test_a_run_ends_where_the_loss_is_no_number() -> None:
    run = Run(Setup(plain(2, nn.ReLU), CE, lambda p: torch.optim.SGD(p, lr=1e30)), rows(), seed=0)
    run.train(200)
    trial = run.trial("", judge=lambda _: 1.0)
    assert trial.diverged
    assert trial.fit is None
    assert len(trial.losses) < 50


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_what_trains_is_left_alone(case: Case) -> None:
    setup, given = case.build()
    made = mend(setup, given, Budget(steps=60))
    assert made.setup is setup
    assert made.changes == ()


@pytest.mark.parametrize(("seed", "faults"), [(4, 2), (9, 3)])
def test_a_broken_network_is_mended_by_what_is_needed_in_the_steps_planned(seed: int, faults: int) -> None:
    """Input and rate of the one are too small; of the other input and weights are too large, too."""
    repair = next(repairs([seed]))
    assert repair.broken
    assert repair.after > GOOD
    assert 0 < len(repair.changes) <= faults
    assert repair.needless == ()


def test_of_what_trains_nearly_always_only_what_it_needs_is_kept() -> None:
    """Raw scores alone are healthy, and get less far in the planned steps than with ReLUs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 10), nn.Softmax(dim=1))
    given = list(load("digits").batches(64, epochs=1, generator=torch.Generator().manual_seed(0)))
    made = mend(Setup(model, CE, torch.optim.Adam), given, steps=600)
    assert [type(change.remedy) for change in made.changes] == [DropSquashing, SwapActivation]
