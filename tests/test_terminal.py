"""What reaches a terminal, a pipe or a notebook: it fits, it is legible, and no name can do harm there."""

import builtins
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len
from torch import Tensor, nn

import gradmend as gm
from gradmend.causes import Cause
from gradmend.console import bullets, html, listed, plain, shortened
from gradmend.diagnosis import Finding, Severity
from gradmend.patch import Patch
from gradmend.recorded import Lasted, Recorded, RecordedModel, RecordedRun
from gradmend.remedies.card import cards
from gradmend.study.file import load_study
from gradmend.terminal import Terminal, spelled
from gradmend.training.run import train
from helpers import ADAM, blobs
from outcomes import outcomes, results

HOSTILE = (
    "[red]mark",
    "\x1b[31mansi\x1b]0;title\x07",
    "two\nlines",
    "層" * 14,
    "<script>",
    "\u202eevil",
    "a\tb",
)
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]\d+)?%?")
ENCODINGS = ("utf-8", "latin-1", "ascii")
NET = f"""
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        for name in {HOSTILE!r}:
            self.add_module(name, nn.Linear(4, 4))
        self.out = nn.Linear(4, 3)
    def forward(self, x):
        for name in {HOSTILE!r}:
            x = torch.sigmoid(getattr(self, name)(x))
        return self.out(x)

torch.manual_seed(0)
net = Net()
batch = torch.randn(96, 4), torch.arange(96) % 3
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(8, 8), "c_proj": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.attn["c_proj"](torch.sigmoid(self.attn["c_attn"](x))))


class Deep(nn.Module):
    """Names as long as those of usual language models, beside hostile ones."""

    def __init__(self, names: tuple[str, ...], blocks: int) -> None:
        super().__init__()
        self.names = names
        self.transformer = nn.ModuleDict({"h": nn.ModuleList(Block() for _ in range(blocks))})
        for name in names:
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.transformer["h"]:
            x = block(x)
        for name in self.names:
            x = torch.sigmoid(getattr(self, name)(x))
        return x


def diagnosed(model: nn.Module, scale: float = 1.0) -> gm.Diagnosis:
    x, y = blobs()
    return gm.diagnose(gm.Setup(model, nn.CrossEntropyLoss(), ADAM), (scale * x, y))


def recorded(finding: Finding) -> Recorded:
    model = RecordedModel(HOSTILE[1], 7, (2.5, 0.25), (Lasted(finding, 1, None),), (HOSTILE[2],))
    return Recorded((RecordedRun(HOSTILE[0], "2026-01-02 03:04:05", "killed", (model,)),))


def compared() -> Any:
    """A study whose labels are long, odd, and end with numbers."""
    levels = {
        "activation of [red] layers": ("sigmoid", "relu", HOSTILE[1]),
        "initialization": ("default", "kaiming normal"),
        "learning_rate": ("0.125", "0.0625"),
    }
    truth = {"sigmoid": 0.25, "relu": 0.5}
    return results(outcomes(levels, lambda **arm: truth.get(next(iter(arm.values())), 0.75)), levels)


def hopeless() -> gm.Diagnosis:
    """A step whose numbers are not finite from the middle on."""
    model = Deep((), 6)
    nn.init.constant_(model.transformer["h"][3].attn["c_proj"].bias, torch.nan)
    return diagnosed(model)


def sound() -> gm.Setup:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    return gm.Setup(model, nn.CrossEntropyLoss(), ADAM)


def squashed() -> gm.Setup:
    return gm.Setup(nn.Sequential(nn.Linear(8, 3), nn.Softmax(1)), nn.CrossEntropyLoss(), ADAM)


PLACES = tuple(f"/home/someone/{'very/deep/' * 9}model.py:{line}" for line in (7, 1234))
FINDING = Finding(Cause.PLATEAU, Severity.WARNING, HOSTILE[2], 1.25, None, "", HOSTILE, PLACES, HOSTILE)
MAKERS: Mapping[str, Callable[[], Any]] = {
    "sound": lambda: diagnosed(sound().model),
    "deep": lambda: diagnosed(Deep((), 12)),
    "hopeless": hopeless,
    "hostile": lambda: diagnosed(Deep(HOSTILE, 2)),
    "finding": lambda: FINDING,
    "prognosis": lambda: noun("hostile").prognosis,
    "history": lambda: train(sound(), blobs(), steps=3, device="cpu"),
    "treatment": lambda: gm.mend(squashed(), blobs()),
    "recorded": lambda: recorded(FINDING),
    "results": compared,
    "study": lambda: load_study("five-remedies"),
    "patch": lambda: Patch("net.py", "net", b"", b"", HOSTILE[:1], HOSTILE[1:2]),
    "card": lambda: cards()[0],
    "catalogue": lambda: listed((card.name, card.what) for card in cards()),
    "bullets": lambda: bullets([*HOSTILE, "a sentence that does not fit into one line of a narrow terminal"]),
}
"""All that prints itself, at its worst."""


@cache
def noun(kind: str) -> Any:
    torch.manual_seed(0)
    return MAKERS[kind]()


def printed(what: Any, encoding: str = "utf-8", **options: Any) -> str:
    """As in a file."""
    data = io.BytesIO()
    with io.TextIOWrapper(data, encoding, newline="\n") as file:
        Terminal(file=file, **options).print(what)
        file.flush()
        return data.getvalue().decode(encoding)


def on_terminal(show: Callable[[Any], None], columns: int, encoding: str = "utf-8") -> str:
    """All that was written to a pseudo terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    said: list[bytes] = []
    reader = Thread(target=_read, args=(ours, said))
    reader.start()
    with open(theirs, "w", encoding=encoding) as file:
        show(file)
    reader.join()
    os.close(ours)
    return b"".join(said).decode(encoding)


