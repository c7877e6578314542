"""What is said to the model and what it answers: how instructions are read, and the layout of a token sequence."""

# N visual tokens, K query tokens

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from omnimri.models import special_tokens as special
from omnimri.models.instructions import FIRST_SHARE, INSTRUCTIONS, context_sentence, is_question
from omnimri.models.vocabulary import DIAGNOSES, IMAGE_TASKS, STRUCTURES, TASKS

if TYPE_CHECKING:  # seconds to import, and tasks that make samples need none of it
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position that no text loss is taken at."""

_WORDS = (special.RESPONSE, special.RESPONSE_END)
ANSWER_TAGS = {"detect": (special.BBOX, special.BBOX_END), "diagnose": _WORDS, "report": _WORDS}
"""What opens and what closes the answer of each text task."""

_TASK_WORDS = {
    "reconstruct": ("reconstruct", "under-sampled", "undersampled", "aliasing", "k-space"),
    "segment": ("segment", "outline", "mask of", "delineate", "contour"),
    "report": ("report", "description", "describe this"),
    "detect": ("detect", "locali", "where", "bounding box", "boxes"),
    "diagnose": ("diagnos", "disease", "suggest"),
}

_MOST_LIKELY = re.compile(r"most likely diagnosis:([^.]*)", flags=re.IGNORECASE)
_DIAGNOSIS = re.compile(rf"\b(?:{'|'.join(map(re.escape, DIAGNOSES))})\b")

_SYNONYMS = {
    "gray matter": "grey matter",
    "csf": "cerebrospinal fluid",
    "tumour": "lesion",
    "tumor": "lesion",
    "abnormality": "lesion",
    "infarct": "lesion",
    "plaque": "lesion",
    "haemorrhage": "lesion",
    "hemorrhage": "lesion",
}


def instruction_for(task: str, *, structure: str | None = None, rng: np.random.Generator | None = None) -> str:
    """An instruction of that task: the first phrasing, or a random one, which is the first one mostly.

    Raises:
        ValueError: If the task is unknown, or is `segment` without a structure.
    """
    if task not in INSTRUCTIONS:
        raise ValueError(f"Task {task!r} is unknown; known: {', '.join(INSTRUCTIONS)}.")
    phrasings = INSTRUCTIONS[task]
    first = rng is None or rng.random() < FIRST_SHARE
    phrase = phrasings[0] if rng is None or first else phrasings[int(rng.integers(1, len(phrasings)))]
    if task == "segment" and structure is None:
        raise ValueError(f"Task 'segment' needs a structure; known: {', '.join(STRUCTURES)}.")
    return phrase.format(structure=structure)


def task_of(instruction: str) -> str:
    """The task that a free instruction asks for, by its words.

    A question with an answer of its own (yes, no, an option) is a diagnosis in words, whatever it is about, unless
    something else is asked for behind its question mark: "Is there a lesion? Outline it."

    Raises:
        ValueError: If no task's words occur in it.
    """
    words, is_asked = instruction.lower(), is_question(instruction)
    if is_asked:
        words = words.partition("?")[2]
    for task, triggers in _TASK_WORDS.items():
        if any(trigger in words for trigger in triggers):
            return task
    if is_asked:
        return "diagnose"
    raise ValueError(
        f"The instruction names none of the tasks {', '.join(TASKS)}; say for example 'Segment the lesion.'"
    )


def structures_of(instruction: str) -> list[str]:
    """Structures that an instruction names, in the order of the vocabulary; empty if it names none."""
    words = instruction.lower()
    for synonym, name in _SYNONYMS.items():
        words = words.replace(synonym, name)
    return [name for name in STRUCTURES if name in words]


def diagnosis_answer(diagnosis: str) -> str:
    """The answer of the diagnosis task, without its tags."""
    return f"Most likely diagnosis: {diagnosis}."


def diagnosis_choices() -> list[str]:
    """What may follow the opening tag of a diagnosis, in the order of `DIAGNOSES`, for `Engine.score_choices`."""
    return [diagnosis_answer(name) + special.RESPONSE_END for name in DIAGNOSES]


def diagnosis_in(text: str) -> str | None:
    """The diagnosis that an answer states to be the most likely, else the first one that it names, or None."""
    stated = _MOST_LIKELY.search(text)
    named = _DIAGNOSIS.search(stated[1] if stated else text)
    return named[0] if named else None


def tagged(text: str) -> str:
    """A free-text answer in its tags."""
    return f"{special.RESPONSE}{text}{special.RESPONSE_END}"


def untagged(text: str) -> str:
    """A text answer as a person should see it."""
    for token in special.SPECIAL_TOKENS:
        text = text.replace(token, "")
    return text.strip()


Facts = Mapping[str, object]
"""What a header says of a volume."""


@dataclass(frozen=True)
class TokenSequence:
    """One sequence of the backbone."""

    token_ids: np.ndarray
    """Int64 `(L,)`; visual positions hold the image placeholder."""
    labels: np.ndarray
    """Int64 `(L,)`: the token itself where text loss is taken, IGNORED elsewhere."""
    positions: np.ndarray | None = None
    """Int64 `(L,)`: each token's place in its own sequence, where several share a row; None where one stands alone."""
    instruction: tuple[int, int] = (0, 0)
    """Half-open range of the user's own words, without the context that stands before them; empty without a turn."""


