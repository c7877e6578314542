"""Findings named in a report: a small negation-aware labeller, and the scores made from its labels.

A label is a pair of a finding of the vocabulary and the patient's side. The labeller reads the wording of short
structured reports; it knows negation, scope and side, not medicine. Its labels on the reference reports are compared
with the boxes where a row has both, so that a reader sees how far to trust it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise

from omnimri.models.vocabulary import FINDINGS

UNSTATED = "unstated"
"""Side of a finding whose side the text does not give."""

Label = tuple[str, str]
"""`(finding, side)`."""

PATTERNS = {
    "old infarct": r"infarct\w*|encephalomalaci\w+|lacun(?:e|es|ar)\b",
    "demyelinating plaque": r"demyelinat\w+(?:\s+(?:plaques?|lesions?|disease))?|plaques?\b|multiple sclerosis",
    "oedematous mass": r"\bmass(?:es)?\b(?! effect)|tumou?rs?\b|neoplas\w+|gliomas?\b|metastas[ei]s",
    "haemorrhage": r"ha?emorrhag\w+|ha?ematomas?\b|microbleeds?\b|bleed(?:ing|s)?\b",
}
"""How a report may name each finding, in British and American spelling."""

# Harmless phrases that look like a negation (pseudo-negation of NegEx), blanked before the scopes are read.
_PSEUDO_NEGATION = re.compile(
    r"(?:can ?not|could not|may not) be (?:excluded|ruled out)|not (?:be )?(?:excluded|ruled out)|not only|"
    r"no (?:significant |interval |relevant )?(?:change|increase|decrease|difference)(?: in| of)?|"
    r"without (?:any )?change"
)
_NEGATION_BEFORE = re.compile(
    r"\b(?:no|not|without|nor|neither|never|absence of|absent|negative for|free of|free from|rather than|instead of|"
    r"excludes?|excluding|to exclude|rules? out|ruled out|lack of|lacks?|unlikely|denies)\b"
)
_NEGATION_AFTER = re.compile(
    r"\b(?:(?:is|are|was|were) (?:not|absent|excluded|ruled out|unlikely)|"
    r"not (?:seen|identified|present|detected|found|demonstrated|visible|evident)|absent|ruled out|excluded)\b"
)
# A negation reaches to the end of its clause: a sentence end, a contrasting word, a comma that opens a new statement.
_CLAUSE_END = re.compile(
    r"[.;:!?\n]|\b(?:but|however|although|though|yet|except|apart from|aside from|other than|whereas)\b|"
    r",\s*(?=(?:and\s+)?(?:there|with|a|an|the|which|consistent|suggest\w*|compatible|in keeping)\b)"
)
_SENTENCE_END = re.compile(r"[.;!?\n]+(?=\s|$)|\n")
_SIDE = re.compile(r"\b(left|right|midline|median|bilateral(?:ly)?|both (?:hemispheres|sides|cerebral hemispheres))\b")
_JOINER = re.compile(r"\b(?:and|or|with)\b|[,;:]")
_PREPOSITION = re.compile(r"\b(?:in|on|of|at|within|involving|to|near|along|throughout)\b|\(")


@dataclass(frozen=True)
class Mention:
    """One place where a text names a finding; `start` and `end` are offsets in its sentence."""

    finding: str
    start: int
    end: int


def label_text(text: str) -> frozenset[Label]:
    """The findings that a text asserts, with the patient's side where it gives one.

    A finding that is asserted anywhere counts, also when another sentence denies it. "Cannot be excluded" asserts;
    "to exclude" does not. A mention without a side is dropped when the same finding stands elsewhere with one.
    """
    labels: set[Label] = set()
    for sentence in _SENTENCE_END.split(text.lower()):
        mentions = find_mentions(sentence)
        for mention in mentions:
            if not is_negated(sentence, mention):
                labels |= {(mention.finding, side) for side in sides_of(sentence, mention, mentions)}
    sided = {finding for finding, side in labels if side != UNSTATED}
    return frozenset(label for label in labels if label[1] != UNSTATED or label[0] not in sided)


def find_mentions(sentence: str) -> list[Mention]:
    """Findings named in a lower-case sentence, in order."""
    mentions = [
        Mention(finding, match.start(), match.end())
        for finding in FINDINGS
        for match in re.finditer(PATTERNS[finding], sentence)
    ]
    return sorted(mentions, key=lambda mention: mention.start)


def is_negated(sentence: str, mention: Mention) -> bool:
    """Whether a negation of the same clause covers the mention (NegEx: Chapman et al., J Biomed Inform 2001)."""
    plain = _PSEUDO_NEGATION.sub(lambda match: "#" * len(match.group()), sentence)
    before = _CLAUSE_END.split(plain[: mention.start])[-1]
    after = _CLAUSE_END.split(plain[mention.end :])[0]
    return bool(_NEGATION_BEFORE.search(before) or _NEGATION_AFTER.search(after))


def sides_of(sentence: str, mention: Mention, mentions: list[Mention]) -> set[str]:
    """Sides that belong to a mention: in its noun phrase, else after a preposition, else the sentence's only ones."""
    earlier = list(_SIDE.finditer(sentence, 0, mention.start))
    if earlier and not _JOINER.search(sentence, earlier[-1].end(), mention.start):
        return _side_names([earlier[-1].group()])
    limit = min((other.start for other in mentions if other.start >= mention.end), default=len(sentence))
    later = list(_SIDE.finditer(sentence, mention.end, limit))
    if later and _PREPOSITION.search(sentence, mention.end, later[0].start()):
        return _side_names(_joined_sides(sentence, later))
    if len({other.finding for other in mentions}) == 1:
        return _side_names([match.group() for match in _SIDE.finditer(sentence)]) or {UNSTATED}
    return {UNSTATED}


