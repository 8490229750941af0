"""Whatever happens in a training, a watch makes it no worse; an error of its own ends only itself."""

import gc
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import DataLoader, TensorDataset

from gradmend.watch import Notice, Watch, events
from gradmend.watch.exam import CarefulRecorder


def quiet(_notice: Notice) -> None:
    """What is found does not matter here."""


class Moody(nn.Module):
    """Raises when told to, in the midst of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.mood: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        if self.mood is not None:
            raise self.mood
        return self.last(h)


def take(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor | None = None) -> float:
    optimizer.zero_grad()
    x = torch.randn(16, 8) if x is None else x
    loss = F.cross_entropy(model(x), torch.arange(len(x)) % 3)
    loss.backward()
    optimizer.step()
    return loss.item()


def moody() -> tuple[Moody, torch.optim.Optimizer]:
    model = Moody()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def clean() -> bool:
    hooks = torch.nn.modules.module
    return not (
        _get_current_function_mode_stack()
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hasattr(torch.autograd.backward, "__wrapped__")
    )


@pytest.mark.parametrize("options", [{}, {"every": 1}], ids=["full look", "layers"])
@pytest.mark.parametrize("mood", [ValueError("no"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_forward_that_raises(mood: BaseException, options: dict[str, Any]) -> None:
    model, optimizer = moody()
    with Watch(model, optimizer, report=quiet, **options) as watch:
        if options:
            take(model, optimizer)
        model.mood = mood
        with pytest.raises(type(mood)) as caught:
            take(model, optimizer)
        assert caught.value is mood
        model.mood = None
        for _ in range(3):
            take(model, optimizer)
        assert watch.step == (4 if options else 3)
    assert clean()


def test_the_line_of_a_lost_number_is_within_the_model() -> None:
    model, optimizer = moody()
    notices: list[Notice] = []
    with Watch(model, optimizer, report=notices.append):
        take(model, optimizer)
        with torch.no_grad():
            model.first.weight.fill_(1e38)
        take(model, optimizer)
    code = Moody.forward.__code__
    lines = range(code.co_firstlineno, code.co_firstlineno + 6)
    assert notices[0].finding.where[0] in [f"{code.co_filename}:{line}" for line in lines]


def test_ctrl_c_that_leaves_the_watch_as_well() -> None:
    model, optimizer = moody()
    model.mood = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), Watch(model, optimizer, report=quiet):
        take(model, optimizer)
    assert clean()


def test_another_model_takes_over() -> None:
    model, optimizer = moody()
    with Watch(model, optimizer, every=1, report=quiet) as watch:
        for _ in range(3):
            take(model, optimizer)
        model, optimizer = moody()
        for _ in range(3):
            take(model, optimizer)
        assert watch.step == 3
    assert clean()


def test_a_layer_is_replaced_by_another() -> None:
    model, optimizer = moody()
    with Watch(model, None, budget=50.0, report=quiet) as watch:
        for _ in range(5):
            take(model, optimizer)
        model.first = nn.Linear(8, 16)
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(60):
            take(model, optimizer)
        assert watch._session.on


def test_workers_of_a_loader_are_forked_while_it_watches() -> None:
    model, optimizer = moody()
    data = TensorDataset(torch.randn(64, 8))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
        loader = DataLoader(data, 16, num_workers=2, multiprocessing_context="fork")
        with Watch(model, optimizer, every=1, report=quiet) as watch:
            for (x,) in loader:
                take(model, optimizer, x)
    assert watch.step == 4


def test_a_child_made_by_fork_is_not_watched() -> None:
    model, optimizer = moody()
    with Watch(model, optimizer, every=1, report=quiet) as watch:
        take(model, optimizer)
        child = os.fork()
        if child == 0:
            take(model, optimizer)
            os._exit(0 if watch.step == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        take(model, optimizer)
        assert watch.step == 2


class Broken:
    """A journal on a full disk."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        raise OSError("No space left on device")


