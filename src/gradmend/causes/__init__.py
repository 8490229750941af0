"""Every illness that gradmend knows: rules name them, remedies treat them. The texts lie beside, as data."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from importlib.resources import files

PARTS = (
    "activation",
    "initialization",
    "normalization",
    "depth",
    "recurrence",
    "learning_rate",
    "optimizer",
    "schedule",
    "loss",
    "output",
    "input",
    "labels",
    "batch",
    "epochs",
    "capacity",
    "regularization",
    "numerics",
    "wiring",
)
"""What can be to blame in a setup."""


@dataclass(frozen=True)
class Illness:
    """What there is to say of one cause.

    Args:
        part: which part of the setup is to blame, one of `PARTS`.
        sentence: what is wrong, in one plain sentence.
        why: why it happens.
        signs: how it shows.
        cure: what treats it.
        reference: author, title, year, link.
    """

    part: str
    sentence: str
    why: str
    signs: str
    cure: str
    reference: str


class Cause(Enum):
    """An illness. Roots come before the symptoms that they bring about.

    Examples:
        >>> Cause.DEAD_UNITS.title, Cause.DEAD_UNITS.part
        ('dead units', 'activation')
    """

    @staticmethod
    def _generate_next_value_(name: str, *_: object) -> str:
        return name.lower()

    # how output, loss, targets and data fit together
    NON_FINITE = auto()
    SOFTMAX_BEFORE_LOGITS_LOSS = auto()
    SIGMOID_BEFORE_LOGITS_LOSS = auto()
    LOGITS_BEFORE_PROBABILITY_LOSS = auto()
    SOFTMAX_OVER_ONE_UNIT = auto()
    SOFTMAX_OVER_THE_BATCH = auto()
    UNREACHABLE_TARGETS = auto()
    WRONG_OUTPUT_COUNT = auto()
    UNFIT_LOSS = auto()
    MISMATCHED_SHAPES = auto()
    LABELS_OUT_OF_RANGE = auto()
    CONSTANT_LABELS = auto()
    SHUFFLED_LABELS = auto()
    CLASS_IMBALANCE = auto()
    UNSCALED_TARGETS = auto()
    UNSCALED_INPUT = auto()
    CONSTANT_INPUT = auto()
    STRAY_COLUMN = auto()

    # how the parts of the setup are put together
    WRONG_DIRECTION = auto()
    NOT_IN_OPTIMIZER = auto()
    NO_GRADIENT = auto()
    FROZEN_PARAMETERS = auto()
    EVAL_MODE = auto()
    INPUT_LOST = auto()
    BATCH_OF_ONE = auto()
    UNFIT_BATCH_SIZE = auto()
    TOO_MUCH_DROPOUT = auto()
    TOO_MUCH_WEIGHT_DECAY = auto()
    TOO_LITTLE_CAPACITY = auto()
    LEARNING_RATE_TOO_HIGH = auto()
    LEARNING_RATE_TOO_LOW = auto()
    UNFIT_OPTIMIZER = auto()
    TOO_FEW_STEPS = auto()
    DENORMAL_NUMBERS = auto()
    TOO_MANY_THREADS = auto()

    # signals and gradients
    SYMMETRIC_WEIGHTS = auto()
    CONTRACTING_ACTIVATION = auto()
    WEIGHTS_TOO_SMALL = auto()
    WEIGHTS_TOO_LARGE = auto()
    CHAOS = auto()
    BATCH_NORM_EXPLOSION = auto()
    RESIDUAL_GROWTH = auto()
    VANISHING_THROUGH_TIME = auto()
    EXPLODING_THROUGH_TIME = auto()
    ATTENTION_SATURATION = auto()
    ATTENTION_COLLAPSE = auto()
    VANISHING_GRADIENT = auto()
    EXPLODING_GRADIENT = auto()
    INFORMATION_COLLAPSE = auto()
    SHATTERED_GRADIENTS = auto()
    SATURATED_UNITS = auto()
    DEAD_UNITS = auto()

    # the course of a training
    DIVERGENCE = auto()
    OSCILLATING_LOSS = auto()
    SLOW_CONVERGENCE = auto()
    PLATEAU = auto()
    OVERFITTING = auto()
    DYING_UNITS = auto()

    @property
    def illness(self) -> Illness:
        """All that there is to say of it."""
        return _illnesses()[self]

    @property
    def sentence(self) -> str:
        """What is wrong, in one plain sentence."""
        return self.illness.sentence

    @property
    def part(self) -> str:
        """Which part of the setup is to blame."""
        return self.illness.part

    @property
    def title(self) -> str:
        """The name as people write it: 'vanishing gradient'."""
        return self.name.lower().replace("_", " ")


@cache
def _illnesses() -> dict[Cause, Illness]:
    tables = [file for file in files(__name__).iterdir() if file.name.endswith(".toml")]
    found = [tomllib.loads(table.read_text(encoding="utf-8")) for table in tables]
    return {Cause(name): Illness(**text) for table in found for name, text in table.items()}
