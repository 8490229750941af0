"""Saved Keras models: a `.keras` file as a setup that can be checked and mended."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmend.data import Data
from gradmend.errors import BatchError, SetupError, TargetError
from gradmend.integrations.keras.backend import import_keras
from gradmend.integrations.keras.code import in_keras
from gradmend.integrations.keras.compiled import KerasLoss, clipping_like, optimizer_like, schedule_like
from gradmend.integrations.keras.twin import twin
from gradmend.remedies import Change
from gradmend.setup import Setup


class KerasModule(nn.Module):
    """A Keras model as a module that trains when it is in training mode, and knows its layers by name.

    Args:
        model: of Keras, on torch.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        # first, so that parameters have their names, and their order, from the layers
        self.layers = nn.ModuleDict({layer.name.replace(".", "_"): layer for layer in model.layers})
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """The output, as the model gives it."""
        return self.model(x, training=self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> KerasModule:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the state of Keras's own optimizer is of no use here
            made = KerasModule(copy.deepcopy(self.model, memo))
        for variable, original in zip(made.model.variables, self.model.variables, strict=True):
            variable.value.requires_grad = original.value.requires_grad
        return made.train(self.training)


@dataclass(frozen=True, eq=False)
class SavedModel:
    """A Keras model from a file.

    Args:
        model: of Keras.
        name: of the file.
    """

    model: Any
    name: str

    @cached_property
    def twin(self) -> nn.Sequential | None:
        """The same in plain torch, where that is possible."""
        return twin(self.model)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read, in words."""
        same = "its layers as layers of torch, with the same weights and outputs"
        other = "measured as Keras runs it; mend changes no layers of such a model"
        notes = [other if self.twin is None else same]
        if self.model.compiled and optimizer_like(self.model.optimizer) is None:
            notes.append(f"torch has no {type(self.model.optimizer).__name__} like that of Keras")
        return tuple(notes)

    def setup(self) -> Setup:
        """What trains: the model, and loss and optimizer as far as it was compiled.

        Raises:
            SetupError: if it has several losses.
        """
        model = self.twin or KerasModule(self.model)
        setup = Setup(model.train())
        if not self.model.compiled:
            return setup
        loss, optimizer = self._loss(), self.model.optimizer
        return replace(
            setup,
            loss_fn=None if loss is None else KerasLoss(loss),
            optimizer=optimizer_like(optimizer),
            schedule=schedule_like(optimizer),
            gradient_transform=clipping_like(optimizer),
        )

    def fitting(self, data: Data) -> Data:
        """The data as the model takes it: channels last or flat, and targets one-hot where the loss wants it.

        Raises:
            BatchError: if that is impossible.
        """
        x, x_test = (self._shaped(part) for part in (data.x, data.x_test))
        y, y_test = (self._coded(part, data.classes) for part in (data.y, data.y_test))
        return replace(data, x=x, x_test=x_test, y=y, y_test=y_test)

    def code(self, changes: Sequence[Change]) -> str:
        """The changes of a treatment as Python for the Keras model, in the variable `model`."""
        return in_keras(changes, self.model)

    def _loss(self) -> Any:
        """The loss of Keras, if it is known by itself."""
        given = self.model.loss if self.model.compiled else None
        losses = list(given.values()) if isinstance(given, dict) else given
        if isinstance(losses, (list, tuple)):
            if len(losses) != 1:
                raise SetupError(f"{self.name} has several losses; gradmend takes models of one loss.")
            given = losses[0]
        with suppress(ValueError):  # "crossentropy" is known to `compile` alone
            return import_keras().losses.get(given)
        return None

    def _shaped(self, x: Tensor) -> Tensor:
        wanted = tuple(self.model.input_shape[1:])
        for candidate in (x, x.movedim(1, -1) if x.dim() > 2 else x, x.flatten(1)):
            if _fits(candidate.shape[1:], wanted):
                return candidate
        if None not in wanted and x[:1].numel() == torch.Size(wanted).numel() and 1 in wanted:
            return x.reshape(-1, *wanted)
        raise BatchError(
            f"{self.name} takes rows of {list(wanted)}, and the data has rows of {list(x.shape[1:])}."
        )

    def _coded(self, y: Tensor, classes: int | None) -> Tensor:
        name = getattr(self._loss(), "name", getattr(self._loss(), "__name__", ""))
        if name.startswith("categorical_") and y.dim() == 1 and classes:
            return F.one_hot(y, classes).float()
        return y


def read_saved(path: str) -> SavedModel:
    """Read a Keras model from a `.keras` file; code that it brings along is not run.

    Args:
        path: of the file.

    Raises:
        TargetError: if there is no such file, or Keras cannot read it.
        MissingExtraError: if Keras is not installed.

    Examples:
        >>> import tempfile
        >>> keras = import_keras()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2)])
        ...     model.save(f"{folder}/model.keras")
        ...     read_saved(f"{folder}/model.keras").setup().model[0].in_features
        4
    """
    if not Path(path).is_file():
        raise TargetError(f"There is no file {path!r}.")
    keras = import_keras()
    try:
        model = keras.models.load_model(path)
    except (ValueError, TypeError, OSError) as error:
        raise TargetError(f"Keras cannot read {path}: {error}") from error
    return SavedModel(model, path)


def _fits(shape: torch.Size, wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(b in (a, None) for a, b in zip(shape, wanted, strict=True))
