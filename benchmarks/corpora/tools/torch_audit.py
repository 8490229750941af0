"""torch-audit 0.3.0 (https://pypi.org/project/torch-audit), as its own training loop goes.

At its default it audits one step in 1,000, so that of the steps allowed here it sees the first only, and one
step is all that it is given.
"""

from __future__ import annotations

from typing import Any

from torch_audit.runtime import Auditor

from benchmarks.corpora.answers import Claim, Level
from benchmarks.corpora.cases import draw
from benchmarks.corpora.training import claims, watched

LEVELS = {"FATAL": Level.ERROR, "ERROR": Level.ERROR, "WARN": Level.WARNING, "INFO": Level.NOTE}

PARTS: dict[str, tuple[str, ...]] = {
    "TA100": ("learning_rate", "numerics", "initialization"),
    "TA102": ("learning_rate",),
    "TA103": ("initialization", "activation"),
    "TA104": ("wiring",),
    "TA105": ("initialization", "learning_rate", "activation"),
    "TA301": ("input",),
    "TA302": ("input",),
    "TA304": ("batch", "normalization"),
    "TA305": ("input",),
}
"""What its advice (`remediation`) would change.

Only rules of stability (TA1) and of the data (TA3): those of hardware, style and unused layers fire on nearly
every program. Neither does TA303 count, which guesses the layout of images: the cases hold channels last, and
their networks turn them round.
"""


def check(case: Any, seed: int) -> list[Claim]:
    """Audit the network, the optimizer and one step."""
    model, optimizer = watched(case)
    ((x, y),) = draw(case, 1, seed)
    auditor = Auditor(model, optimizer=optimizer)
    with auditor:
        auditor.audit_static()
        auditor.audit_init()
        optimizer.zero_grad()
        loss = case.loss_fn(auditor.forward(x), y) + model.penalty()
        auditor.backward(loss)
        auditor.optimizer_step()
    wanted = (f for f in auditor.finish().findings if f.rule_id in PARTS)
    return claims(((f.rule_id, LEVELS[f.severity.value], f.message) for f in wanted), PARTS)
