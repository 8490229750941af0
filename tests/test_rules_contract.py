"""Rules on output, loss, targets and inputs: each fires where it should, and not where it nearly does."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmend as gm
from gradmend.causes import Cause
from gradmend.diagnosis import Finding, Severity
from helpers import SGD, blobs

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE
CE, BCE, MSE = nn.CrossEntropyLoss(), nn.BCELoss(), nn.MSELoss()
X, Y = blobs(256)
ONE_HOT = F.one_hot(Y, 3).float()
YES = (Y == 0).float()[:, None]
AMOUNT = X[:, :1] - 0.5 * X[:, 1:2] ** 2


def net(units: int, *ends: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, units), *ends)


def found(
    model: nn.Module, loss: Any, y: Tensor, x: Tensor = X, optimizer: Any = None
) -> dict[Cause, Finding]:
    batches = list(zip(x.split(64), y.split(64), strict=True))
    return {f.cause: f for f in gm.diagnose(gm.Setup(model, loss, optimizer), batches).findings}


def severity(cause: Cause, *args: Any, **kwargs: Any) -> Severity | None:
    finding = found(*args, **kwargs).get(cause)
    return finding.severity if finding else None


def clipped(p: Tensor) -> Tensor:
    return p.clamp(1e-7, 1 - 1e-7)


def categorical(p: Tensor, y: Tensor) -> Tensor:
    """As Keras has it: divided by the sum, then clipped."""
    return -(y * clipped(p / p.sum(1, keepdim=True)).log()).sum(1).mean()


def cross_entropy(p: Tensor, y: Tensor) -> Tensor:
    return -(y * clipped(p).log()).sum(1).mean()


def binary(p: Tensor, y: Tensor) -> Tensor:
    return -(y * clipped(p).log() + (1 - y) * clipped(1 - p).log()).mean()


def hinge(z: Tensor, y: Tensor) -> Tensor:
    return (1 - y * z).clamp(min=0).mean()


class Exp(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.exp()


class ByHand(nn.Module):
    """A softmax, or a sigmoid of one unit, without torch's functions of that name."""

    def forward(self, z: Tensor) -> Tensor:
        e = z.exp()
        return e / e.sum(1, keepdim=True) if z.shape[1] > 1 else e / (1 + e)


# ---- the output --------------------------------------------------------------------------------------------


def logits_by_hand(z: Tensor, y: Tensor) -> Tensor:
    return -z.log_softmax(1).gather(1, y[:, None]).mean()


