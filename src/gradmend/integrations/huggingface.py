"""Hugging Face: a callback that watches what its `Trainer` trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from gradmend.errors import MissingExtraError
from gradmend.watch import Every, Sink, Watch

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError("transformers", "huggingface", "The Hugging Face callback") from error

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class WatchCallback(TrainerCallback):
    """Watches the training of a Hugging Face `Trainer`, from its start to its end.

    Of a training on several processes the first is watched. The trainer tells nothing of an exception: after
    one, the watch ends with `detach`, with the next training, or with the model.

    Args:
        every: when the layers' signals are looked at, as in `Watch`.
        budget: share of the training's time that watching may take.
        journal: takes what is read: the path of a journal, or a sink such as a tracker's.

    Attributes:
        watch: of the last training; None before the first.

    Examples:
        >>> import tempfile, torch
        >>> from transformers import Trainer, TrainingArguments
        >>> class Line(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(4, 1)
        ...     def forward(self, x, labels):
        ...         return {"loss": (self.layer(x) - labels).square().mean()}
        >>> rows = [{"x": torch.randn(4), "labels": torch.zeros(1)} for _ in range(24)]
        >>> folder, watching = tempfile.TemporaryDirectory(), WatchCallback()
        >>> quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no"}
        >>> arguments = TrainingArguments(folder.name, max_steps=3, use_cpu=True, **quiet)
        >>> _ = Trainer(Line(), arguments, train_dataset=rows, callbacks=[watching]).train()
        ... # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> watching.watch.step
        3
        >>> folder.cleanup()
    """

    def __init__(
        self,
        *,
        every: Every = None,
        budget: float = 0.02,
        journal: Sink | str | Path | None = None,
    ) -> None:
        self.watch: Watch | None = None
        self._options: dict[str, Any] = {"every": every, "budget": budget, "journal": journal}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **others: Any,
    ) -> None:
        """Watch from the first step on."""
        self.detach()
        if state.is_world_process_zero and model is not None:
            self.watch = Watch(model, _inner(optimizer), **self._options).attach()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Leave nothing behind."""
        self.detach()

    def detach(self) -> None:
        """End the watch, as after an exception."""
        if self.watch is not None:
            self.watch.detach()


def _inner(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer that accelerate wraps, which is the one that steps."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer
