"""Watch: the monitor inside a running training."""

from gradmend.acts import Act
from gradmend.watch.monitor import Watch
from gradmend.watch.notices import Notice, Sink
from gradmend.watch.pace import Every

__all__ = ["Act", "Every", "Notice", "Sink", "Watch"]