def logits(z: Tensor, y: Tensor) -> Tensor:
    return -(y * z.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("loss", [CE, logits_by_hand, nn.CrossEntropyLoss(label_smoothing=0.1)])
@pytest.mark.parametrize("end", [nn.Softmax(1), ByHand()])
def test_softmax_before_a_loss_on_logits(loss: Any, end: nn.Module) -> None:
    assert severity(Cause.SOFTMAX_BEFORE_LOGITS_LOSS, net(3, end), loss, Y) is ERROR


@pytest.mark.parametrize("end", [nn.Identity(), nn.LogSoftmax(1), nn.Tanh()])
def test_what_a_loss_on_logits_takes(end: nn.Module) -> None:
    assert not found(net(3, end), logits_by_hand, Y)


def test_sigmoid_before_a_loss_on_logits() -> None:
    def by_hand(z: Tensor, y: Tensor) -> Tensor:
        return (z.clamp(min=0) - z * y + (-z.abs()).exp().log1p()).mean()

    for loss in (nn.BCEWithLogitsLoss(), by_hand):
        assert severity(Cause.SIGMOID_BEFORE_LOGITS_LOSS, net(1, nn.Sigmoid()), loss, YES) is ERROR
        assert severity(Cause.SIGMOID_BEFORE_LOGITS_LOSS, net(1), loss, YES) is None
    assert severity(Cause.SIGMOID_BEFORE_LOGITS_LOSS, net(3, nn.Sigmoid()), CE, Y) is ERROR


@pytest.mark.parametrize(
    ("model", "loss", "y"),
    [
        (lambda: net(1), binary, YES),
        (lambda: net(1, nn.Tanh()), binary, YES),
        (lambda: net(1, nn.ReLU()), binary, YES),
        (lambda: net(3), categorical, ONE_HOT),
        (lambda: net(3, nn.ReLU()), categorical, ONE_HOT),
        (lambda: net(3), cross_entropy, ONE_HOT),
        (lambda: net(3), nn.NLLLoss(), Y),
        (lambda: net(3, nn.Softmax(1)), nn.NLLLoss(), Y),
        (lambda: net(3, nn.Softmax(1)), nn.KLDivLoss(reduction="batchmean"), ONE_HOT),
    ],
)
def test_a_loss_on_probabilities_that_gets_none(model: Callable[[], nn.Module], loss: Any, y: Tensor) -> None:
    assert severity(Cause.LOGITS_BEFORE_PROBABILITY_LOSS, model(), loss, y) is ERROR


@pytest.mark.parametrize(
    ("model", "loss", "y"),
    [
        (lambda: net(1, nn.Sigmoid()), binary, YES),
        (lambda: net(1, ByHand()), binary, YES),
        (lambda: net(1, nn.Sigmoid(), nn.Flatten(0)), BCE, YES[:, 0]),
        (lambda: net(3, nn.Sigmoid()), BCE, ONE_HOT),
        (lambda: net(3, nn.Softmax(1)), categorical, ONE_HOT),
        (lambda: net(3, nn.Softmax(1)), cross_entropy, ONE_HOT),
        (lambda: net(3, nn.Softplus()), categorical, ONE_HOT),
        (lambda: net(3, Exp()), categorical, ONE_HOT),
        (lambda: net(3, nn.LogSoftmax(1)), nn.NLLLoss(), Y),
        (lambda: net(3, nn.LogSoftmax(1)), nn.KLDivLoss(reduction="batchmean"), ONE_HOT),
        (lambda: net(1), MSE, AMOUNT),
        (lambda: net(1, nn.Sigmoid()), MSE, AMOUNT.sigmoid()),
        (lambda: net(1), nn.L1Loss(), AMOUNT),
    ],
)
def test_outputs_that_suit_their_loss(model: Callable[[], nn.Module], loss: Any, y: Tensor) -> None:
    assert not found(model(), loss, y)


def test_softmax_over_one_unit() -> None:
    model = net(1, nn.Softmax(1))
    finding = found(model, binary, YES)[Cause.SOFTMAX_OVER_ONE_UNIT]
    assert (finding.severity, finding.sites) == (ERROR, ("3",))
    assert severity(Cause.SOFTMAX_OVER_ONE_UNIT, net(1), categorical, YES) is ERROR
    zero = torch.zeros(256, dtype=torch.long)
    assert severity(Cause.SOFTMAX_OVER_ONE_UNIT, net(1), CE, zero) is ERROR
    assert severity(Cause.SOFTMAX_OVER_ONE_UNIT, net(2, nn.Softmax(1)), categorical, ONE_HOT[:, :2]) is None
    assert severity(Cause.SOFTMAX_OVER_ONE_UNIT, net(1, nn.Sigmoid()), binary, YES) is None


def test_what_one_unit_may_be_compared_with_instead() -> None:
    for y, cure in ((YES, "nn.Sigmoid"), (2 * YES - 1, "nn.SoftMarginLoss"), (3 * AMOUNT, "nn.MSELoss")):
        assert cure in found(net(1), logits, y)[Cause.SOFTMAX_OVER_ONE_UNIT].sentence


def test_softmax_over_the_batch() -> None:
    assert severity(Cause.SOFTMAX_OVER_THE_BATCH, net(3, nn.Softmax(0)), cross_entropy, ONE_HOT) is ERROR
    assert severity(Cause.SOFTMAX_OVER_THE_BATCH, net(3, nn.Softmax(1)), cross_entropy, ONE_HOT) is None

    def of_loss(z: Tensor, y: Tensor) -> Tensor:
        return -(y * z.softmax(0).clamp(1e-32, 1).log()).sum(1).mean()

    assert severity(Cause.SOFTMAX_OVER_THE_BATCH, net(3), of_loss, ONE_HOT) is ERROR
    assert severity(Cause.SOFTMAX_OVER_THE_BATCH, net(3), CE, ONE_HOT) is None


@pytest.mark.parametrize(
    ("model", "y", "expected"),
    [
        (lambda: net(1, nn.Sigmoid()), AMOUNT, ERROR),
        (lambda: net(1, nn.ReLU()), AMOUNT, ERROR),
        (lambda: net(1, nn.Tanh()), 10 * AMOUNT, ERROR),
        (lambda: net(1, nn.Tanh()), AMOUNT.tanh() * 1.3, WARNING),
        (lambda: net(3, nn.Softmax(1)), X[:, :3], ERROR),
        (lambda: net(1, nn.Tanh()), AMOUNT.tanh(), None),
        (lambda: net(1, nn.Sigmoid()), AMOUNT.sigmoid(), None),
        (lambda: net(1, nn.ReLU()), AMOUNT.abs(), None),
        (lambda: net(1, nn.LeakyReLU()), AMOUNT, None),
        (lambda: net(3, nn.Softmax(1)), X[:, :3].softmax(1), None),
        (lambda: net(1), AMOUNT, None),
    ],
)
def test_targets_beyond_the_last_activation(model: Any, y: Tensor, expected: Severity | None) -> None:
    for loss in (MSE, nn.L1Loss(), nn.HuberLoss()):
        assert severity(Cause.UNREACHABLE_TARGETS, model(), loss, y) is expected


def test_scores_that_cannot_say_no() -> None:
    assert severity(Cause.UNREACHABLE_TARGETS, net(1, nn.ReLU()), nn.BCEWithLogitsLoss(), YES) is ERROR
    assert severity(Cause.UNREACHABLE_TARGETS, net(3, nn.ReLU()), CE, Y) is None


def sparse(p: Tensor, y: Tensor) -> Tensor:
    """As Keras has it: numbers of classes as floats; one that does not exist gives NaN."""
    index = y.long().reshape(-1, 1)
    picked = clipped(p).log().gather(1, index.clamp(0, p.shape[1] - 1))
    return -torch.where(index < p.shape[1], picked, torch.nan).mean()


def log_error(z: Tensor, y: Tensor) -> Tensor:
    return (z.clamp(min=0).log1p() - y.log1p()).square().mean()


def percent(z: Tensor, y: Tensor) -> Tensor:
    return 100 * ((z - y) / y.abs().clamp(min=1e-7)).abs().mean()


def squared_share(z: Tensor, y: Tensor) -> Tensor:
    return ((z - y) / y.abs().clamp(min=1e-7)).square().mean()


def cosine(z: Tensor, y: Tensor) -> Tensor:
    return -F.cosine_similarity(z, y).mean()


def floored(z: Tensor, y: Tensor) -> Tensor:
    """The squared error of logarithms as Keras has it: what is below zero is taken for zero."""
    return log_error(z, y.clamp(min=0))


def by_number(z: Tensor, y: Tensor) -> Tensor:
    """Classes by number, where a one belongs in the place of each."""
    return -(y * z.log_softmax(1)).sum(1).mean()


def divergence(p: Tensor, y: Tensor) -> Tensor:
    """As Keras has it."""
    y, p = y.clamp(1e-7, 1), p.clamp(1e-7, 1)
    return (y * (y / p).log()).sum(-1).mean()


@pytest.mark.parametrize(
    ("model", "loss", "y", "expected"),
    [
        (lambda: net(1, nn.Sigmoid()), binary, Y.float()[:, None], ERROR),
        (lambda: net(2, nn.Softmax(1)), sparse, Y.float(), ERROR),
        (lambda: net(2, nn.Softmax(1)), lambda p, y: binary(p, y.expand_as(p)), YES, ERROR),
        (lambda: net(10), lambda z, y: (z - y).square().mean(), AMOUNT, ERROR),
        (lambda: net(3), lambda z, y: (z - y).abs().mean(), Y.float()[:, None], ERROR),
        (lambda: net(3), lambda z, y: (z - y).cosh().log().mean(), AMOUNT, ERROR),
        (lambda: net(3), log_error, Y.float()[:, None], ERROR),
        (lambda: net(3), nn.PoissonNLLLoss(), Y.float()[:, None], ERROR),
        (lambda: net(1), lambda z, y: (z - y).square().mean(), X[:, :3], ERROR),
        (lambda: net(5), CE, Y, NOTE),
        (lambda: net(3), CE, Y, None),
        (lambda: net(3), nn.CrossEntropyLoss(ignore_index=255), Y.where(Y > 0, 255), None),
        (lambda: net(3, nn.Sigmoid()), BCE, ONE_HOT, None),
        (lambda: net(3), MSE, X[:, :3], None),
    ],
)
def test_units_and_classes(model: Any, loss: Any, y: Tensor, expected: Severity | None) -> None:
    assert severity(Cause.WRONG_OUTPUT_COUNT, model(), loss, y) is expected


def test_one_unit_for_each_step() -> None:
    """[B, T, 1] against [B, T, 1], and classes of each step: nothing is broadcast."""

    class Steps(nn.Module):
        def __init__(self, units: int) -> None:
            super().__init__()
            self.cell, self.out = nn.GRU(4, 16, batch_first=True), nn.Linear(16, units)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cell(x)[0])

    x = torch.randn(256, 6, 4)
    assert not found(Steps(1), MSE, x[:, :, :1].cumsum(1) / 2, x)
    y = (x[:, :, 0] > 0).long()
    assert not found(Steps(2), lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()), y, x)


