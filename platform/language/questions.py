"""Every question that the labels of a row can answer, with its answer; the words are those of `models.instructions`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from omnimri.models.boxes import Box
from omnimri.models.instructions import (
    CHOICE,
    DIFFERENTIAL,
    FOREIGN,
    NAMED,
    NEAR,
    REFUSAL,
    YES_NO,
    Topic,
    lettered,
    with_options,
)
from omnimri.models.prompts import diagnosis_answer
from omnimri.models.vocabulary import DIAGNOSES, FINDINGS, NORMAL, PLANES
from omnimri.platform.language.derive import finding_phrase
from omnimri.platform.language.evidence import Evidence
from omnimri.platform.language.measure import Measured
from omnimri.platform.language.words import CONTRASTS_IN_WORDS, finding_field, number_of_mm, plain_name

QuestionKind = Literal["yes-no", "choice", "named", "differential", "refusal"]

KIND_WEIGHTS: Mapping[QuestionKind, float] = {
    "yes-no": 0.4, "choice": 0.3, "named": 0.1, "differential": 0.1, "refusal": 0.1,
}  # fmt: skip
"""Chance of each kind where a row has all."""

MAX_OPTIONS = 4
SIGNALS = ("hypointense", "isointense", "hyperintense")
_PLACES = {
    frozenset({"left"}): "left side", frozenset({"right"}): "right side", frozenset({"midline"}): "midline",
    frozenset({"left", "right"}): "both sides", frozenset({"left", "right", "midline"}): "both sides",
}  # fmt: skip
_TOLD_APART = ("T1w", "T2w", "FLAIR", "PD")
_ALIKE = frozenset({"T2w", "FLAIR"})
"""FLAIR is T2-weighted, so neither is wrong of the other."""
_SHORTER, _LONGER = 0.6, 1.6
"""Lengths that are asked for, as shares of the true one: far enough from it to be told by eye."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing to ask, and what follows from the labels."""

    kind: QuestionKind
    name: str
    """Of the topic: `side`, `count`."""
    topic: Topic
    verdict: str
    """What is balanced: `yes` or `no`, the right option, `boxes` or `none`."""
    labels: Mapping[str, str]
    """Column to what of it the answer follows from."""
    slots: Mapping[str, str] = field(default_factory=dict)
    """What fills the braces of the topic's words."""
    options: tuple[str, ...] = ()
    """Of a choice, the wrong ones."""
    boxes: tuple[Box, ...] = ()
    """Of a detection."""

    def asked(self, rng: np.random.Generator) -> tuple[str, str]:
        """One phrasing and the answer to it in words, which a detection has none of."""
        phrase = self.topic.phrasings[int(rng.integers(len(self.topic.phrasings)))].format(**self.slots)
        if self.kind == "choice":
            return self._with_options(phrase, rng)
        key = self.verdict if self.kind == "yes-no" else ""
        answer = self.topic.answers[key].format(**self.slots) if self.topic.answers else ""
        return _sentence(phrase), ". ".join(map(_sentence, answer.split(". ")))

    def _with_options(self, phrase: str, rng: np.random.Generator) -> tuple[str, str]:
        wrong = rng.permutation(len(self.options))[: MAX_OPTIONS - 1]
        options = [self.verdict, *(self.options[i] for i in wrong)]
        options = [options[i] for i in rng.permutation(len(options))]
        return with_options(_sentence(phrase), options), f"{lettered(options)[options.index(self.verdict)]}."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def questions(evidence: Evidence) -> list[Question]:
    """All questions of a row, in a fixed order; empty where nothing is known."""
    makers = (_findings, _abnormality, _diagnoses, _sides, _measures, _signals, _sites, _structures, _acquisition,
              _named, _refusals)  # fmt: skip
    return [question for make in makers for question in make(evidence)]


def draw_question(pool: list[Question], rng: np.random.Generator) -> Question:
    """One of them: first its kind, then its topic, then the answer, so that frequent ones do not win."""
    kinds = sorted({question.kind for question in pool}, key=list(KIND_WEIGHTS).index)
    weights = np.array([KIND_WEIGHTS[kind] for kind in kinds])
    kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
    left = [question for question in pool if question.kind == kind]
    for group in ("name", "verdict"):
        values = list(dict.fromkeys(getattr(question, group) for question in left))
        value = values[int(rng.integers(len(values)))]
        left = [question for question in left if getattr(question, group) == value]
    return left[int(rng.integers(len(left)))]


