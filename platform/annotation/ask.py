"""What a vision-language model is asked about a volume: pictures, words, and the schema of its answer.

Level 2 is chosen from the terms of the body part, where it is known; level 3 is written freely in short phrases.
"""

# Z Y X voxels of the native grid

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from omnimri.models.geometry import to_canonical
from omnimri.platform.annotation.config import PictureConfig
from omnimri.platform.annotation.terms import terms_for
from omnimri.platform.language.derive import sequence_words
from omnimri.platform.language.description import TissueSignalCharacteristics, VisibleAnatomicalStructures

PROMPT_VERSION = "levels-2-3/1"
"""Raised with every change of the words, the terms, the schema or the pictures."""

STRUCTURES_LEVEL, SIGNALS_LEVEL = "visible_anatomical_structures", "tissue_signal_characteristics"
_STRUCTURE_KEYS = tuple(VisibleAnatomicalStructures.model_fields)
_SIGNAL_KEYS = tuple(TissueSignalCharacteristics.model_fields)
_MAX_TERMS = 6
_MAX_WORDS_OF_TERM, _MAX_WORDS_OF_PHRASE = 4, 16
_WORD = "[A-Za-z0-9,.;:()/%+*'-]{1,24}"
"""Phrases are bounded by a pattern: into strings of a length, grammars let control characters, which are no JSON."""

_INSTRUCTION = """\
You annotate MRI for research. You see {number} of {total} {plane}slices of one volume{order}. \
What its header says: {facts}. Pictures are in radiological orientation: {orientation}.

Write down only what these pictures show. Leave a list or a phrase empty when you cannot tell. \
Do not name a disease, a patient or a date.

"{structures}": lists of the structures that can be seen{chosen}.
"{signals}": short phrases of a radiologist. "normal_signal_appearance": signal of normal tissues relative to one \
another. "abnormal_signal_patterns": where signal is abnormal and how; empty when nothing is. \
"symmetry_and_structural_integrity": symmetry of the two sides, and whether structures are intact.

Answer with JSON of this form: {form}"""

