"""Instruction-response pairs of a row: the one function behind training (`platform.data.views`) and `omnimri instruct`.

The answer of every pair follows from the labels that it names; the answer of an image task is the image itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from omnimri.models import special_tokens as special
from omnimri.models.boxes import BoxCoder, boxes_to_text
from omnimri.models.preprocess import Preprocess
from omnimri.models.prompts import diagnosis_answer, instruction_for, tagged
from omnimri.models.vocabulary import LESION, NORMAL, TISSUES
from omnimri.platform.data.shards import row_to_scan
from omnimri.platform.language.evidence import Evidence
from omnimri.platform.language.questions import Question, draw_question, questions, slice_question
from omnimri.platform.language.reports import derived_report
from omnimri.platform.language.words import finding_field, plain_name

PLAIN = "plain"
"""Kind of a pair that asks for a whole task; the other kinds are those of `questions`."""

_FACT_SHARE, _ACCELERATION_SHARE, _HISTORY_SHARE = 0.85, 0.5, 0.15
"""Chances that a prompt carries what is known: a request may not know it."""
_DESCRIBED_FACTS = ("plane", "contrast")
"""Context that a description states."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One instruction and its answer."""

    task: str
    """Of the five; a description is a report in another form."""
    kind: str
    """`plain`, or a `QuestionKind`."""
    topic: str
    """What is asked about; empty for a plain task, but `description` for a report in that form."""
    instruction: str
    answer: str
    """With its tags; of an image task the tags alone."""
    verdict: str
    """Short form of the answer, by which answers are counted and balanced."""
    labels: Mapping[str, str]
    """Column of the row to what of it the answer follows from."""
    hides: tuple[str, ...] = field(default=())
    """Context that would give the answer away."""


def plain_tasks(evidence: Evidence) -> tuple[str, ...]:
    """Which of detect, diagnose, report and describe the labels of a row can answer."""
    answered = {
        "detect": evidence.boxes is not None,
        "diagnose": bool(evidence.known.classes),
        "report": bool(evidence.known.report) or derived_report(evidence) is not None,
        "describe": evidence.description is not None,
    }
    return tuple(task for task, is_known in answered.items() if is_known)


def plain_pair(task: str, row: Mapping[str, Any], evidence: Evidence, preprocess: Preprocess,
               rng: np.random.Generator) -> Pair:  # fmt: skip
    """One of `plain_tasks`, asked for as a whole."""
    answer, verdict, labels = _PLAIN_ANSWERS[task](row, evidence, preprocess)
    pair = Pair(
        task=task, kind=PLAIN, topic="", instruction=instruction_for(task, rng=rng), answer=answer, verdict=verdict,
        labels=labels,
    )  # fmt: skip
    return pair if task != "describe" else replace(pair, task="report", topic="description", hides=_DESCRIBED_FACTS)


def question_pair(question: Question, row: Mapping[str, Any], preprocess: Preprocess, rng: np.random.Generator) -> Pair:
    """A question in one of its phrasings, with its answer."""
    instruction, words = question.asked(rng)
    coded = question.kind == "named"
    answer = boxes_to_text(list(question.boxes), BoxCoder(row_to_scan(row), preprocess)) if coded else tagged(words)
    return Pair(
        task=question.topic.task, kind=question.kind, topic=question.name, instruction=instruction, answer=answer,
        verdict=question.verdict, labels=question.labels, hides=question.topic.hides,
    )  # fmt: skip


def draw_text_pair(
    row: Mapping[str, Any], preprocess: Preprocess, rng: np.random.Generator, *, tasks: Mapping[str, float],
    question_share: float,
) -> tuple[Pair, Evidence]:  # fmt: skip
    """One pair with an answer in text, as training takes it.

    Args:
        row: With the labels that it has.
        preprocess: Whose grid the boxes count in.
        rng: Of the sample.
        tasks: Chance of each plain task where a row has labels for all.
        question_share: Chance of a question instead of a plain task.

    Returns:
        The pair, and what it was made of. Where the labels answer nothing, it asks for the number of slices.
    """
    evidence = Evidence.of_row(row)
    weights = {task: tasks[task] for task in plain_tasks(evidence) if tasks.get(task)}
    if rng.random() < question_share or not weights:
        if pool := questions(evidence):
            return question_pair(draw_question(pool, rng), row, preprocess, rng), evidence
        if not weights:
            return question_pair(slice_question(evidence, rng), row, preprocess, rng), evidence
    chances = np.array(list(weights.values()))
    task = list(weights)[int(rng.choice(len(weights), p=chances / chances.sum()))]
    return plain_pair(task, row, evidence, preprocess, rng), evidence