# ---- the loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "loss", "y", "expected"),
    [
        (lambda: net(3, nn.Softmax(1)), nn.L1Loss(), ONE_HOT, ERROR),
        (lambda: net(1, nn.Sigmoid()), nn.L1Loss(), YES, ERROR),
        (lambda: net(3, nn.Softmax(1)), MSE, ONE_HOT, WARNING),
        (lambda: net(1, nn.Sigmoid()), MSE, YES, WARNING),
        (lambda: net(3, nn.Softmax(1)), BCE, ONE_HOT, WARNING),
        (lambda: net(3, nn.Sigmoid()), categorical, ONE_HOT, WARNING),
        (lambda: net(3, nn.Sigmoid()), cross_entropy, ONE_HOT, ERROR),
        (lambda: net(1, nn.Sigmoid()), cross_entropy, YES, ERROR),
        (lambda: net(1), hinge, YES, ERROR),
        (lambda: net(1, nn.Sigmoid()), hinge, 2 * YES - 1, ERROR),
        (lambda: net(1), hinge, 3 * AMOUNT, ERROR),
        (lambda: net(1), hinge, Y.float()[:, None], ERROR),
        (lambda: net(1), nn.PoissonNLLLoss(), AMOUNT, ERROR),
        (lambda: net(1), nn.PoissonNLLLoss(), AMOUNT.exp().round(), None),
        (lambda: net(3), hinge, ONE_HOT, ERROR),
        (lambda: net(3), hinge, 2 * ONE_HOT - 1, None),
        (lambda: net(1), squared_share, AMOUNT, ERROR),
        (lambda: net(1), squared_share, AMOUNT.exp(), None),
        (lambda: net(1), log_error, 3 * AMOUNT, ERROR),
        (lambda: net(3), cosine, Y.float()[:, None], ERROR),
        (lambda: net(3), cosine, ONE_HOT, None),
        (lambda: net(2), by_number, YES, ERROR),
        (lambda: net(3), percent, ONE_HOT, ERROR),
        (lambda: net(1), percent, YES, ERROR),
        (lambda: net(1), percent, AMOUNT, ERROR),
        (lambda: net(1), percent, AMOUNT.exp(), None),
        (lambda: net(1), floored, AMOUNT, ERROR),
        (lambda: net(1), floored, AMOUNT.exp(), None),
        (lambda: net(3), by_number, Y.float()[:, None], ERROR),
        (lambda: net(3), by_number, ONE_HOT, None),
        (lambda: net(1, nn.Sigmoid()), divergence, YES, ERROR),
        (lambda: net(1, nn.Sigmoid()), divergence, Y.float()[:, None], ERROR),
        (lambda: net(3, nn.Softmax(1)), divergence, ONE_HOT, None),
        (lambda: net(3), CE, X[:, :3], ERROR),
        (lambda: net(1, nn.Sigmoid()), binary, 3 * AMOUNT, ERROR),
        (lambda: net(3), CE, (ONE_HOT + ONE_HOT.roll(1, 0)).clamp(max=1), WARNING),
        (lambda: net(1), hinge, 2 * YES - 1, None),
        (lambda: net(1), MSE, YES, None),
        (lambda: net(3), CE, 0.9 * ONE_HOT + 0.1 / 3, None),
        (lambda: net(1, nn.Sigmoid()), binary, AMOUNT.sigmoid(), None),
        (lambda: net(3, nn.Sigmoid()), nn.L1Loss(), X[:, :3].sigmoid(), None),
    ],
)
def test_losses_for_other_targets(model: Any, loss: Any, y: Tensor, expected: Severity | None) -> None:
    assert severity(Cause.UNFIT_LOSS, model(), loss, y) is expected


