"""Rules on optimizer, regularization, batch, capacity and speed: they fire where they must, not beside it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradmend as gm
from gradmend.causes import Cause
from gradmend.diagnosis import Finding, Severity, batch, capacity, regularization, speed, stepping
from gradmend.inquiry import capacity as read_capacity
from gradmend.inquiry import inquire
from gradmend.probe import measure
from gradmend.profile import Profile
from gradmend.response import respond

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
SGD, ADAM = torch.optim.SGD, torch.optim.Adam
RULES = (*batch.RULES, *regularization.RULES, *capacity.RULES, *stepping.RULES, *speed.RULES)
SEEDS = range(3)

_DIGITS = load_digits()
X = torch.tensor(_DIGITS.data, dtype=torch.float32)
X, Y = (X - X.mean(0)) / (X.std(0) + 0.1), torch.tensor(_DIGITS.target)


def profile(setup: gm.Setup, data: Any, steps: int | None = None) -> Profile:
    measured = measure(setup, data)
    answered = replace(measured, response=respond(setup, data), planned=steps)
    return replace(answered, regime=inquire(setup, data, answered))


def findings(setup: gm.Setup, data: Any, steps: int | None = None) -> dict[Cause, Finding]:
    seen = profile(setup, data, steps)
    return {found.cause: found for rule in RULES if (found := rule(seen))}


def mlp(depth: int = 2, width: int = 64, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in in [64] + [width] * (depth - 1):
        layers += [nn.Linear(fan_in, width), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
        nn.init.kaiming_normal_(layers[-2 if not dropout else -3].weight)
    return nn.Sequential(*layers, nn.Linear(width, 10))


def digits(rows: int = 64) -> tuple[Tensor, Tensor]:
    return X[:rows], Y[:rows]


# ---- what is usual stays silent ---------------------------------------------------------------------------

USUAL = {
    "SGD": partial(SGD, lr=0.1),
    "momentum and decay": partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "Adam": partial(ADAM, lr=1e-3),
    "Adam with decay": partial(ADAM, lr=1e-3, weight_decay=1e-4),
    "AdamW": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
    "RMSprop": partial(torch.optim.RMSprop, lr=1e-3),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "Adadelta": torch.optim.Adadelta,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", USUAL)
def test_usual_settings(name: str, seed: int) -> None:
    setup = gm.Setup(mlp(seed=seed, dropout=0.3), CE, USUAL[name])
    assert not findings(setup, digits(), steps=1000)


@pytest.mark.parametrize("name", USUAL)
def test_usual_settings_in_a_network_that_has_learnt(name: str) -> None:
    model, data = mlp(), digits()
    optimizer = ADAM(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        CE(model(data[0]), data[1]).backward()
        optimizer.step()
    errors = findings(gm.Setup(model, CE, USUAL[name]), data, steps=20).values()
    assert not [found for found in errors if found.severity is Severity.ERROR]


# ---- weight decay -----------------------------------------------------------------------------------------


def penalized(strength: float, power: int) -> Any:
    def step(model: nn.Module, data: Any) -> Tensor:
        weights = [p for p in model.parameters() if p.dim() > 1]
        return CE(model(data[0]), data[1]) + strength * sum(p.abs().pow(power).sum() for p in weights)

    return step


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("optimizer", [partial(SGD, lr=0.1), partial(ADAM, lr=1e-3)])
@pytest.mark.parametrize(("power", "strong", "weak"), [(2, 0.2, 1e-3), (1, 0.05, 1e-5)])
def test_a_penalty_in_the_loss(optimizer: Any, power: int, strong: float, weak: float, seed: int) -> None:
    for strength, much in ((strong, True), (weak, False)):
        setup = gm.Setup(mlp(seed=seed), step=penalized(strength, power), optimizer=optimizer)
        found = findings(setup, digits()).get(Cause.TOO_MUCH_WEIGHT_DECAY)
        assert (found is not None and found.severity is Severity.ERROR) == much


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("optimizer", "strong", "weak"),
    [(partial(SGD, lr=0.1), 0.5, 1e-3), (partial(torch.optim.AdamW, lr=1e-3), 30.0, 1.0)],
)
def test_decay_in_the_optimizer(optimizer: Any, strong: float, weak: float, seed: int) -> None:
    for decay, much in ((strong, True), (weak, False)):
        setup = gm.Setup(mlp(seed=seed), CE, partial(optimizer, weight_decay=decay))
        found = findings(setup, digits())
        assert (Cause.TOO_MUCH_WEIGHT_DECAY in found) == much
        if much:
            assert found[Cause.TOO_MUCH_WEIGHT_DECAY].severity is Severity.ERROR


def test_decay_alone_in_branches_that_begin_at_zero() -> None:
    """No gradient reaches them yet, so decay is all that they get: the others learn."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale, self.out = (
                nn.Linear(64, 64),
                nn.Parameter(torch.zeros(())),
                nn.Linear(64, 10),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + self.scale * torch.relu(self.inner(x)))

    torch.manual_seed(0)
    setup = gm.Setup(Branch(), CE, partial(SGD, lr=0.1, weight_decay=5e-4))
    assert not findings(setup, digits())


