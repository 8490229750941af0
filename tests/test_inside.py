"""What goes on within recurrent, attention and normalization calls, seen through `measure`."""

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmend as gm
from gradmend import attention, recurrence
from gradmend.diagnosis.within import vanishing_through_time


class Tagger(nn.Module):
    """A recurrent layer and a score from its last step."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0][:, -1])


def sequences() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(16, 12, 5), torch.randint(3, (16,))


def measured(model: nn.Module, batch: Any) -> gm.Profile:
    return gm.measure(gm.Setup(model, nn.CrossEntropyLoss()), batch)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("behind", [False, True])
def test_the_gradient_through_time(kind: type[nn.Module], behind: bool) -> None:
    """Against the gradient of an input that asks for one; also where a layer comes before."""
    x, y = sequences()
    layer = kind(5, 8, batch_first=True)
    model = Tagger(nn.Sequential(nn.Linear(5, 5), layer) if behind else layer, 8)
    (reading,) = [r for r in measured(model, (x, y)).sites if r.time]
    inner = model.layer[0](x).detach() if behind else x.clone()
    inner.requires_grad_()
    F.cross_entropy(model.out(layer(inner)[0][:, -1]), y).backward()
    assert inner.grad is not None
    twin = inner.grad.double().square().mean((0, 2)).sqrt().flip(0).tolist()
    assert reading.time is not None
    (points,) = reading.time.gradients
    assert [step for step, _ in points] == list(range(12))
    assert [value for _, value in points] == pytest.approx(twin, rel=1e-4)
    assert reading.time.gradient_factors[0] < 1
    assert reading.time.paths[0].growth > 0


def test_the_input_is_left_as_it_was() -> None:
    x, y = sequences()
    measured(Tagger(nn.GRU(5, 8, batch_first=True), 8), (x, y))
    assert not x.requires_grad
    assert x.grad is None


def test_cells_in_a_loop_are_looked_into_now_and_then() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.GRUCell(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), 8)
            for step in x.unbind(1):
                h = self.cell(step, h)
            return self.out(h)

    profile = measured(Loop(), sequences())
    assert [r.site.name for r in profile.sites if r.time] == ["cell", "cell#2", "cell#4", "cell#8"]
    steps = profile.repeated["cell"]
    assert len(steps) == 12
    assert recurrence.factor_per_step([(i, r.gradient or 0.0) for i, r in enumerate(steps)]) > 1


def test_layers_that_one_line_of_code_calls_are_no_steps_in_time() -> None:
    """As in Keras, where each layer calls the same function."""

    class Stack(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(16, 16) / 4 for _ in range(1 if shared else 20))
            self.out, self.shared = nn.Linear(16, 3), shared

        def forward(self, x: Tensor) -> Tensor:
            for weight in [*self.weights] * (20 if self.shared else 1):
                x = torch.sigmoid(x @ weight)
            return self.out(x)

    batch = torch.randn(64, 16), torch.randint(3, (64,))
    apart, again = (measured(Stack(shared), batch) for shared in (False, True))
    assert "matmul" not in apart.repeated
    assert vanishing_through_time(apart) is None
    assert len(again.repeated["matmul"]) == 20
    assert vanishing_through_time(again) is not None


class ByHand(nn.Module):
    """Attention written out, and by torch's function."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.qkv, self.out = fused, nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-2, -1) / 2 + torch.zeros(6, 6), dim=-1) @ v
        return self.out(y.transpose(1, 2).flatten(2).mean(1))


def test_attention_by_hand_is_seen_as_well() -> None:
    torch.manual_seed(0)
    batch = torch.randn(4, 6, 8), torch.randint(3, (4,))
    fused, loose = ByHand(fused=True), ByHand(fused=False)
    loose.load_state_dict(fused.state_dict())
    (a,), (b,) = ([r.attention for r in measured(m, batch).sites if r.attention] for m in (fused, loose))
    assert isinstance(a, attention.AttentionReading)
    assert a.heads == pytest.approx(b.heads, rel=1e-5)
    assert a.logit_rms == pytest.approx(b.logit_rms, rel=1e-5)