def test_amounts_are_not_taken_for_classes() -> None:
    amounts = found(net(1, nn.Sigmoid()), divergence, 3 * AMOUNT.abs() + 0.1)[Cause.UNFIT_LOSS]
    assert "these targets are amounts" in amounts.sentence
    classes = found(net(1, nn.Sigmoid()), divergence, Y.float()[:, None])[Cause.UNFIT_LOSS]
    assert "numbers of classes" in classes.sentence


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("loss", [MSE, nn.L1Loss(), lambda z, y: (z - y).pow(2).sum()])
def test_outputs_and_targets_that_are_broadcast(loss: Any) -> None:
    finding = found(net(1), loss, AMOUNT[:, 0])[Cause.MISMATCHED_SHAPES]
    assert finding.severity is ERROR
    assert "[64, 1]" in finding.sentence
    assert severity(Cause.MISMATCHED_SHAPES, net(1, nn.Flatten(0)), loss, AMOUNT) is ERROR
    assert severity(Cause.MISMATCHED_SHAPES, net(1), loss, AMOUNT) is None
    aligned = severity(Cause.MISMATCHED_SHAPES, net(1), lambda z, y: loss(z[:, 0], y), AMOUNT[:, 0])
    assert aligned is None


# ---- the labels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "loss", "y", "expected"),
    [
        (lambda: net(3, nn.Softmax(1)), sparse, Y / 255, ERROR),
        (lambda: net(3, nn.Softmax(1)), sparse, Y.float() + 1, ERROR),
        (lambda: net(1, nn.Sigmoid()), binary, 2 * YES - 1, ERROR),
        (lambda: net(3, nn.Sigmoid()), binary, 255 * ONE_HOT, ERROR),
        (lambda: net(3, nn.Softmax(1)), sparse, Y.float(), None),
        (lambda: net(1), nn.SoftMarginLoss(), 2 * YES - 1, None),
        (lambda: net(1), nn.BCEWithLogitsLoss(), 2 * YES - 1, ERROR),
        (lambda: net(1, nn.Sigmoid()), binary, YES, None),
    ],
)
def test_labels_that_the_loss_does_not_expect(
    model: Any, loss: Any, y: Tensor, expected: Severity | None
) -> None:
    assert severity(Cause.LABELS_OUT_OF_RANGE, model(), loss, y) is expected