# ---- dropout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_dropout_everywhere(seed: int) -> None:
    adam = partial(ADAM, lr=1e-3)
    found = findings(gm.Setup(mlp(5, 128, 0.8, seed), CE, adam), digits())[Cause.TOO_MUCH_DROPOUT]
    assert found.severity is Severity.ERROR
    assert len(found.sites) == 5
    for depth, share in ((2, 0.5), (5, 0.1), (2, 0.3)):
        assert Cause.TOO_MUCH_DROPOUT not in findings(
            gm.Setup(mlp(depth, 128, share, seed), CE, adam), digits()
        )


# ---- batches ----------------------------------------------------------------------------------------------


def normalized() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def test_batch_normalization_of_two_rows_keeps_signs_only() -> None:
    adam = partial(ADAM, lr=1e-3)
    found = findings(gm.Setup(normalized(), CE, adam), digits(2))[Cause.BATCH_OF_ONE]
    assert (found.severity, found.measured, found.sites) == (Severity.ERROR, 2, ("1",))
    assert Cause.BATCH_OF_ONE not in findings(gm.Setup(normalized(), CE, adam), digits(8))
    frozen = normalized()
    frozen[1].eval()
    assert Cause.BATCH_OF_ONE not in findings(gm.Setup(frozen, CE, adam), digits(2))


def test_batch_normalization_of_one_image_is_a_warning() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)
    )
    found = findings(gm.Setup(model, CE, partial(ADAM, lr=1e-3)), digits(1))[Cause.BATCH_OF_ONE]
    assert (found.severity, found.measured) == (Severity.WARNING, 36)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_whole_data_in_one_batch(seed: int) -> None:
    setup = gm.Setup(mlp(seed=seed), CE, partial(SGD, lr=0.01))
    assert findings(setup, digits(1700), steps=5)[Cause.UNFIT_BATCH_SIZE].severity is Severity.ERROR
    assert Cause.UNFIT_BATCH_SIZE not in findings(setup, digits(1700), steps=5000)
    assert Cause.UNFIT_BATCH_SIZE not in findings(setup, digits(32), steps=5)


def test_the_noise_scale_is_that_of_the_samples_gradients() -> None:
    """tr(Sigma)/|G|^2 from per-sample gradients, over many batches: both estimate the same number."""
    torch.manual_seed(0)
    x, y = torch.randn(4096, 6), torch.randn(4096, 1)
    model = nn.Linear(6, 1)
    residual = 2 * (model(x) - y).detach()
    slopes = torch.cat([residual * x, residual], 1)
    mean = slopes.mean(0)
    exact = (slopes - mean).square().sum(1).mean() / mean.square().sum()
    setup = gm.Setup(model, MSE, partial(SGD, lr=0.1))
    found = inquire(setup, (x, y), profile(setup, (x, y)))
    assert found.noise_scale == pytest.approx(exact.item(), rel=0.2)  # 2,048 rows in each half


# ---- capacity ---------------------------------------------------------------------------------------------


def exclusive_or(rows: int = 200) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = (torch.rand(rows, 2) < 0.5).float()
    return x + 0.05 * torch.randn(rows, 2), (x[:, 0] != x[:, 1]).long()


