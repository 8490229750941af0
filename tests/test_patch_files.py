"""Patches of what trains, the bytes of the patched file, and the command that writes it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from gradmend.cli import main
from gradmend.errors import TargetError
from gradmend.patch.files import order
from gradmend.remedies import (
    LSUV,
    Accumulate,
    AddMissingParameters,
    BatchNorm,
    ClipAdaptive,
    ClipNorm,
    DepthRates,
    Descend,
    DropSquashing,
    FitLoss,
    He,
    LearningRate,
    LessDropout,
    Orthogonal,
    OutputUnits,
    Relabel,
    StandardizeInput,
    SwapActivation,
    UseOptimizer,
    UseSchedule,
    WeightDecay,
)
from gradmend.target import Wishes, find, import_file
from gradmend.training.loop import Stepper
from patching import HEAD, PLAIN, applied, mend, rates, removed, treated

pytestmark = pytest.mark.usefixtures("own_folder")


# ---- what trains


def test_the_learning_rate_by_place_by_name_and_through_a_name() -> None:
    patch, _, again = mend(PLAIN, "model", LearningRate(0.01))
    assert removed(patch) == ["optimizer = torch.optim.SGD(model.parameters(), 0.5)  # fast"]
    assert rates(again.setup) == [0.01]
    _, _, again = mend(PLAIN.replace(" 0.5)", " lr = 0.5 ,)"), "model", WeightDecay(0.1), LearningRate(0.01))
    assert rates(again.setup) == [0.01]
    assert again.setup.build_optimizer().param_groups[0]["weight_decay"] == 0.1


def test_parts_that_are_not_in_the_file_are_left() -> None:
    source = PLAIN.replace("optimizer = ", "_ = ")
    patch, _, _ = mend(source, "model", LearningRate(0.01), ClipNorm(), DropSquashing())
    assert "learning rate 0.01: net.py makes no optimizer for this model" in patch.left
    assert "gradient clipping to norm 1: the optimizer is not made beside the model" in patch.left
    patch, _, _ = mend(PLAIN, "model", LearningRate(0.01), DropSquashing(), optimizer="SGD:0.1")
    assert any("typed" in line for line in patch.left)


def test_what_was_found_on_a_batch_is_written_as_numbers() -> None:
    patch, _, _ = mend(PLAIN, "model", LSUV(), LearningRate(0.01))
    assert not patch.left
    assert "lr=0.01" in patch.written[-1]


def test_what_runs_with_each_step_hangs_on_an_optimizer_without_a_setup() -> None:
    remedies = (He(), ClipNorm(0.01), UseSchedule("linear", 4), UseOptimizer("Adam", lr=0.01))
    patch, mended, _ = mend(PLAIN, "model", *remedies)
    assert not patch.left
    names = vars(import_file("again.py", "again.py"))
    model, optimizer = names["model"], names["optimizer"]
    step, batch = Stepper(mended.copy()), (names["x"], names["y"])
    for _ in range(4):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(step([batch]).item(), rel=1e-4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_adaptive_clipping_of_a_live_optimizer_beside_a_setup() -> None:
    source = PLAIN + "\nimport gradmend\nsetup = gradmend.Setup(model, nn.CrossEntropyLoss(), optimizer)\n"
    patch, _, again = mend(source, "setup", ClipAdaptive(), He())
    assert not patch.left
    assert len(again.setup.build_optimizer()._optimizer_step_pre_hooks) == 1
    patch, _, again = mend(source, "setup", ClipNorm())
    assert again.setup.gradient_transform is not None


SIGNED = (
    HEAD
    + """
y = 1.0 + (x[:, :1] > 0)
batch = (x, y)
model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
loss_fn = nn.BCEWithLogitsLoss()
"""
)


def test_a_loss_around_the_loss_that_stands_there() -> None:
    patch, mended, again = mend(SIGNED, "model", Relabel())
    assert "loss_fn = partial(lambda loss, output, y: loss(output, " in patch.after.decode()
    assert "), nn.BCEWithLogitsLoss())\n" in patch.after.decode()
    batch = again.batches(1)[0]
    torch.testing.assert_close(again.setup.loss(batch), mended.loss(batch))


def test_a_loss_that_is_a_function_is_bound_anew() -> None:
    source = PLAIN + "\ndef loss_fn(output, y):\n    return -nn.functional.cross_entropy(output, y)\n"
    patch, mended, again = mend(source, "model", Descend())
    assert patch.after.decode().endswith(
        "\nloss_fn = partial(lambda loss, output, y: -loss(output, y), loss_fn)\n"
    )
    batch = again.batches(1)[0]
    torch.testing.assert_close(again.setup.loss(batch), mended.loss(batch))
    patch, mended, again = mend(source, "model", FitLoss(), DropSquashing(), some=True)
    assert patch.after.decode().endswith("\nloss_fn = nn.CrossEntropyLoss()\n")


TWICE = (
    HEAD
    + """
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = torch.sigmoid(self.a(x))
        x = F.dropout(x * torch.sigmoid(x), 0.98, self.training)
        x = torch.sigmoid(self.b(x))
        return self.c(x)