def slice_question(evidence: Evidence, rng: np.random.Generator) -> Question:
    """What can be asked of any volume."""
    count, is_more = len(evidence.known.image), bool(rng.random() < 0.5)
    limit = count // 2 if is_more else 2 * count
    return _yes_no("slices", is_more, {"image": str(count)}, limit=str(limit), truth=str(count))


def _yes_no(name: str, verdict: bool, labels: Mapping[str, str], **slots: str) -> Question:
    return Question(
        kind="yes-no", name=name, topic=YES_NO[name], verdict="yes" if verdict else "no", labels=labels, slots=slots
    )


def _choice(name: str, truth: str, wrong: list[str], labels: Mapping[str, str], **slots: str) -> Iterator[Question]:
    """A choice, unless nothing is wrong."""
    if wrong:
        yield Question(
            kind="choice", name=name, topic=CHOICE[name], verdict=truth, labels=labels, slots=slots,
            options=tuple(wrong),
        )  # fmt: skip


def _findings(evidence: Evidence) -> Iterator[Question]:
    for name, column in evidence.present.items():
        measured = evidence.lesions.get(name)
        phrase = finding_phrase(measured) if measured else f"There is {name}"
        yield _yes_no("finding", True, {column: name}, finding=name, phrase=phrase)
    for name in evidence.absent:
        yield _yes_no("finding", False, {"label_map": name}, finding=name)


def _abnormality(evidence: Evidence) -> Iterator[Question]:
    if evidence.abnormal is None:
        return
    found = list(evidence.present) or list(evidence.known.classes or ())
    columns = dict.fromkeys(evidence.present.values(), ", ".join(found))
    labels = columns or {"classes": ", ".join(evidence.known.classes or ())}
    yield _yes_no("abnormality", evidence.abnormal, labels, findings=", ".join(found))


def _diagnoses(evidence: Evidence) -> Iterator[Question]:
    """Only where one diagnosis of the vocabulary is stated: others of a longer list may hold as well."""
    classes = list(evidence.known.classes or ())
    if len(classes) != 1 or classes[0] not in DIAGNOSES:
        return
    truth, labels = classes[0], {"classes": classes[0]}
    others = [name for name in DIAGNOSES if name != truth]
    for name in DIAGNOSES:
        yield _yes_no("diagnosis", name == truth, labels, diagnosis=name, truth=truth)
    yield from _choice("diagnosis", truth, others, labels)
    if truth != NORMAL:
        yield Question(
            kind="differential", name="diagnosis", topic=DIFFERENTIAL, verdict=truth, labels=labels,
            slots={"candidates": ", ".join(_candidates(truth)), "answer": diagnosis_answer(truth)},
        )  # fmt: skip


_FIELD_OF = {name: finding_field(finding) for name, finding in zip(DIAGNOSES[1:], FINDINGS, strict=True)}


def _candidates(truth: str) -> list[str]:
    """The diagnosis among two others, those of the same kind of finding first, in the order of the vocabulary."""
    others = [name for name in _FIELD_OF if name != truth]
    nearest = sorted(others, key=lambda name: _FIELD_OF[name] != _FIELD_OF[truth])[:2]
    return [name for name in _FIELD_OF if name in (truth, *nearest)]


def _sides(evidence: Evidence) -> Iterator[Question]:
    for name, column in evidence.present.items():
        sides, labels = evidence.sides(name), {column: name}
        where = " and ".join(_WHERE[side] for side in _WHERE if side in sides)
        for side in ("left", "right") if sides else ():
            yield _yes_no("side", side in sides, labels, finding=name, side=side, where=where)
        if (place := _PLACES.get(sides)) is not None:
            wrong = [other for other in dict.fromkeys(_PLACES.values()) if other != place]
            yield from _choice("side", place, wrong, labels, finding=name)


_WHERE = {"left": "on the left side", "right": "on the right side", "midline": "in the midline"}