def test_a_linear_network_cannot_bend() -> None:
    adam = partial(ADAM, lr=1e-2)
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(2, 16), nn.Linear(16, 2))
    bent = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    assert findings(gm.Setup(linear, CE, adam), exclusive_or())[Cause.TOO_LITTLE_CAPACITY].sites == ("0", "1")
    assert Cause.TOO_LITTLE_CAPACITY not in findings(gm.Setup(bent, CE, adam), exclusive_or())
    assert Cause.TOO_LITTLE_CAPACITY not in findings(gm.Setup(nn.Linear(64, 10), CE, adam), digits(500))


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_asks_for_nothing(seed: int) -> None:
    torch.manual_seed(seed)
    x, y = torch.randn(200, 5), torch.randn(200, 1)
    setup = gm.Setup(nn.Linear(5, 1), MSE, partial(SGD, lr=0.1))
    assert Cause.TOO_LITTLE_CAPACITY not in findings(setup, (x, y))


def test_one_unit_before_ten_classes() -> None:
    def funnel(units: int) -> gm.Setup:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, units), nn.ReLU(), nn.Linear(units, 10)
        )
        return gm.Setup(model, CE, partial(ADAM, lr=1e-3))

    assert findings(funnel(1), digits())[Cause.TOO_LITTLE_CAPACITY].sites == ("2",)
    assert Cause.TOO_LITTLE_CAPACITY not in findings(funnel(8), digits())


def test_what_no_narrow_layer_lets_through() -> None:
    """The share lost is that of the singular values beyond the width: no map of that rank does better."""
    torch.manual_seed(0)
    x = torch.randn(300, 4)
    y = torch.randn(300, 6)
    lost = read_capacity((x, y)).lost
    centred = y - y.mean(0)
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    for width in range(1, 6):
        best = u[:, :width] * s[:width] @ v[:width]
        left = (centred - best).square().sum() / centred.square().sum()
        assert lost[width - 1] == pytest.approx(left.item(), abs=1e-5)
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 6))
    setup = gm.Setup(model, MSE, partial(SGD, lr=0.1))
    assert findings(setup, (x, y))[Cause.TOO_LITTLE_CAPACITY].sites == ("0",)


# ---- optimizer and steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_an_epsilon_above_the_gradient(seed: int) -> None:
    for epsilon, severity in ((1e3, Severity.ERROR), (1e-8, None), (1e-7, None)):
        setup = gm.Setup(mlp(seed=seed), CE, partial(ADAM, lr=1e-3, eps=epsilon))
        found = findings(setup, digits()).get(Cause.UNFIT_OPTIMIZER)
        assert (found and found.severity) == severity


def test_an_epsilon_that_half_precision_cannot_hold() -> None:
    x, y = digits()
    for epsilon, unfit in ((1e-8, True), (1e-4, False)):
        setup = gm.Setup(mlp().half(), CE, partial(ADAM, lr=1e-3, eps=epsilon))
        assert (Cause.UNFIT_OPTIMIZER in findings(setup, (x.half(), y))) == unfit


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("optimizer", "few", "many"), [(partial(SGD, lr=0.01), 5, 3000), (partial(ADAM, lr=1e-5), 50, 30000)]
)
def test_planned_steps(optimizer: Any, few: int, many: int, seed: int) -> None:
    setup = gm.Setup(mlp(seed=seed), CE, optimizer)
    found = findings(setup, digits(), steps=few)
    assert found[Cause.TOO_FEW_STEPS].severity is Severity.ERROR
    assert Cause.LEARNING_RATE_TOO_LOW in found
    assert not findings(setup, digits(), steps=many)
    assert not findings(setup, digits())


def test_a_rate_that_cannot_cover_the_distance() -> None:
    """RMSprop moves each weight by about its rate: 300 steps of 1e-3 do not reach 5 from 0."""
    x = torch.linspace(1, 2, 80)[:, None]
    model = nn.Linear(1, 1, bias=False)
    setup = gm.Setup(model, MSE, partial(torch.optim.RMSprop, lr=1e-3))
    nn.init.zeros_(model.weight)
    assert {Cause.LEARNING_RATE_TOO_LOW, Cause.TOO_FEW_STEPS} <= findings(setup, (x, 5 * x), steps=300).keys()
    assert not findings(setup, (x, 5 * x), steps=6000)