def test_constant_labels() -> None:
    assert severity(Cause.CONSTANT_LABELS, net(3), CE, torch.full_like(Y, 2)) is ERROR
    assert severity(Cause.CONSTANT_LABELS, net(3), CE, ONE_HOT[:1].repeat(256, 1)) is ERROR
    assert severity(Cause.CONSTANT_LABELS, net(1), MSE, torch.full_like(AMOUNT, 0.3)) is ERROR
    assert severity(Cause.CONSTANT_LABELS, net(4), CE, torch.arange(4).repeat_interleave(64)) is ERROR
    assert severity(Cause.CONSTANT_LABELS, net(1), MSE, torch.zeros_like(AMOUNT)) is WARNING
    in_turn = torch.arange(4).remainder(2).repeat_interleave(64)  # real and made-up images, batch by batch
    assert severity(Cause.CONSTANT_LABELS, net(2), CE, in_turn) is None
    assert severity(Cause.CONSTANT_LABELS, net(3), CE, Y) is None
    assert severity(Cause.CONSTANT_LABELS, net(1), MSE, 1000 + AMOUNT) is None


def test_labels_that_do_not_belong_to_their_inputs() -> None:
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    assert severity(Cause.SHUFFLED_LABELS, net(3), CE, Y[order]) is WARNING
    assert severity(Cause.SHUFFLED_LABELS, net(1), MSE, AMOUNT[order]) is WARNING
    assert severity(Cause.SHUFFLED_LABELS, net(3), CE, Y) is None
    assert severity(Cause.SHUFFLED_LABELS, net(1), MSE, AMOUNT) is None
    assert severity(Cause.SHUFFLED_LABELS, net(3), CE, Y[order][:64], X[:64]) is None