def _joined_sides(sentence: str, matches: list[re.Match[str]]) -> list[str]:
    """The first side, and those joined to it ("left frontal and right parietal lobe") before a new statement."""
    sides = [matches[0].group()]
    for previous, match in pairwise(matches):
        if _CLAUSE_END.search(sentence, previous.end(), match.start()):
            break
        sides.append(match.group())
    return sides


def _side_names(words: Iterable[str]) -> set[str]:
    names: set[str] = set()
    for word in words:
        both = word.startswith(("bilateral", "both"))
        names |= {"left", "right"} if both else {"midline" if word == "median" else word}
    return names


@dataclass(frozen=True)
class ReportCounts:
    """Counts of one report against its reference; pooled over reports they give every label score."""

    matched: int
    """Labels (finding and side) in both."""
    predicted: int
    """Labels in the model's text."""
    reference: int
    """Labels in the reference text."""
    supported_findings: int
    """Kinds of finding, whatever the side, in both."""
    predicted_findings: int
    reference_findings: int

    @property
    def agrees(self) -> bool:
        """Whether the two sets of labels are the same."""
        return self.matched == self.predicted == self.reference


def compare_reports(reference: str, prediction: str) -> ReportCounts:
    """Label both texts and count what they share."""
    wanted, got = label_text(reference), label_text(prediction)
    wanted_findings, got_findings = {label[0] for label in wanted}, {label[0] for label in got}
    return ReportCounts(
        matched=len(wanted & got),
        predicted=len(got),
        reference=len(wanted),
        supported_findings=len(wanted_findings & got_findings),
        predicted_findings=len(got_findings),
        reference_findings=len(wanted_findings),
    )


LEXICAL_PACKAGES = {"bleu4": ("sacrebleu", "sacrebleu"), "rouge_l": ("rouge_score", "rouge-score")}
"""Metric, and the module and package that compute it; both are optional and hold no weights."""


def missing_package(metric: str) -> str | None:
    """Name of the package to install before a lexical metric can be computed; None when it is there."""
    module, package = LEXICAL_PACKAGES[metric]
    return None if find_spec(module) else package


def bleu4(reference: str, prediction: str) -> float:
    """Sentence BLEU-4 of sacrebleu with its own tokenisation and exponential smoothing, in [0, 1]."""
    import sacrebleu

    return sacrebleu.sentence_bleu(prediction, [reference]).score / 100


def rouge_l(reference: str, prediction: str) -> float:
    """ROUGE-L F-measure of rouge-score, in [0, 1]."""
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure


LEXICAL = {"bleu4": bleu4, "rouge_l": rouge_l}
"""Lexical scores of a reference and an answer; they need the packages of LEXICAL_PACKAGES."""