def _measures(evidence: Evidence) -> Iterator[Question]:
    """Counts and lengths, of label maps only: a lesion may have a box on each slice."""
    for measured in evidence.lesions.values():
        labels, finding, count = {"label_map": measured.name}, measured.name, measured.count
        yield _yes_no("count", count > 1, labels, finding=finding, count=str(count))
        near = [str(number) for number in range(max(1, count - 3), count + 4) if number != count]
        yield from _choice("count", str(count), near, labels, finding=finding)
        extent = number_of_mm(measured.extent_mm)
        for is_longer, limit in _limits(measured):
            yield _yes_no("size", is_longer, labels, finding=finding, limit=str(limit), extent=extent)


def _limits(measured: Measured) -> Iterator[tuple[bool, int]]:
    """Whole millimetres below and above the length, and whether it is longer."""
    if (below := math.floor(measured.extent_mm * _SHORTER)) >= 1:
        yield True, below
    yield False, math.ceil(measured.extent_mm * _LONGER)


def _signals(evidence: Evidence) -> Iterator[Question]:
    for measured in evidence.lesions.values():
        if not measured.signal:
            continue
        slots = {"finding": measured.name, "reference": measured.reference}
        labels = {"label_map": measured.name, "image": measured.signal}
        for signal in SIGNALS:
            yield _yes_no("signal", signal == measured.signal, labels, signal=signal, truth=measured.signal, **slots)
        wrong = [signal for signal in SIGNALS if signal != measured.signal]
        yield from _choice("signal", measured.signal, wrong, labels, **slots)


def _sites(evidence: Evidence) -> Iterator[Question]:
    for measured in evidence.lesions.values() if evidence.volume else ():
        if measured.site and evidence.volume:
            wrong = [name for name in evidence.volume.structures if name != measured.site]
            yield from _choice("site", measured.site, wrong, {"label_map": measured.name}, finding=measured.name)


def _structures(evidence: Evidence) -> Iterator[Question]:
    """Only where a structure that the label map was drawn for is not there, else the answer were always yes."""
    unseen = evidence.unseen_structures
    for name in evidence.volume.structures if evidence.volume and unseen else ():
        yield _yes_no("structure", True, {"label_map": name}, structure=name)
    for name in unseen:
        yield _yes_no("structure", False, {"label_map": name}, structure=name)


def _acquisition(evidence: Evidence) -> Iterator[Question]:
    facts = evidence.known.facts
    contrast, plane = facts.get("contrast"), facts.get("plane")
    if contrast in _TOLD_APART and not facts.get("quantitative"):
        wrong = [name for name in _TOLD_APART if name != contrast and {name, contrast} != _ALIKE]
        yield from _fact("contrast", contrast, wrong, CONTRASTS_IN_WORDS)
    if plane in PLANES:
        yield from _fact("plane", plane, [name for name in PLANES if name != plane], {})


def _fact(column: str, truth: str, wrong: list[str], words: Mapping[str, str]) -> Iterator[Question]:
    said, labels = words.get(truth, truth), {column: truth}
    for value in (truth, *wrong):
        yield _yes_no(column, value == truth, labels, truth=said, **{column: words.get(value, value)})
    yield from _choice(column, said, [words.get(value, value) for value in wrong], labels)


def _named(evidence: Evidence) -> Iterator[Question]:
    """Detection of one kind of finding, there or not."""
    places = evidence.boxes
    if places is None:
        return
    column = evidence.boxes_follow_from
    for name in dict.fromkeys([*(plain_name(box.label) for box in places), *evidence.absent]):
        boxes = tuple(box for box in places if plain_name(box.label) == name)
        yield Question(
            kind="named", name="finding", topic=NAMED, verdict="boxes" if boxes else "none", slots={"finding": name},
            labels={column if boxes else "label_map": name}, boxes=boxes,
        )  # fmt: skip


def _refusals(evidence: Evidence) -> Iterator[Question]:
    shown = evidence.known.facts.get("body_part") or ""
    if shown not in NEAR:
        return
    for other, findings in FOREIGN.items():
        if other == shown or other in NEAR[shown]:
            continue
        for topic, name in ((topic, name) for topic in REFUSAL for name in findings):
            yield Question(
                kind="refusal", name=topic.task, topic=topic, verdict=other, labels={"body_part": shown},
                slots={"finding": name, "shown": shown, "other": other},
            )  # fmt: skip
