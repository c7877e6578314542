"""The words of instructions and their answers, as data: phrasings per task, questions, options, refusals, context.

Braces are filled from what a volume is labelled with (`omnimri.platform.language.questions`); nothing here knows an
image. The first phrasing of a task is the one that serving and evaluation use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "reconstruct": (
        "Reconstruct the image from this under-sampled MRI data.",
        "Recover the fully sampled image from these k-space lines.",
        "Remove the aliasing and reconstruct this acquisition.",
        "Reconstruct this accelerated scan.",
        "Some k-space lines were skipped. Give the image without aliasing.",
        "From this undersampled k-space, reconstruct what a full acquisition would show.",
    ),
    "segment": (
        "Segment the {structure} in this MRI.",
        "Outline the {structure}.",
        "Give a mask of the {structure} in this volume.",
        "Delineate the {structure} on every slice.",
        "Draw the contour of the {structure}.",
        "Please segment the {structure}.",
    ),
    "detect": (
        "Identify and localize any lesion in this image.",
        "Where are the abnormalities in this MRI? Answer with boxes.",
        "Detect every lesion and give its bounding box.",
        "Localize all findings in this volume.",
        "Detect what is abnormal here.",
        "Give bounding boxes of all lesions, or an empty list.",
    ),
    "diagnose": (
        "Provide your diagnosis of this MRI volume.",
        "What is the most likely diagnosis?",
        "Which disease does this MRI suggest?",
        "Diagnose this patient from the image.",
        "State the most likely diagnosis for this examination.",
        "What diagnosis would you suggest here?",
    ),
    "report": (
        "Generate a diagnostic report based on this MRI scan.",
        "Write the radiology report of this examination.",
        "Report this MRI.",
        "Dictate a report with findings and impression.",
        "Please write a structured report of this scan.",
        "Report the findings and your impression.",
    ),
    "describe": (
        "Describe this MRI on five levels, as JSON.",
        "Give a structured description of this volume as JSON.",
        "Write the five-level description of this scan.",
        "Describe this volume level by level, as one JSON object.",
        "Fill in the description template for this MRI.",
        "Describe this examination in JSON: acquisition, anatomy, signal, findings, impression.",
    ),
}
"""The plain phrasings of the five tasks of the paper's Table 1, and of the report in its structured form."""

FIRST_SHARE = 0.8
"""Chance of the first phrasing of a task, which is what is asked by default; the others share the rest."""


@dataclass(frozen=True, kw_only=True)
class Topic:
    """What may be asked about one property, and how it is answered."""

    task: str
    """Of the five."""
    phrasings: tuple[str, ...]
    answers: Mapping[str, str]
    """Verdict to the sentence that follows from it."""
    hides: tuple[str, ...] = ()
    """Context that would give the answer away."""


YES_NO: dict[str, Topic] = {
    "finding": Topic(
        task="diagnose",
        phrasings=(
            "Is there any {finding} in this image?",
            "Does this MRI show any {finding}?",
            "Does this image suggest {finding}?",
            "Can {finding} be seen in this volume? Answer yes or no.",
        ),
        answers={"yes": "Yes. {phrase}.", "no": "No. There is no {finding}."},
    ),
    "abnormality": Topic(
        task="diagnose",
        phrasings=(
            "Is there any abnormality in this image?",
            "Is this MRI abnormal?",
            "Does this examination show anything abnormal? Answer yes or no.",
        ),
        answers={"yes": "Yes. It shows {findings}.", "no": "No. There is no abnormality."},
    ),
    "diagnosis": Topic(
        task="diagnose",
        phrasings=(
            "Is {diagnosis} the most likely diagnosis?",
            "Is {diagnosis} what this MRI suggests most? Answer yes or no.",
        ),
        answers={"yes": "Yes. Most likely diagnosis: {truth}.", "no": "No. Most likely diagnosis: {truth}."},
    ),
    "side": Topic(
        task="diagnose",
        phrasings=(
            "Is there any {finding} on the patient's {side} side?",
            "Does the {side} side show any {finding}? Answer yes or no.",
            "Has the patient any {finding} on the {side}?",
        ),
        answers={"yes": "Yes. There is {finding} on the {side} side.", "no": "No. It lies {where}."},
    ),
    "count": Topic(
        task="diagnose",
        phrasings=(
            "Is there more than one focus of {finding}?",
            "Are there several foci of {finding}? Answer yes or no.",
        ),
        answers={"yes": "Yes. There are {count}.", "no": "No. There is 1."},
    ),
    "size": Topic(
        task="diagnose",
        phrasings=(
            "Is the largest focus of {finding} more than {limit} mm long?",
            "Does any {finding} measure more than {limit} mm along the image axes?",
        ),
        answers={"yes": "Yes. The largest measures {extent} mm.", "no": "No. The largest measures {extent} mm."},
    ),
    "signal": Topic(
        task="diagnose",
        phrasings=(
            "Is the {finding} {signal} to {reference}?",
            "Does the {finding} appear {signal} relative to {reference}? Answer yes or no.",
        ),
        answers={"yes": "Yes. It is {truth}.", "no": "No. It is {truth}."},
    ),
    "structure": Topic(
        task="diagnose",
        phrasings=(
            "Is {structure} seen in this volume?",
            "Does this volume show {structure}? Answer yes or no.",
        ),
        answers={"yes": "Yes. It shows {structure}.", "no": "No. {structure} is not seen."},
    ),
    "contrast": Topic(
        task="diagnose",
        phrasings=("Is this a {contrast} image?", "Does this image have {contrast} contrast? Answer yes or no."),
        answers={"yes": "Yes. It is {truth}.", "no": "No. It is {truth}."},
        hides=("contrast",),
    ),
    "plane": Topic(
        task="diagnose",
        phrasings=("Were these slices acquired in the {plane} plane?", "Is this volume {plane}?"),
        answers={"yes": "Yes. It is {truth}.", "no": "No. It is {truth}."},
        hides=("plane",),
    ),
    "slices": Topic(
        task="diagnose",
        phrasings=("Does this volume have more than {limit} slices?", "Are there more than {limit} slices?"),
        answers={"yes": "Yes. It has {truth}.", "no": "No. It has {truth}."},
    ),
}
"""Questions that are answered by yes or no, with the reason."""

