"""The language of reports: finished English texts in another language, by one catalogue of patterns.

The keys of a catalogue (`zh/*.toml`) are the English texts, with fields for what they are filled with:

- `{text}` stands for anything, such as a piece of code, and is copied;
- `{text:name}` stands for one word, such as the name of a layer, and is copied;
- `{text:number}` stands for a number and is copied;
- `{text:estimate}` stands for a number with its unit and interval, as `study.wording` writes it;
- `{text:names}` stands for names as `console.lines` counts them: "fc1, fc2 and 5 more";
- `{text:words}` stands for words that the catalogue has itself, or a list of these;
- `{text:label}` stands for words that the catalogue may have: what it does not have is copied.

gettext and Babel look messages up before they are filled. Here they come filled, from findings that
were made, and written to journals, without knowing who is going to read them.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache, reduce
from importlib.resources import files

from gradmend.errors import GradmendError, suggest

LANGUAGES = ("en", "zh")

FIELD = re.compile(r"(?<!%)\{(\w+)(?::(name|number|estimate|names|words|label))?\}")
"""A field of a pattern: its name and its kind. (`%{x}` is Plotly's own.)"""

_NUMBER = r"(?:[-+−±]?(?:\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?|inf|nan)(?: ?%)?|[-–])"
_ANY = r".+?"
_INTERVAL = rf"(?: \[{_NUMBER}, {_NUMBER}\]| \(\d+ seeds?\))?"
_ESTIMATE = rf"x?{_NUMBER}(?: (?:ms|s|MB))?{_INTERVAL}(?: points)?"
_KINDS = {"name": r"\S+?", "number": _NUMBER, "estimate": _ESTIMATE}
_SENTENCE = re.compile(r"(?<=[.?!]) +")
_MARKED = ("; ", " · ", r" \+(?: |<br>)", "<br>", ", ")
_LISTS = tuple(re.compile(rf"({mark})(?![^[(]*[\])])") for mark in _MARKED)
_WORD = re.compile(r"\b[^\W\d_]+\b")
_ALONE = re.compile(rf"\S+|{_ESTIMATE}(?:, {_ESTIMATE})*")
_BRACKETED = re.compile(r"(.+) \(([^()]+)\)")
_NUMBERED = re.compile(rf"(.+?) ({_ESTIMATE})")
_PLACES = re.compile(r"\S+(?:, \S+)*(?: and \d+ more)?")
_MORE = "{names:words} and {count:number} more"
_COUNTED = re.compile(r"(.+) and (\d+) more")
_MARKS = {"zh": {".": "\u3002", ":": "\uff1a", ", ": "\u3001", "; ": "\uff1b", "()": "{}\uff08{}\uff09"}}
_LONGEST = 500
"""Letters: no pattern is longer when it is filled, and an error may print anything."""


def translated(text: str, lang: str) -> str:
    """A text of a report in another language; what the catalogue does not know stays as it is.

    Args:
        text: a label, one sentence or several, or a list of words.
        lang: one of `LANGUAGES`.

    Raises:
        GradmendError: if there is no such language.

    Examples:
        >>> translated("vanishing gradient", "zh")
        '梯度消失'
        >>> translated("fc1.weight and 3 more are frozen.", "zh")
        'fc1.weight 以及另外 3 个已被冻结。'
    """
    if lang not in LANGUAGES:
        raise GradmendError(f"There is no language {lang!r}. {suggest(lang, LANGUAGES)}")
    if lang == LANGUAGES[0] or not _WORD.search(text):
        return text
    return _known(text, lang) or _sentence_by_sentence(text, lang)


@cache
def catalogue(lang: str) -> Mapping[str, str]:
    """All entries of a language other than English, by their English patterns."""
    tables = (file for file in (files(__name__) / lang).iterdir() if file.name.endswith(".toml"))
    read = [tomllib.loads(table.read_text(encoding="utf-8")) for table in tables]
    return {key: value for table in read for part in table.values() for key, value in part.items()}


@lru_cache(maxsize=4096)
def _known(text: str, lang: str) -> str | None:
    """The whole text in the language, if nothing of it is missing in the catalogue."""
    if text in catalogue(lang) or not _WORD.search(text):
        return catalogue(lang).get(text)
    ways = _WAYS_OF_WORDS if not re.search("[ <]", text) else _WAYS if len(text) < _LONGEST else _WAYS[:1]
    return next((found for way in ways if (found := way(text, lang))), None)


def _by_sentences(text: str, lang: str) -> str | None:
    sentences = _SENTENCE.split(text)
    known = [_known(sentence, lang) for sentence in sentences] if len(sentences) > 1 else [None]
    return None if None in known else reduce(_joined, filter(None, known))


def _ended(text: str, lang: str) -> str | None:
    """Words with a full stop or a colon behind them."""
    mark = _MARKS[lang].get(text[-1]) if text[-2:-1].isalnum() else None
    known = _known(text[:-1], lang) if mark else None
    return known and f"{known}{mark}"


def _headed(text: str, lang: str) -> str | None:
    """Words behind a label, or behind places in the code; one of the two may be a name."""
    head, _, rest = text.partition(": ")
    label, words = (_known(head, lang), _known(rest, lang)) if rest else (None, None)
    places, word = _PLACES.fullmatch(head), _ALONE.fullmatch(rest)
    if not (label or words) or not (label or places) or not (words or word):
        return None
    return (label or _value(head, "names", lang) or head) + _MARKS[lang][":"] + (words or rest)


def _bracketed(text: str, lang: str) -> str | None:
    """Words with others in brackets behind them; one of the two may be a name."""
    parts = match.groups() if (match := _BRACKETED.fullmatch(text)) else ()
    known = [_known(part, lang) for part in parts]
    if not any(known) or not all(new or _ALONE.fullmatch(old) for new, old in zip(known, parts, strict=True)):
        return None
    words, inner = (new or old for new, old in zip(known, parts, strict=True))
    return _MARKS[lang]["()"].format(words, inner)


def _numbered(text: str, lang: str) -> str | None:
    """Words, or a name, with a number behind them."""
    label, number = match.groups() if (match := _NUMBERED.fullmatch(text)) else ("", "")
    words, value = _known(label, lang), _known(number, lang)
    if not (words or value) or not (words or _ALONE.fullmatch(label)):
        return None
    return f"{words or label} {value or number}"


def _listed(text: str, lang: str) -> str | None:
    """A list of words, some of which the catalogue has; the others are single, such as names."""
    if "://" in text:  # a source
        return None
    pieces = next((parts for marks in _LISTS if len(parts := marks.split(text)) > 1), [text])
    known = {piece: _known(piece, lang) for piece in pieces[::2]} if len(pieces) > 1 else {}
    if not any(known.values()) or not all(new or _ALONE.fullmatch(old) for old, new in known.items()):
        return None
    return "".join(known.get(piece) or _MARKS[lang].get(piece) or piece for piece in pieces)


def _unfolded(text: str, lang: str) -> str | None:
    """A label that was broken into lines, as one; in Chinese it is about half as long."""
    return _known(text.replace("-<br>", "-").replace("<br>", " "), lang) if "<br>" in text else None


def _in_small_letters(text: str, lang: str) -> str | None:
    return _known(text[0].lower() + text[1:], lang) if "A" <= text[0] <= "Z" else None


def _sentence_by_sentence(text: str, lang: str) -> str:
    return " ".join(_known(each, lang) or each for each in _SENTENCE.split(text))


# ---- patterns ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pattern:
    """What a text has to match, and the kinds of its fields by their names."""

    match: re.Pattern[str]
    kinds: Mapping[str, str | None]


@cache
def _patterns(lang: str) -> Mapping[str, tuple[str, ...]]:
    """The entries with fields, by the rarest of their fixed words."""
    patterns = [text for text in catalogue(lang) if FIELD.search(text)]
    often = Counter(word for text in patterns for word in fixed_words(text))
    found = defaultdict[str, list[str]](list)
    for text in patterns:
        found[min(fixed_words(text), key=lambda word: (often[word], word))].append(text)
    return {word: tuple(texts) for word, texts in found.items()}


def fixed_words(pattern: str) -> frozenset[str]:
    """The words of a pattern that no field touches: a text that it matches has all of them.

    >>> sorted(fixed_words("{count:number} seeds on {task}s"))
    ['on', 'seeds']
    """
    return frozenset(_WORD.findall(FIELD.sub("0", pattern)))


@cache
def _fixed(pattern: str) -> int:
    """How much of a pattern is fixed text."""
    return len(FIELD.sub("", pattern))


@cache
def _compiled(pattern: str) -> _Pattern:
    pieces = FIELD.split(pattern)
    regex = re.escape(pieces[0])
    for name, kind, fixed in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        regex += f"(?P<{name}>{_KINDS.get(kind, _ANY)}){re.escape(fixed)}"
    return _Pattern(re.compile(regex, re.DOTALL), dict(zip(pieces[1::3], pieces[2::3], strict=True)))


def _by_pattern(text: str, lang: str) -> str | None:
    """By the pattern that the text is a filling of; of several by that with the most fixed text."""
    index = _patterns(lang)
    likely = [pattern for word in dict.fromkeys(_WORD.findall(text)) for pattern in index.get(word, ())]
    for key in sorted(likely, key=_fixed, reverse=True):
        pattern = _compiled(key)
        match = pattern.match.fullmatch(text)
        found = match.groupdict() if match else {}
        values = {name: _value(value, pattern.kinds[name], lang) for name, value in found.items()}
        if match and None not in values.values():
            return _filled(catalogue(lang)[key], values)
    return None


def _value(text: str, kind: str | None, lang: str) -> str | None:
    """What a field is filled with; None if these are no words of the catalogue."""
    if kind == "names" and (match := _COUNTED.fullmatch(text)):
        return _filled(catalogue(lang)[_MORE], {"names": match[1], "count": match[2]})
    known = _known(text, lang) if kind in ("words", "label", "estimate") else None
    return None if kind == "words" and not known and " " in text else known or text


def _filled(into: str, values: Mapping[str, str | None]) -> str:
    pieces = FIELD.split(into)
    parts = [pieces[0]]
    for name, fixed in zip(pieces[1::3], pieces[3::3], strict=True):
        parts += (values[name] or "", fixed)
    return reduce(_joined, parts)


# ---- spaces -----------------------------------------------------------------------------------------------

_WIDE = re.compile(r"[\u3000-\u303f\u3400-\u9fff\uff00-\uffef]")
_HAN = re.compile(r"[\u3400-\u9fff]")
_NARROW = re.compile(r"[A-Za-z0-9`+±%-]")


def _joined(left: str, right: str) -> str:
    """Put together: a space where Chinese meets letters or digits, and none within Chinese.

    >>> _joined("在", "fc1"), _joined("共 ", "三"), _joined("fc1 ", "层")
    ('在 fc1', '共三', 'fc1 层')
    """
    before, after = left.rstrip(" ")[-1:], right.lstrip(" ")[:1]
    if _WIDE.match(before) and _WIDE.match(after):
        return left.rstrip(" ") + right.lstrip(" ")
    apart = (_HAN.match(before) and _NARROW.match(after)) or (_NARROW.match(before) and _HAN.match(after))
    spaced = left.endswith(" ") or right.startswith(" ")
    return f"{left} {right}" if apart and not spaced else left + right


_WAYS = (
    _by_sentences,
    _by_pattern,
    _ended,
    _headed,
    _bracketed,
    _numbered,
    _listed,
    _unfolded,
    _in_small_letters,
)
_WAYS_OF_WORDS = (_ended, _in_small_letters)
"""What is tried one after the other; and what of a single word, such as the name of a layer."""
