"""A callback of Keras that watches `fit`."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradmend.attach.stand_ins import ByHand
from gradmend.integrations.keras.backend import import_keras
from gradmend.watch import Every, Sink, Watch, events

_Callback: Any = import_keras().callbacks.Callback


class WatchCallback(_Callback):  # type: ignore[misc]
    """Watches `model.fit` of Keras on torch, from its start to its end.

    Keras updates the weights itself, after each backward pass: gradients are watched as they are before Keras
    clips them. Keras tells callbacks nothing of an exception: after one, the watch ends with `detach`, with
    the next `fit`, or with this callback.

    Args:
        every: when the layers' signals are looked at, as in `Watch`.
        budget: share of the training's time that watching may take.
        journal: takes what is read: the path of a journal, or a sink such as a tracker's.

    Attributes:
        watch: of the last `fit`; None before the first.

    Raises:
        SetupError: if Keras does not run on torch.

    Warns:
        UserWarning: if the model was compiled with `jit_compile=True`; then nothing is watched.

    Examples:
        >>> import numpy, keras
        >>> model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> watching = WatchCallback()
        >>> x, y = numpy.random.randn(24, 4), numpy.random.randn(24, 1)
        >>> _ = model.fit(x, y, batch_size=8, verbose=0, callbacks=[watching])
        >>> watching.watch.step
        3
    """

    def __init__(
        self,
        *,
        every: Every = None,
        budget: float = 0.02,
        journal: Sink | str | Path | None = None,
    ) -> None:
        super().__init__()
        self.watch: Watch | None = None
        self._options: dict[str, Any] = {"every": every, "budget": budget, "journal": journal}
        self._steps: ByHand | None = None
        self._end: Callable[[], object] = lambda: None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Watch from the first step on."""
        self.detach()
        if self.model.jit_compile:
            warnings.warn(
                "gradmend sees nothing of a training that Keras compiles: jit_compile=True.", stacklevel=2
            )
            return
        stepped = [variable.value for variable in self.model.trainable_variables]
        if stepped:
            self._steps = ByHand(iter(stepped))
            self.watch = Watch(self.model, self._steps, **self._options).attach()
            events.listen(self._steps)
            self._end = weakref.finalize(self, _end, self.watch, self._steps)

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Learn the rate of this step."""
        if self._steps is not None:
            self._steps.param_groups[0]["lr"] = float(self.model.optimizer.learning_rate)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """The weights have moved."""
        if self._steps is not None:
            self._steps.end()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Leave nothing behind."""
        self.detach()

    def detach(self) -> None:
        """End the watch, as after an exception."""
        self._end()
        self._steps = None


def _end(watch: Watch, steps: ByHand) -> None:
    events.unlisten(steps)
    watch.detach()