CHOICE: dict[str, Topic] = {
    "diagnosis": Topic(
        task="diagnose",
        phrasings=("Which diagnosis is the most likely?", "What does this MRI suggest?"),
        answers={},
    ),
    "side": Topic(
        task="diagnose",
        phrasings=("Where does the {finding} lie?", "On which side is the {finding}?"),
        answers={},
    ),
    "count": Topic(
        task="diagnose",
        phrasings=("How many foci of {finding} are there?", "What is the number of foci of {finding}?"),
        answers={},
    ),
    "signal": Topic(
        task="diagnose",
        phrasings=(
            "How does the {finding} appear relative to {reference}?",
            "What is the signal of the {finding} compared with {reference}?",
        ),
        answers={},
    ),
    "site": Topic(
        task="diagnose",
        phrasings=("What mostly surrounds the {finding}?", "Which structure is around most of the {finding}?"),
        answers={},
    ),
    "contrast": Topic(
        task="diagnose",
        phrasings=("Which contrast does this image have?", "How is this image weighted?"),
        answers={},
        hides=("contrast",),
    ),
    "plane": Topic(
        task="diagnose",
        phrasings=("In which plane were these slices acquired?", "Which plane is this?"),
        answers={},
        hides=("plane",),
    ),
}
"""Questions with options, of which one is right; the answer is its letter and its words."""

NAMED = Topic(
    task="detect",
    phrasings=(
        "Identify and localize any {finding} in this image.",
        "Detect {finding} and give a bounding box for each.",
        "Localize {finding} in this volume, or answer with an empty list.",
    ),
    answers={},
)
"""Detection of one kind of finding; the answer is a list of boxes, empty where there is none."""

DIFFERENTIAL = Topic(
    task="diagnose",
    phrasings=(
        "Give a differential diagnosis, then the most likely one.",
        "Name the diagnoses to consider, and then the most likely diagnosis.",
    ),
    answers={"": "Differential diagnosis: {candidates}. {answer}"},
)
"""Candidates before the most likely one, as the paper shows it."""

REFUSAL = (
    Topic(
        task="diagnose",
        phrasings=("Does this image show any {finding}?", "Is there {finding} in this MRI? Answer yes or no."),
        answers={"": "This question does not fit the image: it shows the {shown}, not the {other}."},
    ),
    Topic(
        task="detect",
        phrasings=("Identify and localize any {finding} in this image.", "Detect any {finding} in this {other} MRI."),
        answers={"": "This does not fit the image: it shows the {shown}, not the {other}."},
    ),
)
"""What is said where a question is about another part of the body."""