def _read(terminal: int, said: list[bytes]) -> None:
    try:
        while part := os.read(terminal, 65536):
            said.append(part)
    except OSError:  # how Linux says that the other side is closed
        pass


def numbers(text: str) -> set[str]:
    """All but of how many things there was no room."""
    return set(NUMBER.findall(re.sub(r"\band\s+\d+\s+more", "", text)))


# ---- width, encoding, names


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("kind", MAKERS)
def test_lines_fit_and_no_name_steers_the_terminal(kind: str, width: int, encoding: str) -> None:
    text = printed(noun(kind), encoding, width=width)
    assert text.strip()
    assert max(map(cell_len, text.splitlines())) <= min(width, 120)
    assert not STEERING.search(text)


@pytest.mark.parametrize("width", [40, 50, 60, 80])
@pytest.mark.parametrize("kind", MAKERS)
def test_no_number_is_cut(kind: str, width: int) -> None:
    narrow, wide = (printed(noun(kind), width=columns) for columns in (width, 120))
    assert numbers(narrow) <= numbers(wide)


@pytest.mark.parametrize("kind", ["sound", "deep", "results", "study", "treatment"])
def test_ascii_says_the_same_as_unicode(kind: str) -> None:
    text = printed(noun(kind), "ascii", width=80)
    if kind != "results":  # a name of it has an escape sequence
        assert "?" not in text.replace("together?", "").replace("What helps?", "")
    rich = printed(noun(kind), width=80)
    assert [len(line) for line in text.splitlines()] == [len(line) for line in rich.splitlines()]
    assert text.count("o predicted") == rich.count("◆ predicted")


def test_stand_ins_take_as_many_columns() -> None:
    assert [spelled("█◆…·é層", encoding) for encoding in ENCODINGS] == ["█◆…·é層", "#o~·é?", "#o~.e?"]


def test_file_names_that_are_no_text_print() -> None:
    assert printed("a\udcffb", width=20) == "a?b\n"


def test_names_that_are_typed_are_never_cut() -> None:
    names = [card.name for card in cards()]
    for width in (40, 60, 80):
        words = printed(noun("catalogue"), width=width).split()
        assert set(names) <= set(words)


def test_layers_of_many_blocks_are_told_apart_where_it_is_narrow() -> None:
    for width in (40, 60, 80):
        picture = printed(noun("deep"), width=width).split("layers shown")[0]
        named = [line.split()[0] for line in picture.splitlines() if line.startswith("tr")]
        assert len(named) == 20
        assert len(set(named)) == 20


def test_a_step_that_is_not_finite_shows_how_the_signal_went() -> None:
    text = printed(noun("hopeless"), width=80)
    assert "log10 rms" in text
    assert "█" in text


@example("111//", 3)
@given(st.text(st.sampled_from("ab1.9_/層\x1b"), max_size=60), st.integers(1, 40))
def test_shortened_names_fit_and_keep_their_ends(name: str, width: int) -> None:
    short = shortened(name, width)
    assert cell_len(short) <= width
    if "…" in short:
        assert set(re.findall(r"\d+", short)) <= set(re.findall(r"\d+", name.replace("\x1b", "␛")))
    else:
        assert short == name.replace("\x1b", "␛")


@pytest.mark.parametrize(
    ("width", "short"),
    [
        (71, "model.diffusion_model.input_blocks.11.1.transformer_blocks.0.attn2.to_v"),
        (42, "model…11.1.transformer_blocks.0.attn2.to_v"),
        (24, "model…11.1…0.attn2.to_v"),
        (12, "mode…0…to_v"),
    ],
)
def test_shortened_names_keep_the_numbers_of_their_blocks(width: int, short: str) -> None:
    name = "model.diffusion_model.input_blocks.11.1.transformer_blocks.0.attn2.to_v"
    assert shortened(name, width) == short


# ---- colour