def test_a_softmax_over_classes_is_no_attention() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Softmax(-1), nn.Flatten(), nn.Linear(48, 3))
    assert not any(r.attention for r in measured(model, sequences()).sites)


def test_multi_head_attention() -> None:
    torch.manual_seed(0)

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attend(x, x, x)[0].mean(1))

    model, x = Heads(), torch.randn(4, 6, 8)
    (found,) = [r.attention for r in measured(model, (x, torch.randint(3, (4,)))).sites if r.attention]
    weights = model.attend(x, x, x, average_attn_weights=False)[1]
    twin = attention.read(attention.observe_weights(weights).tolist())
    assert found is not None
    assert found.heads == pytest.approx(twin.heads, rel=1e-4)


def test_running_statistics_against_those_of_the_batch() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8, momentum=None)
    model = nn.Sequential(nn.Linear(5, 8), norm, nn.ReLU(), nn.Linear(8, 3))
    x, y = 3 * torch.randn(64, 5) + 1, torch.randint(3, (64,))
    before = measured(model, (x, y)).sites[1].drift
    h = model[0](x).detach()
    assert before is not None
    assert before.shift == pytest.approx(h.mean(0).abs().mean().item(), rel=1e-3)  # running: 0 and 1
    assert before.ratio == pytest.approx(h.std(0, unbiased=False).log().mean().exp().item(), rel=1e-3)
    model.train()(x)
    after = measured(model, (x, y)).sites[1].drift
    assert after is not None
    assert (after.shift, after.ratio) == pytest.approx((0, 1), abs=0.02)  # the running one is unbiased


def test_residual_streams() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), Block(), Block(), nn.Linear(8, 3))
    profile = measured(model, (torch.randn(32, 5), torch.randint(3, (32,))))
    first, second = profile.residuals
    by_name = {r.site.name: r for r in profile.sites}
    stream, branch = by_name["0"].rms, by_name["1.branch"].rms
    assert first.site.name == "1.add"
    assert first.growth == pytest.approx(by_name["1.add"].rms / stream)
    assert first.share == pytest.approx(branch**2 / (branch**2 + stream**2))
    assert second.growth > 0


def test_what_prepares_the_batch_is_not_the_first_layer() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.dropout(x / 255, 0.0))

    x = 255 * torch.rand(32, 5)
    inputs = measured(Scaled(), (x, torch.randint(3, (32,)))).inputs
    assert inputs is not None
    assert inputs.rms == pytest.approx((x / 255).square().mean().sqrt().item(), rel=1e-5)


def test_samples_are_told_from_steps() -> None:
    """A layer that takes the steps first reads the same as one that takes the samples first."""

    class Steps(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            self.batch_first = batch_first
            self.layer, self.out = nn.GRU(5, 8, batch_first=batch_first), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x if self.batch_first else x.transpose(0, 1))[0]
            return torch.tanh(self.out(h)).mean(1 if self.batch_first else 0)

    first, last = Steps(batch_first=True), Steps(batch_first=False)
    last.load_state_dict(first.state_dict())
    a, b = (measured(model, sequences()).sites for model in (first, last))
    assert [r.site.batch_dim for r in b] == [1, 1, 1, 0]
    for one, other in zip(a, b, strict=True):
        assert one.rms == pytest.approx(other.rms, rel=1e-5)
        assert one.cosine == pytest.approx(other.cosine, rel=1e-4, nan_ok=True)
        if one.gradient_cosine is not None:
            assert one.gradient_cosine == pytest.approx(other.gradient_cosine, rel=1e-3)


def test_no_tensor_outlives_the_measurement() -> None:
    """Though the profile does: gradients are as large as the model."""
    batch = sequences()
    model = Tagger(nn.GRU(5, 8, batch_first=True), 8)
    kept = [measured(model, batch)]

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    before = alive()
    kept.append(measured(model, batch))
    assert alive() == before


def test_a_softmax_over_a_quotient_is_no_attention() -> None:
    class Quotient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(48, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.softmax(self.a(x) / self.b(x).exp(), dim=-1).flatten(1))

    assert not any(r.attention for r in measured(Quotient(), sequences()).sites)
