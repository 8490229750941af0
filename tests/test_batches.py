"""Batches: whatever a user has them in, and what is wrong with them."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gradmend.data import Data, as_batches, check_batch
from gradmend.errors import DataError


def numbered(rows: int, held_out: int = 0) -> Data:
    """Rows whose inputs and targets both hold the number of the row."""
    y = torch.arange(rows)
    x = y.float().unsqueeze(1).expand(rows, 2).contiguous()
    return Data(x, y, x[:held_out], y[:held_out], "numbered", classes=rows)


# as_batches

X, Y = torch.zeros(4, 3), torch.zeros(4, 1)


@pytest.mark.parametrize(
    "batch", [(X, Y), [X, Y], (X, X, Y), {"x": X}, X, ({"x": X}, Y), ([X, X], Y), (X, None)]
)
def test_one_batch_stays_one(batch: object) -> None:
    assert as_batches(batch)[0] is batch
    assert len(as_batches(batch)) == 1


@pytest.mark.parametrize(
    "several", [((X, Y), (X, Y)), [(X, Y), (X, Y)], [[X, Y], [X, Y]], [{"x": X}, {"x": X}]]
)
def test_several_batches_stay_several(several: list[object]) -> None:
    assert len(as_batches(several)) == 2
    assert as_batches(several, limit=1)[0] is several[0]


def test_loaders_and_generators_are_cut_at_the_limit() -> None:
    def endless() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield X, Y

    assert len(as_batches(endless(), limit=3)) == 3
    assert [len(y) for _, y in as_batches(DataLoader(TensorDataset(X, Y), batch_size=3))] == [3, 1]


def test_data_becomes_the_same_batches_each_time() -> None:
    batches = as_batches(numbered(300))
    assert [len(y) for _, y in batches] == [128, 128, 44]
    assert torch.equal(batches[0][1], as_batches(numbered(300), limit=1)[0][1])


def test_taking_batches_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    as_batches(DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True))
    as_batches(numbered(300))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "empty", [[], (), iter([]), DataLoader(TensorDataset(X, Y), batch_size=9, drop_last=True)]
)
def test_an_empty_loader_is_refused(empty: object) -> None:
    with pytest.raises(DataError, match="The loader is empty"):
        as_batches(empty)


def test_what_holds_no_batches_is_refused() -> None:
    with pytest.raises(DataError, match="DataLoader"):
        as_batches(TensorDataset(X, Y))
    with pytest.raises(DataError, match=r"3 \(int\) is neither"):
        as_batches(3)
    with pytest.raises(DataError, match=r"'mnist' \(str\) is neither"):
        as_batches("mnist")


# check_batch

NAN = torch.tensor([[0.0, 1.0], [torch.nan, torch.inf], [0.0, 0.0]])


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        (torch.zeros(4, 7, dtype=torch.long), Y),
        X,
        {"input_ids": torch.ones(4, 7, dtype=torch.long), "scale": torch.tensor(1.0)},
        (X, torch.zeros(2, 4, 5), Y),
        (X, None),
    ],
)
def test_a_sound_batch_passes(batch: object) -> None:
    check_batch(batch)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X[:0], Y[:0]), r"inputs of this batch have no rows: shape \[0, 3\]"),
        ((X, Y[:0]), "targets of this batch have no rows"),
        ((X, Y[:3]), "4 rows of inputs, but 3 of targets"),
        ((NAN, Y[:3]), "inputs hold 2 values that are NaN or infinite, the first in row 1, column 0"),
        ((X[:3], NAN[:, :1]), "targets hold 1 value that is NaN or infinite, the first in row 1, column 0"),
        ((X[:3], NAN[:, 0]), r"targets hold 1 value .* position \[1\]"),
        (({"a": X[:3], "b": NAN}, Y[:3]), "inputs 'b' hold 2 values"),
        ({"pixels": NAN.half()}, "inputs 'pixels' hold 2 values"),
        (NAN, "inputs hold 2 values"),
        ([X[:3], [X[:3], NAN]], "targets hold 2 values"),
    ],
)
def test_an_unsound_batch_is_refused(batch: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_batch(batch)
