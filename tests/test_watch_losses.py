"""What a watch makes of losses: their course, and numbers that are not finite, however they are met."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmend.causes import Cause
from gradmend.diagnosis import Finding
from gradmend.watch import Notice, Watch
from helpers import Book

Loss = Callable[[nn.Module, int], Tensor]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def found(watch: Watch) -> list[tuple[int, Finding]]:
    return [(notice.began, notice.finding) for notice in watch.findings]


def silent(_notice: Notice) -> None: ...


def train_scaled(model: nn.Module, loss_of: Loss, steps: int) -> tuple[Watch, Book]:
    """With a `GradScaler`, which lets no optimizer step where gradients are not finite."""
    optimizer, scaler, book = (
        torch.optim.SGD(model.parameters(), lr=0.01),
        torch.amp.GradScaler("cpu"),
        Book(),
    )
    with Watch(model, optimizer, every=2, journal=book, report=silent) as watch:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
    return watch, book


def test_a_weight_that_is_lost_is_named_though_a_scaler_skips_every_step() -> None:
    def loss_of(model: nn.Module, step: int) -> Tensor:
        if step == 11:
            nn.init.constant_(model[2].bias[1:2], math.nan)
        return model(torch.randn(32, 8)).square().mean()

    watch, _ = train_scaled(network(), loss_of, 20)
    ((began, finding),) = found(watch)
    assert (watch.step, began, finding.cause, finding.sites) == (10, 11, Cause.NON_FINITE, ("2.bias",))
    assert finding.sentence.startswith("The loss of step 11 is nan, after ")
    assert finding.sentence.endswith(" 2.bias was not finite before this step.")


def rough(model: nn.Module, _step: int) -> Tensor:
    """The root's slope at 0 is infinite, times 0 no number."""
    y = model(torch.randn(32, 8))
    return y.square().mean() + (y - y.detach()).square().sum().sqrt()


def test_a_gradient_that_is_never_finite_is_found_though_the_loss_is() -> None:
    watch, book = train_scaled(network(), rough, 40)
    ((_, finding),) = found(watch)
    assert (watch.step, finding.cause) == (0, Cause.NON_FINITE)
    assert finding.sentence == "The last 20 steps were skipped: the loss is finite, its gradient is not."
    assert not book.of("step")


def test_some_skipped_steps_are_nothing_and_their_looks_are_taken_later() -> None:
    def loss_of(model: nn.Module, step: int) -> Tensor:
        loss = rough(model, step) if step % 8 < 6 else model(torch.randn(32, 8)).square().mean()
        return loss

    watch, book = train_scaled(network(), loss_of, 48)
    assert (watch.step, found(watch)) == (12, [])
    layers = [(step, row) for step, row in book.of("reading") if row["table"] == "layers"]
    assert [step for step, _ in layers] == [2, 4, 6, 8, 10, 12]
    assert all(math.isfinite(x) for _, row in layers for x in row["values"].flatten().tolist())
    assert watch.profile is not None


class Critic(nn.Module):
    """Its loss raises an error where its output is no probability."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 8:
            raise ValueError("eight columns")
        return torch.sigmoid(self.body(x)).mean(1)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: x.fill_(torch.nan), ["The batch holds values that are not finite."]),
        (lambda x: x, []),
        (lambda x: x[:, :2], []),
    ],
    ids=["no number", "another error", "the model's own error"],
)
def test_after_an_error_of_the_training_what_was_not_finite_is_named(
    spoil: Callable[[Tensor], Tensor], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = Critic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watch = Watch(model, optimizer, report=silent)

    def train() -> None:
        with watch:
            for step in range(1, 6):
                x = torch.randn(32, 8)
                output = model(x if step < 4 else spoil(x))
                loss = F.binary_cross_entropy(output, torch.ones(32))
                if step == 4:
                    raise KeyError
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    with pytest.raises((RuntimeError, KeyError, ValueError)):
        train()
    assert [finding.sentence for _, finding in found(watch)] == said
    assert capsys.readouterr().err == ""


def test_in_a_game_the_batch_of_either_player_is_seen() -> None:
    """The discriminator is called for the generator's loss, and then twice for its own."""
    players = nn.Linear(4, 8), Critic()
    optimizers = [torch.optim.SGD(player.parameters(), lr=0.01) for player in players]
    generator, critic = players
    watches = [Watch(*pair, report=silent) for pair in zip(players, optimizers, strict=True)]
    for watch in watches:
        watch.attach()
    for step in range(1, 6):
        real = torch.full((32, 8), torch.nan) if step == 5 else torch.randn(32, 8)
        critic(real).mean().backward()
        fake = generator(torch.randn(32, 4))
        (-critic(fake.detach()).mean()).backward()
        optimizers[1].step()
        critic(fake).mean().backward()
        optimizers[0].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    for watch in watches:
        watch.detach()
    ((began, finding),) = found(watches[1])
    assert (began, finding.sentence.partition(". ")[2]) == (5, "The batch holds values that are not finite.")


