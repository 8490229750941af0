"""The code of a change: it runs where there is no gradmend, and trains as the changed setup does."""

import ast
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import ill
from gradmend.errors import NoEffectWarning
from gradmend.remedies import (
    LSUV,
    REMEDIES,
    Accumulate,
    AddSkips,
    BatchNorm,
    BatchSize,
    Change,
    ClipAdaptive,
    ClipNorm,
    ClipValue,
    DepthRates,
    Descend,
    DropSquashing,
    He,
    LessDropout,
    Remedy,
    ScaleBranches,
    StandardizeInput,
    SwapActivation,
    Tailor,
    UseOptimizer,
    UseSchedule,
    anatomy_of,
)
from gradmend.remedies.code import code
from gradmend.remedies.schedule import SCHEDULES
from gradmend.setup import Batch, Setup
from gradmend.training.feed import recut
from gradmend.training.loop import Stepper, grouped
from helpers import ADAM, SGD, plain
from various import GENERAL, LOSS, Case, x, y

STEPS = 6
YOURS = "# here your own optimizer is made"
CASES: dict[str, Callable[[], Case]] = {
    **GENERAL,
    **ill.cases(),
    "AddSkips": GENERAL["cone"],
    "CalmAttention": GENERAL["attention"],
    "ScaleBranches": GENERAL["residual"],
    "DepthRates": lambda: (Setup(plain(23, nn.Tanh, width=8), LOSS, SGD), (x, y)),
}
VARIANTS: tuple[Remedy, ...] = (
    *(UseSchedule(name, STEPS) for name in SCHEDULES),
    *(ClipNorm(0.01), ClipValue(0.001), ClipAdaptive(0.001), BatchSize(24), Accumulate(2)),
    *(AddSkips(scale=0.5, learned=True), ScaleBranches(per_unit=True), Tailor("GELU"), UseOptimizer("AdamW")),
)
FIRST = ("plain", "convolutional", "functional", "residual")
"""The cases that are tried of each remedy, beside one of its own."""

TABLES = {"output": ill.OUTPUTS, "loss": ill.LOSSES, "part": ill.PARTS, "other": ill.CONFORMING}


KINDS = {type(remedy): remedy for remedy in reversed(REMEDIES)}
"""One remedy of each kind, the first."""


def names_of(remedy: Remedy) -> list[str]:
    own = type(remedy).__name__
    return [*(FIRST if remedy in KINDS.values() else FIRST[:1]), *([own] if own in CASES else [])]


PAIRS = [(r, name) for r in dict.fromkeys((*REMEDIES, *VARIANTS)) for name in names_of(r)]
OWN = [(table, name) for table, held in TABLES.items() for name in held]


# ---- training by hand, in the words of the code


@contextmanager
def no_gradmend() -> Iterator[None]:
    """Inside, gradmend cannot be imported."""
    known = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "gradmend"}
    sys.modules.update(dict.fromkeys(known))  # type: ignore[arg-type]
    try:
        with pytest.raises(ImportError):
            import gradmend  # noqa: F401
        yield
    finally:
        sys.modules.update(known)


def by_hand(text: str, setup: Setup, batches: Sequence[Batch]) -> list[float]:
    """The losses of the plain loop that everyone writes, after the code."""
    own = setup.copy()
    names: dict[str, Any] = {"model": own.model, "loss_fn": own.loss_fn}
    before, found, after = text.partition(YOURS)
    early, late = (before, f"#{after}") if found else ("", text) if speaks_of_it(text) else (text, "")
    with no_gradmend():
        exec(early, names)
        names["optimizer"] = optimizer_of(own, names["model"])
        exec(late, names)
    return losses(names, own, batches)


def speaks_of_it(text: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "optimizer" for node in ast.walk(ast.parse(text)))


def optimizer_of(setup: Setup, model: nn.Module) -> Optimizer:
    made = setup.optimizer
    if isinstance(made, Optimizer):
        return made
    assert made is not None
    return made([p for p in model.parameters() if p.requires_grad])


def losses(names: dict[str, Any], setup: Setup, batches: Sequence[Batch]) -> list[float]:
    torch.manual_seed(0)
    model, optimizer, found = names["model"], names["optimizer"], []
    given, parts = cut(batches, names.get("batch_size")), names.get("accumulate", 1)
    stream = cycle(given)
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros(())
        for batch in islice(stream, parts):
            loss = setup.step(model, batch) if setup.step else names["loss_fn"](model(*batch[:-1]), batch[-1])
            (loss / parts).backward()
            total = total + loss.detach() / parts
        optimizer.step()
        found.append(total.item())
    return found


