"""Target: what a command works on, found from what the user typed."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import dropwhile, islice
from pathlib import Path
from sysconfig import get_paths
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmend.data import Data, as_batches, load
from gradmend.errors import DataError, SetupError, TargetError, suggest
from gradmend.lines import remember_lines
from gradmend.remedies import Change
from gradmend.remedies.code import code
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
_ROWS, _EPOCHS = 64, 10
_MOST_BATCHES = 1000
_NO_PLAIN_STEP = ("Optimizer", "LBFGS", "SparseAdam")
_HERE = str(Path(__file__).parent)
_INSTALLED = (_HERE, "<", *(get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")))


@dataclass(frozen=True)
class Target:
    """A setup and the data to try it on.

    Args:
        name: as the user typed it.
        setup: what trains.
        data: what it trains on: a `Data`, a loader, a batch.
        batch_size: rows per batch where `data` is not batched yet, as typed or as its recipe suggests.
        epochs: as typed, or as its recipe suggests.
        notes: what was assumed, in words.
        code: writes changes as code of the framework that the model is of, where that is not torch.
    """

    name: str
    setup: Setup
    data: Any
    batch_size: int
    epochs: int
    notes: tuple[str, ...]
    code: Callable[[Sequence[Change]], str] = code

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
    depth: int | None = None
    width: int | None = None
    epochs: int | None = None
    batch_size: int | None = None


def find(target: str, wishes: Wishes) -> Target:
    """The setup and the data that `target` and the options name.

    Args:
        target: `file.py:name`, a saved `model.keras`, or the name of a shipped recipe.

    Raises:
        TargetError: if it cannot be found, imported or used.
        DataError: if there is no data for it.
    """
    device = _device(wishes.device)
    torch.manual_seed(wishes.seed)
    kind = _recipe if target in RECIPES else _saved if target.endswith(".keras") else _file_target
    found = kind(target, wishes)
    setup = replace(found.setup, model=found.setup.model.to(device))
    return replace(found, setup=setup, data=_moved(found.data, device))


def _recipe(name: str, wishes: Wishes) -> Target:
    sizes = {"depth": wishes.depth, "width": wishes.width}
    changes = {key: value for key, value in sizes.items() if value is not None}
    length = {"epochs": wishes.epochs, "batch_size": wishes.batch_size}
    made = recipe(name, data=wishes.data, seed=wishes.seed, **length, **changes)
    setup, notes = _completed(made.setup, None, wishes, made.data)
    return Target(name, setup, made.data, made.batch_size, made.epochs, notes)


def _saved(target: str, wishes: Wishes) -> Target:
    from gradmend.integrations.keras.saved import read_saved

    saved = read_saved(target)
    if wishes.data is None:
        raise DataError(f"What data shall {target} see? Type --data digits, arrays.npz or FILE.py:NAME.")
    file, name = _split(wishes.data)
    data = _rows(import_file(file, wishes.data), name) if file.endswith(".py") else load(wishes.data)
    data = saved.fitting(data) if isinstance(data, Data) else data
    setup, notes = _completed(saved.setup(), None, wishes, data)
    length = wishes.batch_size or _ROWS, wishes.epochs or _EPOCHS
    return Target(target, setup, data, *length, (*saved.notes, *notes), saved.code)


def _file_target(target: str, wishes: Wishes) -> Target:
    file, name = _split(target)
    module = import_file(file, target)
    if wishes.depth is not None or wishes.width is not None:
        raise TargetError(f"{target} has its own depth and width. --depth and --width are for recipes.")
    setup = _setup(module, name, target)
    data = _data(module, wishes.data, target)
    setup, notes = _completed(setup, module, wishes, data)
    return Target(target, setup, data, wishes.batch_size or _ROWS, wishes.epochs or _EPOCHS, notes)


def _split(target: str) -> tuple[str, str]:
    """The file and the name of `file.py:name`; no name if there is none."""
    file, colon, name = target.rpartition(":")
    return (file, name) if colon else (target, "")


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
    module = ModuleType(str(path.resolve()) if path.stem in sys.modules else path.stem)
    module.__file__ = file
    sys.modules[module.__name__] = module
    sys.path[:0] = [str(path.parent.resolve()), str(Path.cwd())]
    with _users_errors(f"{file} raised an error when it was imported"):
        exec(compile(path.read_bytes(), file, "exec", dont_inherit=True), vars(module))
    return module


@contextmanager
def _users_errors(what: str) -> Iterator[None]:
    """Turn an error of the user's code into a TargetError that shows the user's own traceback."""
    try:
        with remember_lines():
            yield
    except (Exception, SystemExit) as error:
        raise TargetError(f"{what}:\n\n{users_traceback(error)[0]}") from None


def users_traceback(error: BaseException) -> tuple[str, bool]:
    """The traceback from the user's first line on, without gradmend's own; whether there is such a line."""
    shown = traceback.TracebackException.from_exception(error)
    part: traceback.TracebackException | None = shown
    found = False
    while part is not None:
        frames = list(dropwhile(lambda frame: frame.filename.startswith(_INSTALLED), part.stack))
        found = found or bool(frames)
        own = [frame for frame in frames if not frame.filename.startswith((_HERE, "<frozen"))]
        part.stack = traceback.StackSummary.from_list(own)
        part = part.__cause__ or part.__context__
    return "".join(shown.format()).rstrip(), found


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
        with _users_errors(f"{target} raised an error when it was called"):
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
        file, name = _split(wish)
        if not file.endswith(".py"):
            return load(wish)
        same = Path(file).resolve() == Path(module.__file__ or "").resolve()
        return _rows(module if same else import_file(file, wish), name)
    for name in _DATA_NAMES:
        if hasattr(module, name):
            return _rows(module, name)
    raise DataError(
        f"What data shall {target} see? Type --data digits, --data table.csv:TARGET_COLUMN, "
        f"--data arrays.npz or --data FILE.py:NAME (a batch or a loader), or define one of "
        f"{', '.join(_DATA_NAMES)} in {module.__file__}."
    )


def _rows(module: ModuleType, name: str) -> Any:
    """What a module calls `name`, or what its function of that name returns; a generator as a list."""
    file, public = module.__file__, [key for key in vars(module) if not key.startswith("_")]
    if not name:
        raise DataError(f"Which data of {file}? Type {file}:NAME. {suggest(name, public)}")
    if not hasattr(module, name):
        raise DataError(f"{file} has no {name!r}. {suggest(name, public)}")
    value = getattr(module, name)
    with _users_errors(f"{file}:{name} raised an error when it was called"):
        made = value() if callable(value) else value
        return list(islice(made, _MOST_BATCHES)) if isinstance(made, Iterator) else made


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
        try:
            setup.build_optimizer()
        except ValueError as error:
            raise SetupError(f"--optimizer {wishes.optimizer} does not fit this model: {error}") from error
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
    kinds = {key: value for key, value in vars(torch.optim).items() if isinstance(value, type)}
    known: dict[str, Callable[..., Optimizer]] = {
        key.lower(): value
        for key, value in kinds.items()
        if issubclass(value, Optimizer) and key not in _NO_PLAIN_STEP
    }
    if name.lower() not in known:
        raise SetupError(f"There is no optimizer {name!r} here. {suggest(name.lower(), known)}")
    options = {"lr": _rate(rate, name)} if rate else {}
    return partial(known[name.lower()], **options)


def _rate(text: str, name: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 <= rate < math.inf:
        raise SetupError(f"{text!r} is no learning rate. Type for example --optimizer {name}:0.01")
    return rate


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
