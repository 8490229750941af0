from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from gradmend.errors import DataError
from gradmend.setup import Setup
from toys import ADAM, network, on_cpu, plain_network, setup, toy

# Forms of data


def test_forms_of_the_same_batches_train_alike() -> None:
    x, y = toy().x, toy().y
    cut = list(zip(x.split(32), y.split(32), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    setups = (Setup(plain_network(), nn.CrossEntropyLoss(), ADAM) for _ in range(2))
    losses = [on_cpu(next(setups), data, epochs=4).loss for data in (cut, loader)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def test_full_arrays_are_cut_as_data_is() -> None:
    data = toy()
    arrays = on_cpu(setup(), (data.x, data.y), epochs=2, batch_size=16)
    assert arrays.loss == on_cpu(setup(), data, epochs=2, batch_size=16).loss
    assert arrays.test_accuracy is None


def test_ten_epochs_of_batches_of_32_are_usual() -> None:
    history = on_cpu(setup(), toy())
    assert (history.epochs, history.steps) == (10, 30)
    assert on_cpu(setup(), toy(), steps=35).epochs == 12


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.linear(x), labels)}


def test_batches_that_are_dicts() -> None:
    batch = {"x": toy().x, "labels": toy().y}
    history = on_cpu(Setup(WithLoss(), optimizer=partial(SGD, lr=0.5)), [batch], [batch], epochs=20)
    assert history.loss[-1] < history.loss[0]
    assert history.accuracy is None
    assert history.test_accuracy is None
    assert history.test_loss == pytest.approx(history.loss[-1], rel=0.05)
    single = on_cpu(Setup(WithLoss(), optimizer=partial(SGD, lr=0.5)), batch, epochs=2)
    assert single.steps == 2


def test_a_step_of_the_users_own() -> None:
    def step(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return model(batch["pair"][0]).square().mean() + batch["bias"]

    given = Setup(network(), step=step, optimizer=partial(SGD, lr=0.1))
    history = on_cpu(given, [{"pair": [toy().x], "bias": 1.0}], epochs=5)
    assert history.loss[-1] < history.loss[0]
    assert history.accuracy is None


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(toy().x, toy().y, strict=True))


def test_loaders_of_unknown_length() -> None:
    assert on_cpu(setup(), DataLoader(Stream(), batch_size=32), epochs=2).steps == 6


def test_a_generator_serves_one_epoch() -> None:
    batches = [toy().head(32)] * 3
    assert on_cpu(setup(), iter(batches), epochs=1).steps == 3
    with pytest.raises(DataError, match="Epoch 2 gave no batch"):
        on_cpu(setup(), iter(batches), epochs=2)


@pytest.mark.parametrize("data", [[], TensorDataset(toy().x, toy().y), 3])
def test_what_gives_no_batches_is_refused(data: Any) -> None:
    with pytest.raises(DataError):
        on_cpu(setup(), data)