def test_rare_classes() -> None:
    rare = (torch.arange(256) % 25 == 0).long()
    assert severity(Cause.CLASS_IMBALANCE, net(2), CE, rare) is WARNING
    assert severity(Cause.CLASS_IMBALANCE, net(2), CE, F.one_hot(rare, 2).float()) is WARNING
    assert severity(Cause.CLASS_IMBALANCE, net(2), CE, (torch.arange(256) % 5 == 0).long()) is None
    assert severity(Cause.CLASS_IMBALANCE, net(2), CE, rare[:32], X[:32]) is None


@pytest.mark.parametrize(
    ("scale", "expected"), [(1000.0, ERROR), (30.0, WARNING), (2.0, None), (1e-4, WARNING)]
)
def test_targets_of_another_scale(scale: float, expected: Severity | None) -> None:
    assert severity(Cause.UNSCALED_TARGETS, net(1), MSE, scale * AMOUNT) is expected


def test_a_network_that_has_learnt_its_scale_needs_no_other() -> None:
    model = net(1)
    with torch.no_grad():
        model[2].weight.mul_(300)
    assert severity(Cause.UNSCALED_TARGETS, model, MSE, 1000 * AMOUNT) is None


# ---- the input ---------------------------------------------------------------------------------------------


def test_row_numbers_and_times_among_the_columns() -> None:
    for column in (torch.arange(256.0) + 1000, 1.7e9 + 60 * torch.arange(256).float()):
        x = torch.cat([X[:, :7], column[:, None]], dim=1).double()
        causes = found(net(1).double(), MSE, AMOUNT.double(), x)
        assert causes[Cause.STRAY_COLUMN].severity is (ERROR if column[0] > 1e6 else WARNING)
        assert Cause.UNSCALED_INPUT not in causes
    ages = torch.cat([X[:, :7], torch.randint(18, 90, (256, 1)).float()], dim=1)
    assert severity(Cause.STRAY_COLUMN, net(1), MSE, AMOUNT, ages) is None


def test_inputs_that_do_not_vary() -> None:
    assert severity(Cause.CONSTANT_INPUT, net(3), CE, Y, X[:1].repeat(256, 1)) is ERROR
    bias = torch.cat([X[:, :7], torch.ones(256, 1)], dim=1)
    assert severity(Cause.CONSTANT_INPUT, net(3), CE, Y, bias) is NOTE
    assert severity(Cause.CONSTANT_INPUT, net(3), CE, Y) is None


# ---- directions and modes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_steps_uphill(name: str) -> None:
    kind = getattr(torch.optim, name)
    up, down = partial(kind, lr=0.01, maximize=True), partial(kind, lr=0.01)
    assert severity(Cause.WRONG_DIRECTION, net(3), CE, Y, optimizer=up) is ERROR
    assert severity(Cause.WRONG_DIRECTION, net(3), CE, Y, optimizer=down) is None
    negated = lambda z, y: -F.cross_entropy(z, y)  # noqa: E731
    assert severity(Cause.WRONG_DIRECTION, net(3), negated, Y, optimizer=down) is ERROR
    assert severity(Cause.WRONG_DIRECTION, net(3), negated, Y, optimizer=up) is None


