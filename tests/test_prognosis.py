"""The prognosis: monotone, explained, the same every time; high for sound setups, low for broken ones."""

import json
import math
from dataclasses import replace
from functools import partial
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.prognosis.fit import calibrated, fit_curves, folds, outcomes
from benchmarks.prognosis.make import make, measure_again, measured_features
from benchmarks.prognosis.networks import FAMILIES, draw
from benchmarks.prognosis.outcome import Outcome
from benchmarks.prognosis.report import auc, calibration_error
from benchmarks.prognosis.table import Example, append, read, write
from benchmarks.prognosis.tasks import task
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradmend as gm
from gradmend.diagnosis.prognosis import FEATURES, Curve, Prognosis, features, prognose
from gradmend.response import Losses, Outlook, look_ahead
from gradmend.zoo import mlp
from helpers import SGD, assert_same, blobs, trace

ADAM = partial(torch.optim.Adam, lr=1e-2)
CE = nn.CrossEntropyLoss()
DATA = json.loads(files("gradmend.diagnosis").joinpath("prognosis.json").read_text())
CURVES = {name: Curve(tuple(c["knots"]), tuple(c["log_odds"])) for name, c in DATA["curves"].items()}
NUMBERS = st.floats(-40, 40)
LOSSES = st.builds(Losses, st.floats(0, 1e6), st.floats(0, 1e6), st.floats(-1, 1))
OUTLOOKS = st.builds(
    Outlook, *[LOSSES] * 6, moved=st.floats(0, 10), readable=st.floats(-1, 1), rate=st.floats(1e-6, 10)
)


def batches(count: int = 4) -> list[Any]:
    x, y = blobs(64 * count)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return list(zip(x[order].split(64), y[order].split(64), strict=True))


