"""Training: a plain loop as fast as one written by hand, and short trials of copies."""

from gradmend.training.loop import best_threads
from gradmend.training.run import History, Trial, run_trial, train

__all__ = ["History", "Trial", "best_threads", "run_trial", "train"]
