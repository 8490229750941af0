"""Where data comes from: names that everyone knows, and the user's own files."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from gradmend.data.files import load_file, split
from gradmend.data.idx import read_idx
from gradmend.data.record import Data
from gradmend.data.sequences import in_steps, recall
from gradmend.data.small import breast_cancer, random_labels, two_samples
from gradmend.errors import DataError, suggest

_FILE = re.compile(r"(?P<path>.+?\.(csv|npz|parquet))(:(?P<target>.+))?", re.IGNORECASE)
_RECALL = re.compile(r"recall-(?P<steps>\d+)")
_IN_STEPS = re.compile(r"(?P<images>.+)-(?P<by>rows|pixels)")
_OPENML = {"mnist": "mnist_784", "fashion-mnist": "Fashion-MNIST"}
_PICTURES = ("digits", *_OPENML)
_SMALL: Mapping[str, Callable[[int], Data]] = {
    "breast-cancer": breast_cancer,
    "random-labels": random_labels,
    "two-samples": lambda _seed: two_samples(),
}
_EXAMPLES = (*_PICTURES, *_SMALL, "mnist-rows", "mnist-pixels", "recall-100")
_IMAGES = ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz")
_LABELS = ("train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz")


def load(name_or_path: str | os.PathLike[str], *, seed: int = 0) -> Data:
    """Data by name or from a file.

    - `digits`: 1,797 images of 8 x 8 that come with scikit-learn; a fifth is held out, drawn by `seed`.
    - `mnist`, `fashion-mnist`: 60,000 + 10,000 images of 28 x 28, from the four original .gz files in
      `$GRADMEND_DATA/mnist` or `$GRADMEND_DATA/fashion-mnist`, else fetched from OpenML. Images are
      flattened, and standardized with the one mean and the one deviation of the training images.
    - `digits-rows`, `digits-pixels`, and so with the other images: sequences, a row of pixels per step or a
      single one.
    - `recall-100`: 1,000 + 500 sequences of 100 steps, or of any other number, drawn by `seed`. The first
      step shows one of 4 classes, the rest is noise.
    - `breast-cancer`: 569 rows of 30 measures, two classes, with scikit-learn; a fifth is held out, drawn by
      `seed`. Each column is standardized.
    - `random-labels`: 1,000 + 250 rows of 32 uniform numbers, and labels 0 and 1 drawn by `seed` without
      regard to them. They can be learnt by heart, and nothing follows for new rows.
    - `two-samples`: two rows of two numbers, one of each class, none held out.
    - `FILE.csv`, `FILE.parquet`: the target is the column named after a colon (`iris.csv:species`), else
      target, label, class or y, else the last. Text columns become one column per level up to 20 levels,
      and level numbers beyond.
    - `FILE.npz`: arrays `x` or `X` [rows, ...] and `y`, or as named after the colon; held-out rows in
      `x_test` and `y_test`. Sequences of several lengths stand in `x` end to end, and `length` [rows] (and
      `length_test`) cuts them; zeros are put before the shorter ones, so that all end at the last step.

    Whole numbers or text with at most max(20, sqrt(rows)) different values are classes; other targets
    are for regression. A fifth of a file's rows is held out, drawn by `seed`, unless it names them. A
    file is **not** standardized: the scale of your data is one of the things gradmend diagnoses.

    Args:
        name_or_path: one of the names above, or the path of a file, with `:target` if need be.
        seed: decides which rows are held out.

    Raises:
        DataError: if there is no such name, file or column, the file cannot be read, has missing
            values or nothing to learn, or the download fails.
        MissingExtraError: for Parquet without pyarrow.

    Examples:
        >>> load("digits")
        Data('digits', 1437 + 360 rows of [64], 10 classes)
    """
    name = os.fspath(name_or_path)
    if name in _PICTURES:
        return _pictures(name, seed)
    if name in _SMALL:
        return _SMALL[name](seed)
    if (parts := _IN_STEPS.fullmatch(name)) and parts["images"] in _PICTURES:
        return in_steps(_pictures(parts["images"], seed), parts["by"])
    if task := _RECALL.fullmatch(name):
        return recall(int(task["steps"]), seed)
    if file := _FILE.fullmatch(name):
        return load_file(Path(file["path"]).expanduser(), file["target"], seed)
    raise DataError(
        f"There is no data called {name!r}. {suggest(name, _EXAMPLES)} Or give a file: "
        "*.csv, *.npz or *.parquet."
    )


def _pictures(name: str, seed: int) -> Data:
    return _digits(seed) if name == "digits" else _images(name)


def _digits(seed: int) -> Data:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float(), torch.from_numpy(labels).long()
    data = split(x, y, "digits", 10, seed)
    return _standardized(data.x, data.y, data.x_test, data.y_test, "digits")


def _images(name: str) -> Data:
    folder = _folder(name)
    if folder is not None and all((folder / file).is_file() for file in _IMAGES + _LABELS):
        x, x_test = (_flat(read_idx(folder / file, 3)) for file in _IMAGES)
        y, y_test = (torch.from_numpy(read_idx(folder / file, 1).astype(np.int64)) for file in _LABELS)
        return _standardized(x, y, x_test, y_test, name)
    pixels, labels = _fetch(name)
    return _standardized(pixels[:60_000], labels[:60_000], pixels[60_000:], labels[60_000:], name)


def _folder(name: str) -> Path | None:
    root = os.environ.get("GRADMEND_DATA")
    return Path(root).expanduser() / name if root else None


def _flat(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images.astype(np.float32)).flatten(1)


def _standardized(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, name: str) -> Data:
    deviation, mean = torch.std_mean(x)
    return Data((x - mean) / deviation, y, (x_test - mean) / deviation, y_test, name, classes=10)


def _fetch(name: str) -> tuple[Tensor, Tensor]:
    """All 70,000 images [70000, 784] and labels; scikit-learn keeps them in its data folder."""
    from sklearn.datasets import fetch_openml

    columns = (SpinnerColumn("line"), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    try:
        with warnings.catch_warnings(), Progress(*columns, console=console, transient=True) as progress:
            warnings.simplefilter("ignore")  # sklearn's notes on each retry: the error below says it once
            progress.add_task(f"Fetching {name} from OpenML", total=None)
            table = fetch_openml(_OPENML[name], version=1, as_frame=False, parser="liac-arff", n_retries=1)
    except (OSError, ValueError, HTTPException) as error:
        raise DataError(_no_images(name, error)) from error
    return torch.from_numpy(table.data.astype(np.float32)), torch.from_numpy(table.target.astype(np.int64))


def _no_images(name: str, error: Exception) -> str:
    folder = _folder(name)
    where = f"in {folder}" if folder else "because GRADMEND_DATA is not set"
    return (
        f"{name} is not at hand: its files were not found {where}, and the download from OpenML failed "
        f"({error}). Put {', '.join(_IMAGES + _LABELS)} into a folder DIR/{name}, and type: "
        "export GRADMEND_DATA=DIR"
    )
