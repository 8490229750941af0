"""Keras 3 on torch: a callback that watches a training, and saved models as what commands work on."""

from gradmend.integrations.keras.callback import WatchCallback

__all__ = ["WatchCallback"]
