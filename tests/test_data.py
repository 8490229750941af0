import gzip
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from torch.utils.data import DataLoader, TensorDataset

from gradmend.data import Data, as_batches, check_batch, load
from gradmend.errors import DataError, MissingExtraError

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


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


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
    with pytest.raises(DataError, match=r"Did you mean 'mnist'.*Possible: digits.*\*\.csv"):
        load("mnst")


# CSV and Parquet


def test_a_csv_is_read_as_it_is_and_split(tmp_path: Path) -> None:
    lines = [f"{i},{1000 * i},{'odd' if i % 2 else 'even'}" for i in range(50)]
    data = load(write(tmp_path / "t.csv", "\n".join(["a,b,parity", *lines])))
    assert (data.x.shape, data.x_test.shape, data.classes, data.name) == ((40, 2), (10, 2), 2, "t.csv")
    assert data.y_test.bincount().tolist() == [5, 5]
    x, y = torch.cat([data.x, data.x_test]), torch.cat([data.y, data.y_test])
    assert torch.equal(x[:, 1], 1000 * x[:, 0])
    assert torch.equal(y, x[:, 0].long() % 2)
    assert x[:, 0].sort().values.tolist() == list(range(50))


@pytest.mark.parametrize(
    ("header", "suffix", "expected"),
    [("a,b,c", "", 2), ("a,Label,c", "", 1), ("y,target,c", "", 1), ("a,b,y", ":a", 0), ("y,b,c", "", 0)],
)
def test_the_target_is_the_named_the_usual_or_the_last_column(
    header: str, suffix: str, expected: int, tmp_path: Path
) -> None:
    rows = ["1,10,100", "2,20,200"] * 5
    data = load(write(tmp_path / "t.csv", "\n".join([header, *rows])) + suffix)
    rest = [place for place in range(3) if place != expected]
    assert (data.x[data.y == 0][0] == torch.tensor([10.0**place for place in rest])).all()


def test_text_columns_are_one_hot_up_to_twenty_levels(tmp_path: Path) -> None:
    rows = [f"few{i % 3},many{i:02},{i + 0.5}" for i in range(30)]
    data = load(write(tmp_path / "t.csv", "\n".join(["few,many,y", *rows])))
    assert data.x.shape == (24, 4)
    assert (data.x[:, :3].sum(dim=1) == 1).all()
    assert torch.equal(data.x[:, 3:] + 0.5, data.y)


@pytest.mark.parametrize(
    ("targets", "classes"),
    [
        ([str(i % 20) for i in range(100)], 20),
        ([str(i % 25) for i in range(100)], None),
        ([str(i % 25) for i in range(625)], 25),
        ([str(i % 3 + 5) for i in range(30)], 3),
        ([str(i % 3 + 0.5) for i in range(30)], None),
        (["inf", "1"] * 10, None),
        (["rare", *["often"] * 29], 2),
    ],
)
def test_few_whole_numbers_or_texts_are_classes(
    targets: list[str], classes: int | None, tmp_path: Path
) -> None:
    rows = [f"{i},{target}" for i, target in enumerate(targets)]
    data = load(write(tmp_path / "t.csv", "\n".join(["x,y", *rows])))
    assert data.classes == classes
    if classes is None:
        assert data.y.dtype == torch.float32
        assert data.y.shape == (len(data.x), 1)
    else:
        assert torch.cat([data.y, data.y_test]).unique().tolist() == list(range(classes))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_separator_quotes_byte_order_mark_and_blank_lines(delimiter: str, tmp_path: Path) -> None:
    rows = [delimiter.join([str(i), f'"{i % 2}"']) for i in range(10)]
    data = load(
        write(tmp_path / "t.CSV", "\ufeff" + "\n\n".join([delimiter.join("xy"), *rows]) + "\n") + ":y"
    )
    assert (len(data.x), len(data.x_test), data.classes) == (8, 2, 2)


def test_a_csv_without_names_loses_no_row(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "\n".join(f"{i},{i % 2}" for i in range(10)))
    assert len(load(path).x) == 8
    assert load(path + ":1").x.unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("a,b\n", "empty"),
        ("a,b\n1,2\n3,\n", "column 'b' has no value in row 2"),
        ("a,b\n1,x\nnan,y\n", "column 'a' has no value in row 2"),
        ("a,b\nx,1\n?,2\n", "column 'a' has no value in row 2"),
        ("a,b\n1,2\n3\n", "row 2 has 1 cells"),
        ("a,a\n1,2\n", "more than one column called 'a'"),
        ("a\n1\n2\n", "no column besides the target 'a'"),
        ("a,b\n1,2\n", "target 'b' is 2.0 in every row"),
        ("a,b\n1,x\n2,x\n", "target 'b' is x in every row"),
        ("a,b\n" + "\n".join(f"{i},name{i}" for i in range(30)), "too many for classes"),
    ],
)
def test_csv_that_cannot_be_learnt_from(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "t.csv", text))


