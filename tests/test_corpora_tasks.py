"""What programs are to learn: outputs read as their loss reads them, and references that do learn."""

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.corpora.cases import batches
from benchmarks.corpora.references import EPOCHS, STEPS, affordable, own_steps, train_copy, well_set
from benchmarks.corpora.tasks import constant, read_task, score
from benchmarks.corpora.tools.gradmend import setup as as_setup
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Toy:
    """As much of a case as tasks and references need."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    model: nn.Module
    metric: str = "accuracy"
    batch_size: int = 32
    epochs: int | None = 20


class Net(nn.Sequential):
    """A network with the attribute that those of the corpora have."""

    penalties: tuple[object, ...] = ()


def toy(y: Tensor, model: nn.Module | None = None, x: Tensor | None = None, **others: Any) -> Toy:
    x = torch.randn(len(y), 6) if x is None else x
    return Toy(x, y, x, y, model or Net(nn.Linear(6, 1)), **others)


def fixed(output: Tensor) -> nn.Module:
    """A network whose outputs are these, whatever goes in."""
    return nn.Embedding.from_pretrained(output)


def scored(output: Tensor, y: Tensor, loss_fn: Any, **others: Any) -> float:
    case = toy(y, fixed(output), torch.arange(len(y)), **others)
    return score(case.model, loss_fn, case, read_task(case))


@pytest.mark.parametrize(
    ("y", "metric", "kind", "levels"),
    [
        (torch.eye(3), "mse", "class", (0.0, 1.0, 2.0)),
        (torch.tensor([[2.0], [4.0], [2.0]]), "accuracy", "class", (2.0, 4.0)),
        (torch.tensor([0.0, 1.0, 1.0]), "mse", "class", (0.0, 1.0)),
        (torch.tensor([-1.0, 1.0, 1.0]), "accuracy", "class", (-1.0, 1.0)),
        (torch.tensor([[0.0, 1.0], [1.0, 1.0]]), "accuracy", "flags", (0.0, 1.0)),
        (torch.tensor([0.0, 3.0, 7.0]), "mse", "amounts", ()),
    ],
    ids=["one-hot", "numbers", "zeros and ones", "signs", "flags", "amounts"],
)
def test_what_targets_ask_for(y: Tensor, metric: str, kind: str, levels: tuple[float, ...]) -> None:
    task = read_task(toy(y, metric=metric))
    assert (task.kind, task.levels) == (kind, levels)


SCORES = torch.tensor([[-2.0], [0.3], [-0.2], [1.5]])
TRUE = torch.tensor([[0.0], [1.0], [1.0], [1.0]])


@pytest.mark.parametrize(
    ("output", "y", "loss_fn"),
    [
        (SCORES, TRUE, F.binary_cross_entropy_with_logits),
        (SCORES.sigmoid(), TRUE, F.binary_cross_entropy),
        (SCORES.sigmoid(), TRUE, F.mse_loss),
        (SCORES, 2 * TRUE - 1, lambda out, y: (1 - y * out).clamp(min=0).mean()),
        (SCORES + 3.5, TRUE + 3, F.mse_loss),
        (torch.cat([-SCORES, SCORES], 1), TRUE, lambda out, y: F.cross_entropy(out, y.long().flatten())),
        (torch.cat([-SCORES, SCORES], 1), TRUE.flatten(), F.mse_loss),
        (torch.cat([-SCORES, SCORES], 1), torch.cat([1 - TRUE, TRUE], 1), F.cross_entropy),
    ],
    ids=["logits", "probabilities", "squares", "hinge", "numbers", "two units", "flat", "one-hot"],
)
def test_outputs_are_read_as_their_loss_reads_them(output: Tensor, y: Tensor, loss_fn: Any) -> None:
    """The third of four outputs is wrong in each of these forms."""
    assert scored(output, y, loss_fn) == 0.75


def test_classes_with_numbers_of_their_own_have_units_in_order() -> None:
    """Labels 1 and 2 with two units; with three units they number the units."""
    y, two = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    loss = F.mse_loss
    assert scored(two, y, loss) == pytest.approx(2 / 3)
    assert scored(torch.cat([torch.zeros(3, 1), two], 1), y, loss) == pytest.approx(2 / 3)


def test_flags_count_one_by_one() -> None:
    y = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    output = torch.tensor([[0.2, 0.9], [0.9, 0.4]])
    assert scored(output, y, F.binary_cross_entropy) == 0.75


def test_amounts_by_hand() -> None:
    y = torch.tensor([1.0, 2.0, 3.0, 6.5])
    output = torch.tensor([[1.0], [2.0], [3.0], [4.5]])
    expected = 1 - 4.0 / float((y - y.mean()).square().sum())
    assert scored(output, y, F.mse_loss, metric="mse") == pytest.approx(expected)
    assert scored(output * math.nan, y, F.mse_loss, metric="mse") == -1.0


def test_outputs_that_cannot_be_read_are_told() -> None:
    case = toy(torch.eye(6), nn.Unflatten(1, (3, 2)))
    with pytest.raises(ValueError, match="cannot be read as classes"):
        score(case.model, F.mse_loss, case, read_task(case))


@pytest.mark.parametrize(
    ("y", "metric", "expected"),
    [
        (torch.tensor([0.0, 1.0, 1.0, 1.0]), "accuracy", 0.75),
        (torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]), "accuracy", 5 / 6),
        (torch.tensor([0.0, 3.0, 7.0]), "mse", 0.0),
    ],
    ids=["class", "flags", "amounts"],
)
def test_what_a_constant_reaches(y: Tensor, metric: str, expected: float) -> None:
    case = toy(y, metric=metric)
    assert constant(case, read_task(case)) == pytest.approx(expected)


def broken_net(units: int) -> Net:
    """Sigmoids, zero weights, dropout of nearly all, and a softmax: nothing learns in it."""
    layers = [nn.Linear(6, 24), nn.Sigmoid(), nn.Dropout(0.95), nn.Linear(24, units), nn.Softmax(-1)]
    for parameter in nn.Sequential(*layers).parameters():
        nn.init.zeros_(parameter)
    return Net(*layers)


@pytest.mark.parametrize("kind", ["class", "flags", "amounts"])
def test_a_well_set_network_learns(kind: str) -> None:
    torch.manual_seed(0)
    x = 100 * torch.randn(400, 6) + 300
    amount = (x[:, 0] + x[:, 1] - 600) * 5 + 2000
    flag = (amount > 2000).float()
    y = {"class": flag, "flags": torch.stack([flag, 1 - flag, flag], 1)[:, [0, 0, 2]], "amounts": amount}[
        kind
    ]
    case = toy(y, broken_net(1), x, metric="mse" if kind == "amounts" else "accuracy")
    task = read_task(case)
    setup = well_set(case, task, seed=0)
    model, _ = train_copy(setup, case, steps=400, seed=0)
    assert score(model, setup.loss_fn, case, task) > 0.9
    assert next(m.out_features for m in model.modules() if isinstance(m, nn.Linear)) == 24
    assert not any(isinstance(m, (nn.Sigmoid, nn.Dropout, nn.Softmax)) for m in model.modules())


def test_a_network_of_another_shape_is_no_reference() -> None:
    case = toy(torch.randn(8, 3), Net(nn.Unflatten(1, (3, 2)), nn.Linear(2, 1)), metric="mse")
    with pytest.raises(ValueError, match="do not fit targets"):
        well_set(case, read_task(case), seed=0)


def test_steps_are_the_programs_own_as_far_as_they_can_be_afforded() -> None:
    case = toy(torch.randn(100), epochs=None)
    assert own_steps(case) == EPOCHS * 4
    assert affordable(case, 1e-4) == own_steps(case)
    assert affordable(case, 1.0) == 0
    assert affordable(replace(case, epochs=10**6), 1e-9) == STEPS
    assert affordable(replace(case, epochs=1), 1e-3) == 4


class Penalized(Net):
    """A network that knows its penalty, as those of the corpora do."""

    def penalty(self) -> Tensor:
        terms = [l1 * p.abs().sum() + l2 * p.square().sum() for p, l1, l2 in self.penalties]
        return torch.stack([torch.zeros(()), *terms]).sum()


def penalized_toy(l1: float, l2: float, biases: bool, optimizer: Any) -> Any:
    torch.manual_seed(0)
    model = Penalized(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    model.penalties = tuple((p, l1, l2) for p in model.parameters() if p.ndim > 1 or biases)
    case = toy(torch.randn(64, 1), model, metric="mse")
    objective = lambda x, y: F.mse_loss(model(x), y) + model.penalty()  # noqa: E731
    return SimpleNamespace(**vars(case), loss_fn=F.mse_loss, optimizer=optimizer, objective=objective)


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.1), partial(torch.optim.Adam, lr=0.01)])
@pytest.mark.parametrize(
    ("l1", "l2", "biases", "own_step"),
    [(0.0, 0.1, False, False), (0.01, 0.1, False, True), (0.0, 0.1, True, True)],
)
def test_a_penalty_trains_the_same_as_weight_decay(
    l1: float, l2: float, biases: bool, own_step: bool, optimizer: Any
) -> None:
    case = penalized_toy(l1, l2, biases, optimizer)
    given = as_setup(case)
    assert (given.step is not None) == own_step
    trained, _ = train_copy(given, case, steps=20, seed=0)
    live = optimizer(case.model.parameters())
    for x, y in islice(batches(case, 0), 20):
        live.zero_grad()
        case.objective(x, y).backward()
        live.step()
    for one, other in zip(trained.parameters(), case.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
