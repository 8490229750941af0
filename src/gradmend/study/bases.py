"""Bases: the setups that a study starts from, by recipe or the user's own, made anew for each trial."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from gradmend.data import Data, load
from gradmend.errors import NotApplicableError, SetupError, TargetError, suggest
from gradmend.setup import Setup
from gradmend.training.run import BATCH_SIZE, EPOCHS
from gradmend.zoo import RECIPES, Recipe, recipe, usual_data, usual_settings

Source: TypeAlias = str | Setup | Recipe | Callable[[int], Setup | Recipe]
"""The name of a recipe; a setup, the same for all seeds; or a function of the seed that makes one."""


@dataclass(frozen=True)
class Length:
    """How long a trial is, where the study says it; None leaves it to the recipe."""

    epochs: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Base:
    """A setup that a study starts from.

    Args:
        name: in the study.
        source: what makes it.
        settings: of the recipe, other than its own.
    """

    name: str
    source: Source
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def usual(self) -> Mapping[str, Any]:
        """The settings of its recipe's network, with their own values; none of a setup of one's own."""
        return usual_settings(self.source) if isinstance(self.source, str) else {}

    def make(
        self, seed: int, data: Data | str | None, batch_size: int | None, length: Length, **network: Any
    ) -> Recipe:
        """The setup with weights drawn by the seed, and its data; torch's random state stays as it was.

        Raises:
            NotApplicableError: for a setting that it does not have.
            SetupError: if no data is given, and it brings none.
            DataError: if the data cannot be loaded.
        """
        if other := next((key for key in network if key not in self.usual), None):
            raise NotApplicableError(f"{self.name!r} has no setting {other!r}. {self._possible(other)}")
        if isinstance(self.source, str):
            rows = _loaded(data or usual_data(self.source))
            sizes = {"batch_size": batch_size, "epochs": length.epochs, "steps": length.steps}
            return recipe(self.source, data=rows, seed=seed, **sizes, **network)
        return self._own(_drawn(self.source, seed), data, batch_size, length)

    def _own(
        self, made: Setup | Recipe, data: Data | str | None, batch_size: int | None, length: Length
    ) -> Recipe:
        if isinstance(made, Setup):
            if data is None:
                raise SetupError(f'{self.name!r} brings no data. Say which: `data = "digits"`.')
            made = Recipe(self.name, made, _loaded(data), made.batch_size or BATCH_SIZE, EPOCHS)
        rows = made.data if data is None else _loaded(data)
        sizes = batch_size or made.batch_size, length.epochs or made.epochs
        return Recipe(self.name, made.setup, rows, *sizes)

    def _possible(self, given: str) -> str:
        if not self.usual:
            return "It is a setup of your own: make one for each value, or take remedies."
        return suggest(given, self.usual)

    def fingerprint(self, seed: int) -> str:
        """What it is: the same for the same setup in any process."""
        if isinstance(self.source, str):
            return self.source
        return _own_fingerprint(_drawn(self.source, seed))


def read_bases(given: object) -> tuple[Base, ...]:
    """The bases from a source, several names of recipes, or a table name -> source or settings.

    A table of settings names its `recipe`: `{"recipe": "deep", "width": 16}`.

    Raises:
        TargetError: for a recipe that there is not.
        SetupError: for what is no setup.

    Examples:
        >>> [base.name for base in read_bases(["deep", "mnist"])]
        ['deep', 'mnist']
    """
    if isinstance(given, Mapping):
        return tuple(_base(str(name), one) for name, one in given.items())
    many = given if isinstance(given, (list, tuple)) else [given]
    if len(many) > 1 and not all(isinstance(one, str) for one in many):
        raise SetupError("Several setups of your own need names: give a table name -> setup.")
    return tuple(_base(one if isinstance(one, str) else "setup", one) for one in many)


def _base(name: str, given: Any) -> Base:
    if isinstance(given, Mapping):
        own = {str(key): value for key, value in given.items() if key != "recipe"}
        if "recipe" not in given:
            raise SetupError(f"The setup {name!r} says no recipe. {suggest('', RECIPES)}")
        return replace(_base(name, given["recipe"]), settings=own)
    if isinstance(given, str) and given not in RECIPES:
        raise TargetError(f"There is no recipe {given!r}. {suggest(given, RECIPES)}")
    if not isinstance(given, (str, Setup, Recipe)) and not callable(given):
        raise SetupError(
            f"{given!r:.60} is no setup. Give the name of a recipe, a Setup, or a function of the seed that "
            "returns one."
        )
    if isinstance(given, nn.Module):
        raise SetupError("A model alone is no setup. Give `Setup(model, loss_fn, optimizer)`.")
    return Base(name, given)


def _drawn(source: Setup | Recipe | Callable[[int], Setup | Recipe], seed: int) -> Setup | Recipe:
    """A copy of a setup, or what a function makes with torch's random numbers seeded."""
    if isinstance(source, Setup):
        return source.copy()
    if isinstance(source, Recipe):
        return replace(source, setup=source.setup.copy())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = source(seed)
    if not isinstance(made, (Setup, Recipe)):
        raise SetupError(f"A function that makes setups returned {type(made).__name__}, not a Setup.")
    return made