def test_wrong_column_wrong_path_and_binary_file(tmp_path: Path) -> None:
    path = write(tmp_path / "iris.csv", "petal,species\n1,2\n")
    with pytest.raises(DataError, match=r"no column 'specie'\. Did you mean 'species'"):
        load(path + ":specie")
    with pytest.raises(DataError, match=r"There is no file .*Did you mean 'iris\.csv'"):
        load(tmp_path / "irs.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="cannot be read as CSV"):
        load(tmp_path / "b.csv")


def test_parquet_gives_what_csv_gives(tmp_path: Path) -> None:
    columns = {
        "count": list(range(20)),
        "flag": [i % 3 == 0 for i in range(20)],
        "colour": ["red" if i % 2 else "blue" for i in range(20)],
        "y": [i % 4 for i in range(20)],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    rows = [f"{c},{int(f)},{t},{y}" for c, f, t, y in zip(*columns.values(), strict=True)]
    ours, twin = (
        load(tmp_path / "t.parquet"),
        load(write(tmp_path / "t.csv", "\n".join([",".join(columns), *rows]))),
    )
    assert torch.equal(ours.x, twin.x)
    assert torch.equal(ours.y_test, twin.y_test)
    assert ours.classes == twin.classes == 4


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1, 2], "y": [1.5, None]}, "column 'y' has no value in row 2"),
        ({"a": ["u", None], "y": [1, 2]}, "column 'a' has no value in row 2"),
        ({"a": [[1], [2]], "y": [1, 2]}, "not single values"),
    ],
)
def test_parquet_that_cannot_be_learnt_from(columns: dict[str, list], message: str, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=message):
        load(tmp_path / "t.parquet")


def test_parquet_corrupt_or_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.parquet", "nonsense")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load(path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gradmend\[parquet\]'"):
        load(path)


# NPZ


def test_npz_with_its_own_held_out_rows(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.uint8).reshape(6, 2, 2)
    labels = np.array(["b", "a", "b", "a", "c", "c"])
    np.savez(tmp_path / "t.npz", X=x[:4], X_test=x[4:], y=labels[:4], y_test=labels[4:])
    data = load(tmp_path / "t.npz")
    assert data.x.tolist() == x[:4].tolist()
    assert data.x.dtype == torch.float32
    assert (data.y.tolist(), data.y_test.tolist(), data.classes) == ([1, 0, 1, 0], [2, 2], 3)


def test_npz_is_split_and_takes_another_target(tmp_path: Path) -> None:
    x = np.linspace(0, 1, 10)
    np.savez(
        tmp_path / "t.npz", x=x, y=np.arange(10) % 2, both=np.stack([x, 2 * x], axis=1), column=x[:, None]
    )
    assert load(tmp_path / "t.npz").x.shape == (8, 1)
    data = load(f"{tmp_path / 't.npz'}:both")
    assert data.y.shape == (8, 2)
    assert torch.equal(data.y[:, :1], data.x)
    assert load(f"{tmp_path / 't.npz'}:column").y_test.shape == (2, 1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": np.ones(3), "y": np.ones(3)}, "no array 'x'"),
        ({"x": np.ones(3), "Y": np.ones(3)}, "no array 'y'"),
        ({"x": np.ones((3, 2)), "x_test": np.ones((3, 2)), "y": np.arange(3)}, "no array 'y_test'"),
        ({"x": np.ones((3, 2)), "y": np.arange(4)}, "3 rows of inputs, but 4 of targets"),
        ({"x": np.ones((1, 2)), "y": np.eye(2)[:1]}, "1 row: at least"),
        ({"x": np.ones((0, 2)), "y": np.ones(0)}, "neither is empty"),
        ({"x": np.array(["a", "b"]), "y": np.arange(2)}, "cannot be used"),
        ({"x": np.float32(3), "y": np.arange(2)}, "cannot be used"),
        ({"x": np.array([[1, 2], [1, np.nan]]), "y": np.arange(2)}, r"'x\[:, 1\]' has no value in row 2"),
        ({"x": np.ones(2), "y": np.array([0, np.nan])}, r"'y\[:, 0\]' has no value in row 2"),
        ({"x": np.ones(2), "y": np.array([0, {}])}, "cannot be read as NPZ"),
        (
            {"x": np.ones(2), "x_test": np.ones(2), "y": np.ones(2), "y_test": np.ones((2, 3))},
            "do not fit together",
        ),
    ],
)
def test_npz_that_cannot_be_learnt_from(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "t.npz")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04cut short"])
def test_a_corrupt_npz_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as NPZ"):
        load(tmp_path / "t.npz")


def test_an_npy_file_under_the_wrong_name_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.ones(3))
    (tmp_path / "t.npy").rename(tmp_path / "t.npz")
    with pytest.raises(DataError, match="cannot be read as NPZ"):
        load(tmp_path / "t.npz")


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
