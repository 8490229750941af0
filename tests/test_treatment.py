"""Mend: ill setups are cured by what is needed and no more, others come back as they were."""

import copy
import json
import math
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmend import Treatment, mend
from gradmend.data import load
from gradmend.diagnosis import diagnose
from gradmend.errors import DataError, SetupError
from gradmend.remedies import REMEDIES, DropSquashing, He, LearningRate, Relabel, StandardizeInput, Xavier
from gradmend.setup import Batch, Budget, Setup
from gradmend.training import run_trial, train
from gradmend.treatment import UNTREATED, plans
from gradmend.zoo import mlp
from helpers import SGD, Convolutional, Functional, assert_same, blobs, images, plain, trace

CE = nn.CrossEntropyLoss()
BUDGET = Budget(steps=60)
SLOW = partial(torch.optim.SGD, lr=0.003)
Case = tuple[Setup, list[Batch]]


def batches(scale: float = 1.0) -> list[Batch]:
    x, y = blobs(512)
    return [(scale * x[i : i + 64], y[i : i + 64]) for i in range(0, 512, 64)]


def digits() -> list[Batch]:
    data = load("digits")
    return list(data.batches(64, epochs=1, generator=torch.Generator().manual_seed(0)))


def initialized(depth: int, init: Any) -> nn.Sequential:
    """Hidden layers with weights by `init`."""
    model = plain(depth, nn.Tanh, width=64)
    for layer in model[:-1]:
        if isinstance(layer, nn.Linear):
            init(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def half_held() -> Setup:
    model = plain(2, nn.ReLU)
    return Setup(model, CE, torch.optim.SGD(model[4:].parameters(), lr=0.1))


class Softmax(nn.Module):
    """A softmax as a function, in a forward whose way depends on the data, so that it cannot be rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inner(x))
        return torch.softmax(self.out(x if x.sum() < 1e9 else x / 2), 1)


def rate(lr: float) -> Setup:
    return Setup(plain(2, nn.ReLU), CE, partial(torch.optim.SGD, lr=lr))


ILL = {
    "deep sigmoid": lambda: (Setup(mlp(64, 10, depth=12), CE, SGD), digits()),
    "softmax": lambda: (Setup(nn.Sequential(*plain(2, nn.ReLU), nn.Softmax(1)), CE, SGD), batches()),
    "rate too high": lambda: (rate(1e3), batches()),
    "rate too low": lambda: (rate(1e-9), batches()),
    "unscaled": lambda: (rate(0.1), batches(1000.0)),
    "symmetric": lambda: (Setup(initialized(3, nn.init.zeros_), CE, SGD), batches()),
    "large weights": lambda: (Setup(initialized(16, nn.init.normal_), CE, SGD), batches()),
    "forgotten parameters": lambda: (half_held(), batches()),
}
CURES = {
    "softmax": "DropSquashing()",
    "unscaled": "StandardizeInput()",
    "forgotten parameters": "AddMissingParameters()",
}


@cache
def case(name: str) -> Case:
    torch.manual_seed(0)
    return ILL[name]()


@cache
def mended(name: str) -> Treatment:
    return mend(*case(name), BUDGET)


every_illness = pytest.mark.parametrize("name", ILL)


@every_illness
def test_the_illness_is_cured_and_training_is_better(name: str) -> None:
    made = mended(name)
    assert made.mended
    assert not made.before.healthy
    assert diagnose(made.setup, case(name)[1]).healthy
    untreated = made.trials[0]
    best = min(made.trials, key=lambda trial: trial.final_loss)
    assert untreated.label == UNTREATED or UNTREATED in [trial.label for trial in made.trials]
    again = [run_trial(setup, case(name)[1], BUDGET) for setup in (case(name)[0], made.setup)]
    assert again[1].final_loss < 0.95 * again[0].final_loss
    assert (again[1].accuracy or 0) >= (again[0].accuracy or 0)
    assert best.final_loss <= again[1].final_loss
    if name in CURES:
        assert repr(made.changes[0].remedy) == CURES[name]


@every_illness
def test_every_change_is_necessary(name: str) -> None:
    made, (setup, given) = mended(name), case(name)
    whole = run_trial(made.setup, given, BUDGET).final_loss
    for left_out in made.changes:
        rest = setup
        for change in made.changes:
            rest = rest if change is left_out else change.remedy.apply(rest, given).setup
        ill = not diagnose(rest, given).healthy
        assert ill or run_trial(rest, given, BUDGET).final_loss > whole


@every_illness
def test_the_code_makes_the_mended_model_of_the_original(name: str) -> None:
    made, (setup, given) = mended(name), case(name)
    own = setup.copy()
    names: dict[str, Any] = {"model": own.model, "optimizer": own.build_optimizer(), "x": given[0][0]}
    exec(made.code(), names)
    model, wanted = names["model"], copy.deepcopy(made.setup.model)
    assert_same(model.state_dict(), wanted.state_dict())
    assert torch.equal(model(given[0][0]), wanted(given[0][0]))
    groups = [optimizer.param_groups for optimizer in (names["optimizer"], made.setup.build_optimizer())]
    assert [g["lr"] for g in groups[0]] == [g["lr"] for g in groups[1]]
    assert "gradmend" not in made.code()


@every_illness
def test_the_same_again_within_the_budget_and_the_original_untouched(name: str) -> None:
    setup, given = case(name)
    before = trace(setup)
    again = mend(setup, given, BUDGET)
    assert_same(trace(setup), before)
    assert max(len(trial.losses) for trial in again.trials) <= 2 * BUDGET.steps  # the confirmation
    assert len(again.trials) <= BUDGET.trials
    assert again.verdict == mended(name).verdict
    assert_same(again.setup.model.state_dict(), mended(name).setup.model.state_dict())
    losses = [[(trial.label, str(trial.losses)) for trial in made.trials] for made in (again, mended(name))]
    assert losses[0] == losses[1]


@every_illness
def test_it_prints_within_80_columns_and_becomes_json(name: str) -> None:
    made = mended(name)
    assert max(map(len, str(made).splitlines())) <= 80
    assert "Mended by: " in str(made)
    assert UNTREATED in str(made)
    data = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert data["mended"] is True
    assert data["code"] == made.code()
    assert len(data["trials"]) == len(made.trials)
    assert "Mended by" in made._repr_html_()


HEALTHY = {
    "shallow": lambda: (Setup(plain(2, nn.ReLU), CE, SGD), batches()),
    "no optimizer": lambda: (Setup(plain(1, nn.ReLU), CE), batches()),
    "convolutional": lambda: (Setup(Convolutional(), CE, SGD), images(64)),
    "functional": lambda: (Setup(Functional(), CE, SGD), batches()),
    "deep, he": lambda: (Setup(mlp(64, 10, activation="relu", init="he"), CE, SLOW), digits()),
    "normalized, skips": lambda: (Setup(mlp(64, 10, depth=10, norm="layer", skip=True), CE, SLOW), digits()),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_setup_comes_back_as_it_is(name: str) -> None:
    torch.manual_seed(0)
    setup, given = HEALTHY[name]()
    before = trace(setup)
    made = mend(setup, given, BUDGET)
    assert made.setup is setup
    assert_same(trace(setup), before)
    assert (made.changes, made.trials, made.advice, made.code(), made.mended) == ((), (), (), "", False)
    assert made.after is made.before
    assert made.verdict == "This setup is healthy; nothing was changed."
    json.dumps(made.to_dict(), allow_nan=False)


def test_what_nothing_helps_comes_back_and_says_so() -> None:
    torch.manual_seed(0)
    setup = Setup(initialized(3, nn.init.zeros_), CE, SGD)
    given = [(torch.ones_like(x), y) for x, y in batches()]  # nothing in the input tells the classes apart
    made = mend(setup, given, BUDGET)
    assert made.setup is setup
    assert not made.mended
    assert made.trials
    assert made.verdict == "No remedy made this setup healthy and better, so nothing was changed."
    assert "Draw the weights at random" not in made.verdict
    assert made.code() == ""


def test_what_only_the_user_can_change_is_named_with_its_line() -> None:
    torch.manual_seed(0)
    made = mend(Setup(Softmax(), CE, SGD), batches(), BUDGET)
    assert made.changes == ()
    line = Softmax.forward.__code__.co_firstlineno + 2
    assert made.advice[0].startswith(f"{__file__}:{line}: Remove the softmax from the model")


def test_the_rest_is_mended_in_part() -> None:
    torch.manual_seed(0)
    made = mend(Setup(Softmax(), CE, SGD), batches(1000.0), BUDGET)
    assert "StandardizeInput()" in [repr(change.remedy) for change in made.changes]
    assert made.verdict.startswith("Mended in part by: input standardized")
    assert made.verdict.endswith("Left to you:")
    assert not made.mended
    assert len(made.advice) == 1
    assert "Remove the softmax" in made.advice[0]


def test_an_ill_setup_without_an_optimizer_asks_for_one() -> None:
    with pytest.raises(SetupError, match="This setup has no optimizer"):
        mend(Setup(nn.Sequential(*plain(1, nn.ReLU), nn.Softmax(1)), CE), batches(), BUDGET)


def test_every_batch_is_checked() -> None:
    given = batches()
    given[-1][0][3, 2] = torch.nan
    with pytest.raises(DataError, match="The inputs hold 1 value that is NaN or infinite"):
        mend(*((case("softmax")[0]), given), BUDGET)


def test_a_live_optimizer_stays_paired() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*plain(2, nn.ReLU), nn.Softmax(1))
    made = mend(Setup(model, CE, torch.optim.SGD(model.parameters(), lr=0.1)), batches(1000.0), BUDGET)
    optimizer = made.setup.build_optimizer()
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert made.mended
    assert held == [id(p) for p in made.setup.model.parameters()]


def test_report_is_told_what_is_done() -> None:
    said: list[str] = []
    mend(*case("softmax"), Budget(steps=10), said.append)
    assert said[0] == "measuring"
    assert any(text.startswith("trying ") for text in said)


def test_remedies_are_known_by_their_groups_and_costs() -> None:
    assert {plans.group(remedy) for remedy in REMEDIES} <= set(plans.ORDER)
    plan = (DropSquashing(), StandardizeInput(), LearningRate())
    assert plans.cost(plan) == sum(remedy.intrusion for remedy in plan)
    assert plans.describe(()) == UNTREATED
    assert plans.joined((LearningRate(),), (He(), Xavier()), (StandardizeInput(),)) == (
        StandardizeInput(),
        He(),
        LearningRate(),
    )


@pytest.mark.parametrize("budget", [Budget(steps=60, trials=3), Budget(steps=60, seconds=0.2)])
def test_a_spent_budget_gives_the_best_so_far(budget: Budget) -> None:
    setup, given = case("deep sigmoid")
    made = mend(setup, given, budget)
    longest = {trial.label: len(trial.losses) for trial in made.trials}
    assert sum(longest.values()) <= budget.trials * budget.steps
    assert run_trial(made.setup, given, BUDGET).final_loss <= run_trial(setup, given, BUDGET).final_loss


def test_without_time_a_healthy_setup_is_left_as_it_is() -> None:
    setup, given = HEALTHY["shallow"]()
    assert mend(setup, given, Budget(steps=60, seconds=1e-6), steps=600).changes == ()


def test_an_interruption_gives_the_best_so_far() -> None:
    setup, given = case("rate too low")
    tried: list[str] = []

    def interrupt(text: str) -> None:
        tried.append(text)
        if sum(said.startswith("trying") for said in tried) == 4:
            tried.clear()
            raise KeyboardInterrupt

    made = mend(setup, given, BUDGET, interrupt)
    assert len(made.trials) == 3
    assert made.changes


class WithLoss(nn.Module):
    """Takes a dict and returns the loss, as those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain(2, nn.ReLU)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        output = self.net(x)
        return {"loss": nn.functional.cross_entropy(output, labels), "logits": output}


def test_where_targets_cannot_be_exchanged_the_loss_decides() -> None:
    torch.manual_seed(0)
    setup = Setup(WithLoss(), optimizer=partial(torch.optim.SGD, lr=1e-9))
    made = mend(setup, [{"x": x, "labels": y} for x, y in batches()], BUDGET)
    assert made.mended
    assert made.trials[0].fit is None


def soft_cosh(z: Tensor, y: Tensor) -> Tensor:
    """The logarithm of the hyperbolic cosine of the error, so that it does not overflow."""
    return (z - y + nn.functional.softplus(-2 * (z - y)) - math.log(2)).mean()


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("squeezed", [False, True])
def test_a_fault_that_hides_another_is_mended_with_it(rows: int, squeezed: bool) -> None:
    """A softmax over one unit, and outputs beside a row of targets; or one row at a time."""
    x, _ = blobs(512)
    target = x[:, 0] - x[:, 1] if squeezed else x[:, :1] - x[:, 1:2]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1), nn.Softmax(-1))
    setup = Setup(model, soft_cosh, partial(torch.optim.SGD, lr=0.05))
    given = list(zip(x.split(rows), target.split(rows), strict=True))
    trained = mend(setup, given, Budget(steps=200)).setup.copy()
    train(trained, given, steps=600)
    with torch.no_grad():
        error = (trained.model(x).flatten() - target.flatten()).square().mean()
    assert error < 0.2 * target.var()


