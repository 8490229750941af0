"""What the pages of `check` and `mend` show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from gradmend.console import lines, number
from gradmend.diagnosis import Diagnosis, Finding, Severity
from gradmend.diagnosis.prognosis import Prognosis
from gradmend.profile import Profile
from gradmend.readings import Reading
from gradmend.remedies import Change
from gradmend.remedies.card import card as remedy_card
from gradmend.report.parts import Card, Code, Page, Part, Section, Table
from gradmend.spread import Spread, compared
from gradmend.training import Trial
from gradmend.treatment import Treatment, ranked

_TONES: Final = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.NOTE: "note"}
_PLACES, _REASONS = 6, 8
ROWS: Final = 200
"""A table of more layers than this shows some of them."""


def check_page(
    diagnosis: Diagnosis, spread: Spread | None = None, *, title: str = "gradmend check", mend: str = ""
) -> Page:
    """The page of a diagnosis: what is wrong and why, what to expect, and what was measured.

    Args:
        diagnosis: what was found.
        spread: of the outputs and gradients, if that was counted.
        title: of what it is.
        mend: the command that mends it.
    """
    pictures = [*diagnosis.figures().values(), *(spread.figures().values() if spread else ())]
    found = [*_findings(diagnosis), *([Code(mend, "To mend it:")] if mend and not diagnosis.healthy else [])]
    return Page(
        title=title,
        verdict=diagnosis.verdict,
        tone=tone(diagnosis),
        sections=sections(
            ("What is wrong" if diagnosis.findings else "What was found", [*_outlook(diagnosis), *found]),
            ("What was measured", pictures),
            ("What that probability rests on", _prognosis(diagnosis.prognosis)),
            ("Layer by layer", _layers(diagnosis)),
        ),
        notes=_notes(diagnosis),
    )


def mend_page(
    treatment: Treatment,
    code: str = "",
    spread: tuple[Spread, Spread] | None = None,
    *,
    title: str = "gradmend mend",
) -> Page:
    """The page of a treatment: what was changed, that it helped, and what is left to do.

    Args:
        treatment: what was done.
        code: the changes in the user's own code; by default for any code of torch.
        spread: of the outputs and gradients, before and after.
        title: of what it is.
    """
    copied = code or treatment.code() if treatment.changes else ""
    before, after = treatment.before, treatment.after
    left = [Card("left to you", "warning", treatment.advice)] if treatment.advice else []
    pictures = [*treatment.figures().values(), *(compared(*spread).values() if spread else ())]
    return Page(
        title=title,
        verdict=treatment.verdict,
        tone="good" if after.healthy else "error",
        sections=sections(
            ("What was changed", [*map(_change, treatment.changes), *left]),
            ("The same in your own code", [Code(copied)] if copied else []),
            ("Before and after", pictures),
            ("What was tried", [_trials(treatment.trials)] if treatment.trials else []),
            ("What was wrong before", _findings(before)),
            ("What is found now", _findings(after) if treatment.changes else []),
            ("Layer by layer, now", _layers(after)),
        ),
        notes=_notes(after),
    )


def sections(*told: tuple[str, Sequence[Part]]) -> tuple[Section, ...]:
    """Sections of these titles and parts; what has no parts is left out.

    >>> [section.title for section in sections(("Full", ["a text"]), ("Empty", []))]
    ['Full']
    """
    return tuple(Section(title, tuple(parts)) for title, parts in told if parts)


def tone(diagnosis: Diagnosis) -> str:
    """How bad it is what a diagnosis says."""
    if not diagnosis.healthy:
        return "error"
    worst = max((finding.severity for finding in diagnosis.findings), default=Severity.NOTE)
    return "warning" if diagnosis.doubtful or worst is Severity.WARNING else "good"


def card(finding: Finding, *more: str) -> Card:
    """A finding as a card.

    Args:
        finding: what was found.
        more: sentences that come last, such as when it was found.
    """
    illness = finding.cause.illness
    return Card(
        head=finding.cause.title,
        tone=_TONES[finding.severity],
        lines=(finding.sentence, *finding.evidence, *more),
        facts=(*_facts(finding), ("To treat it", illness.cure)),
        where=_few(finding.places),
        more=(
            ("Why it happens", illness.why),
            ("How it shows", illness.signs),
            ("Source", illness.reference),
        ),
    )


def _facts(finding: Finding) -> list[tuple[str, str]]:
    facts = [("At", lines(finding.sites))] if finding.sites else []
    return [*facts, ("Measured", finding.numbers)] if finding.numbers else facts


def _few(places: Sequence[str]) -> tuple[str, ...]:
    more = (f"and {len(places) - _PLACES} more",) if len(places) > _PLACES else ()
    return (*places[:_PLACES], *more)


def _findings(diagnosis: Diagnosis) -> list[Part]:
    return [card(finding) for finding in diagnosis.findings] or ["Nothing was found."]


def _outlook(diagnosis: Diagnosis) -> list[Part]:
    foreseen = () if diagnosis.prognosis is None else (diagnosis.prognosis.sentence,)
    return [*foreseen, *diagnosis.limits]


def _prognosis(prognosis: Prognosis | None) -> list[Part]:
    if prognosis is None:
        return []
    rows = [(r.name, number(r.value, 2), f"{r.log_odds:+.2f}") for r in prognosis.reasons[:_REASONS]]
    words = "What speaks most for it (log-odds above zero) and against it, compared with an average setup."
    return [Table(("of what", "measured", "log-odds"), tuple(rows), words)]


def _notes(diagnosis: Diagnosis) -> tuple[str, ...]:
    profile = diagnosis.profile
    held = {
        f"Not predicted: {profile.unpredictable}.": profile.unpredictable,
        "Compiled: measured as it was written.": profile.compiled,
    }
    told = (text for text, is_so in held.items() if is_so)
    return (f"Loss {number(profile.loss, 4)}, {profile.samples} samples.", *told)


_COLUMNS: Final[dict[str, Callable[[Profile, Reading], float | None]]] = {
    "gradient norm": lambda _, r: r.gradient_norm,
    "predicted": lambda profile, r: e.gradient_norm if (e := profile.expected.get(r.site.index)) else None,
    "rms": lambda _, r: r.rms,
    "cosine": lambda _, r: r.cosine,
    "saturation": lambda _, r: r.saturation,
    "dead": lambda _, r: r.dead,
}


def _layers(diagnosis: Diagnosis) -> list[Part]:
    """The numbers of the layers, without columns that hold none."""
    profile = diagnosis.profile
    readings = profile.weighted() or list(profile.sites)
    table = {name: [read(profile, r) for r in readings] for name, read in _COLUMNS.items()}
    told = {name: values for name, values in table.items() if any(number(value) != "-" for value in values)}
    named = {name for finding in diagnosis.findings for name in finding.sites}
    kept = _kept(told.values(), [at for at, r in enumerate(readings) if r.site.name in named], len(readings))
    rows = [(readings[at].site.name, *(number(values[at]) for values in told.values())) for at in kept]
    some = f"{len(kept)} of {len(readings)} layers: extremes, those with findings, and some between."
    words = some if len(kept) < len(readings) else ""
    return [Table(("layer", *told), tuple(rows), words)] if rows else []


def _kept(columns: Iterable[Sequence[float | None]], marked: Sequence[int], size: int) -> list[int]:
    """Rows evenly spaced, and of each column the least and the greatest; all if they are few."""
    if size <= ROWS:
        return list(range(size))
    some = range(0, size, math.ceil(2 * size / ROWS))
    known = [
        [(value, at) for at, value in enumerate(column) if value is not None and not math.isnan(value)]
        for column in columns
    ]
    ends = [pick(values)[1] for values in known for pick in (min, max)]
    return sorted({*some, *ends, *marked[: ROWS // 4], size - 1})


def _change(change: Change) -> Card:
    told = remedy_card(change.remedy)
    about = (("When it helps, and what it costs", told.about), ("Source", told.source))
    return Card(
        head=change.text,
        tone="good",
        lines=(told.what,),
        facts=(("How much it changes", told.changes),),
        where=_few([edit.text for edit in change.edits if edit.text]),
        more=tuple((label, text) for label, text in about if text),
    )


def _trials(trials: Sequence[Trial]) -> Table:
    rows = [(t.label, str(len(t.losses)), _loss(t), _share(t.accuracy)) for t in ranked(trials)]
    return Table(
        ("trial", "steps", "loss", "accuracy"), tuple(rows), "Those that did worse were ended early."
    )


def _loss(trial: Trial) -> str:
    return "diverged" if trial.diverged else number(trial.final_loss)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
