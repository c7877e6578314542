"""Which series of a DICOMweb service are wanted, and whether what it found is that."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydicom.datadict import keyword_dict, keyword_for_tag, tag_for_keyword

_STUDY_KEYWORDS = frozenset({
    "AccessionNumber", "IssuerOfPatientID", "ModalitiesInStudy", "OtherPatientIDs", "PatientBirthDate", "PatientID",
    "PatientName", "PatientSex", "ReferringPhysicianName", "StudyDate", "StudyDescription", "StudyID",
    "StudyInstanceUID", "StudyTime",
})  # fmt: skip
"""What a search for studies matches; all other attributes belong to the search for series (PS3.18, table 10.6.1-5)."""

_COMPARED = ("CS", "DA", "LO", "SH", "UI")


@dataclass(frozen=True, kw_only=True)
class SeriesQuery:
    """Which series are wanted: attributes with the values that they must match."""

    study_filters: Mapping[str, str]
    series_filters: Mapping[str, str]
    modalities: tuple[str, ...] = ("MR",)


def parse_query(assignments: Sequence[str]) -> SeriesQuery:
    """Read `ATTRIBUTE=VALUE` texts; `Modality=MR,SEG` names the modalities that are retrieved instead of MR alone.

    Raises:
        ValueError: If a text has another form, or names no DICOM attribute, or one twice.
    """
    filters: dict[str, str] = {}
    for assignment in assignments:
        keyword, separator, value = assignment.partition("=")
        if not separator or not value:
            raise ValueError(f"--query {keyword}: expected ATTRIBUTE=VALUE, for example StudyDate=20240101-20240131.")
        if re.fullmatch(r"[0-9A-Fa-f]{8}", keyword):
            keyword = keyword_for_tag(int(keyword, 16)) or keyword
        elif keyword not in keyword_dict:
            close = difflib.get_close_matches(keyword, keyword_dict, n=1)
            suggestion = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"--query {keyword}: no DICOM keyword and no tag of eight digits.{suggestion}")
        if keyword in filters:
            raise ValueError(f"--query {keyword}: given twice. Give it once.")
        filters[keyword] = value
    modalities = tuple(filters.pop("Modality", "MR").split(","))
    if len(modalities) == 1:
        filters.setdefault("ModalitiesInStudy", modalities[0])
    return SeriesQuery(
        study_filters={name: value for name, value in filters.items() if name in _STUDY_KEYWORDS},
        series_filters={name: value for name, value in filters.items() if name not in _STUDY_KEYWORDS},
        modalities=modalities,
    )


def matches(result: Mapping[str, Any], filters: Mapping[str, str]) -> bool:
    """Whether a result is what the filters ask for, as far as it says (PS3.4, section C.2.2.2).

    Names of persons and other types are left to the service, whose rules for them differ.
    """
    for keyword, wanted in filters.items():
        tag = f"{tag_for_keyword(keyword) or int(keyword, 16):08X}"
        values, vr = _values(result, tag)
        if vr in _COMPARED and values and not any(_is(str(value).strip(), wanted.strip(), vr) for value in values):
            return False
    return True


def _is(value: str, wanted: str, vr: str) -> bool:
    if vr == "DA" and "-" in wanted:
        first, _, last = wanted.partition("-")
        return first.strip() <= value <= (last.strip() or value)
    # Lists are for UIDs alone, but some services take them for other attributes.
    patterns = [wanted, *re.split(r"[,\\]", wanted)]
    return any(fnmatch.fnmatchcase(value.casefold(), one.casefold().replace("[", "[[]")) for one in patterns)


def first_value(result: Mapping[str, Any], tag: str) -> Any:
    """First value of an attribute in DICOM JSON (PS3.18 annex F); None where there is none."""
    values, _ = _values(result, tag)
    return values[0] if values else None


def _values(result: Mapping[str, Any], tag: str) -> tuple[list[Any], str]:
    """All values of an attribute, and its value representation."""
    element = result.get(tag)
    if not isinstance(element, dict) or not isinstance(element.get("Value"), list):
        return [], ""
    return element["Value"], str(element.get("vr"))
