"""Stacks: each training is the same as alone, whatever it is trained together with."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from gradmend import Setup
from gradmend.data import Data, load
from gradmend.errors import SetupError
from gradmend.remedies import ClipAdaptive
from gradmend.stack import train_many
from gradmend.training import History, train
from gradmend.zoo import mlp


@pytest.fixture(autouse=True)
def _stacked_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise trainings as short as these would not repay tracing and be taken one after the other."""
    monkeypatch.setattr("gradmend.stack.many._WORTH", 0)


Make = Callable[[int], Setup]

NETWORKS, STEPS, ROWS = 4, 50, 64
CROSS = nn.CrossEntropyLoss()
DIGITS = load("digits")
DOUBLE = Data(DIGITS.x.double(), DIGITS.y, DIGITS.x_test.double(), DIGITS.y_test, "digits", 10)


def network(seed: int, **settings: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp(64, 10, **{"depth": 3, "activation": "relu", "width": 16, **settings}).double()


PLAIN = partial(SGD, lr=0.1)


def setup(seed: int, optimizer: Any = PLAIN, network: Any = network, **others: Any) -> Setup:
    return Setup(network(seed), CROSS, optimizer, **others)


def dropping(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    parts = (
        nn.Linear(64, 16),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(16, 16),
        nn.Dropout(0.1),
        nn.Linear(16, 10),
    )
    return nn.Sequential(*parts).double()


def frozen(seed: int) -> nn.Module:
    model = network(seed)
    model[0].requires_grad_(False)
    return model


def by_layer(parameters: Any, seed: int) -> AdamW:
    weights = [p for p in parameters if p.dim() > 1]
    biases = [p for p in parameters if p.dim() < 2]
    return AdamW([{"params": weights, "lr": 1e-3 * (1 + seed // 2)}, {"params": biases, "weight_decay": 0.0}])


class Weighted(nn.Module):
    """A tensor that is neither parameter nor buffer, and a weight that is used twice."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.twice, self.last = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.scale = torch.full((16,), 0.5, dtype=torch.float64)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twice(torch.tanh(self.first(x))) * self.scale
        return self.last(torch.sigmoid(self.twice(hidden)))


MAKE: dict[str, Make] = {
    "SGD, each its own rate": lambda s: setup(s, partial(SGD, lr=0.1 * (s + 1))),
    "momentum and decay": lambda s: setup(s, partial(SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)),
    "Adam": lambda s: setup(s, partial(Adam, lr=1e-3)),
    "AdamW, cosine, clipped": lambda s: setup(
        s,
        partial(AdamW, lr=1e-2 * (1 + s // 2)),
        schedule=partial(CosineAnnealingLR, T_max=50),
        gradient_transform=partial(clip_grad_norm_, max_norm=0.5),
    ),
    "clipped by value": lambda s: setup(
        s, partial(RMSprop, lr=1e-3), gradient_transform=partial(clip_grad_value_, clip_value=0.01)
    ),
    "clipped by unit": lambda s: ClipAdaptive().apply(setup(s), DOUBLE.head(8)).setup,
    "groups": lambda s: setup(s, partial(by_layer, seed=s)),
    "batch normalization": lambda s: setup(s, partial(Adam, lr=1e-3), partial(network, norm="batch")),
    "layer normalization and skips": lambda s: setup(
        s, partial(Adagrad, lr=1e-2), partial(network, norm="layer", skip=True)
    ),
    "dropout": lambda s: setup(s, partial(Adam, lr=1e-3), dropping),
    "accumulated": lambda s: setup(s, partial(Adam, lr=1e-3), accumulate=3),
    "PReLU": lambda s: setup(s, partial(NAdam, lr=1e-3), partial(network, activation="prelu")),
    "frozen": lambda s: setup(s, network=frozen),
    "shared weights": lambda s: setup(s, network=Weighted),
    "weighted classes": lambda s: Setup(
        network(s), nn.CrossEntropyLoss(torch.arange(10).double(), label_smoothing=0.1), partial(SGD, lr=0.1)
    ),
    "RAdam": lambda s: setup(s, partial(RAdam, lr=1e-2)),
    "Adamax": lambda s: setup(s, partial(Adamax, lr=1e-2)),
    "Adadelta": lambda s: setup(s, partial(Adadelta, lr=0.5)),
}


def alone(setups: list[Setup], data: Data = DOUBLE, **length: Any) -> list[History]:
    return [train(each, data, seed=seed, device="cpu", **length) for seed, each in enumerate(setups)]


def together(setups: list[Setup], data: Data = DOUBLE, **length: Any) -> tuple[list[History], bool]:
    """What they did, and whether they were stacked: alone, all steps of one are shown at once."""
    shown: list[int] = []
    found = train_many(setups, data, seeds=range(len(setups)), device="cpu", show=shown.append, **length)
    steps = [history.steps for history in found]
    assert sum(shown) >= sum(steps)
    return found, shown != steps


def assert_same(stacked: list[History], plain: list[History], rel: float = 1e-9) -> None:
    for one, other in zip(stacked, plain, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=rel, nan_ok=True)
        assert one.accuracy == other.accuracy
        assert one.test_accuracy == other.test_accuracy
        assert (one.steps, one.epochs, one.diverged) == (other.steps, other.epochs, other.diverged)


@pytest.mark.parametrize("name", MAKE)
def test_each_network_is_trained_as_alone(name: str) -> None:
    own, others = ([MAKE[name](seed) for seed in range(NETWORKS)] for _ in range(2))
    stacked, as_one = together(own, steps=STEPS, batch_size=ROWS)
    assert_same(stacked, alone(others, steps=STEPS, batch_size=ROWS))
    assert as_one
    for one, other in zip(own, others, strict=True):
        state = other.model.state_dict()
        for key, value in one.model.state_dict().items():
            # a bias before batch normalization has no gradient but rounding, which Adam takes for one
            assert torch.allclose(value.double(), state[key].double(), rtol=1e-8, atol=1e-8), key


@settings(max_examples=8, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "depth": st.integers(1, 5),
            # layer normalization of two units is a step: where they are all but equal, rounding decides
            "width": st.integers(3, 12),
            "activation": st.sampled_from(["sigmoid", "tanh", "elu", "gelu", "silu", "softplus"]),
            "norm": st.sampled_from([None, "batch", "layer"]),
            "skip": st.booleans(),
        }
    ),
    st.integers(3, 200),
)
def test_of_any_architecture(architecture: dict[str, Any], rows: int) -> None:
    own, others = ([setup(s, network=partial(network, **architecture)) for s in range(3)] for _ in range(2))
    # Layer normalization over few units that are nearly equal divides by their difference: rounding grows,
    # with five units of tanh past 1e-5 in 20 steps. So fewer are compared here; other tests compare 50.
    stacked, as_one = together(own, steps=10, batch_size=rows)
    assert_same(stacked, alone(others, steps=10, batch_size=rows), rel=1e-6)
    assert as_one


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.cell, self.last = kind(8, 8, batch_first=True), nn.Linear(8, 10)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(x.unflatten(1, (8, 8)))[0][:, -1])


class Convolutional(nn.Sequential):
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        convolution = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
        super().__init__(nn.Unflatten(1, (1, 8, 8)), *convolution, nn.Flatten(), nn.Linear(36, 10))
        self.double()


@pytest.mark.parametrize(
    "network",
    [partial(Recurrent, nn.RNN), partial(Recurrent, nn.GRU), partial(Recurrent, nn.LSTM), Convolutional],
    ids=["RNN", "GRU", "LSTM", "convolution"],
)
def test_of_other_kinds(network: Any) -> None:
    own, others = ([setup(seed, network=network) for seed in range(NETWORKS)] for _ in range(2))
    stacked, as_one = together(own, steps=20, batch_size=ROWS)
    assert_same(stacked, alone(others, steps=20, batch_size=ROWS))
    assert as_one


def test_several_structures_keep_their_order() -> None:
    def make() -> list[Setup]:
        shapes = [{}, {"activation": "tanh"}, {"width": 8}]
        return [setup(seed, network=partial(network, **shapes[seed % 3])) for seed in range(9)]

    stacked, as_one = together(make(), steps=41, batch_size=ROWS)
    assert_same(stacked, alone(make(), steps=41, batch_size=ROWS))
    assert as_one


def test_a_network_that_diverges_hurts_no_other() -> None:
    def make() -> list[Setup]:
        return [setup(seed, partial(SGD, lr=1e200 if seed == 1 else 0.1)) for seed in range(NETWORKS)]

    stacked, _ = together(make(), epochs=3, batch_size=ROWS)
    plain = alone(make(), epochs=3, batch_size=ROWS)
    assert [history.diverged for history in stacked] == [seed == 1 for seed in range(NETWORKS)]
    assert len(stacked[1].loss) == len(plain[1].loss)
    assert_same(stacked[2:], plain[2:])


def test_what_it_is_trained_with_makes_no_difference() -> None:
    many, _ = together([setup(s, network=dropping) for s in range(NETWORKS)], steps=60, batch_size=ROWS)
    few, as_one = together([setup(s, network=dropping) for s in range(2)], steps=60, batch_size=ROWS)
    assert as_one
    assert_same(few, many[:2])


def test_single_precision_learns_as_well() -> None:
    def make() -> list[Setup]:
        return [setup(s, partial(Adam, lr=1e-2), lambda seed: network(seed).float()) for s in range(8)]

    stacked, as_one = together(make(), DIGITS, epochs=5, batch_size=ROWS)
    plain = alone(make(), DIGITS, epochs=5, batch_size=ROWS)
    assert as_one
    rates = [torch.tensor([history.test_accuracy for history in each]) for each in (stacked, plain)]
    assert rates[0].mean() > 0.85
    assert abs(rates[0].mean() - rates[1].mean()) < 2 * rates[1].std() / math.sqrt(8)


def live(seed: int) -> Setup:
    model = network(seed)
    return Setup(model, CROSS, SGD(model.parameters(), 0.1))


def half_used(seed: int) -> Setup:
    model = network(seed)
    model.unused = nn.Linear(2, 2).double()
    model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)  # type: ignore[method-assign]
    return Setup(model, CROSS, partial(AdamW, lr=0.1))


class Choosing(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layers = network(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x if x.sum() > 0 else -x)


ALONE: dict[str, Make] = {
    "a live optimizer": live,
    "a parameter that is not used": half_used,
    "a forward that looks at numbers": lambda s: setup(s, network=Choosing),
    "weight normalization": lambda s: setup(
        s, network=lambda seed: nn.Sequential(nn.utils.parametrizations.weight_norm(network(seed)[0]))
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_be_stacked_is_trained_alone(name: str) -> None:
    stacked, as_one = together([ALONE[name](seed) for seed in range(3)], steps=45, batch_size=ROWS)
    plain = alone([ALONE[name](seed) for seed in range(3)], steps=45, batch_size=ROWS)
    assert [one.loss for one in stacked] == [other.loss for other in plain]
    assert not as_one


def test_an_interrupt_ends_it_and_changes_no_weight() -> None:
    setups = [setup(seed) for seed in range(NETWORKS)]
    before = [p.detach().clone() for each in setups for p in each.model.parameters()]

    def interrupt(steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_many(setups, DOUBLE, seeds=range(NETWORKS), steps=10_000, show=interrupt)
    after = [p for each in setups for p in each.model.parameters()]
    assert all(map(torch.equal, before, after))
    assert all(each.model.training for each in setups)


def test_modes_return() -> None:
    setups = [setup(seed, network=partial(network, norm="batch")) for seed in range(NETWORKS)]
    for each in setups:
        each.model.eval()
    _, as_one = together(setups, steps=STEPS, batch_size=ROWS)
    assert as_one
    assert not any(module.training for each in setups for module in each.model.modules())


def test_random_numbers_and_threads_stay() -> None:
    setups = [setup(seed, network=dropping) for seed in range(NETWORKS)]
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    together(setups, steps=STEPS)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_seeds_and_setups_must_be_as_many() -> None:
    with pytest.raises(SetupError, match=r"2 setups, but 3 seeds"):
        train_many([setup(0), setup(1)], DOUBLE, seeds=range(3))


def test_a_schedule_that_waits_for_a_measure_is_refused() -> None:
    with pytest.raises(SetupError, match="ReduceLROnPlateau"):
        together([setup(s, schedule=ReduceLROnPlateau) for s in range(NETWORKS)], steps=STEPS)
