"""Trackers: journals that write what a watch reads to TensorBoard, W&B or MLflow.

Names are the same in all: `loss`, `gradient norm`, `learning rate`; `layers rms/encoder.0` for a statistic of
a layer; findings, acts and notes as text. What is not known is left out; infinite and undefined losses are
written.
"""

from __future__ import annotations

import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradmend.errors import MissingExtraError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from wandb import Run

_STEP = {"loss": "loss", "gradient": "gradient norm", "rate": "learning rate"}


class _Tracker(ABC):
    """Sorts what a watch writes into numbers and text.

    Args:
        prefix: of all names.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Take one record of a watch: `step`, `reading`, `finding`, `act` or `note`."""
        if kind in ("step", "reading"):
            numbers = _of_step(values) if kind == "step" else _of_reading(values)
            if numbers:
                self._numbers(step, {self._prefix + name: number for name, number in numbers.items()})
        else:
            name = f"{kind} {values['id']}" if kind == "finding" else kind
            self._text(step, self._prefix + name, _sentence(values) if kind == "finding" else values["text"])

    @abstractmethod
    def _numbers(self, step: int, numbers: Mapping[str, float]) -> None: ...

    @abstractmethod
    def _text(self, step: int, name: str, text: str) -> None: ...


class TensorBoard(_Tracker):
    """Writes to a `torch.utils.tensorboard.SummaryWriter`, which stays open.

    Args:
        writer: of the training.
        prefix: of all names.

    Examples:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> folder = tempfile.TemporaryDirectory()
        >>> with SummaryWriter(folder.name) as writer:
        ...     TensorBoard(writer).write("step", 1, {"loss": 2.3, "gradient": None, "rate": 0.1})
        >>> folder.cleanup()
    """

    def __init__(self, writer: SummaryWriter, prefix: str = "gradmend/") -> None:
        super().__init__(prefix)
        self._writer = writer

    def _numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def _text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)


class WandB(_Tracker):
    """Writes to a run of Weights & Biases, also offline, along an axis of its own: `gradmend/step`.

    Args:
        run: that `wandb.init` returned.
        prefix: of all names.

    Examples:
        >>> import wandb
        >>> with wandb.init(mode="disabled") as run:
        ...     WandB(run).write("step", 1, {"loss": 2.3, "gradient": None, "rate": 0.1})
    """

    def __init__(self, run: Run, prefix: str = "gradmend/") -> None:
        super().__init__(prefix)
        self._run = run
        run.define_metric(f"{prefix}step")
        run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")

    def _numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, f"{self._prefix}step": step})

    def _text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text, f"{self._prefix}step": step})


class MLflow(_Tracker):
    """Writes to a run of MLflow, in the background; findings become tags.

    What is new is waited for: MLflow's store of files loses one of two writes that make the same folder.

    Args:
        run_id: such as `mlflow.active_run().info.run_id`.
        prefix: of all names.

    Raises:
        MissingExtraError: if MLflow is not installed.

    Examples:
        ```python
        with mlflow.start_run() as run, Watch(model, journal=MLflow(run.info.run_id)):
            ...
        ```
    """

    def __init__(self, run_id: str, prefix: str = "gradmend/") -> None:
        super().__init__(prefix)
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise MissingExtraError("mlflow", "trackers", "The tracker of MLflow") from error
        self._client = MlflowClient()
        self._run_id = run_id
        self._known: set[str] = set()

    def _numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(name), number, now, step) for name, number in numbers.items()]
        new = numbers.keys() - self._known
        self._known |= new
        self._client.log_batch(self._run_id, metrics, synchronous=bool(new))

    def _text(self, step: int, name: str, text: str) -> None:
        self._client.set_tag(self._run_id, _allowed(name), text)


def _of_step(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: values[key] for key, name in _STEP.items() if values.get(key) is not None}


def _of_reading(values: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a table that is known, by `table statistic/row`."""
    return {
        f"{values['table']} {statistic}/{row}": number
        for row, numbers in zip(values["rows"], values["values"].tolist(), strict=True)
        for statistic, number in zip(values["statistics"], numbers, strict=True)
        if not math.isnan(number)
    }


def _sentence(values: Mapping[str, Any]) -> str:
    """A finding in one paragraph.

    >>> found = {"severity": "error", "cause": "dead_units", "sentence": "All are dead.", "began": 3}
    >>> _sentence({**found, "sites": ("relu",), "evidence": (), "where": ("train.py:7",), "ended": 9})
    'error: dead units, steps 3 to 9, at relu. All are dead. (train.py:7)'
    """
    span = f"from step {values['began']}"
    if values["ended"] is not None:
        span = f"steps {values['began']} to {values['ended']}"
    sites = f", at {', '.join(values['sites'])}" if values["sites"] else ""
    where = (f"({', '.join(values['where'])})",) if values["where"] else ()
    cause = values["cause"].replace("_", " ")
    head = f"{values['severity']}: {cause}, {span}{sites}."
    return " ".join([head, values["sentence"], *values["evidence"], *where])


def _allowed(name: str) -> str:
    """A name as MLflow takes it.

    >>> _allowed("sites rms/matmul#2")
    'sites rms/matmul_2'
    """
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