X, Y = blobs(512)
SUM = X.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("target", "judge"),
    [
        ((SUM > 0).float(), lambda z, y: ((z > 0) == (y > 0)).float().mean()),
        ((SUM > 0).float() * 2 - 1, lambda z, y: (z.sign() == y).float().mean()),
        (SUM, lambda z, y: 1 - (z - y).square().mean() / y.var()),
        (Y.float()[:, None], lambda z, y: (z.argmax(1) == y.flatten()).float().mean()),
    ],
    ids=["zeros and ones", "signs", "amounts", "numbers of classes"],
)
@pytest.mark.parametrize("last", [nn.Softmax(-1), nn.Identity()])
def test_one_unit_whose_loss_sums_over_classes(target: Tensor, judge: Any, last: nn.Module) -> None:
    """Whatever the output, the loss is the same; the targets tell which loss and how many units there are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1), last)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return -(y * (z.log() if isinstance(last, nn.Softmax) else z.log_softmax(1))).sum(1).mean()

    given = list(zip(X.split(32), target.split(32), strict=True))
    trained = mend(Setup(model, loss, torch.optim.Adam), given, Budget(steps=200)).setup.copy()
    train(trained, given, steps=600)
    with torch.no_grad():
        assert judge(trained.model(X), target) > 0.9


def test_signs_under_binary_cross_entropy_of_scores_are_numbered() -> None:
    """Its loss falls for ever with the scores of those of -1."""
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    given = list(zip(X.split(32), ((SUM > 0).float() * 2 - 1).split(32), strict=True))
    fast = partial(torch.optim.Adam, lr=0.01)
    made = mend(Setup(model, nn.BCEWithLogitsLoss(), fast), given, Budget(steps=100))
    assert [type(change.remedy) for change in made.changes] == [Relabel]
    assert made.mended
