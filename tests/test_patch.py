"""Patches: the user's file after them gives the mended model, and all that was not meant stays as it was."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import nn

from gradmend.diagnosis import Diagnosis, diagnose
from gradmend.errors import TargetError
from gradmend.patch import Patch, patched
from gradmend.patch.proof import gives, same_model
from gradmend.remedies import (
    Accumulate,
    AddMissingParameters,
    BatchNorm,
    BatchSize,
    Change,
    ClipNorm,
    DepthRates,
    Descend,
    DropSquashing,
    FitLoss,
    He,
    LayerNorm,
    LearningRate,
    Orthogonal,
    OutputUnits,
    Remedy,
    StandardizeInput,
    SwapActivation,
    UseOptimizer,
    UseSchedule,
    WeightDecay,
)
from gradmend.setup import Setup
from gradmend.target import Target, Wishes, find
from gradmend.treatment import Treatment

HEAD = """
import torch
from torch import nn

torch.manual_seed(0)
x = torch.randn(96, 4)
y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
batch = (x, y)

"""
PLAIN = (
    HEAD
    + """
# mine
model = nn.Sequential(
    nn.Linear(4, 16),  # first
    nn.Sigmoid(),
    nn.Linear(16, 16), nn.Sigmoid(),
    nn.Linear(16, 3),  # out
    nn.Softmax(1),  # probabilities
)
optimizer = torch.optim.SGD(model.parameters(), 0.5)  # fast
"""
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("net", "again"):
        sys.modules.pop(name, None)


def treated(found: Target, remedies: Sequence[Remedy]) -> Treatment:
    """A treatment by given remedies, without a search."""
    setup, changes, batches = found.setup, list[Change](), found.batches(4)
    for remedy in remedies:
        change = remedy.apply(setup, batches)
        assert change.edits, remedy
        changes.append(change)
        setup = change.setup
    return Treatment(setup, tuple(changes), some_diagnosis(), some_diagnosis(), ())


@cache
def some_diagnosis() -> Diagnosis:
    """What a treatment has to hold, and a patch does not look at."""
    return diagnose(Setup(nn.Linear(4, 3), nn.CrossEntropyLoss()), (torch.randn(16, 4), torch.arange(16) % 3))


def mend(
    source: str | bytes, name: str, *remedies: Remedy, proved: bool = True, **wishes: Any
) -> tuple[Patch, Setup, Target]:
    """The patch of a file, applied to a copy: the patch, the mended setup, and what the copy gives."""
    data = source if isinstance(source, bytes) else dedent(source).encode()
    Path("net.py").write_bytes(data)
    found = find(f"net.py:{name}", Wishes(**wishes))
    treatment, batch = treated(found, remedies), found.batches(1)[0]
    typed = [part for part in ("loss", "optimizer") if part in wishes]

    def check(after: bytes, name: str) -> bool:
        return gives(after, "net.py", name, treatment.setup, batch)

    patch = patched(data, "net.py", name, found.setup, treatment, typed, check if proved else None)
    Path("again.py").write_bytes(applied(data, patch.diff()))
    assert Path("again.py").read_bytes() == patch.after
    assert Path("net.py").read_bytes() == data
    again = find(f"again.py:{patch.name}", Wishes(**wishes))
    assert same_model(again.setup.model, treatment.setup, batch)
    return patch, treatment.setup, again


def applied(data: bytes, diff: bytes) -> bytes:
    """What `patch` would make of a file."""
    old, new, at = data.split(b"\n"), list[bytes](), 0
    diff = diff.replace(b"\n\\ No newline at end of file\n", b"\x00\n")
    for line in diff.split(b"\n")[2:-1]:
        if hunk := re.match(rb"@@ -(\d+)(?:,(\d+))? ", line):
            start = int(hunk[1]) - (hunk[2] != b"0")
            new += old[at:start]
            at = start
            continue
        kept = line[1:]
        if line[:1] in (b" ", b"-"):
            assert old[at] == kept.rstrip(b"\x00"), (old[at], kept)
            at += 1
        if line[:1] in (b" ", b"+"):
            new.append(kept)
    joined = b"\n".join(new + old[at:])
    return joined.split(b"\x00")[0]


def removed(patch: Patch) -> list[str]:
    """The lines that are gone or changed."""
    lines = patch.diff().decode().splitlines()[2:]
    return [line[1:].strip() for line in lines if line.startswith("-")]


def rates(setup: Setup) -> list[float]:
    return [group["lr"] for group in setup.build_optimizer().param_groups]


# ---- layers and functions where they stand


def test_layers_are_changed_where_they_are_made() -> None:
    patch, _, _ = mend(PLAIN, "model", DropSquashing(), SwapActivation("ReLU"))
    after = patch.after.decode()
    assert removed(patch) == [
        "nn.Sigmoid(),",
        "nn.Linear(16, 16), nn.Sigmoid(),",
        "nn.Softmax(1),  # probabilities",
    ]
    assert "    nn.Linear(16, 16), nn.ReLU(),\n    nn.Linear(16, 3),  # out\n)\n" in after
    assert "net.py:17: nn.Softmax(1) left out" in patch.written
    assert not patch.left


def test_a_layer_is_inserted_beside_its_neighbour_and_others_find_their_places() -> None:
    patch, _, again = mend(PLAIN, "model", LayerNorm(), SwapActivation("ReLU"), He(), DropSquashing())
    after = patch.after.decode()
    assert "    nn.Linear(4, 16),  # first\n    nn.LayerNorm((16,)),\n    nn.ReLU(),\n" in after
    assert "nn.Linear(16, 16), nn.LayerNorm((16,)), nn.ReLU(),\n" in after
    assert "model = mended(model)\noptimizer" in after
    assert [type(m).__name__ for m in again.setup.model] == ["Linear", "LayerNorm", "ReLU"] * 2 + ["Linear"]


def test_a_function_of_the_forward_becomes_another_one() -> None:
    source = (
        HEAD
        + """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = torch.sigmoid(self.a(x))  # squash
        x = self.b(x).sigmoid()
        return torch.softmax(self.c(x) + 1, dim=1)