@pytest.mark.parametrize(
    ("environment", "colours"),
    [
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
        ({"TERM": "xterm-256color", "NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_a_terminal_gets_colours_where_it_has_some_and_they_are_wanted(
    environment: Mapping[str, str], colours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _environment(environment, monkeypatch)
    text = on_terminal(lambda file: Terminal(file=file).print(noun("hostile")), 60)
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    assert bool(re.search(r"\x1b\[[\d;]*m", text)) == colours
    assert max(map(cell_len, lines)) <= 60
    assert max(map(cell_len, lines)) > 55
    assert not STEERING.search("".join(lines))


@pytest.mark.parametrize(("forced", "colours"), [("1", True), ("0", False), ("", False)])
def test_a_file_gets_colours_only_by_force(
    forced: str, colours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _environment({"FORCE_COLOR": forced}, monkeypatch)
    assert ("\x1b[" in printed(noun("sound"), width=80)) == colours


def _environment(told: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("kind", MAKERS)
def test_colours_can_be_read_on_white_and_on_black(kind: str) -> None:
    page = html(noun(kind))
    assert "background-color" not in page
    for colour in set(re.findall(r"color: #(\w{6})", page)):
        light = _luminance(colour)
        assert (1.05 / (light + 0.05)) >= 3.8
        assert ((light + 0.05) / 0.05) >= 3.8


def _luminance(colour: str) -> float:
    """Relative luminance as in WCAG 2, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# ---- print and notebooks


def test_in_a_notebook_nouns_are_text_and_html_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = type("ZMQInteractiveShell", (), {"config": {}})
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    sound = noun("sound")
    assert "Healthy" in str(sound)
    assert sound._repr_html_().count("Healthy") == 1


def test_html_is_escaped_and_scrolls_instead_of_wrapping() -> None:
    page = html(noun("hostile"))
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "\x1b" not in page
    assert "white-space:pre" in page


@pytest.mark.parametrize("width", [40, 80])
def test_printed_nouns_fit_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _environment({"TERM": "xterm", "COLUMNS": str(width)}, monkeypatch)

    def show(file: Any) -> None:
        with monkeypatch.context() as context:
            context.setattr(sys, "stdout", file)
            file.write(str(noun("deep")))

    text = on_terminal(show, width)
    assert max(map(cell_len, text.splitlines())) <= width


def test_print_works_where_the_encoding_has_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        text = plain(noun("deep"))
    assert text.isascii()


# ---- what moves


@pytest.mark.parametrize("columns", [40, 80])
def test_a_progress_bar_stays_in_its_line(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _environment({"TERM": "xterm-256color"}, monkeypatch)
    text = on_terminal(partial(_trained, monkeypatch), columns)
    frames = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text))
    assert any("loss" in frame for frame in frames)
    assert max(map(cell_len, frames)) <= columns
    assert "…" not in text


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}])
def test_a_progress_bar_leaves_one_line_in_a_file(
    environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _environment(environment, monkeypatch)
    file = io.StringIO()
    _trained(monkeypatch, file)
    assert file.getvalue().count("\n") <= 1
    assert "\r" not in file.getvalue()
    assert not re.search(r"\x1b\[[^m]*[A-Zh-l]", file.getvalue())  # nothing that moves or hides the cursor


def _trained(monkeypatch: pytest.MonkeyPatch, file: Any) -> None:
    with monkeypatch.context() as context:
        context.setattr(sys, "stderr", file)
        setup = gm.Setup(nn.Linear(8, 3), nn.CrossEntropyLoss(), ADAM)
        train(setup, blobs(), steps=40, batch_size=8, device="cpu", progress=True)


# ---- the commands themselves


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`gradmend ARGUMENTS` in a folder with `net.py`, piped into files."""
    (folder / "net.py").write_text(NET)
    usual = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    told = {**usual, "OMP_NUM_THREADS": "1", "COLUMNS": "60", **environment}
    line = [sys.executable, "-m", "gradmend", *arguments]
    return subprocess.run(line, cwd=folder, env=told, capture_output=True, timeout=120)


CHECK = ("check", "net.py:net", "--data", "net.py:batch")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_check_prints_to_a_pipe_of_any_encoding(encoding: str, tmp_path: Path) -> None:
    done = command(tmp_path, *CHECK, PYTHONIOENCODING=encoding)
    said = [stream.decode(encoding) for stream in (done.stdout, done.stderr)]
    assert done.returncode == 1, said
    assert "vanishing gradient" in said[0]
    for text in said:
        assert not STEERING.search(text)
        folded = [line for line in text.splitlines() if not line.startswith("To mend it")]  # to be copied
        assert max(map(cell_len, folded)) <= 60


def test_train_keeps_its_bar_out_of_logs(tmp_path: Path) -> None:
    arguments = ("train", "net.py:net", "--data", "net.py:batch", "--epochs", "2", "--device", "cpu")
    done = command(tmp_path, *arguments, FORCE_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert b"\r" not in done.stderr
    assert b"\x1b[?25l" not in done.stderr
    assert b"\x1b[" in done.stdout