model = Net()
"""
)


def test_a_forward_that_was_rewritten_twice_is_changed_where_it_stands() -> None:
    """The second time the text is that of the first, but the lines are the user's."""
    patch, _, _ = mend(TWICE, "model", LessDropout(), SwapActivation("ReLU"))
    assert removed(patch) == [
        "x = F.dropout(x * torch.sigmoid(x), 0.98, self.training)",
        "x = torch.sigmoid(self.b(x))",
    ]
    assert "F.dropout(x * torch.sigmoid(x), p=0.1, training=self.training)" in patch.after.decode()
    assert "def mended" not in patch.after.decode()


def test_parameters_that_an_optimizer_lacks() -> None:
    source = PLAIN.replace("(model.parameters()", "(model[2:].parameters()")
    patch, _, again = mend(source, "model", AddMissingParameters())
    assert "optimizer = tuned(optimizer, model)\n" in patch.after.decode()
    held = [p for group in again.setup.build_optimizer().param_groups for p in group["params"]]
    assert {*held} == {*again.setup.model.parameters()}


def test_an_optimizer_of_new_layers_holds_them() -> None:
    _, _, again = mend(PLAIN, "model", BatchNorm(), StandardizeInput(), LearningRate(0.01))
    held = [p for group in again.setup.build_optimizer().param_groups for p in group["params"]]
    assert {*held} == {*again.setup.model.parameters()}


# ---- bytes


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: (text + "def f():\n    return 1\n").replace("    ", "\t").encode(),
        lambda text: text.replace("    ", "  ").encode(),
        lambda text: text.replace("mine", "Gewicht größer ≥ 0 \u2028 \x0c").encode(),
        lambda text: ("# coding: latin-1" + text.replace("mine", "größer")).encode("latin-1"),
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.rstrip("\n").encode(),
        lambda text: text.rstrip("\n").replace("\n", "\r\n").encode(),
        lambda text: text.replace("x = torch", "s = '''\n a\n'''; x = torch").encode(),
    ],
    ids=["crlf", "tabs", "two spaces", "utf-8", "latin-1", "bom", "no end", "no end, crlf", "semicolon"],
)
def test_bytes_of_other_lines_stay(change: Any) -> None:
    data = change(PLAIN)
    patch, _, _ = mend(data, "model", DropSquashing(), SwapActivation("ReLU"), He(), LearningRate(0.01))
    changed = [line for line in data.split(b"\n") if line not in patch.after.split(b"\n")]
    assert len(changed) in (4, 5)
    ends = set(re.findall(rb"\r?\n", patch.after))
    assert len(ends) == 1
    if b"\t" in data:
        assert not re.search(rb"^ +\S", patch.after, re.M)


@pytest.mark.skipif(shutil.which("patch") is None, reason="no program `patch`")
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_program_patch_applies_it(end: str) -> None:
    patch, _, _ = mend(PLAIN.replace("\n", end).encode(), "model", DropSquashing(), He())
    Path("out.diff").write_bytes(patch.diff())
    subprocess.run(["patch", "-s", "net.py", "out.diff"], check=True)
    assert Path("net.py").read_bytes() == patch.after


def test_a_second_patch_of_a_patched_file() -> None:
    first, _, _ = mend(PLAIN, "model", StandardizeInput(), He())
    second, _, _ = mend(first.after, "model", Orthogonal(), DropSquashing())
    assert second.after.count(b"def set_weight(") == 1
    assert b"def mended_2(model):" in second.after


def test_what_is_for_the_loop_is_left_by_hand() -> None:
    patch, _, _ = mend(PLAIN, "model", Accumulate(3))
    assert patch.after == patch.before
    (line,) = patch.left
    assert line.startswith(
        "3 batches per optimizer step: by hand: accumulate = 3; for your loop: (loss / acc"
    )


def test_a_name_that_the_source_does_not_show() -> None:
    source = PLAIN + "\nglobals()['hidden'] = model\n"
    with pytest.raises(TargetError, match="does not show how 'hidden' is made"):
        mend(source, "hidden", DropSquashing())


