"""Levels: what a study varies, read from numbers, words, remedies and tables of settings."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from gradmend import remedies as known
from gradmend.data import Data
from gradmend.errors import SetupError, suggest
from gradmend.remedies import Remedy

TRAINING: Final = (
    "data",
    "batch_size",
    "optimizer",
    "learning_rate",
    "momentum",
    "weight_decay",
    "schedule",
)
"""The settings of a training; others are of the network."""

NO, YES = "no", "yes"
"""The levels of a remedy."""

_REMEDIES: Final = "remedies"
_KINDS: Final = {
    name: kind
    for name, kind in vars(known).items()
    if isinstance(kind, type) and issubclass(kind, Remedy) and kind is not Remedy
}


@dataclass(frozen=True)
class Level:
    """One value of a factor.

    Args:
        label: what it is called.
        changes: settings of the recipe and its training.
        remedies: applied in this order to what these settings give.
    """

    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    remedies: tuple[Remedy, ...] = ()


@dataclass(frozen=True)
class Factor:
    """What a study varies: levels with labels of their own, the base first.

    Raises:
        SetupError: for fewer than two levels, or two of one label.
    """

    name: str
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        labels = [level.label for level in self.levels]
        if len(labels) < 2:
            raise SetupError(
                f"The factor {self.name!r} has {len(labels)} levels: it takes two or more. What is the same "
                "in all arms belongs into `settings`."
            )
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise SetupError(f"The factor {self.name!r} has the level {twice[0]!r} twice.")


def read_factor(name: str, given: object) -> Factor:
    """A factor from a sequence of values of the setting of its name, or from label -> content.

    Args:
        name: of the setting, or any other if every level says what it changes.
        given: values; or labels with a value, a remedy (or several), or a table of settings, with
            `remedies` among them if need be.

    Raises:
        SetupError: for what is none of these.

    Examples:
        >>> [level.label for level in read_factor("depth", [5, 10]).levels]
        ['5', '10']
        >>> read_factor("clipping", {"none": {}, "norm": "ClipNorm(1.0)"}).levels[1].remedies
        (ClipNorm(max_norm=1.0),)
    """
    if isinstance(given, Mapping):
        return Factor(name, tuple(_level(str(label), content, name) for label, content in given.items()))
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise SetupError(
            f"The factor {name!r} is {given!r:.60}. Give a list of values, or a table of labels and what "
            "each changes."
        )
    return Factor(name, tuple(_level(label_of(value), value, name) for value in given))


def read_remedies(given: object) -> tuple[Factor, ...]:
    """A factor of the levels "no" and "yes" for each remedy of a sequence, or of a table name -> remedy.

    Raises:
        SetupError: for what is no remedy.

    Examples:
        >>> [factor.name for factor in read_remedies(["BatchNorm()", "AddSkips(scale=1.0)"])]
        ['BatchNorm()', 'AddSkips(scale=1.0)']
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise SetupError(
            f"`remedies` is a list of remedies, or a table of names and remedies, not {given!r}."
        )
    named = given if isinstance(given, Mapping) else {label_of(remedy): remedy for remedy in given}
    both = {str(name): (Level(NO), _level(YES, content)) for name, content in named.items()}
    return tuple(Factor(name, levels) for name, levels in both.items())


def label_of(value: object) -> str:
    """What a value is called.

    >>> [label_of(value) for value in (True, None, 0.001, "relu")]
    ['yes', 'no', '0.001', 'relu']
    """
    if value is None or isinstance(value, bool):
        return YES if value else NO
    if isinstance(value, Data):
        return value.name
    if isinstance(value, Remedy):
        return written(value)
    if isinstance(value, (tuple, list)):
        return " + ".join(map(label_of, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse_remedy(text: str) -> Remedy:
    """A remedy from its Python call with literal arguments, or from its name alone.

    Raises:
        SetupError: if there is none of this name, or it does not take these arguments.

    Examples:
        >>> parse_remedy("ClipNorm(0.5)"), parse_remedy("ClipNorm")
        (ClipNorm(max_norm=0.5), ClipNorm(max_norm=1.0))
    """
    name, arguments, options = _call(text)
    if name not in _KINDS:
        raise SetupError(f"There is no remedy {name!r}. {suggest(name, _KINDS)}")
    try:
        remedy: Remedy = _KINDS[name](*arguments, **options)
    except TypeError as error:
        raise SetupError(f"{text!r} cannot be made: {error}. Type: gradmend explain {name}") from error
    return remedy


def _call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """The name and the literal arguments of `Name(...)`."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, [], {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
            options = {str(option.arg): ast.literal_eval(option.value) for option in tree.keywords}
            return tree.func.id, [ast.literal_eval(value) for value in tree.args], options
    except (SyntaxError, ValueError):
        pass
    raise SetupError(f"{text!r} is no remedy. Write it as a call, such as 'BatchNorm()' or 'ClipNorm(0.5)'.")


def written(remedy: Remedy) -> str:
    """A remedy as the call that makes it, without what is usual; `parse_remedy` reads it.

    >>> written(parse_remedy("AddSkips(scale=1.0)"))
    'AddSkips(scale=1.0)'
    """
    held = [f for f in fields(remedy) if getattr(remedy, f.name) != f.default]  # type: ignore[arg-type]
    return f"{type(remedy).__name__}({', '.join(f'{f.name}={getattr(remedy, f.name)!r}' for f in held)})"


def _level(label: str, content: object, setting: str = "") -> Level:
    """What a level changes: a table says it; a bare value is of the setting that is named as its factor."""
    if isinstance(content, Mapping):
        changes = {str(key): value for key, value in content.items() if key != _REMEDIES}
        return Level(label, changes, _read_remedies(content.get(_REMEDIES, ())))
    if setting and not _is_remedy(content):
        return Level(label, {setting: content})
    return Level(label, {}, _read_remedies(content))


def _is_remedy(content: object) -> bool:
    return isinstance(content, (Remedy, tuple, list)) or (isinstance(content, str) and "(" in content)


def _read_remedies(content: object) -> tuple[Remedy, ...]:
    given = content if isinstance(content, (tuple, list)) else (content,)
    return tuple(_remedy(one) for one in given)


def _remedy(given: object) -> Remedy:
    if isinstance(given, Remedy):
        return given
    if isinstance(given, str):
        return parse_remedy(given)
    raise SetupError(f"{given!r:.60} is no remedy. Write it as a call, such as 'BatchNorm()'.")
