"""Target: what a command works on, found from what the user typed."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend.data import Data, as_batches, load
from gradmend.errors import DataError, SetupError, TargetError, suggest
from gradmend.recorder import remember_lines
from gradmend.setup import Batch, OptimizerFactory, Setup
from gradmend.zoo import RECIPES, recipe

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "bce_with_logits": nn.BCEWithLogitsLoss,
    "bce": nn.BCELoss,
    "nll": nn.NLLLoss,
    "mse": nn.MSELoss,
    "l1": nn.L1Loss,
    "huber": nn.HuberLoss,
}
_DATA_NAMES = ("batch", "batches", "loader", "train_loader", "data")
_LOSS_NAMES = ("loss_fn", "criterion", "loss")
_ROWS = 64


@dataclass(frozen=True)
class Target:
    """A setup and the data to try it on.

    Args:
        name: as the user typed it.
        setup: what trains.
        data: what it trains on: a `Data`, a loader, a batch.
        batch_size: rows per batch where `data` is not batched yet.
        epochs: that its recipe suggests.
        notes: what was assumed, in words.
    """

    name: str
    setup: Setup
    data: Any
    batch_size: int
    epochs: int
    notes: tuple[str, ...]

    def batches(self, limit: int | None = None) -> list[Batch]:
        """The training data in batches, in a fixed shuffled order."""
        if isinstance(self.data, Data):
            generator = torch.Generator().manual_seed(0)
            batches = list(self.data.batches(self.batch_size, generator=generator, epochs=1))
            return batches[:limit]
        return as_batches(self.data, limit)


@dataclass(frozen=True)
class Wishes:
    """The options that all commands on a target share."""

    data: str | None = None
    loss: str | None = None
    optimizer: str | None = None
    device: str = "cpu"
    seed: int = 0


def find(target: str, wishes: Wishes) -> Target:
    """The setup and the data that `target` and the options name.

    Args:
        target: `file.py:name`, or the name of a shipped recipe.

    Raises:
        TargetError: if it cannot be found, imported or used.
        DataError: if there is no data for it.
    """
    device = _device(wishes.device)
    torch.manual_seed(wishes.seed)
    found = _recipe(target, wishes) if target in RECIPES else _file_target(target, wishes)
    setup = replace(found.setup, model=found.setup.model.to(device))
    return replace(found, setup=setup, data=_moved(found.data, device))


def _recipe(name: str, wishes: Wishes) -> Target:
    made = recipe(name, data=wishes.data, seed=wishes.seed)
    setup, notes = _completed(made.setup, None, wishes, made.data)
    return Target(name, setup, made.data, made.batch_size, made.epochs, notes)


def _file_target(target: str, wishes: Wishes) -> Target:
    file, colon, name = target.rpartition(":")
    if not colon:
        file, name = target, ""
    module = import_file(file, target)
    setup = _setup(module, name, target)
    data = _data(module, wishes.data, target)
    setup, notes = _completed(setup, module, wishes, data)
    return Target(target, setup, data, _ROWS, 10, notes)


def import_file(file: str, target: str) -> ModuleType:
    """Run a Python file and return it as a module; it finds its neighbours as when it is run itself."""
    path = Path(file)
    if path.suffix != ".py":
        raise TargetError(
            f"{target!r} is neither `file.py:name` nor a shipped recipe. {suggest(target, RECIPES)} "
            "For a model of your own type: gradmend check FILE.py:NAME"
        )
    if not path.is_file():
        near = [str(p) for p in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        raise TargetError(f"There is no file {file!r}. {suggest(file, near)}")
    loader = SourceFileLoader(path.stem, str(path))
    module = ModuleType(path.stem)
    module.__file__ = file
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent.resolve()))
    with _users_errors(path, f"{file} raised an error when it was imported"):
        loader.exec_module(module)
    return module


@contextmanager
def _users_errors(path: Path, what: str) -> Iterator[None]:
    """Turn an error of the user's code into a TargetError that shows the user's own traceback."""
    try:
        with remember_lines():
            yield
    except (Exception, SystemExit) as error:
        frames = error.__traceback__
        while frames is not None and Path(frames.tb_frame.f_code.co_filename).resolve() != path.resolve():
            frames = frames.tb_next
        text = "".join(traceback.format_exception(type(error), error, frames)).rstrip()
        raise TargetError(f"{what}:\n\n{text}") from None


def _setup(module: ModuleType, name: str, target: str) -> Setup:
    usable = [
        key for key, value in vars(module).items() if not key.startswith("_") and _usable(module, value)
    ]
    file = module.__file__ or ""
    if not name:
        raise TargetError(f"Which model of {file}? Type {file}:NAME. {suggest(name, usable)}")
    if not hasattr(module, name):
        raise TargetError(f"{file} has no {name!r}. {suggest(name, usable)}")
    value = getattr(module, name)
    if not isinstance(value, (nn.Module, Setup)) and callable(value):
        with _users_errors(Path(file), f"{target} raised an error when it was called"):
            value = value()
    if isinstance(value, nn.Module):
        return Setup(value)
    if isinstance(value, Setup):
        return value
    raise TargetError(
        f"{target} is a {type(value).__name__}. A target is a torch.nn.Module, a gradmend.Setup, or a "
        f"function without arguments that returns one. {suggest(name, usable)}"
    )


def _usable(module: ModuleType, value: object) -> bool:
    own = getattr(value, "__module__", None) == module.__name__
    return isinstance(value, (nn.Module, Setup)) or (callable(value) and own)


def _data(module: ModuleType, wish: str | None, target: str) -> Any:
    if wish is not None:
        file, _, name = wish.rpartition(":")
        if file.endswith(".py"):
            other = import_file(file, wish)
            if not hasattr(other, name):
                raise DataError(f"{file} has no {name!r}. {suggest(name, vars(other))}")
            value = getattr(other, name)
            return value() if callable(value) else value
        return load(wish)
    for name in _DATA_NAMES:
        if hasattr(module, name):
            value = getattr(module, name)
            return value() if callable(value) else value
    raise DataError(
        f"What data shall {target} see? Type --data digits, --data table.csv:TARGET_COLUMN, "
        f"--data arrays.npz or --data FILE.py:NAME (a batch or a loader), or define one of "
        f"{', '.join(_DATA_NAMES)} in {module.__file__}."
    )


def _completed(
    setup: Setup, module: ModuleType | None, wishes: Wishes, data: Any
) -> tuple[Setup, tuple[str, ...]]:
    """The setup with loss and optimizer: as typed, as defined beside the model, or as usual for the data."""
    notes = []
    if wishes.loss is not None:
        setup = replace(setup, loss_fn=_loss(wishes.loss), step=None)
    elif setup.loss_fn is None and setup.step is None:
        defined = next((getattr(module, n) for n in _LOSS_NAMES if callable(getattr(module, n, None))), None)
        loss_fn, why = (defined, "defined beside the model") if defined else _usual_loss(data)
        if loss_fn is not None:
            setup = replace(setup, loss_fn=loss_fn)
            notes.append(f"loss {getattr(loss_fn, '__name__', type(loss_fn).__name__)} ({why})")
    if wishes.optimizer is not None:
        setup = replace(setup, optimizer=_optimizer(wishes.optimizer))
    elif setup.optimizer is None:
        live = getattr(module, "optimizer", None)
        setup = replace(setup, optimizer=live if isinstance(live, Optimizer) else _optimizer("Adam"))
        note = (
            "defined beside the model" if isinstance(live, Optimizer) else "assumed: give --optimizer NAME:LR"
        )
        notes.append(f"optimizer {type(setup.build_optimizer()).__name__} ({note})")
    return setup, tuple(notes)


def _loss(name: str) -> nn.Module:
    if name not in LOSSES:
        raise SetupError(f"There is no loss {name!r}. {suggest(name, LOSSES)}")
    return LOSSES[name]()


def _usual_loss(data: Any) -> tuple[Callable[..., Tensor] | None, str]:
    batch = (data.x, data.y) if isinstance(data, Data) else as_batches(data, limit=1)[0]
    if not isinstance(batch, (tuple, list)) or not isinstance(batch[-1], Tensor):
        return None, ""
    target = batch[-1]
    if not target.is_floating_point():
        return nn.CrossEntropyLoss(), "assumed: the targets are class numbers"
    return nn.MSELoss(), "assumed: the targets are real numbers"


def _optimizer(wish: str) -> OptimizerFactory:
    """A factory from `NAME` or `NAME:LR`, such as `SGD:0.1`."""
    name, _, rate = wish.partition(":")
    known: dict[str, Callable[..., Optimizer]] = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
    if name.lower() not in known:
        raise SetupError(f"torch has no optimizer {name!r}. {suggest(name.lower(), known)}")
    try:
        return partial(known[name.lower()], **({"lr": float(rate)} if rate else {}))
    except ValueError:
        raise SetupError(f"{rate!r} is no learning rate. Type for example --optimizer {name}:0.01") from None


def _device(name: str) -> torch.device:
    available = ["cpu"]
    available += ["cuda"] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        return torch.device(available[1] if len(available) > 1 else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SetupError(f"There is no device {name!r}. {suggest(name, ['auto', *available])}") from None
    if device.type not in available:
        raise SetupError(f"This machine has no {name}. {suggest(name, ['auto', *available])}")
    return device


def _moved(data: Any, device: torch.device) -> Any:
    if device.type == "cpu":
        return data
    if isinstance(data, Data):
        return data.to(device)
    return [_batch_on(batch, device) for batch in as_batches(data)]


def _batch_on(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _batch_on(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_batch_on(value, device) for value in batch)
    return batch
