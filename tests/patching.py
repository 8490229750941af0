"""What the tests of patches share: files to patch, treatments without a search, and the applied patch."""

import re
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch
from torch import nn

from gradmend.diagnosis import Diagnosis, diagnose
from gradmend.errors import NoEffectWarning
from gradmend.patch import Patch, patched
from gradmend.patch.proof import gives, same_model
from gradmend.remedies import Change, Remedy
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


def treated(found: Target, remedies: Sequence[Remedy], some: bool = False) -> Treatment:
    """A treatment by given remedies, without a search; all of them must do something, or some."""
    setup, changes, batches = found.setup, list[Change](), found.batches(4)
    for remedy in remedies:
        with warnings.catch_warnings(action="ignore", category=NoEffectWarning):
            change = remedy.apply(setup, batches)
        assert change.edits or some, remedy
        changes += [change] if change.edits else []
        setup = change.setup
    return Treatment(setup, tuple(changes), some_diagnosis(), some_diagnosis(), ())


@cache
def some_diagnosis() -> Diagnosis:
    """What a treatment has to hold, and a patch does not look at."""
    return diagnose(Setup(nn.Linear(4, 3), nn.CrossEntropyLoss()), (torch.randn(16, 4), torch.arange(16) % 3))


def mend(
    source: str | bytes, name: str, *remedies: Remedy, some: bool = False, same: bool = True, **wishes: Any
) -> tuple[Patch, Setup, Target]:
    """The patch of a file, applied to a copy: the patch, the mended setup, and what the copy gives.

    Args:
        some: of the remedies are enough to do something.
        same: the patched file must give the mended model.
        wishes: typed.
    """
    data = source if isinstance(source, bytes) else dedent(source).encode()
    Path("net.py").write_bytes(data)
    found = find(f"net.py:{name}", Wishes(**wishes))
    treatment, batch = treated(found, remedies, some), found.batches(1)[0]
    typed = [part for part in ("loss", "optimizer") if part in wishes]

    def check(after: bytes, name: str) -> bool:
        return gives(after, "net.py", name, treatment.setup, batch)

    patch = patched(data, "net.py", name, found.setup, treatment, typed, check)
    Path("again.py").write_bytes(applied(data, patch.diff()))
    assert Path("again.py").read_bytes() == patch.after
    assert Path("net.py").read_bytes() == data
    again = find(f"again.py:{patch.name}", Wishes(**wishes))
    assert same_model(again.setup.model, treatment.setup, batch) or not same
    return patch, treatment.setup, again


def applied(data: bytes, diff: bytes) -> bytes:
    """What `patch` would make of a file."""
    old, new, at = re.findall(rb"[^\n]*\n|[^\n]+", data), list[bytes](), 0
    for line in diff.replace(b"\n\\ No newline at end of file\n", b"\x00\n").split(b"\n")[2:-1]:
        if hunk := re.match(rb"@@ -(\d+)(?:,(\d+))? ", line):
            start = int(hunk[1]) - (hunk[2] != b"0")
            new += old[at:start]
            at = start
            continue
        text = line[1:-1] if line.endswith(b"\x00") else line[1:] + b"\n"
        if line[:1] in (b" ", b"-"):
            assert old[at] == text
            at += 1
        if line[:1] in (b" ", b"+"):
            new.append(text)
    return b"".join(new + old[at:])


def removed(patch: Patch) -> list[str]:
    """The lines that are gone or changed."""
    lines = patch.diff().decode().splitlines()[2:]
    return [line[1:].strip() for line in lines if line.startswith("-")]


def rates(setup: Setup) -> list[float]:
    return [group["lr"] for group in setup.build_optimizer().param_groups]