def cut(batches: Sequence[Batch], rows: int | None) -> list[Batch]:
    if rows is None:
        return list(batches)
    return list(zip(*(torch.cat(part).split(rows) for part in zip(*batches, strict=True)), strict=True))


def by_setup(setup: Setup, batches: Sequence[Batch]) -> list[float]:
    """The losses of gradmend's own loop."""
    own = setup.copy()
    step, stream = Stepper(own), cycle(recut(batches, own.batch_size))
    torch.manual_seed(0)
    return [step(group).item() for group in islice(grouped(stream, own.accumulate), STEPS)]


def halves(batch: Batch) -> list[Batch]:
    size = len(batch[0]) // 2
    return [tuple(part[:size] for part in batch), tuple(part[size:] for part in batch)]


def quietly(remedy: Remedy, setup: Setup, batch: Batch) -> Change:
    with warnings.catch_warnings(action="ignore", category=NoEffectWarning):
        return remedy.apply(setup, batch)


def assert_same_curve(setup: Setup, changes: Sequence[Change], batch: Batch) -> None:
    wanted = by_setup(changes[-1].setup, halves(batch))
    found = by_hand(code(changes), setup, halves(batch))
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)  # torch's fused optimizers round otherwise


# ---- each remedy


@pytest.mark.parametrize(("remedy", "name"), PAIRS, ids=[f"{remedy!r}-{name}" for remedy, name in PAIRS])
def test_the_code_trains_as_the_setup_does(remedy: Remedy, name: str) -> None:
    torch.manual_seed(0)
    setup, batch = CASES[name]()
    made = quietly(remedy, setup, batch)
    if made.edits:
        assert_same_curve(setup, [made], batch)


@pytest.mark.parametrize(("table", "name"), OWN)
def test_the_code_against_each_fault_trains_as_the_setup_does(table: str, name: str) -> None:
    make, batch, remedy, _ = TABLES[table][name]
    setup = make()
    made = quietly(remedy, setup, batch)
    assert made.edits
    assert_same_curve(setup, [made], batch)


def test_every_remedy_has_something_to_do_somewhere() -> None:
    """The tests above pass over what has nothing to do."""
    silent = []
    for kind, remedy in KINDS.items():
        torch.manual_seed(0)
        changes = (quietly(remedy, *CASES[name]()).edits for name in reversed(names_of(remedy)))
        silent += [] if any(changes) else [kind.__name__]
    assert not silent


# ---- several


PLANS: dict[str, tuple[str, tuple[Remedy, ...]]] = {
    "clipping before the optimizer": ("plain", (He(), ClipNorm(0.01), UseOptimizer("Adam", lr=0.01))),
    "layers and their optimizer": ("plain", (BatchNorm(), He(), ClipValue(0.001), UseSchedule(steps=6))),
    "deep": (
        "DepthRates",
        (StandardizeInput(), Tailor(), UseOptimizer("Adam"), DepthRates(), UseSchedule("linear", 6)),
    ),
    "a forward rewritten twice": ("functional", (SwapActivation("ReLU"), SwapActivation("GELU"), LSUV())),
}


@pytest.mark.parametrize("plan", PLANS)
def test_the_code_of_several_changes_trains_as_the_setup_does(plan: str) -> None:
    name, remedies = PLANS[plan]
    torch.manual_seed(0)
    setup, batch = CASES[name]()
    changes, last = [], setup
    for remedy in remedies:
        changes.append(remedy.apply(last, batch))
        last = changes[-1].setup
    assert_same_curve(setup, changes, batch)


def test_each_change_works_on_the_loss_of_the_one_before() -> None:
    setup = ill.LOSSES["uphill"][0]()
    turned, batch = Descend().apply(setup, (ill.X, ill.Y)), (ill.X, ill.Y)
    there_and_back = by_hand(code([turned, turned]), setup, halves(batch))
    assert there_and_back == pytest.approx(by_setup(setup, halves(batch)), rel=1e-4)


class Twice(nn.Module):
    """Two parts, each with a dropout of its own kind in its forward."""

    class Part(nn.Module):
        def __init__(self, width: int, share: float) -> None:
            super().__init__()
            self.layer, self.share = nn.Linear(8, width), share

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.sigmoid(self.layer(x))
            return nn.functional.dropout(hidden, self.share, self.training)

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = self.Part(8, 0.5), self.Part(8, 0.9), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(x)))


def test_each_rewritten_forward_keeps_its_own_two_modes() -> None:
    setup = Setup(Twice(), LOSS, ADAM)
    assert_same_curve(setup, [SwapActivation("ReLU").apply(setup, (x, y))], (x, y))