@dataclass(frozen=True)
class SequenceBuilder:
    """Lays out sequences for training and serving alike."""

    tokenizer: PreTrainedTokenizerBase
    num_visual: int
    """Placeholders per volume."""
    num_queries: int
    """Query tokens in an image answer."""
    num_slice_visual: int = 0
    """Placeholders per single slice."""

    def request(self, instruction: str, facts: Facts | Sequence[Facts], task: str) -> TokenSequence:
        """User turn with the volume and the instruction, open for the assistant.

        It ends in the queries of an image task, and in the tag that opens the answer of a text task.

        Args:
            instruction: Natural language.
            facts: Of the volume; of each, where the turn shows several contrasts of a study. The first is asked about.
            task: One of the five tasks.
        """
        answer = self._queries(task) if task in IMAGE_TASKS else ANSWER_TAGS[task][0]
        return self._turns(instruction, facts, task, (answer, False))

    def example(self, instruction: str, facts: Facts | Sequence[Facts], task: str, answer: str = "") -> TokenSequence:
        """A request with its answer, the answer labelled; the answer of an image task is its query span."""
        answer = self._queries(task) if task in IMAGE_TASKS else answer
        return self._turns(instruction, facts, task, (answer + special.TURN_END, True))

    def paired(self, text: str, *, image_first: bool) -> TokenSequence:
        """Volume and description in one sequence of stage 3, in either order, the text labelled."""
        return self.interleaved([text], image_first=image_first)

    def interleaved(
        self, texts: Sequence[str], *, image_first: bool, images_per_text: int = 1, kind: str = special.VOLUME
    ) -> TokenSequence:
        """Images and texts by turns in one sequence of stage 3, the texts labelled.

        Args:
            texts: In the order of their images.
            image_first: Whether images come before their text or after it.
            images_per_text: 1 for volumes with a text each; more where one text speaks of several slices.
            kind: `VOLUME` or `SLICE` of `special_tokens`.
        """
        parts: list[tuple[str, bool]] = []
        for text in texts:
            pair = [(self._vision(kind) * images_per_text, False), (text + special.TURN_END, True)]
            parts += pair if image_first else pair[::-1]
        return self._join(parts)

    def plain(self, text: str) -> TokenSequence:
        """Text alone, ending in the turn's end, as the text encoder takes it."""
        return self._join([(text + special.TURN_END, False)])

    def _turns(
        self, instruction: str, facts: Facts | Sequence[Facts], task: str, answer: tuple[str, bool]
    ) -> TokenSequence:
        kind = special.KSPACE if task == "reconstruct" else special.VOLUME
        volumes = [facts] if isinstance(facts, Mapping) else facts
        shown = "".join(self._vision(kind) + context_sentence(known) for known in volumes)
        before = f"{special.TURN_START}user\n{shown.removesuffix(' ')}"
        said = f"{' ' if shown.endswith(' ') else ''}{instruction}"  # a token of the vocabulary begins with its blank
        after = f"{special.TURN_END}\n{special.TURN_START}assistant\n"
        return self._join([(before, False), (said, False), (after, False), answer], instruction=1)

    def _vision(self, kind: str) -> str:
        count = self.num_slice_visual if kind == special.SLICE else self.num_visual
        return f"{kind}{special.VISION_START}{special.IMAGE_PAD * count}{special.VISION_END}"

    def _queries(self, task: str) -> str:
        start, end = (special.RECON, special.RECON_END) if task == "reconstruct" else (special.SEG, special.SEG_END)
        return start + "".join(f"<q{i}>" for i in range(self.num_queries)) + end

    def _join(self, parts: list[tuple[str, bool]], *, instruction: int | None = None) -> TokenSequence:
        """Texts, and whether each is labelled; `instruction` is the index of the user's own words."""
        ids: list[int] = []
        labels: list[int] = []
        said = (0, 0)
        for index, (text, labelled) in enumerate(parts):
            encoded = self.tokenizer.encode(text, add_special_tokens=False)
            if index == instruction:
                said = (len(ids), len(ids) + len(encoded))
            ids += encoded
            labels += encoded if labelled else [IGNORED] * len(encoded)
        token_ids, targets = np.array(ids, np.int64), np.array(labels, np.int64)
        unlabelled = [self.tokenizer.convert_tokens_to_ids(f"<q{i}>") for i in range(self.num_queries)]
        targets[np.isin(token_ids, unlabelled)] = IGNORED
        return TokenSequence(token_ids, targets, instruction=said)
