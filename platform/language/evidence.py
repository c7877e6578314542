"""What the labels of a row say, affirm and deny, as questions and reports need it; each thing is worked out once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from omnimri.models.boxes import Box
from omnimri.models.grammars import MAX_PHRASE
from omnimri.models.vocabulary import DIAGNOSES, LESION, NORMAL, SIDES
from omnimri.platform.data.schema import FACTS
from omnimri.platform.language.derive import Known, labelled_volume
from omnimri.platform.language.description import Description
from omnimri.platform.language.measure import LabelledVolume, Measured
from omnimri.platform.language.sections import split_sections
from omnimri.platform.language.words import finding_field, one_line, plain_name, structure_kind

_GENERIC = {LESION, "mass", "tumour", "tumor", "cancer", "carcinoma", "nodule", "neoplasm", "cyst", "collection"}
"""Names that may hold for a finding of another name: that one of these is absent is said where nothing is found."""
MAX_BOXES = 24
"""A label map with more lesions gives no detection answer: the list would be longer than a model writes."""
_PERSONS = {"F": "woman", "M": "man"}
_ADULT_YEARS = 18
MAX_HISTORY = 200
"""Letters of a clinical history that a prompt carries; a longer one is left out."""


class Evidence:
    """A row's labels, looked at when they are asked for."""

    def __init__(self, known: Known, written: str | None = None) -> None:
        self.known = known
        self._written = written

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Evidence:
        """From the columns of a row; what was not loaded counts as unknown."""
        return cls(
            Known(
                image=row["image"],
                affine=np.array(row["affine"], dtype=np.float64).reshape(4, 4),
                facts={name: row.get(name) for name in FACTS},
                label_map=row.get("label_map"),
                label_names=row.get("label_names") or {},
                boxes=row.get("boxes"),
                classes=row.get("classes"),
                report=row.get("report"),
            ),
            row.get("description"),
        )

    @cached_property
    def description(self) -> Description | None:
        """The description that the row carries.

        None where it tells no more than a header does, or has a phrase that is longer than a grammar lets an answer be.
        """
        if not self._written:
            return None
        description = Description.model_validate_json(self._written)
        filled = dict(description.filled())
        is_told = any(not field.startswith("image_modality_sequence.") for field in filled)
        return description if is_told and max(map(len, filled.values())) <= MAX_PHRASE else None

    @cached_property
    def volume(self) -> LabelledVolume | None:
        """The label map."""
        return labelled_volume(self.known)

    @cached_property
    def lesions(self) -> dict[str, Measured]:
        """Name to what the label map says of each finding that it shows."""
        return {measured.name: measured for measured in self.volume.lesions()} if self.volume else {}

    @cached_property
    def label_findings(self) -> list[str]:
        """Findings that the label map was drawn for, there or not."""
        names = map(plain_name, self.known.label_names.values()) if self.volume else ()
        return list(dict.fromkeys(name for name in names if finding_field(name)))

    @cached_property
    def has_specks(self) -> bool:
        """A finding has voxels, and no lesion that is large enough to count."""
        return any(self._voxels(name) and name not in self.lesions for name in self.label_findings)

    @cached_property
    def boxes(self) -> list[Box] | None:
        """Findings with their places: the boxes of the row, else those of its label map.

        None where neither tells, or the label map shows too many.
        """
        if self.known.boxes is not None:
            return [
                Box(label=box["label"], side=box["side"], box_voxel=tuple(box["box_voxel"])) for box in self.known.boxes
            ]
        if not self.label_findings or self.has_specks:
            return None
        boxes = [box for measured in self.lesions.values() for box in boxes_of_measured(measured)]
        return boxes if len(boxes) <= MAX_BOXES else None

    @property
    def boxes_follow_from(self) -> str:
        """The column behind `boxes`."""
        return "label_map" if self.known.boxes is None else "boxes"

    @cached_property
    def present(self) -> dict[str, str]:
        """Name of each finding that is there to the column that says so."""
        boxed = (plain_name(box["label"]) for box in self.known.boxes or ())
        return {name: "boxes" for name in boxed if finding_field(name)} | dict.fromkeys(self.lesions, "label_map")

    @cached_property
    def absent(self) -> list[str]:
        """Findings that the label map was drawn for and that have not one voxel; none that another label may imply."""
        stated = [name for name in (*self.present, *map(str.lower, self.known.classes or ())) if name != NORMAL]
        unseen = [name for name in self.label_findings if not self._voxels(name) and name not in self.present]
        if stated or self.has_specks:
            unseen = [name for name in unseen if name not in _GENERIC]
        return [name for name in unseen if not any(name in other or other in name for other in stated)]

    @property
    def stated_abnormal(self) -> bool | None:
        """What the diagnoses say; None where they are not known, or use words that no table knows (`HC`, `Group 2`)."""
        classes = self.known.classes or ()
        if list(classes) == [NORMAL]:
            return False
        is_known = any(name in DIAGNOSES[1:] or finding_field(plain_name(name)) for name in classes)
        return True if is_known and NORMAL not in classes else None

    @cached_property
    def abnormal(self) -> bool | None:
        """Whether anything is wrong; None where the labels do not say, or contradict each other."""
        if NORMAL in (self.known.classes or ()):
            return None if self.present or self.has_specks else self.stated_abnormal
        return True if self.present else self.stated_abnormal

    def sides(self, name: str) -> frozenset[str]:
        """Sides on which a finding lies; empty where one of its places has no known side."""
        if name in self.lesions:
            return frozenset(self.lesions[name].sides)
        sides = [box.side for box in self.boxes or () if plain_name(box.label) == name]
        return frozenset(side for side in sides if side) if all(side in SIDES for side in sides) else frozenset()

    @cached_property
    def unseen_structures(self) -> list[str]:
        """Normal structures that the label map names and that have no voxel in it."""
        names = dict.fromkeys(map(plain_name, self.known.label_names.values())) if self.volume else {}
        return [name for name in names if structure_kind(name) and not self._voxels(name)]

    @cached_property
    def history(self) -> str:
        """Age, sex and the reason for the examination, as far as they are known."""
        told = one_line(split_sections(self.known.report).history) if self.known.report else ""
        parts = [_person(self.known.facts), told if len(told) <= MAX_HISTORY else ""]
        return " ".join(f"{part.rstrip('.')}." for part in parts if part)

    def _voxels(self, name: str) -> int:
        assert self.volume is not None
        values = [value for value, label in self.known.label_names.items() if plain_name(label) == name]
        return int(self.volume.num_voxels[[value for value in values if 0 < value < len(self.volume.num_voxels)]].sum())


def boxes_of_measured(measured: Measured) -> list[Box]:
    """A box for each lesion of one name, with its side where that is known."""
    sides = measured.sides or (None,) * measured.count
    return [
        Box(label=measured.name, side=side, box_voxel=box)
        for side, box in zip(sides, measured.boxes_voxel, strict=True)
    ]


def _person(facts: Mapping[str, Any]) -> str:
    """`58-year-old woman`."""
    age = facts.get("age_years")
    if age is None:
        return ""
    person = _PERSONS.get(facts.get("sex") or "", "patient") if age >= _ADULT_YEARS else "patient"
    return f"{int(age)}-year-old {person}"
