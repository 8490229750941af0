"""Small data of two classes that needs no download."""

from __future__ import annotations

from typing import Final

import torch

from gradmend.data.files import split
from gradmend.data.record import Data

_ROWS: Final = 1000
_NEW_ROWS: Final = 250
_VALUES: Final = 32


def breast_cancer(seed: int) -> Data:
    """569 tumours, 30 measures of each: benign or malignant; a fifth is held out, drawn by `seed`.

    Each column is standardized by the training rows.

    Source: Street, Wolberg, Mangasarian, Nuclear feature extraction for breast tumor diagnosis, 1993
    """
    from sklearn.datasets import load_breast_cancer

    table, labels = load_breast_cancer(return_X_y=True)
    name = "breast-cancer"
    data = split(torch.from_numpy(table).float(), torch.from_numpy(labels).long(), name, 2, seed)
    deviation, mean = torch.std_mean(data.x, dim=0)
    x, x_test = ((part - mean) / deviation for part in (data.x, data.x_test))
    return Data(x, data.y, x_test, data.y_test, name, classes=2)


def random_labels(seed: int) -> Data:
    """1,000 + 250 rows of 32 numbers from 0 to 1, and labels that have nothing to do with them.

    A network can only learn the training rows by heart; it guesses the held-out ones.

    Source: Zhang et al., Understanding deep learning requires rethinking generalization, 2017,
    https://arxiv.org/abs/1611.03530
    """
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(_ROWS + _NEW_ROWS, _VALUES, generator=draw)
    y = torch.randint(2, (len(x),), generator=draw)
    return Data(x[:_ROWS], y[:_ROWS], x[_ROWS:], y[_ROWS:], "random-labels", classes=2)


def two_samples() -> Data:
    """Two rows of two numbers, one of each class, and none held out.

    Examples:
        >>> two_samples().x.tolist(), two_samples().y.tolist()
        ([[0.5, 1.5], [-1.0, 0.5]], [1, 0])
    """
    x, y = torch.tensor([[0.5, 1.5], [-1.0, 0.5]]), torch.tensor([1, 0])
    return Data(x, y, x[:0], y[:0], "two-samples", classes=2)
