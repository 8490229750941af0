"""Study files: studies as TOML, the user's own and those that are shipped."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final, TypeAlias

from gradmend.errors import DataError, SetupError, TargetError, suggest
from gradmend.setup import Setup
from gradmend.study.design import Study
from gradmend.zoo import Recipe

Find: TypeAlias = Callable[[str], Callable[[int], Setup | Recipe]]
"""What makes the setups of a target `file.py:name`, by their seed."""

_KEYS: Final = tuple(field.name for field in fields(Study) if field.name != "_")
_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "setups": (str, list, dict),
    "remedies": (list, dict),
    "factors": (dict,),
    "combine": (str, list),
    "fraction": (int, float, str),
    "seeds": (int, list),
    "settings": (dict,),
    "epochs": (int,),
    "steps": (int,),
    "batch_size": (int,),
    "target": (int, float),
}
"""What the values may be; the other keys take text."""

_NAMES: Final = {str: "text", list: "a list", dict: "a table", int: "a whole number", float: "a number"}


_SEEDS: Final = 5


def shipped() -> dict[str, Traversable]:
    """The studies that come with gradmend, by their names.

    >>> "five-remedies" in shipped()
    True
    """
    folder = files("gradmend") / "studies"
    return {
        file.name.removesuffix(".toml"): file
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".toml")
    }


def load_study(path_or_name: str | Path, find: Find | None = None) -> Study:
    """A study from a TOML file, or a shipped one by its name.

    The keys of the file are the arguments of `Study`, and `seeds` may be how many; the name is that of the
    file, if nothing else is said.
    A setup of the user's own is a `target`, `file.py:name`, looked for beside the study file.

    Args:
        path_or_name: of the file, or of one of those in `shipped`.
        find: what makes the setups of a target; without it there can be none in the file.

    Raises:
        TargetError: if there is no such file or study, or no such recipe.
        SetupError: if the file is no TOML, has an unknown key, or contradicts itself.

    Examples:
        >>> load_study("depth").name
        'depth'
    """
    ours, path = shipped(), Path(path_or_name)
    if str(path_or_name) in ours:
        return _study(ours[str(path_or_name)].read_text("utf-8"), str(path_or_name), Path(), find)
    if not path.is_file():
        near = [str(file) for file in sorted(path.parent.glob("*.toml"))] if path.parent.is_dir() else []
        raise TargetError(
            f"There is no study {str(path_or_name)!r}. {suggest(str(path_or_name), [*ours, *near])}"
        )
    try:
        return _study(path.read_text("utf-8"), path.stem, path.parent, find)
    except (SetupError, TargetError, DataError, UnicodeDecodeError) as error:
        kind = SetupError if isinstance(error, UnicodeDecodeError) else type(error)
        raise kind(f"{path}: {error}") from error


def _study(text: str, name: str, folder: Path, find: Find | None) -> Study:
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SetupError(f"This is no TOML: {error}.") from error
    for key, value in given.items():
        _check(key, value)
    if "setups" not in given:
        raise SetupError('No setups: say for example `setups = "deep"`.')
    seeds = given.get("seeds", _SEEDS)
    read = {
        "setups": _setups(given["setups"], folder, find),
        "seeds": range(seeds) if isinstance(seeds, int) else seeds,
    }
    return Study(**{"name": name, **given, **read})


def _check(key: str, value: object) -> None:
    if key not in _KEYS:
        raise SetupError(f"There is no key {key!r}. {suggest(key, _KEYS)}")
    kinds = _KINDS.get(key, (str,))
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise SetupError(f"`{key}` is {' or '.join(_NAMES[kind] for kind in kinds)}, not {value!r:.60}.")


def _setups(given: Any, folder: Path, find: Find | None) -> Any:
    """The setups of the user's own, found; recipes stay names."""
    if isinstance(given, dict):
        return {name: _setup(one, folder, find) for name, one in given.items()}
    named = [given] if isinstance(given, str) else given
    if any(isinstance(one, str) and ".py" in one for one in named):
        return {one: _setup({"target": one} if ".py" in one else one, folder, find) for one in named}
    return given


def _setup(given: Any, folder: Path, find: Find | None) -> Any:
    if not isinstance(given, dict) or "target" not in given:
        return given
    if others := sorted(set(given) - {"target"}):
        raise SetupError(f"A `target` is a setup of your own: it takes no {others[0]!r}.")
    if find is None:
        raise SetupError(f"{given['target']!r} is found on the command line: gradmend study FILE.toml")
    return find(str(folder / given["target"]))
