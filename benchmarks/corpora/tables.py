"""The answers as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import quantiles

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.corpora.answers import Answer, Claim, Level
from benchmarks.corpora.cases import CONTROLS, VISIBLE
from benchmarks.corpora.published import SOURCES, covered, figures
from benchmarks.corpora.scoring import detection, localization
from benchmarks.corpora.training import SECONDS, STEPS

RESTRICTED = {
    "torchmortem": ("gradient_flow", "update_ratio", "loss_dynamics"),
    "neural_observatory": ("gradient_health",),
}
"""Rules of activations fire on nearly every network, so these peers are shown by other categories as well."""

COMMONEST = ("output", "activation", "loss")
"""The parts that are labelled most often on dev: a guess that looks at nothing."""

NOTES = f"""\
Shares: programs of one group (variants of one program) count as one; a share is the mean of the groups'
means, in brackets its 95 % interval (Wilson, the number of groups for n). dev and test are never pooled.
n: programs/groups.
Alarm: a finding of level error ("errors"), or at least warning ("with warnings"). Where a tool fails or is
too slow, a buggy program counts as missed, and another one is left out. gradmend calls a setup unhealthy
from errors on. Peers run at their default settings and call attention from warnings on: "with warnings"
is their line. With *: only {"; ".join(f"{tool}'s {', '.join(of)}" for tool, of in RESTRICTED.items())}.
Precision depends on how many programs are buggy: compare it with that of the guess, which always alarms.
Localization: warnings and errors in the tool's own order. A finding of gradmend blames one part; one of
a peer blames all parts that its advice would change (PARTS in benchmarks/corpora/tools), which favours
peers in the hits: see "parts named". The guess names {", ".join(COMMONEST)}, whatever it is given.
Visible in the setup: {VISIBLE}.
Peers watch {STEPS} training steps, or {SECONDS:g} s of CPU time if that is less; torch-audit needs one.
Times: CPU, one thread, without what a first call loads, over one plain forward and backward step."""

LEVELS = {"errors": Level.ERROR, "with warnings": Level.WARNING}


@dataclass(frozen=True)
class View:
    """The answers of one tool, under the name that the tables print."""

    name: str
    answers: tuple[Answer, ...]


def views(answers: Sequence[Answer]) -> list[View]:
    """One per tool, and one per restricted tool, of the cases that could be built."""
    built = [a for a in answers if a.status != "not built"]
    shown = []
    for tool in dict.fromkeys(a.tool for a in built):
        own = tuple(a for a in built if a.tool == tool)
        shown.append(View(tool, own))
        if categories := RESTRICTED.get(tool):
            shown.append(View(f"{tool}*", tuple(_restricted(a, categories) for a in own)))
    return shown


def guesses(shown: Sequence[View]) -> list[View]:
    """What a tool scores that always raises an alarm and names the parts labelled most often."""
    cases = {answer.truth.id: answer for view in shown for answer in view.answers}
    claims = tuple(Claim("guess", Level.ERROR, (part,)) for part in COMMONEST)
    guess = (replace(answer, tool="guess", claims=claims) for answer in cases.values())
    return [View("guess", tuple(guess))]


def _restricted(answer: Answer, categories: tuple[str, ...]) -> Answer:
    return replace(answer, claims=tuple(c for c in answer.claims if c.rule.startswith(categories)))


def coverage(answers: Sequence[Answer]) -> Iterator[str]:
    """How many cases there are, and what became of them."""
    for tool in dict.fromkeys(a.tool for a in answers):
        own = [a for a in answers if a.tool == tool]
        counts = {status: sum(a.status == status for a in own) for status in ("ran", "failed", "not built")}
        groups = len({a.truth.group for a in own if a.status != "not built"})
        told = ", ".join(f"{count} {status}" for status, count in counts.items())
        yield (
            f"{tool}: {told}; {groups} groups, {sum(a.stand_in for a in own)} on stand-in data, "
            f"{sum(a.own_step for a in own)} with a weight penalty"
        )


def plain_table(title: str, *headings: str) -> Table:
    return Table(*headings, title=title, title_justify="left", box=SIMPLE_HEAD)


def detection_table(shown: Sequence[View], title: str) -> Table:
    table = plain_table(title, "tool", "alarm", "recall", "precision", "false alarms", *CONTROLS)
    for view in shown:
        for name, level in LEVELS.items():
            found = detection(view.answers, level)
            alarms = [str(found.false_alarms[kind]) for kind in ("all", *CONTROLS)]
            table.add_row(view.name, name, str(found.recall), str(found.precision), *alarms)
    return table


KINDS: dict[str, Callable[[Answer], bool]] = {
    "labelled part": lambda a: a.truth.located,
    "visible in the setup": lambda a: a.truth.visible,
    "symptom labels": lambda a: a.truth.symptomatic and bool(a.truth.parts),
}


def localization_table(shown: Sequence[View], title: str) -> Table:
    scores = ("hit at 1", "hit at 3", "1/rank", "rank", "labelled share", "parts named")
    table = plain_table(title, "tool", "cases", "n", *scores)
    for view in shown:
        for kind, wanted in KINDS.items():
            chosen = [a for a in view.answers if wanted(a)]
            found = localization(chosen)
            shares = [str(share) for share in (found.first, found.three, found.reciprocal)]
            size = f"{len(chosen)}/{found.first.units:g}"
            row = (*shares, f"{found.rank:g}", str(found.labelled), f"{found.named:.1f}")
            table.add_row(view.name, kind, size, *row)
    return table


def published_table(answers: Sequence[Answer], title: str) -> Table:
    """The published figures, and those of gradmend here on the same programs."""
    headings = ("by", "tool", "n", "noticed", "fault named", "gradmend here: alarm", "labelled part in 3")
    table = plain_table(title, *headings)
    table.caption, table.caption_justify = "\n".join(map(": ".join, SOURCES.items())), "left"
    built = [a for a in answers if a.status != "not built"]
    ours = [a for a in built if a.tool == "gradmend"]
    for figure in figures(built):
        same = [a for a in ours if covered(a, figure.source, figure.tool)]
        found = detection(same, Level.ERROR)
        located = localization([a for a in same if a.truth.located])
        shares = (figure.noticed, figure.named, found.recall, located.three)
        size = f"{figure.cases}/{figure.noticed.units:g}"
        table.add_row(figure.source, figure.tool, size, *map(str, shares))
    return table


def time_table(shown: Sequence[View], title: str) -> Table:
    table = plain_table(title, "tool", "cases", "median", "quartiles", "longest")
    for view in shown:
        ratios = [a.seconds / a.step_seconds for a in view.answers if a.status == "ran"]
        if len(ratios) > 1:
            low, middle, high = quantiles(ratios, n=4)
            row = (f"{middle:.0f}", f"{low:.0f} to {high:.0f}", f"{max(ratios):.0f}")
            table.add_row(view.name, str(len(ratios)), *row)
    return table


def mistakes(answers: Sequence[Answer]) -> Iterator[str]:
    """Each buggy case without an alarm, each control with one, and each that did not run."""
    for answer in answers:
        if answer.status == "not built":
            continue
        buggy, alarm = answer.truth.verdict == "buggy", answer.alarm(Level.ERROR)
        if answer.status == "failed" or buggy != alarm:
            kind = answer.problem or ("missed" if buggy else f"false alarm ({answer.truth.verdict})")
            yield f"{answer.tool}  {answer.truth.id}  {kind}"
            yield from _details(answer)


def _details(answer: Answer) -> Iterator[str]:
    known = answer.truth
    yield f"    labelled: {', '.join(known.parts) or '-'}  ({', '.join(known.faults) or 'no label'})"
    for claim in answer.claims:
        yield f"    {claim.level.name.lower():8}{claim.rule} [{', '.join(claim.parts)}] {claim.sentence}"
