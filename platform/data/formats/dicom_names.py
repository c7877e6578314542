"""Plain names for labels that arrive with free text, so that no text of a file reaches a row.

A name is made of words of DICOM's own list of segmentation property types (context group 7151) and a few of ours. A
text with any other word gives no name at all: what is left of a name after words are taken out says something else.
"""

from __future__ import annotations

import functools
import re

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
