"""Watch: the monitor inside a running training."""

from gradmend.watch.monitor import Watch
from gradmend.watch.notices import Notice, Sink
from gradmend.watch.treat import Act

__all__ = ["Act", "Notice", "Sink", "Watch"]
