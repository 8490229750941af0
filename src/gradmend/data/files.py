"""The user's own files: CSV, Parquet and NPZ as Data."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gradmend.data.record import Data
from gradmend.data.tables import features, floats, read_csv, read_parquet, refuse_missing, target_name
from gradmend.errors import DataError, suggest

Array: TypeAlias = NDArray[Any]


def load_file(path: Path, target: str | None, seed: int) -> Data:
    """A CSV, Parquet or NPZ file as Data; see `load`."""
    if not path.is_file():
        near = [file.name for file in path.parent.glob(f"*{path.suffix}")]
        raise DataError(f"There is no file {path}. {suggest(path.name, near)}")
    if path.suffix.lower() == ".npz":
        return _load_arrays(path, target or "y", seed)
    table = read_csv(path) if path.suffix.lower() == ".csv" else read_parquet(path)
    name = target_name(path, table, target)
    y, classes = _encode_target(path, name, table[name])
    return split(features(path, table, name), y, path.name, classes, seed)


def split(x: Tensor, y: Tensor, name: str, classes: int | None, seed: int) -> Data:
    """Hold out a fifth of the rows, drawn by `seed`, class by class where there are enough of each."""
    from sklearn.model_selection import train_test_split

    held_out = math.ceil(len(y) / 5)
    if len(x) != len(y):
        raise DataError(f"{name}: {len(x)} rows of inputs, but {len(y)} of targets.")
    if len(y) < 2:
        raise DataError(f"{name} has {len(y)} row: at least one to train on and one to hold out are needed.")
    enough = (
        classes is not None and int(y.bincount().min()) >= 2 and classes <= min(held_out, len(y) - held_out)
    )
    rows = np.arange(len(y))
    labels = y.numpy() if enough else None
    train, test = train_test_split(rows, test_size=held_out, random_state=seed, stratify=labels)
    return Data(x[train], y[train], x[test], y[test], name, classes)


def _load_arrays(path: Path, target: str, seed: int) -> Data:
    arrays = _read_npz(path)
    inputs = "X" if "X" in arrays and "x" not in arrays else "x"
    parts = ("", "_test") if f"{inputs}_test" in arrays else ("",)
    y = [_array(path, arrays, target + part, "biufUS") for part in parts]
    x = [_read_inputs(path, arrays, inputs, part, len(rows)) for part, rows in zip(parts, y, strict=True)]
    numbers, classes = _encode_target(path, target, _join(path, target, y))
    if len(parts) == 1:
        return split(x[0], numbers, path.name, classes, seed)
    rows = len(y[0])
    return Data(x[0], numbers[:rows], x[1], numbers[rows:], path.name, classes)


def _read_inputs(path: Path, arrays: dict[str, Array], name: str, part: str, rows: int) -> Tensor:
    x = _inputs(_array(path, arrays, name + part, "biuf"))
    lengths = f"length{part}"
    end_to_end = lengths in arrays and len(x) != rows
    return _cut(path, lengths, x, _array(path, arrays, lengths, "iu")) if end_to_end else x


def _cut(path: Path, name: str, x: Tensor, lengths: Array) -> Tensor:
    """Sequences that stand end to end, one per row; zeros come before the shorter ones."""
    if lengths.ndim != 1 or lengths.min() < 1 or lengths.sum() != len(x):
        raise DataError(
            f"{path}: {name!r} must hold the steps of each sequence, 1 or more, which all together are "
            f"{len(x)} here; it is {lengths.dtype} {list(lengths.shape)}, together {lengths.sum()}."
        )
    parts = torch.split(x, [int(length) for length in lengths])
    return pad_sequence(list(parts), batch_first=True, padding_side="left")


def _read_npz(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as NPZ: {error}. Write it with `numpy.savez`.") from error


def _array(path: Path, arrays: dict[str, Array], name: str, kinds: str) -> Array:
    if name not in arrays:
        raise DataError(f"{path} has no array {name!r}. {suggest(name, arrays)}")
    array = arrays[name]
    if array.ndim == 0 or array.size == 0 or array.dtype.kind not in kinds:
        raise DataError(
            f"{path}: the array {name!r}, {array.dtype} {list(array.shape)}, cannot be used. Inputs are "
            "numbers [rows, ...], targets numbers or text [rows], and neither is empty."
        )
    _refuse_nan(path, name, array)
    return array


def _refuse_nan(path: Path, name: str, array: Array) -> None:
    if array.dtype.kind == "f" and (missing := np.isnan(array).reshape(len(array), -1)).any():
        column = int(missing.any(axis=0).argmax())
        refuse_missing(path, f"{name}[:, {column}]", missing[:, column])


def _join(path: Path, name: str, parts: list[Array]) -> Array:
    try:
        return np.concatenate(parts)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: {name!r} and '{name}_test' do not fit together: {error}.") from error


def _inputs(array: Array) -> Tensor:
    x = floats(array)
    return x.unsqueeze(1) if x.dim() == 1 else x


def _encode_target(path: Path, name: str, values: Array) -> tuple[Tensor, int | None]:
    """Class numbers [rows] and how many classes, or float32 targets [rows, targets] and None."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    text = values.dtype.kind not in "biuf"
    distinct, codes = np.unique(values, return_inverse=True)
    if len(distinct) == 1:
        raise DataError(f"{path}: the target {name!r} is {distinct[0]} in every row: nothing to learn.")
    few = values.ndim == 1 and len(distinct) <= max(20.0, math.sqrt(len(values)))
    if few and (text or all(float(value).is_integer() for value in distinct)):
        return torch.from_numpy(codes), len(distinct)
    if text:
        raise DataError(
            f"{path}: the target {name!r} is text with {len(distinct)} different values, too many for "
            f"classes. Name another: {path.name}:NAME"
        )
    return _inputs(values), None
