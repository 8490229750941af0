"""Watch: the monitor inside a running training."""

from gradmend.watch.monitor import Watch
from gradmend.watch.notices import Notice, Sink

__all__ = ["Notice", "Sink", "Watch"]
