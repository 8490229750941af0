"""Training: a plain loop as fast as one written by hand, and short trials of copies."""

from gradmend.training.loop import best_threads
from gradmend.training.run import History, train
from gradmend.training.trials import Run, Trial, run_trial

__all__ = ["History", "Run", "Trial", "best_threads", "run_trial", "train"]
