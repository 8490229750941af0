"""The Hugging Face callback, with the real trainer and a small model of theirs."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_pre_hooks

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from gradmend.causes import Cause  # noqa: E402
from gradmend.diagnosis import Severity, diagnose  # noqa: E402
from gradmend.integrations.huggingface import WatchCallback  # noqa: E402
from gradmend.setup import Setup  # noqa: E402
from helpers import Book  # noqa: E402

BACKWARD = torch.autograd.backward
TOKENS = torch.randint(32, (32, 6), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in TOKENS]
QUIET = {
    "report_to": [],
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "dataloader_pin_memory": False,
}


def language_model() -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    made: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, vocab_size=32))
    return made


def trained(folder: Path, *callbacks: Any, model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = model or language_model()
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01, **options}
    arguments = transformers.TrainingArguments(str(folder), use_cpu=True, seed=0, **QUIET, **options)
    trainer = transformers.Trainer(model, arguments, train_dataset=ROWS, callbacks=list(callbacks))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}],
    ids=["plain", "accumulated", "mixed precision"],
)
def test_watches_every_step_and_changes_nothing(tmp_path: Path, options: dict[str, Any], capsys: Any) -> None:
    journal = Book()
    watching = WatchCallback(journal=journal)
    watched, alone = trained(tmp_path, watching, **options), trained(tmp_path, **options)
    assert all(map(torch.equal, watched.parameters(), alone.parameters()))
    steps = 16 // options.get("gradient_accumulation_steps", 1)
    assert watching.watch is not None
    assert watching.watch.step == steps == len(journal.values("step"))
    assert all(0 < values["loss"] < 6 for values in journal.values("step"))
    assert all(values["rate"] <= 0.01 for values in journal.values("step"))
    assert not journal.values("note")
    assert "error inside" not in capsys.readouterr().err
    assert torch.autograd.backward is BACKWARD
    assert not _global_forward_pre_hooks


def test_signals_of_the_layers_are_seen(tmp_path: Path) -> None:
    journal = Book()
    trained(tmp_path, WatchCallback(every=1, journal=journal))
    tables = {values["table"]: values for values in journal.values("reading")}
    assert "model.layers.0.self_attn.q_proj" in tables["layers"]["rows"]
    assert "model.layers.1.mlp.up_proj.weight" in tables["weights"]["rows"]


def test_a_finding_is_told(tmp_path: Path, capsys: Any) -> None:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(6, 1), 0

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.calls += 1
            output = self.layer(input_ids.float())
            return {"loss": output.square().mean() * (float("inf") if self.calls == 3 else 1)}

    watching = WatchCallback()
    trained(tmp_path, watching, model=Overflowing(), max_steps=4, max_grad_norm=0)
    assert watching.watch is not None
    assert [notice.finding.cause for notice in watching.watch.findings] == [Cause.NON_FINITE]
    assert "step 3" in capsys.readouterr().err


def test_after_an_exception_the_next_training_is_watched_anew(tmp_path: Path) -> None:
    class Broken(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step == 3:
                raise RuntimeError("broken")

    watching = WatchCallback()
    with pytest.raises(RuntimeError, match="broken"):
        trained(tmp_path, watching, Broken())
    first = watching.watch
    assert first is not None
    assert first.step == 3
    trained(tmp_path, watching)
    assert watching.watch is not first
    assert first.step == 3
    assert torch.autograd.backward is BACKWARD


def test_a_training_is_resumed(tmp_path: Path) -> None:
    saving = {**QUIET, "save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, **saving)
    trainer = transformers.Trainer(
        language_model(), arguments, train_dataset=ROWS, callbacks=[WatchCallback()]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    assert "Watch" not in (tmp_path / "checkpoint-4" / "trainer_state.json").read_text()
    watching = WatchCallback()
    arguments.max_steps = 10
    again = transformers.Trainer(language_model(), arguments, train_dataset=ROWS, callbacks=[watching])
    again.remove_callback(transformers.PrinterCallback)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert watching.watch is not None
    assert watching.watch.step == 6


@pytest.mark.parametrize(
    ("rate", "errors"),
    [(0.3, [Cause.LEARNING_RATE_TOO_HIGH]), (1e-3, []), (1e-8, [Cause.LEARNING_RATE_TOO_LOW])],
)
def test_a_rate_far_off_is_found_with_the_batches_of_a_tokenizer(rate: float, errors: list[Cause]) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**size, vocab_size=60, num_labels=3)
    )
    tokens = torch.randint(2, 60, (128, 8))
    batches = [
        transformers.BatchEncoding({"input_ids": ids, "labels": ids[:, 0] % 3}) for ids in tokens.split(32)
    ]
    found = diagnose(Setup(model, optimizer=partial(torch.optim.AdamW, lr=rate)), batches)
    assert [f.cause for f in found.findings if f.severity is Severity.ERROR] == errors
