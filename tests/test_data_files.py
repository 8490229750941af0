"""Tables and arrays in files: CSV, Parquet, NPZ."""

from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from gradmend.data import load
from gradmend.errors import DataError, MissingExtraError


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


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


def test_npz_sequences_of_several_lengths_all_end_at_the_last_step(tmp_path: Path) -> None:
    length, x = np.array([2, 3, 1, 2]), np.arange(1.0, 17).reshape(8, 2)
    np.savez(
        tmp_path / "t.npz",
        **{"x": x, "y": [0, 1, 0, 1], "length": length},
        **{"x_test": x[:3], "y_test": [1, 0], "length_test": [1, 2]},
    )
    data = load(tmp_path / "t.npz")
    assert data.x.shape == (4, 3, 2)
    assert data.x[:, :, 0].tolist() == [[0, 1, 3], [5, 7, 9], [0, 0, 11], [0, 13, 15]]
    assert data.x_test[:, :, 1].tolist() == [[0, 2], [4, 6]]
    np.savez(tmp_path / "t.npz", x=x[:4], y=[0, 1, 0, 1], length=length)
    assert load(f"{tmp_path / 't.npz'}:length").x.shape == (3, 2)


@pytest.mark.parametrize(
    "length", [[2, 2], [[2, 3]], [0, 5], [2.0, 3.0]], ids=["sum", "dimensions", "empty", "no whole numbers"]
)
def test_lengths_that_do_not_cut_sequences_are_refused(length: list[object], tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.zeros((5, 2)), y=[0, 1], length=length)
    with pytest.raises(DataError, match="length"):
        load(tmp_path / "t.npz")


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
