"""The plain training that a peer watches, and what the peers have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from time import process_time
from typing import Any

import torch
from torch import Tensor

from benchmarks.corpora.answers import Claim, Level
from benchmarks.corpora.cases import batches

STEPS, SECONDS = 400, 3.0
"""A peer watches so many steps, or as many as fit into so many seconds of CPU time."""

_ROUND = 10
"""The clock is read so often: some peers look at every tenth step only, and must see the last one."""

After = Callable[[Tensor], object]


def train(case: Any, optimizer: torch.optim.Optimizer, seed: int, after: After) -> None:
    """Train as the program does, and call `after` with the loss at the end of each step."""
    end = process_time() + SECONDS
    for step, (x, y) in enumerate(islice(batches(case, seed), STEPS)):
        if step % _ROUND == 0 and process_time() > end:
            break
        optimizer.zero_grad()
        loss = case.objective(x, y)
        loss.backward()
        optimizer.step()
        after(loss)


def watched(case: Any) -> tuple[Any, torch.optim.Optimizer]:
    """The model and its optimizer."""
    return case.model, case.optimizer(case.model.parameters())


def claims(found: Iterable[tuple[str, Level, str]], parts: Mapping[str, tuple[str, ...]]) -> list[Claim]:
    """A peer's findings as claims: the worst first, and one per rule, though it may name many layers.

    Args:
        found: rule, level and sentence.
        parts: what each rule's advice would change, the first advice first.
    """
    worst = sorted(found, key=lambda finding: -finding[1])
    once = {rule: (level, sentence) for rule, level, sentence in reversed(worst)}
    rules = dict.fromkeys(rule for rule, _, _ in worst)
    return [Claim(rule, once[rule][0], parts[rule], once[rule][1]) for rule in rules]


def rule_of(sentence: str, parts: Mapping[str, tuple[str, ...]]) -> str:
    """The rule of a table whose words stand in a sentence, else the sentence, which no table knows."""
    return next((rule for rule in parts if rule.split(": ")[-1] in sentence.lower()), sentence)
