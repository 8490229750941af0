"""The Keras callback with the real `fit`, and saved Keras models as targets."""

import gc
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.module import _global_forward_pre_hooks

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", reason="Keras is not installed")

from gradmend.causes import Cause  # noqa: E402
from gradmend.data import load  # noqa: E402
from gradmend.integrations.keras import WatchCallback  # noqa: E402
from helpers import Book  # noqa: E402

BACKWARD = torch.autograd.backward
X = np.random.default_rng(0).standard_normal((64, 8)).astype("float32")
Y = X[:, :3].argmax(1)


def classifier(**compiled: Any) -> Any:
    keras.utils.set_random_seed(0)
    dense, dropout = keras.layers.Dense, keras.layers.Dropout
    model = keras.Sequential([keras.layers.Input((8,)), dense(16, "relu"), dropout(0.1), dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(**{"optimizer": keras.optimizers.Adam(0.01), "loss": loss, **compiled})
    return model


def fitted(*callbacks: Any, x: Any = X, epochs: int = 2, **compiled: Any) -> Any:
    model = classifier(**compiled)
    model.fit(x, Y, batch_size=16, epochs=epochs, verbose=0, shuffle=False, callbacks=list(callbacks))
    return model


def test_watches_every_step_and_changes_nothing(capsys: Any) -> None:
    journal = Book()
    watching = WatchCallback(journal=journal)
    watched, alone = fitted(watching), fitted()
    assert all(map(np.array_equal, watched.get_weights(), alone.get_weights()))
    assert watching.watch is not None
    assert watching.watch.step == 8 == len(journal.values("step"))
    assert all(0 < values["loss"] < 5 for values in journal.values("step"))
    assert [values["rate"] for values in journal.values("step")] == pytest.approx([0.01] * 8)
    assert not journal.values("note")
    assert "error inside" not in capsys.readouterr().err
    assert torch.autograd.backward is BACKWARD
    assert not _global_forward_pre_hooks


def test_the_losses_are_those_of_keras() -> None:
    journal, seen = Book(), []

    class Seen(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            seen.append(logs["loss"] * (batch % 4 + 1))  # Keras tells the mean of the epoch so far

    fitted(WatchCallback(journal=journal), Seen(), epochs=1)
    losses = np.diff([0, *seen])
    assert [values["loss"] for values in journal.values("step")] == pytest.approx(losses, rel=1e-5)


def test_steps_are_measured_whole() -> None:
    watching = WatchCallback(every=1)
    fitted(watching)
    assert watching.watch is not None
    assert watching.watch.profile is not None
    functions = [reading.site.function for reading in watching.watch.profile.sites]
    assert functions == ["matmul", "relu", "dropout", "matmul"]


def test_a_network_that_does_not_learn_is_found_out() -> None:
    digits = load("digits")
    layers = [keras.layers.Dense(64, "sigmoid") for _ in range(8)]
    model = keras.Sequential([keras.layers.Input((64,)), *layers, keras.layers.Dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    watching = WatchCallback()
    x, y = digits.x.flatten(1).numpy(), digits.y.numpy()
    model.fit(x, y, batch_size=64, verbose=0, callbacks=[watching])
    assert watching.watch is not None
    causes = {notice.finding.cause for notice in watching.watch.findings}
    assert Cause.CONTRACTING_ACTIVATION in causes


def test_a_bad_batch_is_found(capsys: Any) -> None:
    bad = X.copy()
    bad[32] = np.nan
    watching = WatchCallback()
    fitted(watching, x=bad, epochs=1)
    assert watching.watch is not None
    first = watching.watch.findings[0]
    assert first.finding.cause is Cause.NON_FINITE
    assert first.began == 3
    assert "step 3" in capsys.readouterr().err


def test_a_raised_rate_is_seen() -> None:
    journal = Book()
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.01 * 10**epoch)
    fitted(schedule, WatchCallback(journal=journal))
    assert [values["rate"] for values in journal.values("step")] == pytest.approx([0.01] * 4 + [0.1] * 4)


def test_after_an_exception_nothing_is_left() -> None:
    class Broken(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if batch == 2:
                raise RuntimeError("broken")

    def broken() -> None:
        fitted(WatchCallback(), Broken())

    with pytest.raises(RuntimeError, match="broken") as caught:
        broken()
    del caught
    gc.collect()
    assert torch.autograd.backward is BACKWARD
    assert not _global_forward_pre_hooks


def test_one_callback_watches_one_fit_after_another() -> None:
    watching = WatchCallback()
    fitted(watching)
    first = watching.watch
    fitted(watching, epochs=1)
    assert first is not None
    assert watching.watch is not None
    assert (first.step, watching.watch.step) == (8, 4)


def test_a_training_that_keras_compiles_is_not_watched() -> None:
    model = classifier(jit_compile=True)
    watching = WatchCallback()
    watching.set_model(model)
    with pytest.warns(UserWarning, match="jit_compile=True"):
        watching.on_train_begin()
    assert watching.watch is None
    watching.on_train_batch_begin(0)
    watching.on_train_batch_end(0)
