"""Plain names for labels and coded concepts, so that no text of a file reaches a row.

A coded concept has the meaning that the standard's dictionary gives its code. The name of a label is made of words of
DICOM's own list of segmentation property types (context group 7151) and a few of ours. A text with any other word gives
no name at all: what is left of a name after words are taken out says something else.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict

from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from omnimri.models.vocabulary import LESION

_LESION_WORDS = r"\b(lesions?|tumou?rs?|mass(es)?|metastas[ie]s|nodules?|neoplasms?|gtv)\b"

_MORE_WORDS = frozenset(
    {
        "enhancing", "nonenhancing", "non", "core", "whole", "tumor", "tumour", "metastasis", "infarct",
        "plaque", "haemorrhage", "oedema", "grey", "demyelinating", "hyperintensity", "hippocampal",
        "subthalamic", "cerebellar", "cyst", "cystic", "solid", "necrotic", "peritumoral", "peritumoural",
        "gtv", "ctv", "ptv", "zone", "transition", "cochlea", "acl", "pcl", "csf", "lesions", "nodules",
        "background",
    }
)  # fmt: skip
_EPONYMS = frozenset({"boyd", "cockett", "couinaud", "dodd", "giacomini", "hunterian", "willis"})
"""Surnames within the terms; a patient may have the same."""

_EMPTY_WORDS = frozenset(
    {
        "segment", "structure", "object", "region", "area", "system", "concept", "id", "background", "of",
        "the", "and", "or", "entire", "anatomical", "organ", "left", "right", "upper", "lower", "anterior",
        "posterior", "white", "gray", "grey", "small", "large", "great", "first", "second", "third", "main",
        "major", "minor", "common", "normal", "male", "female", "power", "elm", "tissue", "body", "substance",
        "physical", "spatial", "relational", "morphologically", "abnormal", "function",
    }
)  # fmt: skip
"""Words that name nothing by themselves."""

_SIDES = {"7771000": "left", "24028007": "right", "51440002": "bilateral", "G-A101": "left", "G-A100": "right"}
"""SNOMED codes of laterality, current and retired."""

_MAX_WORDS = 6

_QUALIFIERS = (
    r"\s*\((?:attribute|body structure|disorder|finding|observable entity|procedure|property|qualifier value)\)"
)
"""What SNOMED adds to its fully specified names."""
_ABNORMAL_WORDS = (
    r"\b(abscess|cysts?|embolus|infarct(ion)?s?|haematomas?|hematomas?|haemorrhages?|hemorrhages?|necrosis|oedema|edema|"
    r"plaques?|stenosis)\b"
)
_ABNORMAL_STRUCTURE = Code("49755003", "SCT", "")

_UNIT_TOKEN = r"\{[^}]*\}|\[[^\]]*\]|[A-Za-z%]+"
_MORE_UNITS = frozenset(
    {"kg", "g", "mg", "ug", "ng", "l", "L", "ml", "mL", "dl", "dL", "nm", "us", "T", "mol", "kHz", "MHz"}
)
_UNIT = re.compile(r"[A-Za-z%\[\]{}()'_.*/^+\d-]{1,32}")


@functools.cache
def _terms() -> dict[Code, str]:
    """Codes of the context group with their meanings in lower case."""
    return {code: code.meaning.lower() for code in codes.CID7151.concepts.values()}


@functools.cache
def _words() -> frozenset[str]:
    known = {word for meaning in _terms().values() for word in re.findall(r"[a-z]{2,}", meaning)}
    return frozenset(known - _EPONYMS) | _MORE_WORDS


def plain_name(text: object) -> str:
    """A free text in plain lower-case words, or nothing if one of its words is not in the vocabulary.

    Numbers, punctuation and single letters are dropped: `Kidney_Left #2` is `kidney left`.
    """
    words = [word for word in re.findall(r"[^\W\d_]+", str(text or "").lower()) if len(word) > 1]
    is_known = 0 < len(words) <= _MAX_WORDS and all(word in _words() for word in words)
    return " ".join(words) if is_known and not set(words) <= _EMPTY_WORDS else ""


def coded_name(segment: Dataset) -> str:
    """Property type and side of a segment by their codes: the standard's meanings, never those that the file writes."""
    kind = _first(segment, "SegmentedPropertyTypeCodeSequence")
    side = _SIDES.get(str(_first(kind, "SegmentedPropertyTypeModifierCodeSequence").get("CodeValue")), "")
    code = Code(str(kind.get("CodeValue") or ""), str(kind.get("CodingSchemeDesignator") or ""), "")
    # Equality of codes knows the retired SNOMED identifiers, their hash does not.
    meaning = next((meaning for term, meaning in _terms().items() if term == code), "")
    return f"{side} {meaning}".strip() if not set(meaning.split()) <= _EMPTY_WORDS else ""


