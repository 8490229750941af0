from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from gradmend.setup import Budget, Setup
from gradmend.training import Trial, run_trial
from gradmend.training.evaluation import evaluate, fit
from gradmend.zoo import mlp
from toys import assert_same, network, on_cpu, setup, state, toy

# Trials


def test_a_trial_touches_nothing() -> None:
    model = network(nn.Dropout(0.2))
    given = Setup(model, nn.CrossEntropyLoss(), Adam(model.parameters()))
    on_cpu(given, toy(), steps=3)
    model.eval()
    weights, random = state(model), torch.get_rng_state()
    memory = [entry["exp_avg"].clone() for entry in given.optimizer.state.values()]
    gradients = [p.grad.clone() for p in model.parameters()]
    run_trial(given, [toy().head(32)], Budget(steps=10))
    assert_same(state(model), weights)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in model.modules())
    after = [entry["exp_avg"] for entry in given.optimizer.state.values()]
    assert all(map(torch.equal, memory, after))
    assert all(map(torch.equal, gradients, [p.grad for p in model.parameters()]))


def test_trials_are_comparable_and_learn() -> None:
    batches = list(toy().batches(32, epochs=1, generator=torch.Generator().manual_seed(0)))
    first, again, other = (
        run_trial(setup(), batches, Budget(steps=60), label="as it is", seed=seed) for seed in (0, 0, 1)
    )
    assert first.losses == again.losses
    assert first.losses != other.losses
    assert (first.label, len(first.losses), first.diverged) == ("as it is", 60, False)
    assert first.final_loss < first.initial_loss == first.losses[0]
    assert first.accuracy > 0.5


def test_a_trial_ends_by_time_or_divergence() -> None:
    batches = [toy().head(32)]
    assert len(run_trial(setup(), batches, Budget(steps=1000, seconds=1e-9)).losses) == 1
    exploding = Setup(network(), nn.CrossEntropyLoss(), partial(SGD, lr=1e30))
    trial = run_trial(exploding, batches, Budget(steps=1000))
    assert trial.diverged
    assert trial.final_loss == math.inf
    assert len(trial.losses) <= 50


def test_the_final_loss_is_the_median_of_the_last_quarter() -> None:
    trial = Trial("", (9.0, 8.0, 7.0, 6.0, 5.0, 1.0, 3.0, 2.0), None, 1.0, diverged=False)
    assert (trial.initial_loss, trial.final_loss) == (9.0, 2.5)


def test_a_trial_accumulates() -> None:
    given = Setup(mlp(8, 3, depth=1), nn.CrossEntropyLoss(), partial(SGD, lr=0.1), accumulate=4)
    assert len(run_trial(given, [toy().head(8)], Budget(steps=5)).losses) == 5


def test_a_trial_keeps_frozen_parts_in_eval_mode() -> None:
    """The trial of a frozen normalization uses its running statistics: here they make the loss exact."""
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
    given = Setup(model, nn.CrossEntropyLoss(), partial(SGD, lr=0.0))
    batch = toy().head(32)
    x, y = batch
    losses = {}
    for frozen in (True, False):
        model.train()
        model[0].train(not frozen)
        losses[frozen] = run_trial(given, [(10 * x, y)], Budget(steps=1)).initial_loss
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model.eval()(10 * x), y).item()
    assert losses[True] == pytest.approx(expected, rel=1e-5)
    assert losses[False] != pytest.approx(expected, rel=1e-2)


# How well samples fit


def test_rows_that_come_one_by_one_get_the_targets_of_others() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 1)
    right = Setup(nn.Identity(), nn.MSELoss())
    assert fit(right, [(x, x)]) == fit(right, list(zip(x.split(1), x.split(1), strict=True))) == 1
    no_use = Setup(nn.Identity(), nn.MSELoss())
    assert abs(fit(no_use, list(zip(x.split(1), x.flip(0).split(1), strict=True)))) < 0.5
    assert fit(right, [(x[:1], x[:1])]) is None


def test_of_sequences_that_the_model_flattens_every_place_counts_once() -> None:
    x, y = torch.eye(5).expand(3, 5, 5), torch.arange(5).expand(3, 5)
    flat = Setup(nn.Flatten(0, 1), nn.CrossEntropyLoss())
    assert evaluate(flat, [(x, y.flatten())])[1] == 1
    assert evaluate(flat, [(x, y.flip(1).flatten())])[1] == pytest.approx(0.2)


def test_of_amounts_none_is_right() -> None:
    amounts, yes = torch.tensor([[0.3], [-2.0]]), torch.tensor([[0.0], [1.0]])
    setup = Setup(nn.Identity(), nn.BCEWithLogitsLoss())
    assert evaluate(setup, [(amounts, amounts)])[1] is None
    assert evaluate(setup, [(2 * yes - 1, yes)])[1] == 1
