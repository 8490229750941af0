"""Input, output, gradient, optimizer: what each remedy says of itself, measured."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset

from gradmend.causes import Cause
from gradmend.diagnosis import diagnose
from gradmend.errors import NoEffectWarning, SetupError
from gradmend.remedies import (
    Accumulate,
    AddMissingParameters,
    BatchSize,
    ClipAdaptive,
    ClipNorm,
    ClipValue,
    DropSquashing,
    Epsilon,
    LearningRate,
    Remedy,
    StandardizeInput,
    UseOptimizer,
    UseSchedule,
    WeightDecay,
)
from gradmend.setup import Batch, Budget, Setup
from gradmend.training import run_trial, train
from gradmend.training.feed import recut
from gradmend.training.loop import Stepper
from helpers import SGD, blobs, plain, setups
from promises import applied

CE = nn.CrossEntropyLoss()


def treated(remedy: Remedy, model: nn.Module, batch: Batch | None = None, loss: Any = CE) -> nn.Module:
    return remedy.apply(Setup(model, loss, SGD), batch or blobs()).setup.model


class OneForAll(nn.Module):
    """The same module as hidden and as output activation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out, self.act = nn.Linear(8, 8), nn.Linear(8, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.out(self.act(self.inner(x)))).squeeze(1)


# Gradients and optimization


@pytest.mark.parametrize(
    ("remedy", "clip"),
    [
        (ClipAdaptive(0.02), lambda ps: unit_wise(ps, 0.02)),
        (ClipNorm(0.01), lambda ps: nn.utils.clip_grad_norm_(ps, 0.01)),
        (ClipValue(0.001), lambda ps: nn.utils.clip_grad_value_(ps, 0.001)),
    ],
)
def test_clipping_is_that_of_the_book(remedy: Remedy, clip: Callable[[Any], object]) -> None:
    setup = Setup(plain(2, nn.ReLU), CE, partial(torch.optim.SGD, lr=1.0))
    made, own = remedy.apply(setup, blobs()).setup, setup.copy()
    Stepper(made)([blobs()])
    own.loss(blobs()).backward()
    clip(list(own.model.parameters()))
    for p, q in zip(own.model.parameters(), made.model.parameters(), strict=True):
        torch.testing.assert_close(q, p - p.grad)


def unit_wise(parameters: list[Tensor], share: float) -> None:
    """Adaptive clipping, a unit at a time, as the paper has it."""
    for p in parameters:
        units = [(p.detach(), p.grad)] if p.dim() == 1 else zip(p.detach(), p.grad, strict=True)
        for weight, slope in units:
            most = share * max(float(weight.norm()), 1e-3)
            if float(slope.norm()) > most:
                slope.mul_(most / float(slope.norm()))