def test_nothing_is_written_of_no_changes() -> None:
    assert code([]) == ""


def test_the_code_says_where_the_optimizer_is_made() -> None:
    setup = Setup(plain(2, nn.ReLU), LOSS, SGD)
    he = He().apply(setup, (x, y))
    text = code([ClipNorm().apply(he.setup, (x, y)), he])
    assert text.index("set_weight(model") < text.index(YOURS) < text.index("optimizer.register_step_pre_hook")
    assert YOURS not in code([he])


# ---- lines


class Shares(ill.Body):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.body(x)
        return torch.softmax(scores, 1)


def test_lines_stay_the_users_when_a_forward_is_rewritten() -> None:
    setup = Setup(ill.Dropping(), LOSS, ADAM)
    lines = [site.line for site in anatomy_of(setup, (x, y)).sites]
    once = LessDropout().apply(setup, (x, y)).setup
    again = SwapActivation("GELU").apply(once, (x, y)).setup
    for changed in (once, again, again.copy()):
        assert [site.line for site in anatomy_of(changed, (x, y)).sites] == lines
    squashed = Setup(Shares(), LOSS, SGD)
    lines = [site.line for site in anatomy_of(squashed, (x, y)).sites]
    raw = DropSquashing().apply(squashed, (x, y)).setup
    assert [site.line for site in anatomy_of(raw, (x, y)).sites] == lines[:-1]
    setup = Setup(Twice(), LOSS, ADAM)
    lines = [site.line for site in anatomy_of(setup, (x, y)).sites]
    swapped = SwapActivation("ReLU").apply(setup, (x, y)).setup
    assert [site.line for site in anatomy_of(swapped, (x, y)).sites] == lines
    assert all(str(Path(__file__).name) in str(line) for line in lines)


def test_an_error_in_a_rewritten_forward_names_the_users_line() -> None:
    model = DropSquashing().apply(Setup(ill.Softmax(), LOSS, SGD), (x, y)).setup.model
    with pytest.raises(RuntimeError) as caught:
        model(x[:, :3])
    lines = [(entry.path.name, entry.lineno + 1) for entry in caught.traceback]
    own = ill.Softmax.forward.__code__
    assert ("ill.py", own.co_firstlineno + 1) in lines


# ---- in a process of its own

CHILD = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gradmend":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch
torch.set_num_threads(1)
found = []
for model, loss_fn, kind, options, early, late, batch in torch.load("given.pt", weights_only=False):
    names = {"model": model, "loss_fn": loss_fn}
    exec(early, names)
    wanted = [p for p in names["model"].parameters() if p.requires_grad]
    names["optimizer"] = getattr(torch.optim, kind)(wanted, **options)
    exec(late, names)
    torch.manual_seed(0)
    losses = []
    for _ in range(3):
        names["optimizer"].zero_grad()
        loss = names["loss_fn"](names["model"](batch[0]), batch[1])
        loss.backward()
        names["optimizer"].step()
        losses.append(loss.item())
    found.append(losses)
assert not any(name.partition(".")[0] == "gradmend" for name in sys.modules)
torch.save(found, "found.pt")
"""


def torchs_own(setup: Setup) -> bool:
    """Whether a setup is made of nothing but torch, so that another process can read it."""
    held = (*setup.model.modules(), setup.loss_fn)
    return isinstance(setup.optimizer, partial) and all(type(m).__module__.startswith("torch.") for m in held)


def test_a_process_without_gradmend(tmp_path: Path) -> None:
    given, wanted = [], []
    for kind, remedy in KINDS.items():
        torch.manual_seed(0)
        setup, batch = CASES[kind.__name__ if kind.__name__ in CASES else "plain"]()
        made = quietly(remedy, setup, batch)
        if not made.edits or not torchs_own(setup) or kind in (Accumulate, BatchSize):
            continue
        text, factory = code([made]), setup.optimizer
        assert isinstance(factory, partial)
        parts = ("", text) if speaks_of_it(text) else (text, "")
        given.append((setup.model, setup.loss_fn, factory.func.__name__, factory.keywords, *parts, batch))
        step = Stepper(made.setup.copy())
        torch.manual_seed(0)
        wanted.append([step([batch]).item() for _ in range(3)])
    torch.save(given, tmp_path / "given.pt")
    subprocess.run([sys.executable, "-c", dedent(CHILD)], cwd=tmp_path, check=True)
    found = torch.load(tmp_path / "found.pt")
    assert len(given) > 30
    for losses_found, losses_wanted in zip(found, wanted, strict=True):
        assert losses_found == pytest.approx(losses_wanted, rel=1e-4, abs=1e-6)
