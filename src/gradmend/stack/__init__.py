"""Stack: many trainings as one computation, each the same as alone."""

from gradmend.stack.many import lacks_memory, train_many

__all__ = ["lacks_memory", "train_many"]
