"""Repairs of output, loss, labels, input and wiring: each cures its fault, and keeps all promises."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ill
from gradmend.causes import Cause
from gradmend.contract import read_contract
from gradmend.diagnosis import RULES, diagnose
from gradmend.errors import NoEffectWarning
from gradmend.layers import Rescale
from gradmend.probe import measure
from gradmend.remedies import (
    AddDropout,
    Change,
    Descend,
    DropColumns,
    DropSquashing,
    FitLoss,
    LastActivation,
    LessDropout,
    NormalizeInput,
    OutputShape,
    OutputUnits,
    Reconnect,
    Relabel,
    Remedy,
    RescaleOutput,
    StandardizeInput,
    TrainMode,
    WeighClasses,
)
from gradmend.setup import Batch, Budget, Setup
from gradmend.training import run_trial, train
from helpers import ADAM, SGD, assert_same, plain
from ill import AMOUNT, CE, ONE_HOT, RARE, YES, X, Y, ends, network
from promises import applied, output

TABLES = {"output": ill.OUTPUTS, "loss": ill.LOSSES, "parts": ill.PARTS, "train": ill.CONFORMING}
FAULTS = [(table, name) for table, cases in TABLES.items() for name in cases]
every_fault = pytest.mark.parametrize(("table", "name"), FAULTS)
STEPS = Budget(steps=100)


@cache
def setup(table: str, name: str) -> Setup:
    torch.manual_seed(0)
    return TABLES[table][name][0]()


@cache
def treated(table: str, name: str) -> Change:
    _, batch, remedy, _ = TABLES[table][name]
    return remedy.apply(setup(table, name), batch)


@every_fault
def test_keeps_all_promises(table: str, name: str) -> None:
    _, batch, remedy, _ = TABLES[table][name]
    applied(remedy, setup(table, name), batch)


@pytest.mark.parametrize(("table", "name"), [fault for fault in FAULTS if fault[0] != "train"])
def test_the_fault_is_found_and_cured(table: str, name: str) -> None:
    _, batch, remedy, cause = TABLES[table][name]
    assert cause in remedy.treats
    assert cause in causes(setup(table, name), batch, table)
    assert cause not in causes(treated(table, name).setup, batch, table)


def causes(given: Setup, batch: Batch, table: str) -> set[Cause]:
    """All that is found; of output and loss without the steps on a copy, which say nothing of these."""
    if table == "parts":
        return {finding.cause for finding in diagnose(given, batch).findings}
    profile = replace(measure(given, batch), contract=read_contract(given, [batch]))
    return {finding.cause for rule in RULES if (finding := rule(profile))}


RIGHT = {  # shares of right answers after 100 steps; regressions: the error over the targets' variance
    "asleep": 1.0,
    "affine": 0.75,
    "rare class": 0.6,
    "rare class, function": 0.6,
    "rare class, smoothed": 0.6,
    "rare yes": 0.6,
}


@every_fault
def test_the_result_learns(table: str, name: str) -> None:
    _, (x, y), _, _ = TABLES[table][name]
    made = treated(table, name).setup.copy()
    train(made, [(x, y)], steps=100, device="cpu")
    with torch.no_grad():
        right = _right(made.model.eval()(x), y)
    assert right >= RIGHT.get(name, 0.9)


def _right(output: Tensor, y: Tensor) -> float:
    """The share of right answers, or of the variance that is explained."""
    if y.is_floating_point() and len(y.unique()) > 3:
        return 1 - float((output.reshape(y.shape) - y).square().mean() / y.var())
    if y.shape == output.shape and y.shape[1] > 1:
        return float((output.argmax(1) == y.argmax(1)).float().mean())
    if output.shape[1] > 1:
        return float((output.argmax(1) == y.flatten()).float().mean())
    middle = 0.5 if output.min() >= 0 and output.max() <= 1 else 0.0
    return float(((output > middle) == (y > y.float().mean())).float().mean())


# What each says of itself


def test_the_new_last_layer_computes_what_the_loss_takes() -> None:
    for name, wanted in {
        "no softmax": partial(torch.log_softmax, dim=1),
        "no softmax, own loss": partial(torch.softmax, dim=1),
        "sigmoid for softmax": lambda z: torch.logit(z).softmax(1),
        "sigmoid for amounts": torch.logit,
        "sigmoid function for amounts": torch.logit,
    }.items():
        before = setup("output", name).model(X)
        torch.testing.assert_close(
            treated("output", name).setup.model(X), wanted(before), rtol=1e-3, atol=1e-4
        )


def test_units_that_were_there_keep_their_weights() -> None:
    old = setup("output", "one unit, three classes").model[2]
    new = treated("output", "one unit, three classes").setup.model[2]
    assert torch.equal(new.weight[:1], old.weight)
    assert not new.weight[1:].any()
    mean = treated("output", "three units, one amount").setup.model[2].weight
    torch.testing.assert_close(mean[0], setup("output", "three units, one amount").model[2].weight.mean(0))


def test_an_output_that_no_sample_gets_through_becomes_linear() -> None:
    """A ReLU behind negative numbers puts out zeros, and lets no gradient back."""
    model = network(nn.ReLU(), out=1)
    nn.init.constant_(model[2].bias, -50.0)
    batch = (X, AMOUNT - AMOUNT.min())
    dead = Setup(model, nn.MSELoss(), SGD)
    assert Cause.NO_GRADIENT in diagnose(dead, batch).causes
    cured = LastActivation().apply(dead, batch).setup
    assert Cause.NO_GRADIENT not in diagnose(cured, batch).causes
    with pytest.warns(NoEffectWarning):
        LastActivation().apply(Setup(network(nn.ReLU(), out=1), nn.MSELoss(), SGD), batch)


@pytest.mark.parametrize("bounded", [False, True])
def test_rescaled_outputs_cover_the_targets(bounded: bool) -> None:
    given = Setup(network(*([nn.Tanh()] if bounded else []), out=2), nn.MSELoss(), SGD)
    y = torch.randn(96, 2) * torch.tensor([1000.0, 0.01]) + torch.tensor([5000.0, 0.0])
    after = RescaleOutput().apply(given, (X, y)).setup.model.after
    assert isinstance(after, Rescale)
    if bounded:
        low, high = after(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
        width = y.amax(0) - y.amin(0)
        torch.testing.assert_close(low, y.amin(0) - 0.1 * width, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(high, y.amax(0) + 0.1 * width, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(after.shift, y.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after.scale, y.std(0, correction=0), rtol=1e-4, atol=1e-4)


def test_a_rescaled_output_trains_where_the_plain_one_does_not() -> None:
    _, batch, _, _ = ill.OUTPUTS["large amounts"]
    plain, cured = setup("output", "large amounts"), treated("output", "large amounts").setup
    losses = [run_trial(s, [batch], STEPS).final_loss for s in (plain, cured)]
    assert losses[1] < 0.01 * losses[0]


@pytest.mark.parametrize(
    ("y", "given"),
    [
        (Y.int(), "y.long().flatten()"),
        (Y.float()[:, None], "y.long().flatten()"),
        (ONE_HOT, None),
        (ONE_HOT.long(), "y.to(output.dtype).view_as(output)"),
    ],
)
def test_the_right_loss_takes_targets_of_any_dtype(y: Tensor, given: str | None) -> None:
    made = FitLoss().apply(Setup(ends(ill.SOFTMAX)(), squared_of_shares, SGD), (X, y))
    used: Any = made.setup.loss_fn
    assert isinstance(used if given is None else used.loss, nn.CrossEntropyLoss)
    assert given is None or given in made.edits[-1].code
    torch.testing.assert_close(made.setup.loss((X, y)), F.cross_entropy(made.setup.model(X), Y))


def squared_of_shares(output: Tensor, target: Tensor) -> Tensor:
    hot = target if target.shape == output.shape else F.one_hot(target.long().flatten(), 3)
    return F.mse_loss(output, hot.to(output.dtype))


@pytest.mark.parametrize(
    "given",
    [
        Setup(network(), CE, SGD),
        Setup(ends(partial(nn.LogSoftmax, dim=1))(), nn.NLLLoss(), SGD),
        Setup(ends(ill.SOFTMAX)(), lambda o, t: F.nll_loss((o + 1e-9).log(), t), SGD),
    ],
)
@pytest.mark.parametrize(
    "remedy",
    [FitLoss(), LastActivation(), OutputUnits(), OutputShape(), Relabel(), Descend(), RescaleOutput()],
)
def test_what_suits_stays(given: Setup, remedy: Remedy) -> None:
    with pytest.warns(NoEffectWarning):
        remedy.apply(given, (X, Y))


@pytest.mark.parametrize(
    ("model", "loss", "y"),
    [
        (ends(nn.Sigmoid), nn.BCELoss(), YES),
        (network, nn.BCEWithLogitsLoss(), YES),
        (network, nn.MSELoss(), AMOUNT),
        (network, nn.L1Loss(), AMOUNT),
        (network, nn.SmoothL1Loss(), AMOUNT),
        (network, ill.hinge, 2 * YES - 1),
        (network, nn.SoftMarginLoss(), 2 * YES - 1),
        (network, nn.PoissonNLLLoss(), torch.arange(96.0)[:, None] % 5),
    ],
)
def test_losses_that_suit_their_targets_stay(model: Any, loss: Any, y: Tensor) -> None:
    for remedy in (FitLoss(), LastActivation(), OutputUnits(), Relabel(), DropSquashing()):
        with pytest.warns(NoEffectWarning):
            remedy.apply(Setup(model(out=1), loss, SGD), (X, y))


def test_weights_of_classes_are_the_inverse_of_their_shares() -> None:
    weight = treated("loss", "rare class").setup.loss_fn.weight
    torch.testing.assert_close(weight, torch.tensor([48 / 92, 48 / 4]))
    assert treated("loss", "rare yes").setup.loss_fn.pos_weight.item() == pytest.approx(92 / 4)
    made = treated("loss", "rare class, function").setup
    wanted = F.cross_entropy(made.model(X), RARE, weight=weight)
    torch.testing.assert_close(made.loss((X, RARE)), wanted)
    with pytest.warns(NoEffectWarning):
        WeighClasses().apply(Setup(network(), CE, SGD), (X, Y))


@pytest.mark.parametrize(
    ("labels", "model", "loss"),
    [
        (Y + 1, network, lambda o, t: F.cross_entropy(o, t.clamp(0, 2))),
        (Y / 2, network, lambda o, t: F.cross_entropy(o, t.long())),
    ],
)
def test_labels_find_their_places(labels: Tensor, model: Any, loss: Any) -> None:
    made = Relabel().apply(Setup(model(), loss, SGD), (X, labels)).setup
    torch.testing.assert_close(made.loss((X, labels)), F.cross_entropy(made.model(X), Y))


def test_stray_columns_are_silenced_and_others_stay() -> None:
    made = treated("train", "numbered rows")
    assert made.remedy == DropColumns((7,))
    x = ill.numbered_rows()
    silenced = made.setup.model.before(x)
    assert torch.equal(silenced[:, :7], x[:, :7])
    assert not silenced[:, 7].any()


def test_normalized_columns_run_from_0_to_1() -> None:
    x = torch.cat([X[:, :7] * 100, torch.full((96, 1), 5.0)], 1)
    made = applied(NormalizeInput(), Setup(network(), CE, SGD), (x, Y)).setup
    z = made.model.before(x)
    assert torch.equal(z.amin(0), torch.zeros(8))
    torch.testing.assert_close(z.amax(0), torch.tensor([1.0] * 7 + [0.0]))


def test_one_scaling_takes_the_place_of_the_other() -> None:
    given = NormalizeInput().apply(Setup(network(), CE, SGD), (X, Y)).setup
    twice = StandardizeInput().apply(given, (X, Y)).setup
    once = StandardizeInput().apply(Setup(network(), CE, SGD), (X, Y)).setup
    assert_same(twice.model.state_dict(), once.model.state_dict())


def test_unfrozen_parameters_reach_a_live_optimizer() -> None:
    model = ill.frozen()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    made = applied(ill.Unfreeze(), Setup(model, CE, optimizer), (X, Y)).setup
    assert len(made.build_optimizer().param_groups[0]["params"]) == 4


class Aiming(ill.Body):
    """Its cut is meant: it keeps no parameter from learning."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.body(x)
        return scores - scores.data.mean(1, keepdim=True)


