"""What research tools found in the same programs, as it was published.

They ran on the original programs, in Keras and on the original data, and on buggy ones only: how many false
alarms they gave is not published for these programs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.corpora.answers import Answer
from benchmarks.corpora.cases import Json
from benchmarks.corpora.scoring import Estimate, over_groups

Verdict = bool | None
"""None where nothing is published."""

SOURCES = {
    "deepmufl": "Ghanbari et al., ASE 2023, https://github.com/ali-ghanbari/deepmufl-ase-2023",
    "DeepFD": "Cao et al., ICSE 2022, https://github.com/ArabelaTso/DeepFD",
    "DeepDiagnosis": "Wardat et al., ICSE 2022, https://github.com/DeepDiagnosis/ICSE2022",
    "study": "independent, EMSE 2025, https://github.com/dlfaults/dnn-auto-fl-empirical-assesment",
}
"""Who published: the first three are the authors of a tool, which they compare with others."""

_FIELDS = {"DeepFD_Evaluation.xlsx": "DeepFD", "DeepDiagnosis_Table6": "DeepDiagnosis"}


@dataclass(frozen=True)
class Figure:
    """One tool by one source: whether it noticed the fault, and whether it named it, in so many programs."""

    source: str
    tool: str
    cases: int
    noticed: Estimate
    named: Estimate


def figures(answers: Sequence[Answer]) -> list[Figure]:
    """All that is published of the buggy programs among these, each once."""
    known = {answer.truth.id: answer for answer in answers if answer.truth.verdict == "buggy"}.values()
    keys = dict.fromkeys(key for answer in known for key in verdicts(answer.truth.published))
    return [_figure(source, tool, list(known)) for source, tool in sorted(keys)]


def covered(answer: Answer, source: str, tool: str) -> bool:
    """Whether this source says if the tool noticed the fault of this program."""
    return verdicts(answer.truth.published).get((source, tool), (None, None))[0] is not None


def _figure(source: str, tool: str, known: Sequence[Answer]) -> Figure:
    def share(member: int) -> tuple[int, Estimate]:
        found = [(a, verdicts(a.truth.published).get((source, tool), (None, None))[member]) for a in known]
        told = {a.truth.id: value for a, value in found if value is not None}
        chosen = [a for a in known if a.truth.id in told]
        return len(chosen), over_groups(chosen, lambda a: told[a.truth.id])

    (cases, noticed), (_, named) = share(0), share(1)
    return Figure(source, tool, cases, noticed, named)


def verdicts(published: Json) -> dict[tuple[str, str], tuple[Verdict, Verdict]]:
    """By source and tool, whether it noticed the fault of one program and whether it named it."""
    found: dict[tuple[str, str], tuple[Verdict, Verdict]] = {}
    for field, row in published.items():
        if field.startswith("FL_study"):
            found |= {("study", tool): pair for tool, pair in _study(row)}
        elif field in _FIELDS:
            found |= {(_FIELDS[field], tool): pair for tool, pair in _sheet(row)}
        else:
            noticed = row.get("detected", row.get("detected_any_config"))
            found["deepmufl", field] = (_verdict(noticed), None)
    return found


def _sheet(row: Json) -> Iterator[tuple[str, tuple[Verdict, Verdict]]]:
    noticed = row.get("fault_detected") or row["bug_identified"]
    named = row.get("fault_type_diagnosed") or row["fault_localised"]
    for tool in noticed:
        yield tool, (_verdict(noticed[tool]), _verdict(named.get(tool)))


def _study(row: Json) -> Iterator[tuple[str, tuple[Verdict, Verdict]]]:
    """Faults in codes such as `ACH(2), HLR`; the layers in brackets are not compared."""
    for tool, told in row.items():
        if tool not in ("id", "GT") and told != "N/A":
            yield tool, (told != "-", bool(_codes(told) & _codes(row["GT"])))


def _codes(text: str) -> set[str]:
    return set(re.findall(r"[A-Z]{3}", text))


def _verdict(value: object) -> Verdict:
    return None if value is None else bool(value)
