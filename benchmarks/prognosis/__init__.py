"""The training set of the prognosis, its fit, and how good it is on what it has not seen."""

from benchmarks.prognosis.report import run

__all__ = ["run"]