def test_a_journal_that_fails_is_named_once_and_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = moody()
    with Watch(model, optimizer, every=1, journal=Broken(), report=quiet) as watch:
        for _ in range(4):
            take(model, optimizer)
    printed = capsys.readouterr()
    assert printed.err.count("No space left on device") == 1
    assert printed.out == ""
    assert watch.step == 4
    assert watch.loss is not None


def test_a_journal_that_cannot_be_opened_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("no journal")
    model, optimizer = moody()
    with Watch(model, optimizer, journal=tmp_path / "run", report=quiet) as watch:
        take(model, optimizer)
    assert watch.step == 1
    assert "journal" in capsys.readouterr().err


def test_an_error_inside_ends_the_watch_and_not_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    def choose(step: int) -> bool:
        raise RuntimeError(f"cannot choose step {step}")

    model, optimizer = moody()
    with Watch(model, optimizer, every=choose, report=quiet) as watch:
        for _ in range(4):
            take(model, optimizer)
    assert "cannot choose step 2" in capsys.readouterr().err
    assert watch.step == 1
    assert clean()


def test_a_report_that_raises_ends_the_watch_and_not_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    def report(notice: Notice) -> None:
        raise RuntimeError("nobody to tell")

    model, optimizer = moody()
    with Watch(model, optimizer, report=report):
        for _ in range(4):
            take(model, optimizer, torch.full((16, 8), torch.nan))
    assert capsys.readouterr().err.count("nobody to tell") == 1
    assert clean()


@pytest.mark.parametrize("early", [True, False], ids=["before the function", "after it"])
def test_an_error_of_the_recorder_leaves_the_forward_pass_alone(early: bool) -> None:
    failed: list[Exception] = []

    def fail(*_: object) -> None:
        raise RuntimeError("the recorder is at its end")

    def guard(function: Callable[..., None]) -> Callable[..., None]:
        def guarded(*args: object) -> None:
            try:
                function(*args)
            except RuntimeError as error:
                failed.append(error)

        return guarded

    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(8, 3))
    x = torch.randn(16, 8)
    torch.manual_seed(3)
    expected = model(x)
    recorder = CarefulRecorder(model, fail if early else None, None if early else fail, guard)
    torch.manual_seed(3)
    with recorder.watching(x):
        found = model(x)
    assert torch.equal(found, expected)
    assert [str(error) for error in failed] == ["the recorder is at its end"]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_model_full_of_hooks() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    calls: list[str] = []
    for layer in model:
        layer.register_full_backward_hook(lambda *_: calls.append("backward"))
        layer.register_forward_pre_hook(lambda _, args: (args[0] * 1.0,))
        layer.register_forward_hook(lambda *given: given[-1] * 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, optimizer, every=1, report=quiet) as watch:
        for _ in range(3):
            take(model, optimizer)
        assert watch._session.on
    assert calls == ["backward"] * 9


