"""The IDX format in which MNIST and Fashion-MNIST are published (LeCun, http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradmend.errors import DataError


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The bytes of a gzipped IDX file, in an array of so many dimensions.

    The file holds two zero bytes, the type (8: unsigned bytes), the number of dimensions, each length
    as four bytes with the highest first, and then the values, the last dimension varying fastest.

    Raises:
        DataError: if the file cannot be unpacked, is of another kind, or is cut short.
    """
    try:
        with gzip.open(path) as file:
            raw = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}. Fetch it again.") from error
    start = 4 + 4 * dimensions
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) < start:
        raise DataError(f"{path} is not an IDX file of unsigned bytes in {dimensions} dimensions.")
    shape = np.frombuffer(raw[:start], dtype=">u4", offset=4).tolist()
    if len(raw) - start != math.prod(shape):
        raise DataError(f"{path} promises {shape} values and holds {len(raw) - start}. Fetch it again.")
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)