def test_gradients_reach_what_was_cut_off_and_a_cut_that_is_meant_stays() -> None:
    before, after = (s.copy() for s in (setup("parts", "cut off"), treated("parts", "cut off").setup))
    for given, reached in ((before, 2), (after, 4)):
        given.loss((X, Y)).backward()
        assert sum(p.grad is not None for p in given.model.parameters()) == reached
    assert_same(output(after.model, (X, Y)), output(before.model, (X, Y)))
    with pytest.warns(NoEffectWarning):
        Reconnect().apply(Setup(Aiming(), CE, SGD), (X, Y))


class CutInABranch(ill.Body):
    def forward(self, x: Tensor) -> Tensor:
        h = self.body[0](x)
        if h.sum() > -1e9:
            h = h.detach()
        return self.body[2](h)


def test_a_cut_that_cannot_be_traced_is_left_to_the_user() -> None:
    with pytest.warns(NoEffectWarning, match="Take out `detach` by hand"):
        made = Reconnect().apply(Setup(CutInABranch(), CE, SGD), (X, Y))
    line = CutInABranch.forward.__code__.co_firstlineno + 2
    assert made.by_hand[0].startswith(f"{__file__}:{line}: torch.fx cannot trace")


def test_train_mode_spares_frozen_normalization() -> None:
    model = ill.asleep()
    model[1].requires_grad_(False)
    with pytest.warns(NoEffectWarning):
        TrainMode().apply(Setup(model, CE, SGD), (X, Y))
    assert treated("parts", "asleep").setup.model[1].training


