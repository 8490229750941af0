"""Keras on torch, or a plain word why not."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

from gradmend.errors import MissingExtraError, SetupError


def import_keras() -> Any:
    """Import Keras, on torch if the choice is ours.

    Raises:
        MissingExtraError: if Keras is not installed.
        SetupError: if Keras is in use on something else.

    Examples:
        >>> import_keras().backend.backend()
        'torch'
    """
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "torch"
    try:
        keras = import_module("keras")
    except ImportError as error:
        raise MissingExtraError("keras", "keras", "To read Keras models") from error
    if (backend := keras.backend.backend()) != "torch":
        raise SetupError(
            f"Keras runs on {backend} here, and gradmend watches torch. Before Keras is imported, type: "
            "export KERAS_BACKEND=torch"
        )
    return keras