def setup(optimizer: Any = ADAM, scale: float = 1.0, **changes: Any) -> gm.Setup:
    torch.manual_seed(0)
    model = mlp(8, 3, **({"width": 32, "depth": 2, "activation": "relu", "init": "he"} | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return gm.Setup(model, CE, optimizer)


def foresee(which: gm.Setup, count: int = 4) -> Prognosis:
    outlook = look_ahead(which, batches(count))
    assert isinstance(outlook, Outlook)
    return prognose(gm.measure(which, batches()[0]), outlook)


BROKEN = {
    "weights of zero": partial(setup, init="zero"),
    "rate far too low": partial(setup, partial(torch.optim.SGD, lr=1e-6)),
    "rate far too high": partial(setup, partial(torch.optim.SGD, lr=1e4)),
    "vanishing gradient": partial(setup, SGD, depth=30, activation="sigmoid", init="default"),
    "weights of NaN": partial(setup, scale=math.nan),
}


@pytest.mark.parametrize("optimizer", [ADAM, partial(torch.optim.SGD, lr=0.2, momentum=0.9)])
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_sound_networks_are_trusted(activation: str, optimizer: Any) -> None:
    assert foresee(setup(optimizer, activation=activation)).probability > 0.7


@pytest.mark.parametrize("name", BROKEN)
def test_broken_networks_are_not(name: str) -> None:
    """Not zero: the one that hardly moves tells targets apart by luck as it stands, by 0.27."""
    assert foresee(BROKEN[name]()).probability < 0.2


@pytest.mark.parametrize("name", BROKEN)
def test_reasons_add_up_to_the_log_odds(name: str) -> None:
    prognosis = foresee(BROKEN[name]())
    total = prognosis.base + sum(reason.log_odds for reason in prognosis.reasons)
    assert prognosis.log_odds == pytest.approx(total)
    assert prognosis.probability == pytest.approx(1 / (1 + math.exp(-total)))
    assert {*prognosis.speaks_for, *prognosis.speaks_against} <= {*prognosis.reasons}
    weights = [abs(reason.log_odds) for reason in prognosis.reasons]
    assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize("name", CURVES)
@given(low=NUMBERS, high=NUMBERS)
def test_no_curve_ever_falls(name: str, low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert CURVES[name](low) <= CURVES[name](high) + 1e-12


@given(outlook=OUTLOOKS, factor=st.floats(0, 1))
def test_a_lower_loss_after_the_steps_never_lowers_the_probability(outlook: Outlook, factor: float) -> None:
    """If all later losses of the own targets fall, everything read from them rises or stays."""
    after, everywhere, ahead = (
        replace(losses, own=factor * losses.own)
        for losses in (outlook.after, outlook.everywhere, outlook.ahead)
    )
    better = replace(outlook, after=after, everywhere=everywhere, ahead=ahead)
    found, improved = (prognose(PROFILE, o) for o in (outlook, better))
    assert improved.log_odds >= found.log_odds - 1e-9


@given(outlook=OUTLOOKS, share=st.floats(0, 1))
def test_outputs_that_follow_the_targets_better_never_lower_the_probability(
    outlook: Outlook, share: float
) -> None:
    alignment = outlook.ahead.alignment + share * (1 - outlook.ahead.alignment)
    readable = outlook.readable + share * (1 - outlook.readable)
    better = replace(outlook, ahead=replace(outlook.ahead, alignment=alignment), readable=readable)
    assert prognose(PROFILE, better).log_odds >= prognose(PROFILE, outlook).log_odds - 1e-9


PROFILE = gm.measure(setup(), batches()[0])


def test_the_data_file_is_whole() -> None:
    assert set(CURVES) <= set(FEATURES)
    assert DATA["examples"] >= 500
    for curve in CURVES.values():
        assert list(curve.knots) == sorted(set(curve.knots))
        assert len(curve.knots) == len(curve.log_odds)
        assert all(map(math.isfinite, (*curve.knots, *curve.log_odds)))
        assert curve.log_odds[0] < 0 < curve.log_odds[-1]


def test_what_cannot_be_measured_says_nothing() -> None:
    """A network of one layer has no hidden one whose samples could look alike."""
    model = gm.Setup(nn.Linear(8, 3), CE, ADAM)
    reasons = foresee(model).reasons
    missing = [reason for reason in reasons if math.isnan(reason.value)]
    assert missing
    assert all(reason.log_odds == 0 for reason in missing)


def test_features_are_numbers_whatever_is_wrong() -> None:
    for broken in BROKEN.values():
        which = broken()
        outlook = look_ahead(which, batches())
        assert isinstance(outlook, Outlook)
        found = features(gm.measure(which, batches()[0]), outlook)
        assert list(found) == list(FEATURES)
        assert not any(map(math.isinf, found.values()))


def test_it_is_the_same_every_time_and_disturbs_nothing() -> None:
    which = setup()
    before = trace(which)
    assert foresee(which) == foresee(which)
    assert_same(before, trace(which))


def test_one_batch_is_enough() -> None:
    sound, broken = foresee(setup(), count=1), foresee(BROKEN["weights of zero"](), count=1)
    assert sound.probability > 0.5 > broken.probability


def test_it_prints_in_eighty_columns_and_becomes_plain_data() -> None:
    for which in (setup(), BROKEN["weights of NaN"]()):
        prognosis = foresee(which)
        text = str(prognosis)
        assert f"{prognosis.probability:.0%}" in text
        assert max(map(len, text.splitlines())) <= 80
        data = json.loads(json.dumps(prognosis.to_dict(), allow_nan=False))
        assert data["probability"] == prognosis.probability
        assert len(data["reasons"]) == len(prognosis.reasons)


EXAMPLES = read()


def test_the_curves_are_those_of_the_table() -> None:
    fitted = calibrated(EXAMPLES)
    assert DATA["examples"] == len(EXAMPLES)
    assert fitted.base == pytest.approx(DATA["base"], abs=0.02)
    for example in EXAMPLES[::50]:
        shipped = DATA["base"] + sum(curve(example.features[name]) for name, curve in CURVES.items())
        assert fitted.log_odds(example.features) == pytest.approx(shipped, abs=0.05)


@pytest.mark.parametrize("example", EXAMPLES[7::200], ids=lambda example: str(example.setup.seed))
def test_the_table_is_what_its_seeds_give(example: Example) -> None:
    """Sums in another order, on another processor, change little."""
    assert draw(example.setup.seed) == example.setup
    assert measured_features(example.setup) == pytest.approx(
        example.features, rel=0.05, abs=0.02, nan_ok=True
    )


def test_the_table_shows_all_kinds() -> None:
    assert {family for shares in FAMILIES.values() for family in shares} == {e.setup.family for e in EXAMPLES}
    for example in EXAMPLES:
        assert set(example.features) == set(FEATURES)
        assert task(example.setup.task).guess < example.outcome.reference


def test_networks_on_unseen_data_sets_are_told_apart() -> None:
    """The report's numbers with some room, so that no change of the features loses them unseen."""
    p = np.empty(len(EXAMPLES))
    for held in folds(EXAMPLES):
        fitted = calibrated([e for e, out in zip(EXAMPLES, held, strict=True) if not out])
        p[held] = [1 / (1 + math.exp(-fitted.log_odds(EXAMPLES[k].features))) for k in np.flatnonzero(held)]
    assert auc(outcomes(EXAMPLES), p) > 0.94
    assert calibration_error(outcomes(EXAMPLES), p) < 0.05


def test_area_and_calibration_error_by_hand() -> None:
    y, p = np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.1, 0.6, 0.6, 0.9])
    assert auc(y, p) == 3.5 / 4
    assert calibration_error(y, p) == pytest.approx((0.1 + 0.2 + 0.1) / 4)


def test_examples_survive_the_file(tmp_path: Any) -> None:
    example = replace(EXAMPLES[0], features={"a": math.nan, "b": 0.5}, again=Outcome(0.5, 0.1, 0.9))
    write([example], tmp_path / "t.gz")
    append(EXAMPLES[1], tmp_path / "t.gz")
    found = read(tmp_path / "t.gz")
    assert found[0].features == pytest.approx(example.features, nan_ok=True)
    assert replace(found[0], features={}) == replace(example, features={})
    assert found[1] == EXAMPLES[1]
    assert found[0].again is not None
    assert found[0].again.share == pytest.approx(0.5)


def test_making_goes_on_where_it_ended(tmp_path: Any) -> None:
    write(EXAMPLES[:1], tmp_path / "t.gz")
    make(tmp_path / "t.gz", seconds=60, most=1)
    known, made = read(tmp_path / "t.gz")
    assert known == EXAMPLES[0]
    assert made.setup == EXAMPLES[1].setup
    assert made.outcome.score == pytest.approx(EXAMPLES[1].outcome.score, abs=0.02)


def test_measuring_again_keeps_what_became_of_the_setups(tmp_path: Any) -> None:
    write([replace(EXAMPLES[0], features={"a": 1.0})], tmp_path / "t.gz")
    measure_again(tmp_path / "t.gz")
    (found,) = read(tmp_path / "t.gz")
    assert found.outcome == EXAMPLES[0].outcome
    assert found.features == pytest.approx(EXAMPLES[0].features, rel=0.05, abs=0.02, nan_ok=True)


def test_a_fit_finds_the_feature_that_matters() -> None:
    """Of features of noise and one that decides, falling as well as rising ones: only rising ones count."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, len(FEATURES)))
    trains = rng.random(400) < 1 / (1 + np.exp(-4 * x[:, 0] + 4 * x[:, 1]))
    scores = np.where(trains, 1.0, 0.0)
    examples = [
        Example(EXAMPLES[0].setup, dict(zip(FEATURES, row, strict=True)), Outcome(score, 0.0, 1.0))
        for row, score in zip(x, scores, strict=True)
    ]
    rises = {name: c.log_odds[-1] - c.log_odds[0] for name, c in fit_curves(examples).curves.items()}
    assert max(rises, key=lambda name: rises[name]) == FEATURES[0]
    assert FEATURES[1] not in rises