def test_accumulated_batches_make_the_step_of_a_large_one() -> None:
    x, y = blobs(96)
    made = applied(Accumulate(3), Setup(plain(2, nn.ReLU), CE, SGD), (x, y)).setup
    whole = Setup(plain(2, nn.ReLU), CE, SGD)
    whole.model.load_state_dict(made.model.state_dict())
    train(made, [(x[i : i + 32], y[i : i + 32]) for i in (0, 32, 64)], steps=1, device="cpu")
    train(whole, [(x, y)], steps=1, device="cpu")
    for p, q in zip(made.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("form", [list, lambda batches: DataLoader(Rows(batches), batch_size=None)])
@pytest.mark.parametrize("rows", [8, 20, 64])
def test_batches_are_joined_and_cut(rows: int, form: Any) -> None:
    x, y = blobs(96)
    seen: list[int] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(len(target))
        assert torch.equal(target, y[sum(seen[:-1]) : sum(seen)])
        return CE(output, target)

    made = applied(BatchSize(rows), Setup(plain(1, nn.ReLU), CE, SGD), (x, y)).setup
    given = form([(x[i : i + 24], y[i : i + 24]) for i in range(0, 96, 24)])
    train(replace(made, loss_fn=loss), given, epochs=1, device="cpu")
    assert seen == [rows] * (96 // rows) + [96 % rows] * (96 % rows > 0)


class Rows(Dataset[Any]):
    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: int) -> Batch:
        return self.batches[place]


def test_batches_of_a_trial_and_of_arrays_follow_the_setup() -> None:
    made = replace(Setup(plain(1, nn.ReLU), CE, SGD), batch_size=10)
    assert train(made.copy(), blobs(96), epochs=1, device="cpu").steps == 10
    assert train(made.copy(), blobs(96), epochs=1, batch_size=48, device="cpu").steps == 2
    first = run_trial(made, [blobs(96)], Budget(steps=1)).initial_loss
    x, y = blobs(96)
    assert first == pytest.approx(CE(made.model(x[:10]), y[:10]).item())
    with pytest.raises(SetupError, match="`batch_size` counts rows: 1 or more, not 0"):
        replace(made, batch_size=0)


def test_batches_that_cannot_be_joined_come_as_they_are() -> None:
    odd = [{"x": torch.zeros(3)}, (torch.zeros(3), torch.zeros(2)), "text"]
    assert list(recut(odd, 2)) == odd
    mixed = [(torch.zeros(3, 2), torch.zeros(3)), (torch.zeros(3, 5), torch.zeros(3))]
    assert [tuple(x.shape) for x, _ in recut(mixed, 2)] == [(2, 2), (1, 2), (3, 5)]


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("constant", partial(lr_scheduler.ConstantLR, factor=1.0, total_iters=12)),
        ("inverse time", partial(lr_scheduler.LambdaLR, lr_lambda=lambda t: 1 / (1 + 99 / 12 * t))),
        ("linear", partial(lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=12)),
        ("polynomial", partial(lr_scheduler.PolynomialLR, total_iters=12, power=2.0)),
        ("cosine", partial(lr_scheduler.CosineAnnealingLR, T_max=12)),
        ("exponential", partial(lr_scheduler.ExponentialLR, gamma=0.01 ** (1 / 12))),
        ("step", partial(lr_scheduler.StepLR, step_size=4, gamma=0.1)),
        ("warm-up", partial(lr_scheduler.LinearLR, start_factor=0.01, end_factor=1.0, total_iters=12)),
    ],
)
def test_schedules_are_torchs(name: str, reference: Callable[..., Any]) -> None:
    made = UseSchedule(name, steps=12).apply(Setup(plain(1, nn.ReLU), CE, SGD), blobs()).setup
    step, other = Stepper(made), SGD(plain(1, nn.ReLU).parameters())
    schedule = reference(other)
    for _ in range(12):
        step([blobs()])
        other.step()
        schedule.step()
        assert step.optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]


def test_schedules_end_where_their_formulas_say() -> None:
    ends = {
        "constant": 0.1,
        "inverse time": 1e-3,
        "linear": 0.0,
        "polynomial": 0.0,
        "cosine": 0.0,
        "exponential": 1e-3,
        "step": 1e-4,
        "warm-up": 0.1,
    }
    for name, end in ends.items():
        step = Stepper(UseSchedule(name, 30).apply(Setup(plain(1, nn.ReLU), CE, SGD), blobs()).setup)
        for _ in range(30):
            step([blobs()])
        assert step.optimizer.param_groups[0]["lr"] == pytest.approx(end, abs=1e-9)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    ("kind", "lr"),  # Adam at 1e3 separates these blobs: nothing to cure
    [(torch.optim.SGD, 1e-9), (torch.optim.SGD, 1e3), (torch.optim.SGD, 0.0), (torch.optim.Adam, 1e-9)],
)
def test_learning_rate_finds_one_that_trains(kind: Any, lr: float, live: bool) -> None:
    model = plain(2, nn.ReLU)
    optimizer = kind(model.parameters(), lr=lr) if live else partial(kind, lr=lr)
    setup = Setup(model, CE, optimizer)
    losses = [_loss_after_50_steps(s) for s in (setup, LearningRate().apply(setup, blobs()).setup)]
    assert not losses[0] < 1.0
    assert losses[1] < 0.1