def heights(losses: Iterator[float] | list[float], **options: float) -> Watch:
    """A training whose losses are these, and whose weight goes from 1 to -1 and back."""
    weight = nn.Linear(1, 1, bias=False)
    nn.init.ones_(weight.weight)
    optimizer = torch.optim.SGD(weight.parameters(), **{"lr": 2.0, **options})
    with Watch(weight, optimizer, report=silent) as watch:
        for height in losses:
            optimizer.zero_grad()
            loss = weight(torch.ones(64, 1)).square().mean() / 2
            (loss - loss.detach() + height).backward()
            optimizer.step()
    return watch


@pytest.mark.parametrize("loss", [-math.inf, math.inf, math.nan])
def test_every_loss_that_is_not_finite_is_one(loss: float) -> None:
    watch = heights([*[1.0] * 5, loss])
    assert [(began, finding.cause) for began, finding in found(watch)] == [(6, Cause.NON_FINITE)]
    assert f"The loss of step 6 is {loss}, after 1" in watch.findings[0].finding.sentence


@pytest.mark.parametrize("high", [1.0, 1.7], ids=["at one height", "at two"])
def test_weights_that_jump_there_and_back_are_found_though_the_loss_fell_before(high: float) -> None:
    watch = heights([*[100 / (1 + i) for i in range(30)], *[1.0, high] * 40])
    ((began, finding),) = found(watch)
    assert finding.cause is Cause.OSCILLATING_LOSS
    assert began == 101
    assert "moves weight by 200% of its size: there and back." in finding.sentence


@pytest.mark.parametrize(
    ("losses", "options"),
    [
        ([*[100 / (1 + i) for i in range(30)], *[1.0] * 80], {"lr": 1e-4}),  # at rest
        ([*[100 / (1 + i) for i in range(30)], *[1e-9] * 80], {}),  # all is learnt
        ([*[100 / (1 + i) for i in range(30)], *[1.0, 1.1, 1.0, 0.9] * 20], {}),  # four numbers
    ],
    ids=["at rest", "learnt", "others"],
)
def test_other_losses_that_rest_are_no_jumps(losses: list[float], options: dict[str, float]) -> None:
    assert found(heights(losses, **options)) == []


def test_a_loss_that_is_lost_in_the_first_steps_is_a_divergence() -> None:
    torch.manual_seed(0)
    lost = [1.6, *(10 + 3 * torch.randn(150)).tolist()]
    assert [(began, f.cause) for began, f in found(heights(lost, lr=1e-4))] == [(100, Cause.DIVERGENCE)]


@pytest.mark.parametrize("seed", range(3))
def test_a_low_first_loss_of_single_samples_is_chance(seed: int) -> None:
    torch.manual_seed(seed)
    squares = [0.01, *torch.randn(150).square().tolist()]
    assert found(heights(squares, lr=1e-4)) == []


def test_a_large_step_of_the_optimizer_does_not_overwrite_weights() -> None:
    """One weight comes close to 0 on its way."""
    weight = nn.Linear(1, 1, bias=False)
    nn.init.ones_(weight.weight)
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.999)
    with Watch(weight, optimizer, report=silent) as watch:
        for _ in range(5):
            optimizer.zero_grad()
            (weight(torch.ones(64, 1)).square().mean() / 2).backward()
            optimizer.step()
    assert found(watch) == []


@pytest.mark.parametrize("apart", [True, False], ids=["a game", "its own parts"])
def test_the_loss_of_a_player_may_rise_and_rest(apart: bool) -> None:
    """But not where the other optimizer steps parameters of the same model."""
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    layer = nn.ModuleList([model, other]) if not apart else model
    optimizers = [torch.optim.SGD(part.parameters(), lr=1e-4) for part in (model, other)]
    with Watch(layer, optimizers[0], report=silent) as watch:
        for step in range(120):
            for part, optimizer in zip((other, model), optimizers[::-1], strict=True):
                optimizer.zero_grad()
                loss = part(torch.ones(4, 1)).mean()
                (loss - loss.detach() + 0.7 + max(0.0, min(step - 30, 30) / 10)).backward()
                optimizer.step()
    assert [f.cause for _, f in found(watch)] == ([] if apart else [Cause.DIVERGENCE])


def outside(steps: int, late: int) -> Watch:
    """The first layer is stepped by an optimizer of its own, which begins late, or never does."""
    model = network()
    last, first = (torch.optim.SGD(model[i].parameters(), lr=0.01) for i in (2, 0))
    with Watch(model, last, report=silent) as watch:
        for step in range(1, steps + 1):
            model.zero_grad()
            x = torch.randn(32, 8)
            (model(x) - x[:, :4]).square().mean().backward()
            if step >= late:
                first.step()
            last.step()
    return watch


def test_parameters_that_no_optimizer_steps_are_found_once_all_optimizers_have_stepped() -> None:
    ((began, finding),) = found(outside(60, late=100))
    assert (began, finding.cause) == (52, Cause.NOT_IN_OPTIMIZER)
    assert finding.sites == ("0.weight", "0.bias")
    assert found(outside(60, late=40)) == []