@functools.cache
def _meanings() -> dict[tuple[str, str], list[str]]:
    """Scheme and value of every code of the standard's dictionary to its meanings, the shortest first.

    Before them stands the meaning that segments of this code have.
    """
    meanings: dict[tuple[str, str], set[str]] = defaultdict(set)
    for scheme in codes.schemes():
        for code in getattr(codes, scheme).concepts.values():
            meanings[code.scheme_designator, code.value].add(re.sub(_QUALIFIERS, "", code.meaning).strip().lower())
    of_segments = {(code.scheme_designator, code.value): meaning for code, meaning in _terms().items()}
    return {
        key: sorted(known, key=lambda meaning: (meaning != of_segments.get(key), len(meaning), meaning))
        for key, known in meanings.items()
    }


@functools.cache
def _current(scheme: str, value: str) -> tuple[str, str]:
    """A code with the identifier that SNOMED uses today; one of another scheme as it is."""
    if scheme != "SRT":
        return scheme, value
    given = Code(value, scheme, "")
    return next(
        ((code.scheme_designator, code.value) for code in codes.SCT.concepts.values() if code == given), ("", "")
    )


def concept_name(concept: Dataset | None) -> str:
    """Meaning of a coded concept in lower case: one of the standard's, if the file writes one of them, that.

    A code that the standard does not know counts by its meaning where that is a plain name (`plain_name`).

    Returns:
        Nothing where neither holds.
    """
    if concept is None:
        return ""
    written = str(concept.get("CodeMeaning") or "")
    known = _meanings().get(_current(*_code(concept)))
    if known is None:
        return plain_name(written)
    return written.lower() if written.lower() in known else known[0]


def _code(concept: Dataset) -> tuple[str, str]:
    value = next((str(concept.get(k)) for k in ("CodeValue", "LongCodeValue", "URNCodeValue") if concept.get(k)), "")
    return str(concept.get("CodingSchemeDesignator") or ""), value


def side_name(concept: Dataset | None) -> str:
    """`left`, `right` or `bilateral`; another laterality by its meaning; nothing where there is none."""
    return "" if concept is None else _SIDES.get(_code(concept)[1]) or concept_name(concept)


def unit_code(concept: Dataset) -> str:
    """UCUM code of a unit; nothing for a unit of another scheme, or of parts that no unit of the standard has."""
    scheme, value = _code(concept)
    if scheme != "UCUM" or not _UNIT.fullmatch(value) or re.search(r"\d{3}", value):
        return ""
    return value if set(re.findall(_UNIT_TOKEN, value)) <= _unit_tokens() else ""


@functools.cache
def _unit_tokens() -> frozenset[str]:
    known = codes.UCUM.concepts.values()
    return _MORE_UNITS | {token for code in known for token in re.findall(_UNIT_TOKEN, code.value)}


def is_abnormal(finding: Dataset, category: Dataset | None) -> bool:
    """Whether a finding is something abnormal, and not an organ or a tissue that was measured."""
    of_category = category is not None and _current(*_code(category)) == _ABNORMAL_STRUCTURE[1::-1]
    return of_category or _current(*_code(finding)) in _abnormal_codes() or _says_abnormal(concept_name(finding))


def _says_abnormal(name: str) -> bool:
    return says_lesion(name) or bool(re.search(_ABNORMAL_WORDS, name))


@functools.cache
def _abnormal_codes() -> frozenset[tuple[str, str]]:
    """Codes of CID 7194, morphologically abnormal structures, but for its normal and background."""
    return frozenset(
        (code.scheme_designator, code.value)
        for keyword, code in codes.CID7194.concepts.items()
        if keyword not in ("Normal", "Background")
    )


def _first(dataset: Dataset, keyword: str) -> Dataset:
    return next(iter(dataset.get(keyword) or []), Dataset())


def segment_name(segment: Dataset, otherwise: str) -> str:
    """Name of a segment: of its code and its label the one that says more, else as `label_name` decides."""
    names = [coded_name(segment), plain_name(segment.get("SegmentLabel"))]
    return max(names, key=lambda name: len(name.split())) or label_name(
        segment.get("SegmentLabel"), segment.get("SegmentDescription"), otherwise=otherwise
    )


def says_lesion(*texts: object) -> bool:
    """Whether one of the texts speaks of a lesion."""
    return any(re.search(_LESION_WORDS, str(text or "").lower().replace("_", " ")) for text in texts)


def label_name(*texts: object, otherwise: str) -> str:
    """The first text that is a plain name; else `lesion` if one speaks of it; else the name given."""
    named = next(filter(None, map(plain_name, texts)), "")
    return named or (LESION if says_lesion(*texts) else otherwise)
