"""Studies: cures compared on a task, with many seeds, and what follows from it."""
