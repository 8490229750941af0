"""Code: changes as Python that does the same without gradmend."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from itertools import groupby

from gradmend.layers import definitions
from gradmend.remedies.base import SEED, Change
from gradmend.surgery import Edit

_DRAWS = re.compile(r"\b(set_weight|gated)\(|\bnn\.(Linear|Conv|GRU|LSTM|RNN)\w*\(|orthogonal")
_MADE = re.compile(r"^optimizer = ", re.M)
_WORD = re.compile(r"[\w.]+")
_YOURS = "# here your own optimizer is made: optimizer = ...(model.parameters(), ...)"


def code(changes: Sequence[Change]) -> str:
    """Changes as Python that needs nothing but torch; "" without changes.

    It works on the variables `model`, `loss_fn` and `optimizer`, as far as they change: on the model first,
    then, once an optimizer is made of its parameters, on that, and last come the hooks that run with each of
    its steps. `accumulate` and `batch_size` are for the loop.

    >>> from functools import partial
    >>> from torch import nn, optim, randn, zeros
    >>> from gradmend.remedies import ClipValue
    >>> from gradmend.setup import Setup
    >>> setup = Setup(nn.Linear(2, 1), nn.MSELoss(), partial(optim.SGD, lr=0.1))
    >>> print(code([ClipValue(0.5).apply(setup, (randn(4, 2), zeros(4, 1)))]).split("#")[1].strip())
    gradient clipping to values within 0.5
    def clip(*_):
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.5)
    <BLANKLINE>
    optimizer.register_step_pre_hook(clip)
    """
    parts = [_part(changes, stage) for stage in range(3)]
    if parts[0] and (parts[1] or parts[2]) and not _MADE.search(parts[1]):
        parts.insert(1, _YOURS)
    text = "\n\n".join(part for part in parts if part)
    return f"{definitions(text)}\n{text}\n" if text else ""


def _part(changes: Sequence[Change], stage: int) -> str:
    """The code of all changes for one stage."""
    held = [(change, [edit for edit in change.edits if _stage(edit) == stage]) for change in changes]
    texts = [f"# {change.text}\n{_seeded(_loops(edits))}" for change, edits in held if edits]
    return "\n\n".join(texts)


def _stage(edit: Edit) -> int:
    """0 for what changes the model or the loss, 1 for the optimizer, 2 for its hooks."""
    if "optimizer.register_step_" in edit.code:
        return 2
    return int(bool(re.search(r"^[^#\n]*\boptimizer\b", edit.code, re.M)))


def _seeded(text: str) -> str:
    """Weights are drawn as they were when the remedy was applied."""
    return f"torch.manual_seed({SEED})\n{text}" if _DRAWS.search(text) else text


def _loops(edits: Sequence[Edit]) -> str:
    """The code of the edits; runs of places at which the same is done become one loop."""
    places = [(where, "\n".join(edit.code for edit in at)) for where, at in groupby(edits, lambda e: e.where)]
    parts = []
    for template, run in groupby(places, lambda place: _template(*place)):
        held = list(run)
        names = textwrap.fill(" ".join(where for where, _ in held), 88, break_long_words=False)
        loop = f'for name in """\\\n{names}\n""".split():\n{textwrap.indent(template, "    ")}'
        looped = len(held) > 1 and all(_WORD.fullmatch(where) for where, _ in held)
        parts += [loop] if looped else [text for _, text in held]
    return "\n".join(parts)


def _template(where: str, text: str) -> str:
    return text.replace(f'"{where}"', "name") if where else text