# ---- speed ------------------------------------------------------------------------------------------------


def scaled(scale: float, optimizer: Any) -> gm.Setup:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10))
    return gm.Setup(model, step=lambda m, data: scale * CE(m(data[0]), data[1]), optimizer=optimizer)


@pytest.mark.parametrize(
    ("scale", "optimizer", "slow"),
    [
        (1e-18, ADAM, True),  # the squares, times 1 - beta_2, are below 1e-38
        (1e-18, SGD, False),
        (1e-36, SGD, True),  # the gradients themselves
        (1.0, ADAM, False),
        (1e-30, ADAM, False),  # the squares are exactly zero
    ],
)
def test_denormal_numbers(scale: float, optimizer: Any, slow: bool) -> None:
    found = findings(scaled(scale, partial(optimizer, lr=1e-3)), digits())
    assert (Cause.DENORMAL_NUMBERS in found) == slow


def test_the_share_of_denormal_numbers_is_that_of_the_tensors() -> None:
    """Theory takes values about zero for normal; counted in the gradients and Adam's squares themselves."""
    setup = scaled(3e-18, partial(ADAM, lr=1e-3))
    data = digits()
    seen = profile(setup, data)
    optimizer = setup.build_optimizer()
    setup.loss(data).backward()
    optimizer.step()
    squares = torch.cat([entry["exp_avg_sq"].flatten() for entry in optimizer.state.values()])
    counted = ((squares > 0) & (squares < torch.finfo(torch.float32).tiny)).float().mean().item()
    shares = speed._squares(seen)
    predicted = sum(share * size for share, size in shares) / sum(size for _, size in shares)
    assert predicted == pytest.approx(counted, abs=0.15)  # gradients have heavier tails than normal


def test_flushed_numbers_cost_nothing() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        found = findings(scaled(1e-18, partial(ADAM, lr=1e-3)), digits())
    finally:
        torch.set_flush_denormal(False)
    assert Cause.DENORMAL_NUMBERS not in found


# ---- the inquiry touches nothing --------------------------------------------------------------------------


def test_the_users_things_stay_as_they_were() -> None:
    model = mlp(dropout=0.9)
    optimizer = ADAM(model.parameters(), lr=1e-3)
    setup = gm.Setup(model, CE, optimizer)
    data = digits()
    CE(model(data[0]), data[1]).backward()
    optimizer.step()
    before = ([p.clone() for p in model.parameters()], [p.grad.clone() for p in model.parameters()])
    memory = [entry["exp_avg"].clone() for entry in optimizer.state.values()]
    random = torch.get_rng_state()
    seen = profile(setup, data)
    assert seen.regime.tried.keys() == {"dropout", "no dropout"}
    assert all(map(torch.equal, before[0], model.parameters()))
    assert all(map(torch.equal, before[1], [p.grad for p in model.parameters()]))
    assert all(map(torch.equal, memory, [entry["exp_avg"] for entry in optimizer.state.values()]))
    assert torch.equal(torch.get_rng_state(), random)
    assert model[2].p == 0.9


def test_optimizers_that_cannot_be_tried_are_left_alone() -> None:
    setup = gm.Setup(mlp(), CE, torch.optim.LBFGS)
    assert inquire(setup, digits(), measure(setup, digits())) is None


def test_a_penalty_that_the_data_holds_against() -> None:
    """Learnt by heart, the gradient of the data is gone and Adam's step is all decay; halving would hurt."""
    model, data = mlp(), digits()
    optimizer = ADAM(model.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        CE(model(data[0]), data[1]).backward()
        optimizer.step()
    setup = gm.Setup(model, step=penalized(3e-4, 2), optimizer=partial(ADAM, lr=1e-3))
    seen = profile(setup, data)
    before, halved = seen.regime.tried["half the weights"]
    assert halved > 2 * before
    assert seen.regime.shrinking > 0.7
    assert regularization.too_much_weight_decay(seen) is None
