"""Recurrent remedies: what they do to gates, recurrent weights and gradients through time, measured."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmend.causes import Cause
from gradmend.diagnosis import diagnose
from gradmend.errors import NoEffectWarning, SetupError
from gradmend.remedies import (
    Chrono,
    ForgetBias,
    Gated,
    IdentityRecurrence,
    OrthogonalRecurrence,
    Remedy,
    Truncate,
)
from gradmend.sequences import HiddenOnly, Truncated, gated
from gradmend.setup import Budget, Setup
from gradmend.training import run_trial
from helpers import ADAM, assert_same
from promises import applied, grown, output

CE = nn.CrossEntropyLoss()
STEPS, WIDTH = 30, 16


class Reader(nn.Module):
    """A recurrent layer whose last output, or last state, is classified."""

    def __init__(self, layer: nn.Module, by_state: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.out, self.by_state = layer, nn.Linear(WIDTH, 2), by_state

    def forward(self, x: Tensor) -> Tensor:
        output, state = self.layer(x)
        return self.out(state[-1] if self.by_state else output[:, -1])


class Cells(nn.Module):
    """A cell that the user's own loop calls."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.out = cell, nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), WIDTH)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state)


class Loop(nn.Module):
    """Recurrence by hand, over linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.turn, self.out = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), WIDTH)
        for step in x.unbind(1):
            state = torch.tanh(self.read(step) + self.turn(state))
        return self.out(state)


def sequences(steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """The class is the sign of the very first number."""
    x = torch.randn(64, steps, 3, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0, 0] > 0).long()


def rnn(kind: type[nn.Module] = nn.RNN, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(3, WIDTH, batch_first=True, **options)


def setup(layer: nn.Module, by_state: bool = False) -> Setup:
    return Setup(Reader(layer, by_state), CE, ADAM)


LAYERS: dict[str, Callable[[], Setup]] = {
    "rnn": lambda: setup(rnn()),
    "rnn, last state": lambda: setup(rnn(num_layers=2), by_state=True),
    "rnn of two directions": lambda: setup(nn.Sequential(rnn(bidirectional=True), Halves())),
    "gru": lambda: setup(rnn(nn.GRU)),
    "lstm": lambda: Setup(Reader(rnn(nn.LSTM, num_layers=2)), CE, ADAM),
    "rnn cell": lambda: Setup(Cells(nn.RNNCell(3, WIDTH)), CE, ADAM),
    "gru cell": lambda: Setup(Cells(nn.GRUCell(3, WIDTH)), CE, ADAM),
    "loop": lambda: Setup(Loop(), CE, ADAM),
}


class Halves(nn.Module):
    """The mean of both directions."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0].unflatten(-1, (2, WIDTH)).mean(-2), pair[1]


GATED = ("gru", "lstm", "gru cell")
PLAIN = ("rnn", "rnn, last state", "rnn of two directions", "rnn cell")
WORKS = [
    *((Gated("GRU"), name) for name in PLAIN),
    *((Gated("LSTM"), name) for name in PLAIN[:3]),
    *((remedy, name) for remedy in (ForgetBias(), Chrono(), Chrono(50)) for name in GATED),
    *((OrthogonalRecurrence(), name) for name in LAYERS),
    *((IdentityRecurrence(0.9), name) for name in PLAIN),
    *((Truncate(7), name) for name in ("rnn", "rnn, last state", "gru", "lstm")),
]


@pytest.mark.parametrize(("remedy", "name"), WORKS, ids=[f"{r.title}, {n}" for r, n in WORKS])
def test_keeps_all_promises(remedy: Remedy, name: str) -> None:
    applied(remedy, LAYERS[name](), sequences())


@pytest.mark.parametrize(
    ("remedy", "name"),
    [
        (Gated("GRU"), "lstm"),
        (Gated("LSTM"), "rnn cell"),
        (ForgetBias(), "rnn"),
        (Chrono(), "loop"),
        (IdentityRecurrence(), "gru"),
        (Truncate(7), "rnn of two directions"),
        (Truncate(STEPS), "gru"),
    ],
)
def test_says_when_there_is_nothing_to_do(remedy: Remedy, name: str) -> None:
    with pytest.warns(NoEffectWarning):
        remedy.apply(LAYERS[name](), sequences())


def test_an_unknown_cell_is_refused() -> None:
    with pytest.raises(SetupError, match="becomes a GRU or an LSTM, not 'Elman'"):
        Gated("Elman")