def test_another_tool_wraps_backward_and_stays() -> None:
    model, optimizer = moody()
    original, calls = torch.autograd.backward, []
    watch = Watch(model, optimizer, report=quiet).attach()
    ours = torch.autograd.backward

    def theirs(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        ours(*args, **kwargs)

    torch.autograd.backward = theirs
    try:
        take(model, optimizer)
        watch.detach()
        assert torch.autograd.backward is theirs
        take(model, optimizer)
    finally:
        torch.autograd.backward = original
    assert len(calls) == 2


def test_a_validation_between_the_steps_is_not_looked_at() -> None:
    model, optimizer = moody()
    with Watch(model, optimizer, every=1, report=quiet) as watch:
        for _ in range(3):
            model.eval()
            with torch.no_grad():
                model(torch.full((4, 8), 1e6))
            model.train()
            take(model, optimizer)
        table = watch._session.stream.latest("layers")
    assert table is not None
    assert (table.column("rms") < 100).all()


def test_a_compiled_model_is_watched_from_outside(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        compiled = torch.compile(model, backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watch = Watch(compiled, optimizer, report=quiet)
        if watched:
            watch.attach()
        results.append([take(compiled, optimizer) for _ in range(40)])
        watch.detach()
    assert results[0] == results[1]
    assert "compiled" in capsys.readouterr().err
    assert watch.loss == results[1][-1]
    gradients = watch._session.stream.latest("gradients")
    assert gradients is not None
    assert (gradients.column("gradient") > 0).all()


def test_a_watch_goes_on_where_it_was() -> None:
    model, optimizer = moody()
    watch = Watch(model, optimizer, every=1, report=quiet)
    for _ in range(2):
        with watch:
            take(model, optimizer)
        take(model, optimizer)
    assert watch.step == 2
    assert clean()


def test_an_optimizer_that_calls_back() -> None:
    model, _ = moody()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    x = torch.randn(16, 8)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(16) % 3)
        loss.backward()
        return loss

    with Watch(model, optimizer, every=1, report=quiet) as watch:
        for _ in range(5):
            optimizer.step(closure)
        assert watch.step == 5
        assert watch._session.on


def test_gradients_are_those_that_hooks_of_the_optimizer_leave() -> None:
    """Torch calls the hooks for all optimizers first, and then its own, which may clip."""
    model, optimizer = moody()
    clip = nn.utils.clip_grad_norm_
    optimizer.register_step_pre_hook(lambda *_: clip(model.parameters(), 1e-3) and None)
    hooks = len(optimizer._optimizer_step_pre_hooks)
    with Watch(model, optimizer, every=1, report=quiet) as watch:
        for _ in range(8):
            take(model, optimizer)
            assert len(optimizer._optimizer_step_pre_hooks) == hooks
        table = watch._session.stream.latest("gradients")
    assert table is not None
    sizes = np.sqrt(np.array([p.numel() for p in model.parameters()], np.float32))
    assert table.norm("gradient", sizes) == pytest.approx(1e-3, rel=0.01)


def test_from_now_on_there_is_no_hook_on_modules() -> None:
    model, optimizer = moody()
    with Watch(model, optimizer, every=1, report=quiet) as watch:
        for step in range(6):
            if step == 3:
                watch.leave_modules()
            take(model, optimizer)
            assert bool(torch_module._global_forward_pre_hooks) == (step < 3)
        layers, gradients = (watch._session.stream.latest(name) for name in ("layers", "gradients"))
    assert layers is not None
    assert layers.step == 3
    assert gradients is not None
    assert watch.step == 6


def test_no_hook_goes_while_the_garbage_is_collected() -> None:
    """Dynamo looks at all hooks while it compiles, and may be interrupted by that at any time."""
    model, optimizer = moody()
    other, others = moody()
    watch = Watch(model, optimizer, every=1, report=quiet).attach()
    take(model, optimizer)
    hooks = len(torch_module._global_forward_pre_hooks)
    gone = weakref.ref(model.first.weight)
    del model, optimizer
    gc.collect()
    assert gone() is None
    assert len(torch_module._global_forward_pre_hooks) == hooks == 1
    take(other, others)
    assert not torch_module._global_forward_pre_hooks
    watch.detach()
    assert clean()


def test_listeners_may_come_and_go_while_they_are_told() -> None:
    model, optimizer = moody()
    watches: list[Watch] = []

    class Finder:
        """Attaches a watch to every optimizer that it sees, as it sees it."""

        def before_backward(self, loss: Tensor, scale: float | Tensor) -> None: ...

        def after_backward(self) -> None: ...

        def before_step(self, found: torch.optim.Optimizer) -> None:
            if not watches:
                watches.append(Watch(model, found, report=quiet).attach())

        def after_update(self) -> None:
            pass

        def after_step(self, found: torch.optim.Optimizer) -> None:
            if watches[0].step == 2:
                watches[0].detach()

    finder = Finder()
    events.listen(finder)
    for _ in range(4):
        take(model, optimizer)
    events.unlisten(finder)
    events.settle()
    assert watches[0].step in (2, 3)
    assert clean()
