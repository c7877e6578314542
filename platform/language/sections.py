"""Sections of English radiology reports, and which of their statements are affirmed, negated or uncertain.

Negation follows NegEx (Chapman et al., J Biomed Inform 2001;34:301-310): a trigger before or after a finding negates
it, a pseudo-trigger looks like one and does not. The scope is that of ConText (Harkema et al., J Biomed Inform
2009;42:839-851): from the trigger to the end of the sentence or to a word that ends it, such as `but`. The lists are a
choice of those of NegEx, with what radiologists add.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

_HEADINGS = {
    "technique": ("technique", "procedure", "protocol", "sequences", "scan protocol", "examination technique"),
    "findings": ("findings", "description", "observations", "report"),
    "impression": (
        "impression", "impressions", "conclusion", "conclusions", "opinion", "summary", "interpretation",
        "impression and recommendation", "impression and recommendations", "diagnosis", "assessment",
    ),
    "recommendation": ("recommendation", "recommendations", "advice", "follow-up recommendation"),
    "history": (
        "history", "clinical history", "clinical information", "clinical details", "indication", "indications",
        "reason for exam", "reason for examination",
    ),
    "other": ("comparison", "comparisons", "exam", "examination", "contrast", "addendum", "limitations"),
}  # fmt: skip
_SECTION_OF = {heading: section for section, headings in _HEADINGS.items() for heading in headings}
_ANY_HEADING = "|".join(sorted(map(re.escape, _SECTION_OF), key=len, reverse=True))
_HEADING = re.compile(
    rf"(?:^[ \t]*|(?<=[.!?:;])[ \t]+)[*#_ ]*({_ANY_HEADING})[*_ ]*(?::[*_]*|[ \t]*$)",
    flags=re.IGNORECASE | re.MULTILINE,
)
"""A known word at the start of a line or after a sentence, with a colon behind it or nothing on its line."""


@dataclass(frozen=True, kw_only=True)
class Sections:
    """What a report says under each heading; empty where the heading is missing."""

    technique: str = ""
    findings: str = ""
    impression: str = ""
    recommendation: str = ""
    history: str = ""
    """Why the examination was asked for."""
    other: str = ""
    """Under headings that are not about the images, and before the first one."""


def split_sections(report: str) -> Sections:
    """Split a report at its headings, which may come in any order; parts under one heading are joined by lines."""
    headings = list(_HEADING.finditer(report))
    starts = [*(heading.start() for heading in headings), len(report)]
    parts: dict[str, list[str]] = {section: [] for section in _HEADINGS}
    parts["other"].append(report[: starts[0]])
    for heading, end in zip(headings, starts[1:], strict=True):
        parts[_SECTION_OF[heading[1].lower()]].append(report[heading.end() : end])
    texts = {section: "\n".join(filter(None, map(str.strip, texts))) for section, texts in parts.items()}
    return Sections(**texts)


_ABBREVIATION = re.compile(r"\b(?:dr|mr|mrs|e\.g|i\.e|vs|cf|approx|fig|no\. of|st)\.$", flags=re.IGNORECASE)
_BOUNDARY = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9(*-])|\n\s*(?=[-*•]|\d+[.)]\s|[A-Z])|\n\s*\n")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)](?=\s)|\(\d+\))\s*")


def sentences(text: str) -> list[str]:
    """Sentences without bullets, numbers in front and full stops; a line that goes on is one with the next."""
    found: list[str] = []
    pending = ""
    for piece in _BOUNDARY.split(text):
        pending = f"{pending} {piece}".strip()
        if _ABBREVIATION.search(pending) or re.fullmatch(r"\d+[.)]", pending):
            continue
        found.append(pending)
        pending = ""
    plain = (" ".join(_BULLET.sub("", sentence).split()).rstrip(".!? ") for sentence in [*found, pending])
    return list(filter(None, plain))


Certainty = Literal["affirmed", "negated", "uncertain"]


@dataclass(frozen=True)
class Statement:
    """A part of a sentence that has one certainty, without its trigger."""

    text: str
    certainty: Certainty


_PSEUDO = (
    "no increase", "no change", "no interval change", "no significant change", "no significant interval change",
    "no suspicious change", "no further", "not only", "not certain if", "not certain whether", "not necessarily",
    "not drain", "gram negative", "without difficulty", "without further", "without change", "without interval change",
    "unchanged", "no definite change", "not significantly changed",
)  # fmt: skip
_UNCERTAIN_BEFORE = (
    "rule out", "r/o", "to exclude", "cannot rule out", "can not rule out", "cannot exclude", "can not exclude",
    "cannot be certain", "not excluding", "does not exclude", "do not exclude", "possible", "possibly", "probable",
    "probably", "may represent", "might represent", "could represent", "may be", "might be", "could be",
    "questionable", "query", "suspicion of", "suspicious for", "concern for", "equivocal for", "versus",
    "no definite", "not certain for", "what must be ruled out is",
)  # fmt: skip
_UNCERTAIN_AFTER = (
    "cannot be excluded", "can not be excluded", "cannot be ruled out", "can not be ruled out", "is not excluded",
    "are not excluded", "not ruled out", "should be ruled out", "must be ruled out", "is to be ruled out",
    "should be excluded", "must be excluded", "is possible", "are possible", "is suspected", "are suspected",
    "is questionable",
)  # fmt: skip
_NEGATED_BEFORE = (
    "no", "not", "without", "no evidence of", "no evidence for", "no evidence to suggest", "no sign of", "no signs of",
    "no suggestion of", "no indication of", "no finding of", "no findings of", "no findings to indicate",
    "no radiographic evidence of", "no mri evidence of", "no new evidence of", "no other evidence of", "no new",
    "no abnormal", "no cause of", "no mammographic evidence of", "no significant", "no suspicious", "absence of",
    "negative for", "free of", "fails to reveal", "failed to reveal", "does not show", "do not show", "did not show",
    "does not demonstrate", "do not demonstrate", "not demonstrate", "not appear", "not appreciate", "not see",
    "not reveal", "not associated with", "rules out", "ruled out for", "rather than", "denies", "never had",
    "unremarkable for", "without evidence of", "without any evidence of", "without indication of", "without sign of",
    "nor", "neither", "none of", "lack of", "resolution of", "resolved", "never", "not known to have",
)  # fmt: skip
_NEGATED_AFTER = (
    "is not seen", "are not seen", "not seen", "is not identified", "are not identified", "not identified",
    "is not demonstrated", "are not demonstrated", "is not visualized", "are not visualized", "is not visualised",
    "are not visualised", "is not evident", "are not evident", "is not present", "are not present", "not detected",
    "is not detected", "are not detected", "is absent", "are absent", "is ruled out", "are ruled out", "was ruled out",
    "have been ruled out", "has been ruled out", "is excluded", "are excluded", "is unlikely", "are unlikely",
    "unlikely", "was negative", "is negative", "are negative", "has resolved", "have resolved",
)  # fmt: skip
_ENDS = (
    "but", "however", "nevertheless", "yet", "though", "although", "still", "except", "except for", "apart from",
    "aside from", "other than", "cause of", "causes of", "source of", "reason for", "secondary to", "due to",
    "which", "with the exception of", "as a cause of", "on the other hand", "otherwise",
)  # fmt: skip

_Role = Literal["pseudo", "end", "before", "after"]


def _trigger_table() -> dict[str, tuple[_Role, Certainty]]:
    lists: Sequence[tuple[Sequence[str], _Role, Certainty]] = (
        (_NEGATED_BEFORE, "before", "negated"), (_NEGATED_AFTER, "after", "negated"),
        (_UNCERTAIN_BEFORE, "before", "uncertain"), (_UNCERTAIN_AFTER, "after", "uncertain"),
        (_PSEUDO, "pseudo", "affirmed"), (_ENDS, "end", "affirmed"),
    )  # fmt: skip
    return {trigger: (role, certainty) for triggers, role, certainty in lists for trigger in triggers}


_TRIGGERS = _trigger_table()
_ANY_TRIGGER = re.compile(
    r"(?<![\w-])(?:" + "|".join(sorted(map(re.escape, _TRIGGERS), key=len, reverse=True)) + r")(?![\w-])|;",
    flags=re.IGNORECASE,
)
"""The longest trigger wins, so that `no change` is not read as `no`."""


def statements(sentence: str) -> list[Statement]:
    """The parts of a sentence with what is said of them.

    A trigger in front holds to the end of its clause, one behind from the clause's start or the trigger before it.
    Clauses that are both affirmed stay together: `infarct due to embolism` is one statement.
    """
    found: list[_Span] = []
    for span in (span for clause in _clauses(sentence) for span in _spans(sentence, *clause)):
        if found and found[-1].joins(span, sentence):
            found[-1] = _Span(found[-1].start, span.end, "affirmed")
        else:
            found.append(span)
    said = (Statement(_plain(sentence[span.start : span.end]), span.certainty) for span in found)
    return [statement for statement in said if any(map(str.isalpha, statement.text))]


@dataclass(frozen=True)
class _Span:
    """Characters of a sentence that have one certainty."""

    start: int
    end: int
    certainty: Certainty

    def joins(self, later: _Span, sentence: str) -> bool:
        """Both are affirmed, and no trigger but a word that ends scopes stands between them."""
        between = sentence[self.end : later.start].lower()
        return self.certainty == later.certainty == "affirmed" and _TRIGGERS.get(between, ("",))[0] == "end"


def _clauses(sentence: str) -> Iterator[tuple[int, int]]:
    """Start and end of the parts between what ends the scope of a trigger."""
    start = 0
    for match in _ANY_TRIGGER.finditer(sentence):
        if match[0] == ";" or _TRIGGERS[match[0].lower()][0] == "end":
            yield start, match.start()
            start = match.end()
    yield start, len(sentence)


def _spans(sentence: str, start: int, end: int) -> Iterator[_Span]:
    """What lies between the triggers of one clause."""
    certainty: Certainty = "affirmed"
    for match in _ANY_TRIGGER.finditer(sentence, start, end):
        role, said = _TRIGGERS[match[0].lower()]
        if role == "pseudo":
            continue
        yield _Span(start, match.start(), said if role == "after" else certainty)
        start, certainty = match.end(), said if role == "before" else "affirmed"
    yield _Span(start, end, certainty)


_HANGING = re.compile(
    r"^(?:and|or|with|there (?:is|are))\b|\b(?:and|or|with|is|are|there (?:is|are))$", flags=re.IGNORECASE
)


def _plain(text: str) -> str:
    """A part of a sentence without the words and signs that joined it to the rest."""
    return _HANGING.sub("", text.strip(" ,:.-")).strip(" ,:.-")


def affirmed(text: str) -> list[str]:
    """What a text states without negation or doubt, sentence by sentence."""
    return [said.text for line in sentences(text) for said in statements(line) if said.certainty == "affirmed"]
