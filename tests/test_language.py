"""Reports in Chinese: every text that a report shows is in the catalogue, and the catalogue is sound."""

import ast
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from html import unescape
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradmend
import ill
from deep import BATCH, mlp
from gradmend.causes import Cause
from gradmend.diagnosis import diagnose, look
from gradmend.diagnosis.prognosis import FEATURES
from gradmend.errors import GradmendError
from gradmend.journal import Journal
from gradmend.language import FIELD, LANGUAGES, catalogue, fixed_words, translated
from gradmend.remedies import REMEDIES
from gradmend.remedies.card import cards
from gradmend.report.page import Page, content
from gradmend.report.pages import check_page, mend_page
from gradmend.report.run import run_page
from gradmend.setup import Budget, Setup
from gradmend.study.file import load_study, shipped
from gradmend.treatment import mend
from gradmend.watch import Watch
from helpers import SGD, blobs, plain
from outcomes import outcomes, results

ZH = catalogue("zh")
HAN = re.compile(r"[\u3400-\u9fff]")
CODE = re.compile(r"`[^`]*`")
ENGLISH = re.compile(r"\b(?!alpha|et)[a-z]{2,} [a-z]{2,}\b|\b(?:the|of|and|with|points|seeds|steps|layers)\b")
"""Words that were left: one alone may be a name, or a term like softmax, that Chinese keeps."""


def chinese(text: str) -> str:
    """Its translation, of which nothing is missing."""
    told = translated(text, "zh")
    assert HAN.search(told), f"not in the catalogue: {text}"
    assert not ENGLISH.search(CODE.sub("", told)), f"partly in the catalogue: {text} -> {told}"
    return told


# ---- what it does -----------------------------------------------------------------------------------------


def test_english_stays_and_other_languages_are_refused() -> None:
    assert translated("vanishing gradient", "en") == "vanishing gradient"
    with pytest.raises(GradmendError, match="Possible: en, zh"):
        translated("vanishing gradient", "hz")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("dead units", "单元死亡"),
        ("Dead units.", "单元死亡。"),
        ("dead units, chaos and 3 more", "单元死亡、混沌以及另外 3 个"),
        ("fc1, fc2 and 3 more are frozen.", "fc1, fc2 以及另外 3 个已被冻结。"),
        ("net.py:3, net.py:5: Call `model.train()` before each epoch.", None),
        ("test accuracy 97.3 % [96.9, 97.7]", "测试准确率 97.3 % [96.9, 97.7]"),
        ("batch normalization + Adam", "批归一化 + Adam"),
        ("batch normalization (3 layers); Adam", None),
        ("The loss of step 3 is nan. Leave it out.", "第 3 步的损失为 nan。请去掉它。"),
    ],
)
def test_texts_are_taken_apart(text: str, told: str | None) -> None:
    assert chinese(text) == (told or chinese(text))


@pytest.mark.parametrize("text", ["", "fc1.output", "<script>alert(1)</script>", "train.py:10", "a: b", "7"])
def test_names_stay(text: str) -> None:
    assert translated(text, "zh") == text


def test_names_within_sentences_are_not_translated() -> None:
    assert "vanishing gradient" in translated("vanishing gradient are frozen.", "zh")


def test_what_is_known_of_several_sentences_is_translated() -> None:
    assert translated("This is news to me. Leave it out.", "zh").startswith("This is news to me. ")


@settings(deadline=None)
@given(
    st.text()
    | st.lists(st.sampled_from(["a: ", "a, ", "(", ") ", "On rank 1: ", "dead units. "])).map("".join)
)
def test_no_text_is_too_odd(text: str) -> None:
    assert isinstance(translated(text, "zh"), str)


# ---- the catalogue ----------------------------------------------------------------------------------------


def test_no_text_has_two_entries() -> None:
    tables = (files("gradmend.language") / "zh").iterdir()
    read = [tomllib.loads(table.read_text(encoding="utf-8")) for table in tables]
    count = Counter(key for table in read for part in table.values() for key in part)
    assert [key for key, times in count.items() if times > 1] == []


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_fields_and_code_agree(language: str) -> None:
    for key, value in catalogue(language).items():
        assert sorted(m[0] for m in FIELD.findall(key)) == sorted(m[0] for m in FIELD.findall(value)), key
        assert Counter(CODE.findall(key)) == Counter(CODE.findall(value)), key
        assert numbers(key) <= numbers(value), key