def _loss_after_50_steps(setup: Setup) -> float:
    step = Stepper(setup.copy())
    for _ in range(50):
        loss = step([blobs()])
    return loss.item()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_rate_by_curvature_is_one_over_the_largest_eigenvalue(momentum: float) -> None:
    """Of linear regression the Hessian is known: 2 x'x / n."""
    x, y = blobs()
    model = nn.Linear(8, 1, bias=False)
    optimizer = partial(torch.optim.SGD, lr=3.0, momentum=momentum)
    setup = Setup(model, nn.MSELoss(), optimizer)
    made = LearningRate(by="curvature").apply(setup, (x, y[:, None].float()))
    largest = torch.linalg.eigvalsh(2 * x.T @ x / len(x))[-1].item()
    assert made.remedy.lr == pytest.approx((1 - momentum) / largest, rel=1e-2)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_the_rate_by_curvature_ends_the_next_step_of_an_adaptive_optimizer_in_the_lowest_point(
    kind: Any,
) -> None:
    x, y = blobs()
    batch = (x, y[:, None].float())
    setup = Setup(nn.Linear(8, 1), nn.MSELoss(), partial(kind, lr=1e-4))
    lr = LearningRate(by="curvature").apply(setup, batch).remedy.lr
    losses = []
    for factor in (0.8, 1.0, 1.25):
        made = LearningRate(factor * lr).apply(setup, batch).setup
        Stepper(made)([batch])
        losses.append(made.loss(batch).item())
    assert losses[1] == min(losses)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("lr", [1e-9, 1e3])
def test_the_rate_by_curvature_trains(kind: Any, lr: float) -> None:
    setup = Setup(plain(2, nn.Tanh), CE, partial(kind, lr=lr))
    made = applied(LearningRate(by="curvature"), setup, blobs())
    assert _loss_after_50_steps(made.setup) < 0.5
    assert 1e-4 < made.remedy.lr < 10


def test_an_unknown_way_to_a_rate_is_refused() -> None:
    with pytest.raises(SetupError, match="is not found by 'curve'"):
        LearningRate(by="curve")


def test_epsilon_keeps_the_state() -> None:
    model = plain(1, nn.ReLU)
    setup = Setup(model, CE, torch.optim.Adam(model.parameters(), eps=1.0))
    Stepper(setup)([blobs()])
    made = applied(Epsilon(), setup, blobs()).setup.build_optimizer()
    assert made.param_groups[0]["eps"] == 1e-8
    assert len(made.state) == 4
    with pytest.warns(NoEffectWarning):
        Epsilon().apply(Setup(model, CE, SGD), blobs())


def test_learning_rate_reaches_every_group() -> None:
    model = plain(1, nn.ReLU)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 1e3}]
    made = LearningRate(0.1).apply(Setup(model, CE, torch.optim.SGD(groups, lr=0.1)), blobs())
    assert len(made.edits) == 1
    assert [group["lr"] for group in made.setup.build_optimizer().param_groups] == [0.1, 0.1]


def test_options_reach_the_optimizer_of_any_factory() -> None:
    def own(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e3)

    for factory in (own, partial(own), torch.optim.SGD, partial(torch.optim.SGD, lr=1e3)):
        setup = Setup(plain(1, nn.ReLU), CE, factory)
        for remedy in (LearningRate(0.1), WeightDecay(0.01)):
            setup = remedy.apply(setup, blobs()).setup
        group = setup.build_optimizer().param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (0.1, 0.01)


def test_use_optimizer_compares_options_as_well() -> None:
    setup = Setup(plain(1, nn.ReLU), CE, SGD)
    made = UseOptimizer("SGD", lr=0.1, momentum=0.9).apply(setup, blobs())
    assert made.setup.build_optimizer().param_groups[0]["momentum"] == 0.9
    with pytest.warns(NoEffectWarning):
        UseOptimizer("SGD").apply(made.setup, blobs())


def test_missing_parameters_join_the_optimizer() -> None:
    model = plain(2, nn.ReLU)
    for named in (False, True):
        known = model[0].named_parameters() if named else model[0].parameters()
        setup = Setup(model, CE, torch.optim.SGD(known, lr=0.1))
        made = AddMissingParameters().apply(setup, blobs()).setup
        assert Cause.NOT_IN_OPTIMIZER in diagnose(setup, blobs()).causes
        assert diagnose(made, blobs()).healthy
        Stepper(made)([blobs()])
        made.build_optimizer().load_state_dict(made.build_optimizer().state_dict())


