"""A watch finds what goes wrong in a running training, where and when, and tells its journal."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmend.causes import Cause
from gradmend.errors import SetupError
from gradmend.journal import Journal
from gradmend.watch import Notice, Watch
from helpers import Book

EVERY = 10
FAULT = 61


def network() -> nn.Sequential:
    """Six layers with He's weights: healthy."""
    widths = [(20, 64), *[(64, 64)] * 4]
    model = nn.Sequential(*[m for a, b in widths for m in (nn.Linear(a, b), nn.ReLU())], nn.Linear(64, 5))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return model


Fault = Callable[[nn.Sequential, torch.optim.Optimizer, Tensor], object]


def train(
    model: nn.Module, watch: Watch, optimizer: torch.optim.Optimizer, fault: Fault, steps: int = 100
) -> None:
    directions = torch.randn(20, 5)
    with watch:
        for step in range(1, steps + 1):
            x = torch.randn(64, 20)
            y = (x @ directions).argmax(1)
            if step == FAULT:
                fault(model, optimizer, x)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def faster(_model: nn.Module, optimizer: torch.optim.Optimizer, _x: Tensor) -> None:
    optimizer.param_groups[0]["lr"] *= 100


def forget(model: nn.Module, _optimizer: object, _x: Tensor) -> None:
    nn.init.zeros_(model[4].weight)


def spoil(_model: nn.Module, _optimizer: object, x: Tensor) -> None:
    x[3, 4] = torch.nan


def overflow(model: nn.Module, _optimizer: object, _x: Tensor) -> None:
    with torch.no_grad():
        model[4].weight.mul_(1e38)


def kill(model: nn.Module, _optimizer: object, _x: Tensor) -> None:
    nn.init.constant_(model[4].bias, -1000.0)


FAULTS = [
    (faster, 1, Cause.LEARNING_RATE_TOO_HIGH, ()),
    (spoil, 0, Cause.NON_FINITE, ()),
    (overflow, 0, Cause.NON_FINITE, ("4",)),
    (forget, 0, Cause.WEIGHTS_TOO_SMALL, ("4",)),
    (kill, 2 * EVERY, Cause.DEAD_UNITS, ("5",)),
]


@pytest.mark.parametrize(
    ("fault", "delay", "cause", "sites"), FAULTS, ids=lambda x: getattr(x, "__name__", "")
)
def test_a_fault_is_found_soon_with_its_cause_and_site(
    fault: Fault, delay: int, cause: Cause, sites: tuple[str, ...]
) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    notices: list[Notice] = []
    train(model, Watch(model, optimizer, every=EVERY, report=notices.append), optimizer, fault)
    first = notices[0]
    assert first.finding.cause is cause
    assert FAULT <= first.began <= FAULT + delay
    assert first.finding.sites[: len(sites)] == sites
    assert first.finding.where == ()  # no line of this file is within the model


def test_weights_that_are_set_to_zero_are_found_before_training_has_filled_them_up() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    notices: list[Notice] = []
    train(model, Watch(model, optimizer, report=notices.append), optimizer, forget, steps=150)
    assert [(n.finding.cause, n.began, n.finding.sites) for n in notices[:1]] == [
        (Cause.WEIGHTS_TOO_SMALL, FAULT, ("4",))
    ]
    assert len(notices) == 2
    assert notices[1].ended == FAULT + 50
    assert model[4].weight.detach().square().mean().sqrt() > 0.01


def test_weights_that_stay_zero_are_a_finding_that_lasts() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    notices: list[Notice] = []
    train(model, Watch(model, optimizer, report=notices.append), optimizer, forget, steps=300)
    assert [(n.finding.cause, n.began, n.ended) for n in notices[:1]] == [
        (Cause.WEIGHTS_TOO_SMALL, FAULT, None)
    ]
    assert all(n.finding.cause is not Cause.WEIGHTS_TOO_SMALL for n in notices[1:])


@pytest.mark.parametrize(
    ("every", "looks"),
    [pytest.param(1, [], id="always, as an optimizer does"), pytest.param(2, [54, 154], id="now and then")],
)
def test_weights_that_somebody_else_writes_are_looked_at_more_and_more_seldom(
    every: int, looks: list[int]
) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    book = Book()
    with Watch(model, optimizer, journal=book, budget=1e-9) as watch:
        for step in range(200):
            x = torch.randn(16, 20)
            optimizer.zero_grad()
            F.cross_entropy(model(x), x.argmax(1) % 5).backward()
            optimizer.step()
            if step % every == 0:
                with torch.no_grad():
                    for p in model.parameters():
                        p.clamp_(-0.5, 0.5)
    assert watch.findings == ()
    found = [step for step, values in book.of("reading") if values["table"] == "weights"]
    assert [step for step in found if step > 10] == looks