def numbers(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", FIELD.sub("", text)))


def test_every_pattern_can_be_found() -> None:
    assert [key for key in ZH if FIELD.search(key) and not fixed_words(key)] == []


def test_punctuation_is_chinese() -> None:
    odd = re.compile(r"(?<![a-z0-9]\()[\u3400-\u9fff][,;:?!(]|[,;:?!)][\u3400-\u9fff]")
    formula = re.compile(r"\b(?:sqrt|log)\([^)]*\)")
    assert [value for value in ZH.values() if odd.search(formula.sub("", CODE.sub("", value)))] == []


WORDS = st.sampled_from(["dead units", "chaos", "plateau", "batch normalization", "attention collapse"])
NAMES = st.from_regex(r"[a-z_]{3,9}[0-9]", fullmatch=True)
NUMBERS = st.floats(0.001, 1e6).map(lambda value: f"{value:.3g}") | st.integers(0, 10**6).map(str)
VALUES = {"number": NUMBERS, "estimate": NUMBERS, "words": WORDS, "label": WORDS}
PATTERNS = sorted(key for key in ZH if FIELD.search(key))


def fills(pattern: str, values: Mapping[str, str]) -> bool:
    """Whether the pattern, filled with these, is translated as the translation filled with the same."""
    told = {name: ZH.get(value, value) for name, value in values.items()}
    wanted = FIELD.sub(lambda match: told[match[1]], ZH[pattern])
    filled = FIELD.sub(lambda match: values[match[1]], pattern)
    return translated(filled, "zh").replace(" ", "") == wanted.replace(" ", "")


def test_no_two_patterns_are_mistaken_for_each_other() -> None:
    usual = {"number": "1.2e-05", "estimate": "97.3 % [96.9, 97.7]", "words": "dead units", "label": "chaos"}
    for pattern in PATTERNS:
        assert fills(pattern, {name: usual.get(kind, "net.py:3") for name, kind in FIELD.findall(pattern)})


@settings(deadline=None)
@given(st.data(), st.sampled_from(PATTERNS))
def test_a_filled_pattern_gives_the_filled_translation(data: st.DataObject, pattern: str) -> None:
    drawn = {name: data.draw(VALUES.get(kind, NAMES)) for name, kind in FIELD.findall(pattern)}
    assert fills(pattern, drawn)


# ---- what it holds: texts that are tables -----------------------------------------------------------------


@pytest.mark.parametrize("cause", Cause, ids=lambda cause: cause.value)
def test_all_of_a_cause(cause: Cause) -> None:
    illness = cause.illness
    for text in (cause.title, illness.sentence, illness.why, illness.signs, illness.cure):
        assert text in ZH


def test_features() -> None:
    for text in FEATURES:
        chinese(text)


def test_remedies_and_their_cards() -> None:
    for remedy in REMEDIES:
        if not re.fullmatch(r"[A-Z]\w+|epsilon .*", remedy.title):  # names stay
            chinese(remedy.title)
    for card in cards():
        for text in (card.what, card.about, card.changes):
            chinese(text)


# ---- what it holds: texts in the code ---------------------------------------------------------------------

SOURCE = Path(gradmend.__file__).parent
FILES = """
    diagnosis/*.py watch/rules.py watch/origin.py watch/treat.py treatment/__init__.py recorded.py
    expected.py theory/network.py theory/rules.py pictures/*.py report/pages.py report/run.py spread.py
    study/advice.py study/analysis.py study/curves.py study/figures.py study/heatmap.py study/outcome.py
    study/page.py study/report.py study/wording.py atlas/*.py
"""
"""Whose texts reports show."""

INSIDE = frozenset(
    {
        "cross entropy", "binary cross entropy", "log probabilities", "half the weights", "bold 7",
        "x domain", "y domain", "y7 domain", "top left", "top center", "top right", "bottom center",
        "middle right", "outside top", "figure 7", "dial 7", "gradmend check", "gradmend mend",
        "gradmend 7, torch 7", "weight gradient", "7<br>from step 7", "7, 7 times the usual",
        "7 units dead again and drawn again,", "7 · chosen",
    }
)  # fmt: skip
"""Names in the code, and what is put together from entries."""

UNSPOKEN = re.compile(r"^gradmend |\n|import |print\(|found\.|clip=|SELECT |=\"|, (?:19|20)\d\d$")
"""Commands, code, HTML, and sources."""

FOLDED = "\n".join(FIELD.sub("7", key) for key in ZH)


def texts_of(node: ast.AST) -> Iterator[str]:
    """The literal texts below a node, fields as "7"; without docstrings, annotations and errors."""
    if isinstance(node, (ast.Raise, ast.Assert, ast.Subscript)) or _raises(node):
        return
    text = _text(node)
    if text is not None:
        yield text
    if isinstance(node, ast.Constant) or (isinstance(node, ast.BinOp) and text is not None):
        return
    for child in _inner(node):
        yield from texts_of(child)


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "7" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None or right is None else left + right
    return None


def _raises(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error")


def _inner(node: ast.AST) -> Iterator[ast.AST]:
    quiet = {id(getattr(node, name, None)) for name in ("annotation", "returns")}
    for child in ast.iter_child_nodes(node):
        docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        piece = isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant)
        if not docstring and not piece and id(child) not in quiet:
            yield child


def missing(path: Path) -> list[str]:
    """The sentences of a file that are part of no entry, whatever their fields stand for."""
    texts = texts_of(ast.parse(path.read_text(encoding="utf-8")))
    spoken = [text for text in texts if re.search(r"[A-Za-z]{2,} \S|\S [A-Za-z]{2,}", text)]
    spoken = [text for text in spoken if not UNSPOKEN.search(text)]
    parts = {part for text in spoken for part in re.split(r"(?<=[.?!]) +", text)}
    sentences = {re.sub(r"^7 ?(?=[A-Z])", "", part).strip(" |") for part in parts}
    return sorted(each for each in sentences - INSIDE if not _covered(each))


def _covered(sentence: str) -> bool:
    pattern = ".*?".join(map(re.escape, sentence.split("7")))
    return bool(re.search(pattern, FOLDED) or re.search(pattern[:1].lower() + pattern[1:], FOLDED))


def paths() -> list[str]:
    found = {
        path.relative_to(SOURCE).as_posix() for pattern in FILES.split() for path in SOURCE.glob(pattern)
    }
    return sorted(found)


@pytest.mark.parametrize("name", paths())
def test_no_sentence_of_the_code_is_missing(name: str) -> None:
    assert missing(SOURCE / name) == []


@pytest.mark.parametrize("name", ["main.html", "page.html"])
def test_no_label_of_a_template_is_missing(name: str) -> None:
    template = (SOURCE / "report" / name).read_text(encoding="utf-8")
    labels = re.findall(r"""say\((["'])(.+?)\1\)""", template)
    assert [label for _, label in labels if label not in ZH] == []


def test_a_sentence_that_is_new_is_noticed(tmp_path: Path) -> None:
    code = tmp_path / "new.py"
    code.write_text('def say(n):\n    """No text."""\n    return f"There are {n} new words."\n')
    assert missing(code) == ["There are 7 new words."]


def test_questions_of_shipped_studies() -> None:
    for name in shipped():
        chinese(load_study(name).question)


# ---- what it holds: whole pages ---------------------------------------------------------------------------


REFERENCES = "\n".join((*(cause.illness.reference for cause in Cause), *(card.source for card in cards())))


def left(page: Page) -> list[str]:
    """What stays English on a page in Chinese, apart from code, its title, sources, and what was cut off."""
    held = content(page, "zh")
    html = re.sub(r"<(code|pre|h1)\b.*?</\1>", "", held["html"], flags=re.S)
    texts = [unescape(part).strip() for part in re.split(r"<[^>]*>", html)]
    drawn = [text for data in held["figures"].values() for text in _drawn(json.loads(data))]
    labels = re.findall(r"<(?:h2|th|dt|summary|caption)\b[^>]*>([^<]*[A-Za-z]{3}[^<]*)</", html)
    found = {text for text in (*texts, *drawn) if ENGLISH.search(CODE.sub("", text))}
    found |= {label for label in labels if not HAN.search(label)}
    return sorted(text for text in found if text not in REFERENCES and "…" not in text)


def _drawn(value: object, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _drawn(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _drawn(part, key)
    elif isinstance(value, str) and key in ("text", "title", "name", "hovertemplate", "hovertext", "words"):
        yield value


def test_a_page_of_a_check() -> None:
    diagnosis = diagnose(Setup(mlp(12, nn.Sigmoid), nn.CrossEntropyLoss(), SGD), BATCH)
    assert not diagnosis.healthy
    assert left(check_page(diagnosis)) == []


def test_a_page_of_a_treatment() -> None:
    setup = Setup(nn.Sequential(*plain(2, nn.ReLU), nn.Softmax(1)), nn.CrossEntropyLoss(), SGD)
    x, y = blobs(rows=256)
    treatment = mend(setup, list(zip(x.split(64), y.split(64), strict=True)), Budget(steps=60))
    assert treatment.changes
    assert left(mend_page(treatment)) == []


@pytest.mark.parametrize("name", sorted(ill.cases()))
def test_pages_of_faults(name: str) -> None:
    setup, batch = ill.cases()[name]()
    assert left(check_page(look(setup, batch))) == []


def test_a_page_of_a_training(tmp_path: Path) -> None:
    model, journal = mlp(3, nn.ReLU), tmp_path / "run.gradmend"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, journal=str(journal), report=lambda _: None, treat=True, every=5):
        for step in range(60):
            optimizer.zero_grad()
            x, y = BATCH
            nn.functional.cross_entropy(model(x if step != 40 else x * float("nan")), y).backward()
            optimizer.step()
    assert left(run_page(Journal(journal))) == []


def test_a_page_of_a_study() -> None:
    levels = {"norm": ("no", "yes"), "depth": ("2", "5", "20"), "activation": ("relu", "tanh")}

    def truth(norm: str, depth: str, activation: str) -> float:
        return (
            0.5 + 0.2 * (norm == "yes") - 0.01 * int(depth) + 0.1 * (norm == "yes") * (activation == "tanh")
        )

    assert left(results(outcomes(levels, truth)).page()) == []