# Input and output


def columns() -> Tensor:
    """Columns whose deviations lie eight decades apart, and a constant one."""
    scales = torch.tensor([1e-4, 1.0, 1e4, 1.0, 3.0, 5.0, 1.0, 2.0])
    x = torch.randn(96, 8) * scales + torch.tensor([0.0, -3.0, 1e5, 0.0, 0.0, 0.0, 0.0, 7.0])
    x[:, 3] = 12345.678
    return x


def test_standardized_columns_have_mean_0_and_deviation_1() -> None:
    x, (_, y) = columns(), blobs()
    batches = [(x[:50], y[:50]), (x[50:], y[50:])]
    made = StandardizeInput().apply(Setup(plain(1, nn.ReLU), CE, SGD), batches).setup
    z = made.model.before(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(8), atol=1e-3, rtol=0)
    wanted = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(z.std(0, unbiased=False), wanted, atol=1e-3, rtol=0)


def test_standardized_images_have_mean_0_and_deviation_1_per_channel() -> None:
    x = torch.randint(256, (32, 3, 6, 6), dtype=torch.uint8) // torch.tensor([1, 4, 60]).view(3, 1, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    made = StandardizeInput().apply(Setup(Floats(model), CE, SGD), (x, torch.arange(32) % 3)).setup
    z = made.model.before(x)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-5, rtol=0)


class Floats(nn.Module):
    """Takes integer images, as many do."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.float())


def test_sequences_of_several_lengths_are_standardized_per_feature() -> None:
    body = nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 8)), nn.Flatten(), nn.Linear(8, 3)
    )
    y = torch.arange(16) % 3
    batches = [(100 + 7 * torch.randn(16, length, 5), y) for length in (4, 9)]
    made = StandardizeInput().apply(Setup(body, CE, SGD), batches).setup
    z = torch.cat([made.model.before(x).flatten(0, 1) for x, _ in batches])
    torch.testing.assert_close(z.std(0, unbiased=False), torch.ones(5), atol=1e-4, rtol=0)


def test_signals_are_standardized_per_channel_before_a_convolution() -> None:
    body = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    x = torch.randn(16, 2, 20) * torch.tensor([[1.0], [500.0]])
    z = treated(StandardizeInput(), body, (x, torch.arange(16) % 3)).before(x)
    torch.testing.assert_close(z.std((0, 2), unbiased=False), torch.ones(2), atol=1e-4, rtol=0)


def test_numbers_of_an_embedding_are_not_standardized() -> None:
    setup, batch = setups()["recurrent"]
    with pytest.warns(NoEffectWarning):
        StandardizeInput().apply(setup, batch)


@pytest.mark.parametrize(
    ("squash", "loss", "target"),
    [
        (nn.Softmax(dim=1), nn.CrossEntropyLoss(), blobs()[1]),
        (nn.Sigmoid(), nn.BCEWithLogitsLoss(), torch.eye(3)[blobs()[1]]),
    ],
)
def test_the_second_squashing_is_dropped(squash: nn.Module, loss: nn.Module, target: Tensor) -> None:
    x, _ = blobs()
    model = nn.Sequential(*plain(2, nn.ReLU), squash)
    after = treated(DropSquashing(), model, (x, target), loss)
    torch.testing.assert_close(after(x), model[:-1](x))


@pytest.mark.parametrize(
    ("squash", "loss"), [(nn.Sigmoid(), nn.CrossEntropyLoss()), (nn.LogSoftmax(1), nn.NLLLoss())]
)
def test_a_squashing_that_suits_its_loss_stays(squash: nn.Module, loss: nn.Module) -> None:
    with pytest.warns(NoEffectWarning):
        treated(DropSquashing(), nn.Sequential(*plain(1, nn.ReLU), squash), None, loss)


def test_a_squashing_that_is_a_hidden_activation_as_well_stays() -> None:
    x, y = blobs()
    with pytest.warns(NoEffectWarning):
        treated(DropSquashing(), OneForAll(), (x, (y == 0).float()), nn.BCEWithLogitsLoss())
