"""Sequences: a task of any length, and images read step by step."""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F

from gradmend.data.record import Data
from gradmend.errors import DataError

_CLASSES: Final = 4
_NOISE: Final = 0.3
_ROWS: Final = 1000
_NEW_ROWS: Final = 500


def recall(steps: int, seed: int) -> Data:
    """Which class was shown at the first of so many steps? Noise comes after it.

    1,000 + 500 sequences [steps, 4]: first the class as a 1 among zeros, then normal noise of deviation 0.3.

    Raises:
        DataError: for less than one step.

    Source: the idea is of Hochreiter, Schmidhuber, Long short-term memory, 1997,
    https://doi.org/10.1162/neco.1997.9.8.1735 (the first symbol decides, noise follows)

    Examples:
        >>> recall(20, seed=0)
        Data('recall-20', 1000 + 500 rows of [20, 4], 4 classes)
    """
    if steps < 1:
        raise DataError("Sequences have one step or more: type recall-100, for example.")
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(_CLASSES, (_ROWS + _NEW_ROWS,), generator=draw)
    x = _NOISE * torch.randn(len(y), steps, _CLASSES, generator=draw)
    x[:, 0] = F.one_hot(y, _CLASSES)
    return Data(x[:_ROWS], y[:_ROWS], x[_ROWS:], y[_ROWS:], f"recall-{steps}", _CLASSES)


def in_steps(images: Data, by: str) -> Data:
    """Square images as sequences: a row of pixels per step (`by="rows"`), or one pixel (`by="pixels"`).

    Examples:
        >>> x, y = torch.zeros(4, 9), torch.arange(4)
        >>> in_steps(Data(x, y, x[:1], y[:1], "toy", 4), "rows")
        Data('toy-rows', 4 + 1 rows of [3, 3], 4 classes)
    """
    pixels = images.x[0].numel()
    values = math.isqrt(pixels) if by == "rows" else 1
    x, x_test = (part.reshape(len(part), -1, values) for part in (images.x, images.x_test))
    return Data(x, images.y, x_test, images.y_test, f"{images.name}-{by}", images.classes)
