"""Watch: the monitor inside a running training."""

from gradmend.watch.monitor import Watch
from gradmend.watch.notices import Notice, Sink
from gradmend.watch.pace import Every
from gradmend.watch.treat import Act

__all__ = ["Act", "Every", "Notice", "Sink", "Watch"]