@lru_cache(maxsize=8)
def _load(name: str) -> Data:
    return load(name)


def _loaded(data: Data | str) -> Data:
    """Data by name is loaded once in a process."""
    return _load(data) if isinstance(data, str) else data


def digest(value: object) -> Any:
    """Plain data that stands for a value: data by its numbers, a file by its bytes.

    >>> digest("relu"), digest(0.1)
    ('relu', 0.1)
    """
    if isinstance(value, Data):
        return _data_digest(value)
    if isinstance(value, str) and (file := Path(value.partition(":")[0])).is_file():
        return _file_digest(file) + value.partition(":")[2]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise SetupError(f"A setting is a number, a word or data, not {value!r:.60}.")


@lru_cache(maxsize=8)
def _data_digest(data: Data) -> str:
    return _hashed(_bytes((data.x, data.y, data.x_test, data.y_test)))


@lru_cache(maxsize=8)
def _file_digest(file: Path) -> str:
    return _hashed([file.read_bytes()])


def hashed(content: object) -> str:
    """A short name for plain data, the same in any process."""
    return _hashed([json.dumps(content, sort_keys=True).encode()])


def _hashed(parts: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:24]


def _bytes(tensors: Iterable[Tensor]) -> Iterator[bytes]:
    for tensor in tensors:
        yield f"{tensor.dtype}{list(tensor.shape)}".encode()
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _own_fingerprint(made: Setup | Recipe) -> str:
    """A hash of a setup's weights and structure, of what trains it, and of the user's own code in it."""
    setup = made if isinstance(made, Setup) else made.setup
    parts = (setup.loss_fn, setup.step, setup.schedule, setup.gradient_transform)
    own = {type(module) for module in setup.model.modules()}
    told = [repr(setup.model), *map(_told, parts), *sorted(_source(kind) for kind in own)]
    told += [str(setup.accumulate), str(setup.batch_size), _optimizer(setup)]
    told += (
        [str(digest(made.data)), str(made.batch_size), str(made.epochs)] if isinstance(made, Recipe) else []
    )
    weights = setup.model.state_dict().values()
    return _hashed([*map(str.encode, told), *_bytes(v for v in weights if isinstance(v, Tensor))])


def _optimizer(setup: Setup) -> str:
    if setup.optimizer is None:
        return ""
    optimizer = setup.build_optimizer()
    groups = [{key: v for key, v in group.items() if key != "params"} for group in optimizer.param_groups]
    return f"{type(optimizer).__name__}{groups}"


def _told(part: Any) -> str:
    """What can be said of a function, without its address in memory."""
    if isinstance(part, nn.Module):
        return f"{part!r}{_source(type(part))}"
    if isinstance(part, partial):
        return f"{_told(part.func)}{part.args}{sorted(part.keywords.items())}"
    return getattr(part, "__qualname__", type(part).__name__) + _source(part)


_LIBRARIES: Final = ("torch", "gradmend", "builtins")


def _source(thing: Any) -> str:
    """The code of a class or function of the user's own; "" of a library's, and where there is none."""
    if str(getattr(thing, "__module__", "")).partition(".")[0] in _LIBRARIES:
        return ""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""
