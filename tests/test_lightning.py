"""The Lightning callback, with Lightning's own trainer."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

from gradmend.causes import Cause  # noqa: E402
from gradmend.integrations.lightning import WatchCallback  # noqa: E402
from gradmend.journal import Journal  # noqa: E402
from helpers import Book  # noqa: E402

BACKWARD = torch.autograd.backward
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
ROWS = TensorDataset(X, X[:, :3].argmax(1))
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Classifier(lightning.LightningModule):
    def __init__(self, bad_step: int | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
        self.bad_step = bad_step

    def training_step(self, batch: Any, index: int) -> Tensor:
        x = batch[0] * torch.nan if index == self.bad_step else batch[0]
        return F.cross_entropy(self.net(x), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Adversaries(lightning.LightningModule):
    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8))
        self.critic = nn.Linear(8, 1)

    def training_step(self, batch: Any, index: int) -> None:
        first, second = self.optimizers()
        made = self.generator(torch.randn(len(batch[0]), 4))
        judged = torch.cat([self.critic(batch[0]), self.critic(made.detach())])
        truth = torch.cat([torch.ones(len(made), 1), torch.zeros(len(made), 1)])
        second.zero_grad()
        self.manual_backward(F.binary_cross_entropy_with_logits(judged, truth))
        second.step()
        first.zero_grad()
        self.manual_backward(-self.critic(made).mean())
        first.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(part.parameters(), 0.01) for part in (self.generator, self.critic)]


def fit(model: Any, *callbacks: Any, resume: str | None = None, **options: Any) -> Any:
    options = {"max_epochs": 2, "enable_checkpointing": False, "accelerator": "cpu", **QUIET, **options}
    trainer = lightning.Trainer(callbacks=list(callbacks), **options)
    torch.manual_seed(0)
    trainer.fit(model, DataLoader(ROWS, 16, shuffle=True), ckpt_path=resume)
    return trainer


def trained(*callbacks: Any, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    model = Classifier()
    fit(model, *callbacks, **options)
    return list(model.parameters())


def nothing_is_left() -> bool:
    hooks = (_global_forward_pre_hooks, _global_forward_hooks)
    steps = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
    return torch.autograd.backward is BACKWARD and not any(map(len, (*hooks, *steps)))


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, {"precision": "bf16-mixed"}],
    ids=["plain", "accumulated and clipped", "mixed precision"],
)
def test_watches_every_step_and_changes_nothing(options: dict[str, Any], capsys: Any) -> None:
    journal = Book()
    watching = WatchCallback(journal=journal)
    watched, alone = trained(watching, **options), trained(**options)
    steps = 8 // options.get("accumulate_grad_batches", 1)
    assert all(map(torch.equal, watched, alone))
    assert watching.watches["net"].step == steps == len(journal.values("step"))
    assert all(0 < values["loss"] < 3 for values in journal.values("step"))
    assert {"layers", "gradients"} & {values["table"] for values in journal.values("reading")}
    assert not journal.values("note")
    assert "error inside" not in capsys.readouterr().err
    assert nothing_is_left()


def test_each_optimizer_has_its_part() -> None:
    journals: dict[str, Book] = {"generator": Book(), "critic": Book()}
    watching = WatchCallback(journal=journals.__getitem__)
    fit(Adversaries(), watching)
    assert {name: watch.step for name, watch in watching.watches.items()} == {"generator": 8, "critic": 8}
    assert next(values["loss"] for values in journals["critic"].values("step")) > 0.5
    readings = journals["critic"].values("reading")
    rows = {values["rows"] for values in readings if values["table"] == "gradients"}
    assert rows == {("weight", "bias")}


def test_findings_are_in_lightnings_log(caplog: Any) -> None:
    watching = WatchCallback()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(Classifier(bad_step=2), watching, max_epochs=1)
    assert [notice.finding.cause for notice in watching.watches["net"].findings] == [Cause.NON_FINITE]
    assert "gradmend, step 3" in caplog.text
    assert "non finite" in caplog.text


def test_parameters_that_no_optimizer_steps_are_watched_as_well() -> None:
    class Forgetful(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net[3].parameters(), lr=0.1)

    class Frozen(Forgetful):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].requires_grad_(False)

    watching = WatchCallback()
    fit(Forgetful(), watching)
    assert list(watching.watches) == ["net"]
    fit(Frozen(), watching)
    assert list(watching.watches) == ["net.3"]


def test_an_exception_ends_the_watch() -> None:
    class Broken(Classifier):
        def training_step(self, batch: Any, index: int) -> Tensor:
            if index == 2:
                raise RuntimeError("broken")
            return super().training_step(batch, index)

    watching = WatchCallback()
    with pytest.raises(RuntimeError, match="broken"):
        fit(Broken(), watching)
    assert watching.watches["net"].step == 2
    assert nothing_is_left()


def test_a_training_is_resumed_and_its_checkpoint_knows_nothing_of_the_watch(tmp_path: Path) -> None:
    file = str(tmp_path / "first.ckpt")
    fit(Classifier(), WatchCallback(), max_epochs=1).save_checkpoint(file)
    saved = torch.load(file, weights_only=True)
    assert "WatchCallback" not in str(saved.get("callbacks"))
    watching = WatchCallback()
    trainer = fit(Classifier(), watching, resume=file, max_epochs=3)
    assert trainer.global_step == 12
    assert watching.watches["net"].step == 8


def test_only_the_first_process_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning.Trainer, "is_global_zero", False)
    watching = WatchCallback()
    fit(Classifier(), watching)
    assert not watching.watches


def test_validation_counts_no_step() -> None:
    class Validated(Classifier):
        def validation_step(self, batch: Any, index: int) -> None:
            self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    watching = WatchCallback(every=1)
    model = Validated()
    trainer = lightning.Trainer(
        callbacks=[watching], max_epochs=1, accelerator="cpu", enable_checkpointing=False, **QUIET
    )
    trainer.fit(model, DataLoader(ROWS, 16), DataLoader(ROWS, 16))
    assert watching.watches["net"].step == 4
    assert not watching.watches["net"].findings


def test_a_path_becomes_a_journal(tmp_path: Path) -> None:
    fit(Adversaries(), WatchCallback(journal=tmp_path / "run.gradmend"), max_epochs=1)
    journal = Journal(tmp_path / "run.gradmend")
    steps = [next(iter(journal.steps(run["id"]).values()))["step"] for run in journal.runs()]
    assert [len(each) for each in steps] == [4, 4]
