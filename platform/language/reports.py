"""A report made of labels, for rows that have labels and no report: technique, findings, impression.

Findings stand in the order of the paper's example: joint space, menisci, cartilage, bone marrow, ligaments, soft
tissue, then what else there is. A recommendation is left out: labels do not know it.
"""

from __future__ import annotations

from collections.abc import Iterator

from omnimri.models.vocabulary import NORMAL
from omnimri.platform.language.derive import finding_phrase, sequence_words
from omnimri.platform.language.evidence import Evidence
from omnimri.platform.language.words import REPORT_ORDER, one_line


def derived_report(evidence: Evidence) -> tuple[str, dict[str, str]] | None:
    """The text, and what it follows from by column; None where the labels say nothing of findings."""
    findings = list(_findings(evidence))
    impression = _impression(evidence)
    if not impression:
        return None
    sections = {"Technique": _technique(evidence), "Findings": " ".join(findings), "Impression": impression}
    text = " ".join(f"{title}: {words}" for title, words in sections.items() if words)
    return text, _follows_from(evidence)


def _technique(evidence: Evidence) -> str:
    facts = evidence.known.facts
    sequence, _, agent = sequence_words(facts).partition(", ")
    words = " ".join(filter(None, (facts.get("plane"), sequence, facts.get("body_part"), "MRI")))
    return f"{', '.join(filter(None, (words[:1].upper() + words[1:], agent)))}."


def _findings(evidence: Evidence) -> Iterator[str]:
    for name in sorted(evidence.present, key=report_place):
        measured = evidence.lesions.get(name)
        sides = sorted(evidence.sides(name))
        told = finding_phrase(measured) if measured else ", ".join([name, *sides])
        signal = f", {measured.signal} to {measured.reference}" if measured and measured.signal else ""
        yield f"{told[:1].upper()}{told[1:]}{signal}."
    if evidence.absent:
        *most, last = evidence.absent
        yield f"No {', '.join(most)} or {last}." if most else f"No {last}."


def _impression(evidence: Evidence) -> str:
    """Diagnoses where they are known, else the findings, else that what was looked for is not there."""
    classes = [one_line(name) for name in evidence.known.classes or ()]
    if classes == [NORMAL]:
        return "Normal." if evidence.abnormal is False else ""
    named = classes or sorted(evidence.present, key=report_place)
    if named:
        listed = ", ".join(named)
        return f"{listed[:1].upper()}{listed[1:]}."
    return "None of the findings looked for." if evidence.absent and not evidence.has_specks else ""


def _follows_from(evidence: Evidence) -> dict[str, str]:
    columns: dict[str, list[str]] = {}
    for name, column in evidence.present.items():
        columns.setdefault(column, []).append(name)
    for name in evidence.absent:
        columns.setdefault("label_map", []).append(f"no {name}")
    if evidence.known.classes:
        columns["classes"] = list(evidence.known.classes)
    return {column: ", ".join(names) for column, names in columns.items()}


def report_place(name: str) -> int:
    """Where a finding stands in a report, by the words of its name."""
    words = set(name.replace("/", " ").split())
    return next((place for place, known in enumerate(REPORT_ORDER) if words & known), len(REPORT_ORDER))