@pytest.mark.parametrize("name", ["dropout", "dropout as a function"])
def test_dropout_is_bounded_in_training_and_off_in_evaluation(name: str) -> None:
    model = treated("train", name).setup.model
    found = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert [m.p for m in found] == [0.1]
    batch = (X, Y)
    assert_same(
        output(model, batch, training=False), output(setup("train", name).model, batch, training=False)
    )
    with pytest.warns(NoEffectWarning):
        LessDropout(0.99).apply(setup("train", name), batch)


def test_dropout_is_added_after_hidden_activations() -> None:
    given = Setup(plain(3, nn.ReLU), CE, SGD)
    made = applied(AddDropout(0.3), given, (X, Y)).setup
    assert sum(isinstance(m, nn.Dropout) for m in made.model.modules()) == 3
    assert_same(output(made.model, (X, Y), training=False), output(given.model, (X, Y)))


@pytest.mark.parametrize(
    ("remedy", "loss", "y", "words"),
    [
        (DropSquashing(), CE, Y, "leave out `softmax` by hand"),
        (FitLoss(), nn.MSELoss(), ONE_HOT, "leave out `softmax` by hand"),
        (LastActivation(), nn.NLLLoss(), Y, "type `LogSoftmax(dim=1)` for `softmax` by hand"),
    ],
)
def test_what_cannot_be_traced_is_left_to_the_user_with_its_line(
    remedy: Remedy, loss: Any, y: Tensor, words: str
) -> None:
    first = ill.Branching.forward.__code__.co_firstlineno
    with pytest.warns(NoEffectWarning, match="found nothing to change.*by hand"):
        made = remedy.apply(Setup(ill.Branching(), loss, ADAM), (X, y))
    (text,) = made.by_hand
    assert text.startswith(f"{ill.__file__}:{first + 3}: {words}")
    assert f"{ill.__file__}:{first + 1}: torch.fx cannot trace this forward" in text