@pytest.mark.parametrize("rate", [1e-8, 10.0, 1e4, 1e30])
def test_a_step_too_long_is_no_step_uphill(rate: float) -> None:
    assert severity(Cause.WRONG_DIRECTION, net(3), CE, Y, optimizer=partial(torch.optim.SGD, lr=rate)) is None


def test_gradients_turned_round() -> None:
    def turn(parameters: Any) -> None:
        for p in parameters:
            p.grad.neg_()

    setup = gm.Setup(net(3), CE, SGD, gradient_transform=turn)
    assert Cause.WRONG_DIRECTION in gm.diagnose(setup, (X, Y)).causes


def test_modes() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))
    assert severity(Cause.EVAL_MODE, model, CE, Y) is None
    assert severity(Cause.EVAL_MODE, model.eval(), CE, Y) is NOTE
    model.train()
    model[1].eval()
    finding = found(model, CE, Y)[Cause.EVAL_MODE]
    assert (finding.severity, finding.sites) == (WARNING, ("1",))
    model[1].requires_grad_(False)  # as in fine-tuning
    assert severity(Cause.EVAL_MODE, model, CE, Y) is None
    assert severity(Cause.EVAL_MODE, net(3).eval(), CE, Y) is None


def test_a_loss_that_is_satisfied_has_no_gradient() -> None:
    model = net(1)
    nn.init.zeros_(model[2].weight)
    nn.init.constant_(model[2].bias, 5.0)
    assert severity(Cause.NO_GRADIENT, model, hinge, torch.ones(256, 1)) is None


def test_lines_of_output_and_loss() -> None:
    finding = found(net(3), categorical, ONE_HOT)[Cause.LOGITS_BEFORE_PROBABILITY_LOSS]
    line = categorical.__code__.co_firstlineno
    assert any(where.endswith(f"test_rules_contract.py:{line}") for where in finding.where)
    assert finding.sites == ("2",)


def test_a_loss_that_cuts_numbers_in_two_asks_for_one_unit() -> None:
    stars = torch.arange(256) % 10

    def loved(p: Tensor, y: Tensor) -> Tensor:
        return BCE(p.squeeze(1), (y > 4).float())

    assert severity(Cause.WRONG_OUTPUT_COUNT, net(1, nn.Sigmoid()), loved, stars) is None


@pytest.mark.parametrize("one_hot", [False, True])
def test_class_weights_answer_an_imbalance(one_hot: bool) -> None:
    rare = (torch.arange(256) % 32 == 0).long()
    y = F.one_hot(rare, 2).float() if one_hot else rare
    plain, weighted = CE, nn.CrossEntropyLoss(torch.tensor([0.05, 0.95]))
    assert severity(Cause.CLASS_IMBALANCE, net(2), plain, y) is WARNING
    assert severity(Cause.CLASS_IMBALANCE, net(2), weighted, y) is None


def test_a_positive_weight_answers_an_imbalance() -> None:
    y = (torch.arange(256) % 32 == 0).float()[:, None]
    weighted = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(31.0))
    assert severity(Cause.CLASS_IMBALANCE, net(1), nn.BCEWithLogitsLoss(), y) is WARNING
    assert severity(Cause.CLASS_IMBALANCE, net(1), weighted, y) is None


def test_a_step_of_several_batches_is_judged_as_a_whole() -> None:
    net_, y = net(2), torch.arange(256) // 128
    batches = list(zip(X.split(64), y.split(64), strict=True))
    alternating = [batches[i] for i in (0, 2, 1, 3)]
    for accumulate, given, alarm in ((1, batches, True), (2, alternating, False), (2, batches[:1], False)):
        setup = gm.Setup(net_, CE, accumulate=accumulate)
        causes = {f.cause for f in gm.diagnose(setup, given).findings}
        assert (Cause.CONSTANT_LABELS in causes) is alarm