def test_a_finding_is_reported_once_and_again_when_it_has_passed() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    notices: list[Notice] = []
    watch = Watch(model, optimizer, report=notices.append)
    with watch:
        for step in range(1, 9):
            x = torch.randn(64, 20) if step not in (3, 4, 5) else torch.full((64, 20), torch.inf)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            for p in model.parameters():
                p.grad.nan_to_num_()
            optimizer.step()
    assert [(n.began, n.ended) for n in notices] == [(3, None), (3, 6)]
    assert [(n.began, n.ended) for n in watch.findings] == [(3, 6)]


def test_a_loss_that_climbs_is_a_divergence_until_it_is_down_again() -> None:
    weight = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.0)
    notices: list[Notice] = []
    heights = [2.0] * 20 + [2 * 1.2**i for i in range(30)] + [400.0] * 80 + [1.0] * 5
    with Watch(weight, optimizer, report=notices.append):
        for height in heights:
            optimizer.zero_grad()
            (weight(torch.ones(64, 1)).mean() * 0 + height).backward()
            optimizer.step()
    assert [(n.finding.cause, n.ended) for n in notices if n.finding.cause is Cause.DIVERGENCE] == [
        (Cause.DIVERGENCE, None),
        (Cause.DIVERGENCE, 131),
    ]