FOREIGN: dict[str, tuple[str, ...]] = {
    "brain": ("brain metastasis", "multiple sclerosis"),
    "spine": ("disc herniation", "spinal canal stenosis"),
    "breast": ("breast carcinoma",),
    "knee": ("meniscal tear", "anterior cruciate ligament tear"),
    "prostate": ("prostate cancer",),
    "heart": ("myocardial scar", "left ventricular thrombus"),
    "liver": ("hepatic cyst", "hepatocellular carcinoma"),
    "shoulder": ("rotator cuff tear",),
    "ankle": ("Achilles tendon rupture",),
    "wrist": ("scaphoid fracture",),
}
"""Body part to findings that only it can have."""

FOREIGN_STRUCTURES: dict[str, tuple[str, ...]] = {
    "brain": ("hippocampus", "corpus callosum"),
    "breast": ("fibroglandular tissue", "nipple"),
    "knee": ("medial meniscus", "patella", "femur"),
    "prostate": ("prostate", "seminal vesicles"),
    "heart": ("left ventricular myocardium", "right atrium"),
    "liver": ("liver", "gallbladder", "kidney"),
    "shoulder": ("supraspinatus tendon", "acromion"),
    "ankle": ("Achilles tendon", "talus"),
    "wrist": ("scaphoid", "lunate"),
}
"""Body part to structures that only it, or what is near it, can show."""

NEAR: dict[str, frozenset[str]] = {
    "brain": frozenset({"spine"}),
    "neck": frozenset({"brain", "spine", "shoulder"}),
    "spine": frozenset({"brain", "heart", "liver", "shoulder", "prostate"}),
    "breast": frozenset({"heart", "liver", "shoulder", "spine"}),
    "heart": frozenset({"breast", "liver", "spine", "shoulder"}),
    "chest": frozenset({"breast", "heart", "liver", "spine", "shoulder"}),
    "liver": frozenset({"heart", "spine", "breast"}),
    "abdomen": frozenset({"heart", "liver", "spine", "breast", "prostate"}),
    "pelvis": frozenset({"prostate", "spine"}),
    "prostate": frozenset({"spine"}),
    "hip": frozenset({"prostate", "spine"}),
    "shoulder": frozenset({"breast", "spine", "heart"}),
    "knee": frozenset(),
    "ankle": frozenset(),
    "wrist": frozenset(),
}
"""Body part to those that its images may show in part; a question about these is not refused. A part that is not
listed may show anything."""

CHOOSE = "Choose one: {options}."
OUTLINED = "outlined"
"""Fact of a scan: what the image decoder has drawn of it, in words (`omnimri.platform.language.outline`)."""

_BRACES = re.compile(r"\{\w+\}")
_ASKS = re.compile(
    r"^(?:is|are|does|has|have|was|were|do (?:you see|these|the)|(?:can|could) (?!you\b))\b|choose one:|yes or no",
    flags=re.IGNORECASE,
)


def is_question(instruction: str) -> bool:
    """Whether an instruction is answered by yes, no or one of its options, by its words."""
    return _ASKS.search(instruction.strip()) is not None


def question_texts() -> Iterator[str]:
    """The words of every question, answer and context without what fills them, for the tokenizer."""
    for topic in (*YES_NO.values(), *CHOICE.values(), NAMED, DIFFERENTIAL, *REFUSAL):
        yield from (_BRACES.sub("", text) for text in (*topic.phrasings, *topic.answers.values()))
    yield from (CHOOSE.format(options=""), "with 4x acceleration. History: 58-year-old woman.")
    yield "Outlined: 2 lesions, up to 14 mm, 1.3 mL, hyperintense to white matter, in grey matter: left [0]; right [9]."
    yield "Outlined: no lesion."


def with_options(question: str, options: Sequence[str]) -> str:
    """A question with its options, lettered from A."""
    return f"{question} {CHOOSE.format(options=', '.join(lettered(options)))}"


def lettered(options: Sequence[str]) -> list[str]:
    """`A) left side`, `B) right side`."""
    return [f"{chr(ord('A') + number)}) {option}" for number, option in enumerate(options)]


def context_sentence(facts: Mapping[str, object]) -> str:
    """What is known before looking, with a blank behind it: plane, contrast, acceleration and history.

    Then what the image decoder has drawn, where it was asked to.
    """
    known = [str(facts[key]) for key in ("plane", "contrast") if facts.get(key)]
    acceleration = f" with {facts['acceleration']}x acceleration" if facts.get("acceleration") else ""
    scan = " ".join([*known, "MRI"])
    told = [
        f"This is {'an' if scan[0] in 'aeiouM' else 'a'} {scan}{acceleration}. " if known or acceleration else "",
        f"History: {facts['history']} " if facts.get("history") else "",
        f"Outlined: {facts[OUTLINED]} " if facts.get(OUTLINED) else "",
    ]
    return "".join(told)
