"""Stack: many trainings as one computation, each the same as alone."""

from gradmend.stack.many import train_many

__all__ = ["train_many"]