def test_a_sick_network_is_named_at_its_first_step() -> None:
    model = nn.Sequential(
        *[m for _ in range(20) for m in (nn.Linear(20, 20), nn.Sigmoid())], nn.Linear(20, 5)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    notices: list[Notice] = []
    train(model, Watch(model, optimizer, report=notices.append), optimizer, faster, steps=2)
    assert {n.finding.cause for n in notices} >= {Cause.VANISHING_GRADIENT, Cause.CONTRACTING_ACTIVATION}
    assert {n.began for n in notices} == {1}


def test_what_is_read_is_what_plain_autograd_gives() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    book, kept = Book(), {}
    watch = Watch(model, optimizer, every=1, journal=book, report=print)

    def keep(module: nn.Module, _given: object, output: Tensor) -> None:
        output.retain_grad()
        kept[module] = output

    hooks = [m.register_forward_hook(keep) for m in model if isinstance(m, nn.ReLU)]
    x, y = torch.randn(64, 20), torch.randint(5, (64,))
    expected, losses = [], []
    with watch:
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            outputs = [kept[m] for m in model if isinstance(m, nn.ReLU)]
            rms = [o.square().mean().sqrt().item() for o in outputs]
            slopes = [o.grad.square().mean().sqrt().item() for o in outputs]
            expected.append([*zip(rms, slopes, strict=True)])
    for hook in hooks:
        hook.remove()
    layers = [(step, row) for step, row in book.of("reading") if row["table"] == "layers"]
    assert [step for step, _ in layers] == [2, 3, 4]
    for step, row in layers:
        assert row["rows"] == ("1", "3", "5", "7", "9", "10")
        np.testing.assert_allclose(row["values"][:5], expected[step - 1], rtol=1e-5)
    assert [row["loss"] for _, row in book.of("step")] == pytest.approx(losses)
    assert {row["rate"] for _, row in book.of("step")} == {0.02}


class Transposed(nn.Module):
    """A layer that is not torch's: GPT-2's `Conv1D`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(20, 16) / 4), nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Residual(nn.Module):
    """A block that adds what its own function makes; its parts are layers, it is none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gain = nn.Linear(16, 16), nn.Parameter(torch.ones(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) @ self.gain


def test_layers_that_are_not_torchs_are_seen_as_well() -> None:
    model = nn.Sequential(Transposed(), Residual(), nn.Linear(16, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    book, outputs = Book(), []
    model[0].register_forward_hook(lambda *given: outputs.append(given[-1].square().mean().sqrt().item()))
    train(model, Watch(model, optimizer, every=1, journal=book, report=print), optimizer, spoil, steps=2)
    (row,) = (row for _, row in book.of("reading") if row["table"] == "layers")
    assert row["rows"] == ("0", "1.inner", "2")
    assert row["values"][0, 0] == pytest.approx(outputs[1], rel=1e-5)


def test_parameters_are_read_as_the_optimizer_gets_and_leaves_them() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    book = Book()
    x, y = torch.randn(64, 8), torch.randint(5, (64,))
    seen: dict[int, dict[str, tuple[float, ...]]] = {}
    with Watch(model, optimizer, journal=book, report=print):
        for step in range(1, 41):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer.step()
            seen[step] = {
                name: tuple(
                    t.square().mean().sqrt().item() for t in (before[name], p.detach() - before[name], p.grad)
                )
                for name, p in model.named_parameters()
            }
    tables = {row["table"]: (step, row) for step, row in book.of("reading")}
    step, row = tables["weights"]
    np.testing.assert_allclose(row["values"], [seen[step][n][:2] for n in row["rows"]], rtol=1e-4)
    step, row = tables["gradients"]
    np.testing.assert_allclose(row["values"][:, 0], [seen[step][n][2] for n in row["rows"]], rtol=1e-5)
    norm = next(values["gradient"] for at, values in book.of("step") if at == step)
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_losses_of_accumulation_and_scaling_are_those_before() -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    book = Book()
    x = torch.randn(8, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Watch(model, optimizer, journal=book, report=print):
        for _ in range(2):
            optimizer.zero_grad()
            for half in x.chunk(2):
                scaler.scale(model(half).square().mean() / 2).backward()
            scaler.step(optimizer)
            scaler.update()
    whole = model(x).square().mean().item()
    assert [values["loss"] for _, values in book.of("step")] == pytest.approx([whole, whole])


def test_losses_go_to_the_optimizer_that_steps_next() -> None:
    """As in adversarial training: two models, two optimizers, steps by turns."""
    models = [nn.Linear(4, 1), nn.Linear(4, 1)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models]
    books = [Book(), Book()]
    watches = [
        Watch(m, o, journal=b, report=print).attach()
        for m, o, b in zip(models, optimizers, books, strict=True)
    ]
    losses: list[list[float]] = [[], []]
    for _ in range(3):
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss = (model(torch.randn(8, 4)) - i).square().mean()
            loss.backward()
            optimizer.step()
            losses[i].append(loss.item())
    for watch in watches:
        watch.detach()
    assert [[row["loss"] for _, row in book.of("step")] for book in books] == [
        pytest.approx(found) for found in losses
    ]


@pytest.mark.parametrize(
    ("every", "steps"),
    [(5, [5, 10, 15]), ("log", [2, 4, 8, 16]), (lambda step: step == 7, [7])],
    ids=["number", "log", "function"],
)
def test_layers_are_looked_at_when_asked_for(every: Any, steps: list[int]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    book = Book()
    train(model, Watch(model, optimizer, every=every, journal=book), optimizer, faster, steps=16)
    assert [step for step, row in book.of("reading") if row["table"] == "layers"] == steps


def test_every_step_and_every_finding_is_written_once() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    book = Book()
    train(model, Watch(model, optimizer, every=EVERY, journal=book, report=print), optimizer, kill)
    assert Counter(step for step, _ in book.of("step")) == Counter(range(1, 101))
    begun = [values["id"] for _, values in book.of("finding") if values["ended"] is None]
    assert len(begun) == len(set(begun)) > 0


def test_a_journal_may_be_a_path(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    watch = Watch(model, optimizer, every=5, journal=tmp_path / "run.gradmend", report=print)
    train(model, watch, optimizer, kill)
    journal = Journal(tmp_path / "run.gradmend")
    (run,) = journal.runs()
    (steps,) = journal.steps(run["id"]).values()
    assert len(steps["step"]) == 100
    assert {reading.table for reading in journal.readings(run["id"])} >= {"layers", "sites", "weights"}
    found = [(finding["cause"], finding["began"]) for finding in journal.findings(run["id"])]
    assert found == [(notice.finding.cause.value, notice.began) for notice in watch.findings]


def test_by_default_findings_are_printed_in_full_on_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    train(model, Watch(model, optimizer, every=EVERY), optimizer, faster, steps=FAULT + 1)
    printed = capsys.readouterr()
    words = " ".join(printed.err.split())
    assert (
        f"gradmend, step {FAULT + 1} error learning rate too high At step {FAULT} the learning rate" in words
    )
    assert f"by step {FAULT + 1}." in words
    assert printed.out == ""


@pytest.mark.parametrize("wrong", [{"every": 0}, {"every": "now"}, {"budget": 0.0}])
def test_what_is_not_possible_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SetupError):
        Watch(nn.Linear(1, 1), **wrong)