"""
    )
    patch, _, _ = mend(source, "Net", DropSquashing(), SwapActivation("LeakyReLU"))
    after = patch.after.decode()
    assert "import torch.nn.functional as F" not in after
    assert "        x = nn.functional.leaky_relu(self.a(x))  # squash\n" in after
    assert "        x = nn.functional.leaky_relu(self.b(x))\n        return (self.c(x) + 1)\n" in after
    assert len(removed(patch)) == 3
    assert patch.name == "Net"


def test_a_missing_import_is_added_after_those_that_are_there() -> None:
    source = '''"""A net."""
from __future__ import annotations
import torch  # first
from torch.nn import Linear, Module

x, y = torch.randn(64, 4), torch.arange(64) % 3
batch = x, y

class Net(Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Linear(4, 16), Linear(16, 3)

    def forward(self, x):
        return self.b(torch.sigmoid(self.a(x)))
'''
    patch, _, _ = mend(source, "Net", SwapActivation("GELU"))
    assert "torch.nn.functional.gelu(self.a(x))" in patch.after.decode() or "F.gelu" in patch.after.decode()
    patch, _, _ = mend(source, "Net", SwapActivation("ReLU"))
    assert "self.b(torch.relu(self.a(x)))" in patch.after.decode()


LOOP = (
    HEAD
    + """
def block(width):
    return [nn.Linear(width, width), nn.Sigmoid()]

layers = [nn.Linear(4, 8), nn.Sigmoid()]
for _ in range(3):
    layers += block(8)
model = nn.Sequential(*layers, nn.Linear(8, 3))
"""
)


def test_one_line_that_makes_several_layers_is_changed_once() -> None:
    patch, _, _ = mend(LOOP, "model", SwapActivation("ReLU"))
    assert removed(patch) == [
        "return [nn.Linear(width, width), nn.Sigmoid()]",
        "layers = [nn.Linear(4, 8), nn.Sigmoid()]",
    ]


def test_a_line_of_whose_layers_only_some_change_stays() -> None:
    source = (
        HEAD
        + """
acts = [nn.Sigmoid() for _ in range(2)]
model = nn.Sequential(nn.Linear(4, 8), acts[0], nn.Linear(8, 3), acts[1])
"""
    )
    patch, _, _ = mend(source, "model", SwapActivation("ReLU"))
    assert "acts = [nn.Sigmoid() for _ in range(2)]" in patch.after.decode()
    assert any("net.py:11 makes layers of which only some change" in line for line in patch.written)


def test_a_function_that_others_use_stays_as_it_is() -> None:
    source = LOOP + "other = nn.Sequential(*block(4))\n"
    patch, _, _ = mend(source, "model", SwapActivation("ReLU"))
    assert "    return [nn.Linear(width, width), nn.Sigmoid()]" in patch.after.decode()
    assert any("is also used by net.py:18" in line for line in patch.written)


def test_a_loop_over_the_parameters_draws_as_before() -> None:
    source = PLAIN.replace("optimizer", "for p in model.parameters():\n    nn.init.normal_(p)\noptimizer", 1)
    patch, _, _ = mend(source, "model", LayerNorm())
    after = patch.after.decode()
    assert "    nn.init.normal_(p)\n\nmodel = mended(model)\noptimizer" in after
    assert not any("look it through" in line for line in patch.left)


# ---- the helper


def test_several_models_in_one_file() -> None:
    source = PLAIN + "\nother = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())\n"
    patch, _, _ = mend(source, "model", StandardizeInput(), Orthogonal())
    assert removed(patch) == []
    assert patch.after.decode().endswith("other = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())\n")


def test_a_class_gets_a_function_that_makes_mended_models() -> None:
    source = (
        HEAD
        + """
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 16), nn.Sigmoid(), nn.Linear(16, 3))
"""
    )
    patch, _, again = mend(source, "Net", StandardizeInput(), He())
    assert patch.name == "mended_net"
    assert removed(patch) == []
    assert type(again.setup.model).__name__ == "Before"


DECORATED = """
import functools, torch
from functools import partial
from torch import nn
import gradmend as gm