def segment_pair(structure: str, rng: np.random.Generator) -> Pair:
    """An instruction to segment one structure; the mask is its answer."""
    return Pair(
        task="segment", kind=PLAIN, topic="", instruction=instruction_for("segment", structure=structure, rng=rng),
        answer=f"{special.SEG}{special.SEG_END}", verdict=structure, labels={"label_map": structure},
    )  # fmt: skip


def reconstruct_pair(rng: np.random.Generator) -> Pair:
    """An instruction to reconstruct; the fully sampled image is its answer."""
    return Pair(
        task="reconstruct", kind=PLAIN, topic="", instruction=instruction_for("reconstruct", rng=rng),
        answer=f"{special.RECON}{special.RECON_END}", verdict="image", labels={"kspace": "fully sampled"},
    )  # fmt: skip


def segmentable(label_names: Mapping[int, str]) -> list[str]:
    """Structures that may be asked for by name: tissues, other structures, and lesions where some were looked for."""
    names = list(dict.fromkeys(map(plain_name, label_names.values())))
    structures = [name for name in names if finding_field(name) is None]
    lesion = [LESION] if len(structures) < len(names) else []
    return [*(t for t in TISSUES if t in structures), *(s for s in structures if s not in TISSUES), *lesion]


def drawn_context(
    evidence: Evidence,
    rng: np.random.Generator,
    *,
    is_text: bool,
    hides: tuple[str, ...] = (),
    acceleration: int | None = None,
) -> dict[str, str | int]:
    """What the prompt carries besides the instruction, each part left out now and then; images have no history."""
    facts = evidence.known.facts
    known: dict[str, str | int | None] = {
        "plane": facts.get("plane"), "contrast": facts.get("contrast"), "acceleration": acceleration,
        "history": evidence.history,
    }  # fmt: skip
    shares = {"acceleration": _ACCELERATION_SHARE, "history": _HISTORY_SHARE if is_text else 0.0}
    kept = {name: rng.random() < shares.get(name, _FACT_SHARE) for name in known}
    return {name: value for name, value in known.items() if value and kept[name] and name not in hides}


def _detect(row: Mapping[str, Any], evidence: Evidence, preprocess: Preprocess) -> tuple[str, str, dict[str, str]]:
    boxes = evidence.boxes
    assert boxes is not None
    answer = boxes_to_text(boxes, BoxCoder(row_to_scan(row), preprocess))
    found = ", ".join(sorted({plain_name(box.label) for box in boxes})) or "none"
    return answer, "boxes" if boxes else "none", {evidence.boxes_follow_from: found}


def _diagnose(_: Mapping[str, Any], evidence: Evidence, __: Preprocess) -> tuple[str, str, dict[str, str]]:
    assert evidence.known.classes
    first = evidence.known.classes[0]
    return tagged(diagnosis_answer(first)), first, {"classes": first}


def _report(_: Mapping[str, Any], evidence: Evidence, __: Preprocess) -> tuple[str, str, dict[str, str]]:
    """The report as it was written, else one made of labels."""
    derived = None if evidence.known.report else derived_report(evidence)
    text, labels = derived or (str(evidence.known.report), {"report": "as written"})
    is_abnormal = True if derived and evidence.present else evidence.stated_abnormal
    return tagged(text), {True: "abnormal", False: NORMAL, None: "open"}[is_abnormal], labels


def _describe(_: Mapping[str, Any], evidence: Evidence, __: Preprocess) -> tuple[str, str, dict[str, str]]:
    description = evidence.description
    assert description is not None
    findings = any(phrase for phrase in description.pathological_findings.model_dump().values())
    return tagged(description.answer()), "findings" if findings else "none", {"description": "as written"}


_PLAIN_ANSWERS: dict[str, Callable[[Mapping[str, Any], Evidence, Preprocess], tuple[str, str, dict[str, str]]]] = {
    "detect": _detect,
    "diagnose": _diagnose,
    "report": _report,
    "describe": _describe,
}
