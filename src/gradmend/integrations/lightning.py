"""Lightning: a callback that watches what its trainer trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from gradmend.console import plain
from gradmend.diagnosis import Severity
from gradmend.errors import MissingExtraError
from gradmend.watch import Every, Notice, Sink, Watch

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities import rank_zero_info
except ImportError as error:
    raise MissingExtraError("lightning", "lightning", "The Lightning callback") from error

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class WatchCallback(Callback):
    """Watches every optimizer of a trainer and the module it trains, from the start of training to its end.

    What an optimizer trains is the smallest part of the LightningModule that holds all its parameters: of a
    GAN, the generator or the discriminator. Signals are seen where this very part is called. Findings go to
    Lightning's log. Of a training on several processes the first is watched. Checkpoints hold nothing of it.

    Args:
        every: when the layers' signals are looked at, as in `Watch`.
        budget: share of the training's time that watching may take.
        journal: takes what is read: the path of a journal, a sink such as a tracker's, or a function that
            makes a sink for the name of each part.

    Attributes:
        watches: by the name of the part, "" for all of the LightningModule; they stay after the training.

    Examples:
        >>> import torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from torch.utils.data import DataLoader
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Linear(4, 1)
        ...     def training_step(self, x, _):
        ...         return self.net(x).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> watching = WatchCallback()
        >>> quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary"], False)
        >>> trainer = Trainer(max_steps=3, accelerator="cpu", callbacks=[watching], **quiet,
        ...                   enable_checkpointing=False)
        >>> trainer.fit(Line(), DataLoader(torch.randn(24, 4), 8))
        >>> watching.watches["net"].step
        3
    """

    def __init__(
        self,
        *,
        every: Every = None,
        budget: float = 0.02,
        journal: Sink | str | Path | Callable[[str], Sink] | None = None,
    ) -> None:
        self.watches: dict[str, Watch] = {}
        self._options: dict[str, Any] = {"every": every, "budget": budget}
        self._journal = journal

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch from the first step on."""
        if not trainer.is_global_zero:
            return
        self._detach()
        self.watches = {}
        parts = trained_parts(pl_module, trainer.optimizers)
        for (name, part), optimizer in zip(parts.items(), trainer.optimizers, strict=True):
            watch = Watch(part, optimizer, journal=self._sink(name), report=_log, **self._options)
            self.watches[name] = watch.attach()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._detach(isinstance(exception, Exception))

    def _sink(self, name: str) -> Sink | str | Path | None:
        return self._journal(name) if callable(self._journal) else self._journal

    def _detach(self, failed: bool = False) -> None:
        for watch in self.watches.values():
            watch.detach(failed)


def trained_parts(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, nn.Module]:
    """By name, what each optimizer trains: the smallest part of a model that holds all its parameters.

    What no optimizer steps, though it could, counts with the first one.

    >>> import torch
    >>> net = nn.ModuleDict({"first": nn.Linear(2, 3), "second": nn.Linear(3, 2)})
    >>> list(trained_parts(net, [torch.optim.SGD(part.parameters()) for part in net.values()]))
    ['first', 'second']
    """
    stepped = [{id(p) for group in o.param_groups for p in group["params"]} for o in optimizers]
    if stepped:
        stepped[0] |= _ids(p for p in model.parameters() if p.requires_grad) - set().union(*stepped)
    found: dict[str, nn.Module] = {}
    for held in stepped:
        name, part = _smallest(model, held & _ids(model.parameters()))
        found[name if name not in found else f"{name} ({len(found) + 1})"] = part
    return found


def _smallest(model: nn.Module, held: set[int]) -> tuple[str, nn.Module]:
    lists = (nn.ModuleList, nn.ModuleDict)  # these are never called
    holders = [
        (name, part)
        for name, part in model.named_modules()
        if held <= _ids(part.parameters()) and not isinstance(part, lists)
    ]
    return holders[-1] if held else ("", model)


def _ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(parameter) for parameter in parameters}


def _log(notice: Notice) -> None:
    if notice.finding.severity is Severity.NOTE:
        return
    if notice.ended is None:
        rank_zero_info(f"gradmend, step {notice.began}\n{plain(notice.finding)}")
    else:
        rank_zero_info(f"gradmend, step {notice.ended}: {notice.finding.cause.title} has passed")