def test_rates_by_depth_of_a_live_optimizer() -> None:
    source = (
        HEAD
        + """
def hidden():
    return [nn.Linear(8, 8), nn.Tanh()]

model = nn.Sequential(nn.Linear(4, 8), *sum((hidden() for _ in range(30)), []), nn.Linear(8, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
    )
    patch, wanted, again = mend(source, "model", DepthRates())
    assert "def tuned(optimizer, model):" in patch.after.decode()
    assert rates(again.setup) == rates(wanted)
    source = source.replace("optimizer = ", "import gradmend as gm\nsetup = gm.Setup(model, optimizer=")
    patch, _, _ = mend(source.replace("(model.parameters(), lr=0.1)", ")"), "setup", DepthRates(), He())
    assert any("the optimizer is not made beside the model" in line for line in patch.left)


def test_other_units_and_a_loss_that_needs_other_targets() -> None:
    source = PLAIN.replace("nn.Linear(16, 3)", "nn.Linear(16, 1)").replace("    nn.Softmax(1),", "   ")
    source = source.replace("batch = (x, y)", "batch = (x, y[:, None].float())")
    patch, wanted, again = mend(source + "criterion = nn.BCEWithLogitsLoss()\n", "model", OutputUnits())
    assert "criterion = (lambda output, y: nn.CrossEntropyLoss()(output, y.long().flatten()))" in str(
        patch.after
    )
    batch = again.batches(1)[0]
    assert torch.equal(again.setup.loss(batch), wanted.loss(batch))


# ---- files and the command line

SOFT = """
import torch
from torch import nn
x, y = torch.randn(256, 4), torch.arange(256) % 3
x[:, 0] += y
batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 256, 64)]
healthy = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3), nn.Softmax(1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
"""
PATCHED = SOFT.replace(", nn.Softmax(1)", "")


def filled(out: Path | None, write: bool) -> list[str]:
    """What is said after a softmax was dropped, with the options of the command."""
    asked = order("net.py:model", out, write)
    found = find("net.py:model", Wishes())
    return asked.fill(found.setup, treated(found, [DropSquashing()]), found.batches(1)[0])


def test_a_diff_leaves_the_file_and_a_write_keeps_what_was() -> None:
    Path("net.py").write_text(SOFT)
    assert filled(Path("my out.diff"), False)[-1] == "To apply it: patch net.py 'my out.diff'"
    assert Path("net.py").read_text() == SOFT
    assert "-model = " in Path("my out.diff").read_text()
    Path("net.py").chmod(0o640)
    assert filled(None, True)[-1] == "Changed net.py; as it was before: net.py.bak."
    assert (Path("net.py").read_text(), Path("net.py.bak").read_text()) == (PATCHED, SOFT)
    assert Path("net.py").stat().st_mode & 0o777 == 0o640
    Path("net.py").write_text(SOFT + "# mine")
    filled(None, True)
    assert Path("net.py.bak1").read_text() == SOFT + "# mine"
    assert Path("net.py.bak").read_text() == SOFT


def test_a_file_that_has_changed_meanwhile_stays() -> None:
    Path("net.py").write_text(SOFT)
    asked = order("net.py:model", None, True)
    found = find("net.py:model", Wishes())
    Path("net.py").write_text(SOFT + "# more")
    with pytest.raises(TargetError, match="has changed since"):
        asked.fill(found.setup, treated(found, [DropSquashing()]), found.batches(1)[0])
    assert sorted(path.name for path in Path().iterdir() if path.is_file()) == ["net.py"]
    assert Path("net.py").read_text() == SOFT + "# more"


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_the_command_writes_a_diff_that_heals(capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.py").write_text(SOFT)
    assert command("mend", "net.py:model", "--steps", 20, "--patch", "out.diff") == 0
    said = capsys.readouterr().out
    assert "Written: net.py:8: nn.Softmax(1) left out" in said
    assert "Wrote out.diff." in said
    Path("again.py").write_bytes(applied(SOFT.encode(), Path("out.diff").read_bytes()))
    assert command("check", "again.py:model") == 0


def test_beside_json_the_command_talks_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.py").write_text(SOFT.partition("model =")[0])
    assert command("mend", "net.py:healthy", "--write", "--patch", "out.diff", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["changes"] == []
    assert "No patch: nothing was changed." in said.err
    assert not Path("out.diff").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mnist", "--patch", "out.diff"], "'mnist' has no source to patch: that takes FILE.py:NAME"),
        (["net.keras", "--write"], "'net.keras' has no source to patch"),
        (["net.py:model", "--patch", "net.py"], "net.py exists already. Type another name, such as --patch"),
        (["net.py:model", "--patch", "no/out.diff"], "lies in no folder that exists"),
        (["nets.py:model", "--write"], "There is no file 'nets.py'. Did you mean 'net.py'?"),
        (["net.py", "--write"], "has no source to patch"),
    ],
)
def test_what_cannot_be_patched(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.py").write_text(SOFT)
    assert command("mend", *arguments) == 2
    assert words in capsys.readouterr().err
    assert Path("net.py").read_text() == SOFT


def test_a_file_that_makes_another_model_each_time() -> None:
    Path("net.py").write_text(SOFT.replace("model = nn", "torch.seed()\nmodel = nn"))
    said = filled(Path("out.diff"), False)
    assert "Left: no proof: the file makes another model each time it runs" in said[1]
    assert "nn.Softmax(1) left out" in said[1]