def twice(function):
    @functools.wraps(function)
    def inner():
        return function()
    return inner

x = torch.randn(96, 4)
batch = (x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())

# what trains
@twice
def make():
    '''A setup.'''
    net = nn.Sequential(nn.Linear(4, 16), nn.Sigmoid(), nn.Linear(16, 3))
    for layer in net[::2]:
        nn.init.normal_(layer.weight)
    loss = nn.MultiMarginLoss()
    return gm.Setup(net, loss, partial(torch.optim.SGD, lr=5.0))
"""


def test_a_decorated_function_that_returns_a_setup() -> None:
    remedies = (StandardizeInput(), He(), FitLoss(), UseOptimizer("AdamW", 0.01), ClipNorm(2.0))
    more = (UseSchedule(steps=50), Accumulate(2), BatchSize(8), WeightDecay(0.1))
    patch, wanted, again = mend(DECORATED, "make", *remedies, *more)
    after = patch.after.decode()
    assert not patch.left
    assert "        nn.init.normal_(layer.weight)\n\n    net = mended(net)\n    loss = " in after
    assert after.index("def mended") < after.index("# what trains\n@twice\ndef make")
    setup = again.setup
    assert type(setup.loss_fn) is nn.CrossEntropyLoss
    optimizer = setup.build_optimizer()
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["lr"], optimizer.defaults["weight_decay"] == (0.01, 0.1)
    assert repr(setup.gradient_transform) == repr(wanted.gradient_transform)
    assert repr(setup.schedule) == repr(wanted.schedule)
    assert (setup.accumulate, setup.batch_size) == (2, 8)


def test_a_function_that_returns_a_model_or_a_setup_of_another_function() -> None:
    source = HEAD + "def make():\n    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))\n"
    patch, _, _ = mend(source, "make", He())
    line = "    return mended(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)))\n"
    assert line in patch.after.decode()
    patch, _, again = mend(DECORATED + "\nsmall = make()\n", "small", StandardizeInput())
    assert patch.after.decode().endswith("small = make()\nsmall = mended(small)\n")
    assert rates(again.setup) == [5.0]


def test_names_that_the_file_uses_otherwise() -> None:
    source = PLAIN.replace("nn", "layers").replace("from torch import layers", "import torch.nn as layers")
    source += "\nclass Before: pass\ndef mended(): return Before()\n"
    patch, _, _ = mend(source, "model", StandardizeInput(), He(), DropSquashing())
    after = patch.after.decode()
    assert "def mended_2(model):" in after
    assert "\nclass Before(" not in after
    assert "from torch import nn" not in after


def test_the_random_numbers_after_it_stay_the_same() -> None:
    source = PLAIN + "\nlater = torch.randn(4)\n"
    mend(source, "model", Orthogonal(), SwapActivation("PReLU"))
    assert torch.equal(sys.modules["net"].later, sys.modules["again"].later)


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
    assert "learning rate 0.01: net.py makes no Adam for this model" in patch.left
    assert "gradient clipping to norm 1: net.py makes no Setup that could hold it" in patch.left
    patch, _, _ = mend(PLAIN, "model", LearningRate(0.01), DropSquashing(), optimizer="SGD:0.1")
    assert any("typed" in line for line in patch.left)


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


def test_what_has_no_code_is_left_by_hand() -> None:
    source = PLAIN + "\ndef loss_fn(output, y):\n    return -nn.functional.cross_entropy(output, y)\n"
    patch, _, _ = mend(source, "model", Descend())
    assert patch.after == patch.before
    assert patch.left == ("loss negated: by hand: loss: -loss_fn(output, y)",)


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
