"""Data in memory, and data sets by their names."""

import gzip
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmend.data import Data, load
from gradmend.errors import DataError

FOLDERS = ["mnist", "fashion-mnist"]


def numbered(rows: int, held_out: int = 0) -> Data:
    """Rows whose inputs and targets both hold the number of the row."""
    y = torch.arange(rows)
    x = y.float().unsqueeze(1).expand(rows, 2).contiguous()
    return Data(x, y, x[:held_out], y[:held_out], "numbered", classes=rows)


def packed(content: bytes) -> bytes:
    """Without the time of packing, which would be another one in each test process."""
    return gzip.compress(content, mtime=0)


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes()
    path.write_bytes(packed(header + values.tobytes()))


def write_images(folder: Path, rows: int = 12, held_out: int = 5) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    for part, number in (("train", rows), ("t10k", held_out)):
        images = draw.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        labels = draw.integers(0, 10, number, dtype=np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
        if part == "train":
            first = images, labels
    return first


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing cached, and every request refused by this machine itself."""
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY", "GRADMEND_DATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "cache"))
    return tmp_path


# Data


@settings(deadline=None)
@given(rows=st.integers(1, 60), size=st.integers(1, 70), seed=st.integers(0, 9))
def test_an_epoch_holds_every_row_once_in_batches_of_the_size_asked_for(
    rows: int, size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = list(numbered(rows).batches(size, generator=generator, epochs=1))
    assert torch.cat([y for _, y in batches]).sort().values.tolist() == list(range(rows))
    assert all(torch.equal(x, y.float().unsqueeze(1).expand(-1, 2)) for x, y in batches)
    sizes = [len(y) for _, y in batches]
    assert all(n == size for n in sizes[:-1])
    assert sizes[-1] <= size + 1
    assert 1 not in sizes or size == 1 or rows == 1


def test_epochs_differ_in_order_and_repeat_with_the_generator() -> None:
    def epochs(seed: int) -> list[list[int]]:
        stream = numbered(40).batches(40, generator=torch.Generator().manual_seed(seed), epochs=2)
        return [y.tolist() for _, y in stream]

    assert epochs(0) == epochs(0) != epochs(1)
    assert epochs(0)[0] != epochs(0)[1]


def test_batches_go_on_without_end_and_follow_the_global_generator() -> None:
    torch.manual_seed(0)
    stream = numbered(6).batches(4)
    first = [next(stream)[1].tolist() for _ in range(20)]
    assert [len(batch) for batch in first] == [4, 2] * 10
    torch.manual_seed(0)
    assert next(numbered(6).batches(4))[1].tolist() == first[0]


def test_batches_are_copies() -> None:
    data = numbered(4)
    next(data.batches(2))[0].zero_()
    assert data.x[3, 0] == 3


def test_head_device_and_name() -> None:
    data = numbered(5, held_out=2)
    x, y = data.head(2)
    assert x.shape == (2, 2)
    assert y.tolist() == [0, 1]
    moved = data.to("meta")
    assert {t.device.type for t in (moved.x, moved.y, moved.x_test, moved.y_test)} == {"meta"}
    assert repr(data) == "Data('numbered', 5 + 2 rows of [2], 5 classes)"


def test_impossible_data_is_refused() -> None:
    x, y = torch.zeros(3, 2), torch.zeros(3, 1)
    with pytest.raises(DataError, match="3 rows of training inputs, but 2 of targets"):
        Data(x, y[:2], x, y, "toy", None)
    with pytest.raises(DataError, match="3 rows of test inputs, but 1 of targets"):
        Data(x, y, x, y[:1], "toy", None)
    with pytest.raises(DataError, match="no training rows"):
        Data(x[:0], y[:0], x, y, "toy", None)
    with pytest.raises(DataError, match="one row or more, not 0"):
        numbered(3).batches(0)


# Named data


def test_digits_are_stratified_and_standardized() -> None:
    data = load("digits")
    assert data.x.shape == (1437, 64)
    assert data.x_test.shape == (360, 64)
    assert (data.x.dtype, data.y.dtype, data.classes) == (torch.float32, torch.int64, 10)
    assert abs(data.x.mean()) < 1e-5
    assert abs(data.x.std() - 1) < 1e-5
    assert all(35 <= count <= 37 for count in data.y_test.bincount().tolist())


def test_the_seed_decides_which_rows_are_held_out() -> None:
    assert torch.equal(load("digits", seed=1).x_test, load("digits", seed=1).x_test)
    assert not torch.equal(load("digits", seed=1).x_test, load("digits", seed=2).x_test)


@pytest.mark.parametrize("name", FOLDERS)
def test_images_come_from_the_original_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = write_images(tmp_path / name)
    monkeypatch.setenv("GRADMEND_DATA", str(tmp_path))
    data = load(name)
    assert (data.x.shape, data.x_test.shape) == ((12, 784), (5, 784))
    assert (data.name, data.classes, data.y.tolist()) == (name, 10, labels.tolist())
    pixels = torch.from_numpy(images.reshape(12, 784).astype(np.float32))
    torch.testing.assert_close(data.x, (pixels - pixels.mean()) / pixels.std())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-images-idx3-ubyte.gz", b"not gzip", "cannot be unpacked"),
        ("train-images-idx3-ubyte.gz", packed(bytes(99))[:-20], "cannot be unpacked"),
        ("train-images-idx3-ubyte.gz", packed(b"\0\0\x08"), "not an IDX file"),
        ("train-labels-idx1-ubyte.gz", packed(b"\0\0\x08\x03" + bytes(12)), "not an IDX file"),
        (
            "t10k-labels-idx1-ubyte.gz",
            packed(b"\0\0\x08\1\0\0\0\5abc"),
            r"promises \[5\] values and holds 3",
        ),
        (
            "t10k-labels-idx1-ubyte.gz",
            packed(b"\0\0\x08\1\0\0\0\3abc"),
            "5 rows of test inputs, but 3",
        ),
    ],
    ids=["not packed", "cut off", "short header", "other dimensions", "too few values", "too few rows"],
)
def test_broken_image_files_are_refused(
    file: str, content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "mnist")
    (tmp_path / "mnist" / file).write_bytes(content)
    monkeypatch.setenv("GRADMEND_DATA", str(tmp_path))
    with pytest.raises(DataError, match=message):
        load("mnist")


def test_a_failed_download_says_what_to_type(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError) as error:
        load("mnist")
    for part in (
        "GRADMEND_DATA is not set",
        "refused",
        "train-images-idx3-ubyte.gz",
        "export GRADMEND_DATA=",
    ):
        assert part in str(error.value)
    monkeypatch.setenv("GRADMEND_DATA", str(offline))
    with pytest.raises(DataError, match=r"not found in .*fashion-mnist"):
        load("fashion-mnist")


def test_openml_gives_60000_rows_to_train_on(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = SimpleNamespace(data=np.arange(60_003 * 2).reshape(-1, 2), target=np.array(["7"] * 60_003))
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *_, **__: table)
    data = load("mnist")
    assert (data.x.shape, data.x_test.shape) == ((60_000, 2), (3, 2))
    assert data.y_test.tolist() == [7, 7, 7]


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(DataError, match=r"Did you mean 'mnist'.*Possible: breast-cancer, digits.*\*\.csv"):
        load("mnst")