_ORIENTATIONS = {
    0: "the patient's right is at the left edge, the front is up",
    1: "the patient's right is at the left edge, the head is up",
    2: "the patient's front is at the left edge, the head is up",
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """All that a backend is given about one volume."""

    prompt: str
    pictures: list[bytes]
    """PNG files."""
    schema: str
    """JSON schema of the answer."""
    slices: list[int]
    """Which slices the pictures show, counted along the slice axis of the volume turned to RAS."""


def question_about(row: Mapping[str, Any], config: PictureConfig) -> Question:
    """The question about a row that was loaded with its image, affine and facts."""
    affine = np.reshape(np.asarray(row["affine"], dtype=float), (4, 4))
    pictures, slices, total, axis = slice_pictures(row["image"], affine, config)
    terms = terms_for(row["body_part"])
    form = {
        STRUCTURES_LEVEL: {key: ["..."] for key in _STRUCTURE_KEYS},
        SIGNALS_LEVEL: dict.fromkeys(_SIGNAL_KEYS, "..."),
    }
    prompt = _INSTRUCTION.format(
        number=len(pictures), total=total, plane=f"{row['plane']} " if row["plane"] else "",
        order=f", numbers {', '.join(str(index + 1) for index in slices)}", facts=known_facts(row),
        orientation=_ORIENTATIONS[axis], structures=STRUCTURES_LEVEL, signals=SIGNALS_LEVEL,
        chosen=", chosen from: " + "; ".join(f"{key}: {', '.join(t)}" for key, t in terms.items()) if terms else "",
        form=json.dumps(form),
    )  # fmt: skip
    return Question(prompt=prompt, pictures=pictures, schema=json.dumps(answer_schema(terms)), slices=slices)


def known_facts(row: Mapping[str, Any]) -> str:
    """Level 1 in words: what the header says of the acquisition, never of the person."""
    field = row.get("field_strength_t")
    facts = (
        ("body part", row["body_part"]),
        ("sequence", sequence_words(row)),
        ("plane", row["plane"]),
        ("field strength", f"{field:g} T" if field else ""),
    )
    return "; ".join(f"{name} {value}" for name, value in facts if value) or "nothing"


def answer_schema(terms: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """JSON schema of an answer; a key of level 2 without terms takes short words of any kind."""
    phrase = {"type": "string", "pattern": f"^({_words(_MAX_WORDS_OF_PHRASE)})?$"}
    word = {"type": "string", "pattern": f"^{_words(_MAX_WORDS_OF_TERM)}$"}

    def choice(key: str) -> dict[str, Any]:
        of_key = {"type": "string", "enum": list(terms[key])} if terms.get(key) else word
        # Nothing to choose from: the anatomy has no structures of that kind.
        most = _MAX_TERMS if not terms or terms.get(key) else 0
        return {"type": "array", "items": of_key, "maxItems": most}

    levels = {
        STRUCTURES_LEVEL: _object({key: choice(key) for key in _STRUCTURE_KEYS}),
        SIGNALS_LEVEL: _object(dict.fromkeys(_SIGNAL_KEYS, phrase)),
    }
    return _object(levels)


def _words(most: int) -> str:
    """Pattern of one to so many words."""
    return f"{_WORD}( {_WORD}){{0,{most - 1}}}"


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def slice_pictures(
    image: np.ndarray, affine: np.ndarray, config: PictureConfig
) -> tuple[list[bytes], list[int], int, int]:
    """Slices of a volume as PNG files.

    Args:
        image: Magnitudes `(Z, Y, X)`.
        affine: `(4, 4)`, voxel index `(x, y, z, 1)` to RAS mm.
        config: How many, and how large.

    Returns:
        The files, which slices they show, how many slices there are, and the canonical axis across them (0 is z).
    """
    canonical = to_canonical(image, affine)
    axis = 2 - int(canonical.transform[2, 0])
    # Both in-plane axes grow against the viewing direction in RAS order.
    slices = np.moveaxis(canonical.array, axis, 0)[:, ::-1, ::-1]
    row_mm, column_mm = (mm for index, mm in enumerate(canonical.spacing_mm) if index != axis)
    low, high = np.percentile(slices, (1, 99.5))
    chosen = _spread_over_tissue(slices, low + 0.1 * (high - low), config.slices)
    scale = config.longest_edge_px / max(slices.shape[1] * row_mm, slices.shape[2] * column_mm)
    size = (max(28, round(slices.shape[2] * column_mm * scale)), max(28, round(slices.shape[1] * row_mm * scale)))
    files = []
    for index in chosen:
        shade = np.clip((slices[index] - low) / max(high - low, 1e-12), 0, 1)
        picture = Image.fromarray((255 * shade).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        buffer = BytesIO()
        picture.save(buffer, format="PNG")
        files.append(buffer.getvalue())
    return files, chosen, len(slices), axis


def _spread_over_tissue(slices: np.ndarray, threshold: float, count: int) -> list[int]:
    """Indices that cut the slices with at least half of the usual tissue into equal parts."""
    areas = (slices > threshold).mean(axis=(1, 2))
    shown = np.flatnonzero(areas >= 0.5 * np.median(areas[areas > 0])) if areas.any() else np.arange(len(slices))
    places = (np.arange(count) + 0.5) / count * len(shown)
    return sorted({int(shown[int(place)]) for place in places})


def read_answer(text: str) -> dict[str, str]:
    """Fields that an answer fills, by `level.key`.

    Raises:
        ValueError: If it is no JSON of the form that was asked for.
    """
    try:
        answer = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"The answer is no JSON ({error.msg} at character {error.pos} of {len(text)}).") from error
    levels = {STRUCTURES_LEVEL: _STRUCTURE_KEYS, SIGNALS_LEVEL: _SIGNAL_KEYS}
    if not isinstance(answer, dict) or set(answer) != set(levels):
        raise ValueError(f"The answer has not the levels {', '.join(levels)}.")
    fields = {}
    for level, keys in levels.items():
        if not isinstance(answer[level], dict) or set(answer[level]) != set(keys):
            raise ValueError(f"The answer has not the keys of {level}: {', '.join(keys)}.")
        for key in keys:
            if phrase := _phrase(answer[level][key], is_list=level == STRUCTURES_LEVEL, where=f"{level}.{key}"):
                fields[f"{level}.{key}"] = phrase
    return fields


_NOTHING = {"", "...", "none", "n/a", "na", "unknown", "not visible", "not applicable", "cannot tell"}


def _phrase(value: Any, *, is_list: bool, where: str) -> str:
    words = value if is_list else [value]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"The answer's {where} is not {'a list of strings' if is_list else 'a string'}.")
    said = (" ".join(word.split()).strip(" .,;") for word in words)
    return ", ".join(dict.fromkeys(word for word in said if word.lower() not in _NOTHING))


def seed_of(row_id: str, attempt: int, seed: int) -> int:
    """A seed for one volume and attempt, whichever worker asks."""
    digest = hashlib.sha256(f"{seed}/{row_id}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