@pytest.mark.parametrize("remedy", [Gated("GRU"), Gated("LSTM")])
def test_the_weights_of_the_rnn_become_those_of_the_candidate(remedy: Gated) -> None:
    given = LAYERS["rnn"]()
    old, new = given.model.layer, remedy.apply(given, sequences()).setup.model.layer
    new = new.body if isinstance(new, HiddenOnly) else new
    for name, value in old.named_parameters():
        assert torch.equal(getattr(new, name)[2 * WIDTH : 3 * WIDTH], value)
    assert grown(new) == {"GRU": 3, "LSTM": 4}[remedy.to] * grown(old)


def test_with_open_gates_a_gru_computes_what_the_rnn_did() -> None:
    old = rnn()
    new = gated(old, "GRU")
    for bias in (new.bias_ih_l0, new.bias_hh_l0):  # r = 1, z = 0
        bias.data[:WIDTH], bias.data[WIDTH : 2 * WIDTH] = 50.0, -50.0
    x, _ = sequences()
    torch.testing.assert_close(new(x)[0], old(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GATED)
def test_the_forget_gate_opens(name: str) -> None:
    model = ForgetBias(2.0).apply(LAYERS[name](), sequences()).setup.model
    layer = model.cell if isinstance(model, Cells) else model.layer
    for first, second in zip(biases(layer, "bias_ih"), biases(layer, "bias_hh"), strict=True):
        sums = (first + second)[WIDTH : 2 * WIDTH]
        assert torch.equal(sums, torch.full((WIDTH,), 2.0))


def biases(layer: nn.Module, stem: str) -> list[Tensor]:
    return [value for name, value in layer.named_parameters() if name.startswith(stem)]


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_chrono_spreads_time_constants_up_to_the_length(name: str) -> None:
    made = Chrono().apply(LAYERS[name](), sequences())
    assert made.remedy == Chrono(steps=STEPS)
    layer = made.setup.model.layer
    keep = layer.bias_ih_l0[WIDTH : 2 * WIDTH].detach()
    assert ((keep.exp() >= 1 - 1e-6) & (keep.exp() <= STEPS - 1)).all()
    assert keep.exp().std() > 0.15 * STEPS  # that of a uniform distribution is 0.29
    assert not layer.bias_hh_l0[WIDTH : 2 * WIDTH].any()
    if name == "lstm":
        assert torch.equal(layer.bias_ih_l0[:WIDTH], -keep)


@pytest.mark.parametrize("name", LAYERS)
def test_orthogonal_recurrence_turns_and_does_not_shrink(name: str) -> None:
    model = OrthogonalRecurrence().apply(LAYERS[name](), sequences()).setup.model
    named = [p for n, p in model.named_parameters() if "weight_hh" in n or n == "turn.weight"]
    for weight in named:
        for part in weight.split(WIDTH):
            torch.testing.assert_close(part @ part.T, torch.eye(WIDTH), atol=1e-5, rtol=0)
    assert named


def test_identity_recurrence_keeps_a_state_of_relu_for_ever() -> None:
    given = setup(rnn(nonlinearity="relu"))
    layer = IdentityRecurrence().apply(given, sequences()).setup.model.layer
    layer.bias_ih_l0.data.zero_()
    state = torch.rand(1, 4, WIDTH)
    torch.testing.assert_close(layer(torch.zeros(4, 100, 3), state)[1], state)


def slopes(layer: nn.Module, x: Tensor, weigh: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """Norm of the gradient at each step of the input."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(weigh(*layer(x)), x)
    return slope.norm(dim=(0, 2))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("by_state", [False, True])
def test_truncation_keeps_the_outputs_and_cuts_the_gradient(kind: type[nn.Module], by_state: bool) -> None:
    layer, (x, _) = rnn(kind), sequences()
    cut = Truncated(copy.deepcopy(layer), 7)
    assert_same(_tensors(cut(x)), _tensors(layer(x)))
    weigh = (lambda _, s: _tensors(s)[0].sum()) if by_state else (lambda out, _: out[:, -1].sum())
    whole, part = slopes(layer, x, weigh), slopes(cut, x, weigh)
    assert whole.all()
    reach = STEPS - STEPS // 7 * 7  # the last part
    assert torch.equal(part > 0, torch.arange(STEPS) >= STEPS - reach)
    torch.testing.assert_close(part[-reach:], whole[-reach:])


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in _tensors(part)]


def test_truncation_is_that_of_a_loop_with_detach() -> None:
    layer, (x, _) = rnn(nn.GRU), sequences()
    cut, state, loss = Truncated(layer, 5), None, torch.zeros(())
    for part in x.split(5, 1):
        out, state = layer(part, None if state is None else state.detach())
        loss = loss + out.square().sum()
    wanted = torch.autograd.grad(loss, list(layer.parameters()))
    given = torch.autograd.grad(cut(x)[0].square().sum(), list(layer.parameters()))
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_truncation_passes_states_packed_sequences_and_steps_first() -> None:
    layer = nn.LSTM(3, WIDTH)
    cut = Truncated(layer, 4)
    x, state = torch.randn(9, 2, 3), (torch.randn(1, 2, WIDTH), torch.randn(1, 2, WIDTH))
    assert_same(_tensors(cut(x, state)), _tensors(layer(x, state)))
    assert_same(_tensors(cut(x[:, 0])), _tensors(layer(x[:, 0])))
    packed = nn.utils.rnn.pack_sequence([x[:, 0], x[:5, 1]])
    assert_same(cut(packed)[0].data, layer(packed)[0].data)


def test_an_lstm_in_the_place_of_an_rnn_takes_its_state() -> None:
    layer, (x, _) = gated(rnn(), "LSTM"), sequences()
    state = torch.randn(1, len(x), WIDTH)
    out, (last, _) = layer.body(x, (state, torch.zeros_like(state)))
    assert_same(list(layer(x, state)), [out, last])


def test_checkpoints_from_before_still_load() -> None:
    for remedy in (Gated("LSTM"), Truncate(7)):
        given = LAYERS["rnn"]()
        made = remedy.apply(given, sequences()).setup.model
        old = {
            k: v for k, v in given.model.state_dict().items() if isinstance(remedy, Truncate) or "out" in k
        }
        found = made.load_state_dict(old, strict=False)
        assert not found.unexpected_keys
        assert bool(found.missing_keys) == isinstance(remedy, Gated)


def test_hidden_state_of_a_cell_stays_one_tensor() -> None:
    given, batch = LAYERS["rnn cell"](), sequences()
    made = applied(Gated("GRU"), given, batch).setup.model
    assert output(made, batch).shape == output(given.model, batch).shape


@pytest.mark.parametrize(
    "remedy", [Gated("GRU"), Gated("LSTM"), OrthogonalRecurrence(), IdentityRecurrence()]
)
def test_gradients_reach_the_first_steps(remedy: Remedy) -> None:
    given, batch = setup(small(rnn())), sequences()
    assert Cause.VANISHING_THROUGH_TIME in found(given, batch)
    before, after = (
        slopes(s.model.layer, batch[0], lambda out, _: out[:, -1].sum())
        for s in (given, remedy.apply(given, batch).setup)
    )
    assert after[0] / after[-1] > 1e3 * before[0] / before[-1]


def small(layer: nn.Module) -> nn.Module:
    layer.weight_hh_l0.data.mul_(0.3)
    return layer


def found(given: Setup, batch: Any) -> set[Cause]:
    return {finding.cause for finding in diagnose(given, batch).findings}


def test_clipping_norm_is_the_cure_through_time_too() -> None:
    layer = rnn(nonlinearity="relu")
    layer.weight_hh_l0.data.copy_(1.6 * nn.init.orthogonal_(torch.empty(WIDTH, WIDTH)))
    given = Setup(Reader(layer), CE, partial(torch.optim.SGD, lr=0.1))
    assert Cause.EXPLODING_THROUGH_TIME in found(given, sequences())
    cut = Truncate(5).apply(given, sequences()).setup
    untreated, treated = (slopes(s.model.layer, sequences()[0], last) for s in (given, cut))
    assert untreated.max() > 1e3 * treated.max()


def last(out: Tensor, _: Any) -> Tensor:
    return out[:, -1].sum()


def test_a_gated_chrono_network_learns_what_the_plain_one_cannot() -> None:
    x, y = sequences()
    x[:, 1:] = 0.0  # the first step alone tells the class
    given = Setup(Reader(small(rnn())), CE, partial(torch.optim.Adam, lr=0.01))
    treated = given
    for remedy in (Gated("GRU"), Chrono()):
        treated = remedy.apply(treated, (x, y)).setup
    plain, cured = (run_trial(s, [(x, y)], Budget(steps=100)) for s in (given, treated))
    assert cured.final_loss < 0.3
    assert plain.final_loss > 0.6
