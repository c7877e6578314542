"""DICOM structured reports of template 1500: measurements and findings of the images that they name.

A measurement group speaks of the images that it names; if it names none, of the series or segmentation that it names;
if it only has coordinates in space, of every series of the report in that frame of reference, but for intensities,
which are those of one image; if it has nothing, of the one image series that the report lists as evidence. Its regions
become boxes on the grid of the volume (`dicom_regions`). Only codes and numbers are used. Text of a report (observers,
comments, tracking identifiers) goes nowhere, and neither does what a file writes beside a code, unless the standard or
our vocabulary knows it (`names.concept_name`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import highdicom
import pydicom
from highdicom.sr import MeasurementReport
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import (
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
)  # fmt: skip

from omnimri.models.vocabulary import SIDES
from omnimri.platform.data.formats.dicom import labels as dicom_labels
from omnimri.platform.data.formats.dicom.names import concept_name, is_abnormal, side_name, unit_code
from omnimri.platform.data.formats.dicom.regions import Drawings, instance_uid
from omnimri.platform.data.formats.records import (
    UNREADABLE,
    ReadError,
    ReadLimits,
    SeriesRecord,
    quiet_libraries,
)  # fmt: skip

_DOCUMENTS = {
    EnhancedSRStorage: highdicom.sr.EnhancedSR,
    ComprehensiveSRStorage: highdicom.sr.ComprehensiveSR,
    Comprehensive3DSRStorage: highdicom.sr.Comprehensive3DSR,
}
_MEASUREMENT_REPORT = "1500"
_PRESENCE = Code("705057003", "SCT", "Presence")
_KEPT = "The volume was kept."

REFERENCE_TAGS = [
    "ContentTemplateSequence",
    "CurrentRequestedProcedureEvidenceSequence",
    "PertinentOtherEvidenceSequence",
]
"""Header elements that `is_report` and `references` look at."""

_SIZES = frozenset({"um", "um2", "um3", "mm", "mm2", "mm3", "cm", "cm2", "cm3", "m", "dm3", "ml", "mL", "l", "L"})
"""Units of sizes, which are the same on every series of a frame of reference."""


def is_report(header: Dataset) -> bool:
    """Whether an instance is a structured report of template 1500."""
    templates = header.get("ContentTemplateSequence") or []
    return header.SOPClassUID in _DOCUMENTS and any(
        str(template.get("TemplateIdentifier")) == _MEASUREMENT_REPORT for template in templates
    )


def references(header: Dataset) -> tuple[str, ...]:
    """Series Instance UIDs that a report lists as evidence, and SOP Instance UIDs of label objects among it."""
    evidence = _evidence(header)
    uids = [series for _, series in evidence.values()]
    uids += [instance for instance, (sop_class, _) in evidence.items() if dicom_labels.is_label_class(sop_class)]
    return tuple(dict.fromkeys(uids))


def _evidence(dataset: Dataset) -> dict[str, tuple[str, str]]:
    """SOP Instance UID of all evidence to its SOP class and Series Instance UID."""
    return {
        str(instance.get("ReferencedSOPInstanceUID")): (
            str(instance.get("ReferencedSOPClassUID")),
            str(series.get("SeriesInstanceUID")),
        )
        for keyword in REFERENCE_TAGS[1:]
        for study in dataset.get(keyword) or []
        for series in study.get("ReferencedSeriesSequence") or []
        for instance in series.get("ReferencedSOPSequence") or []
    }


@dataclasses.dataclass(frozen=True)
class _Group:
    """A measurement group: what it says, and what it says it of."""

    finding: str
    is_abnormal: bool
    site: str
    laterality: str
    measurements: list[tuple[frozenset[str], dict[str, Any]]]
    """Images that a measurement names itself, and its columns."""
    num_unknown: int
    """Measurements whose name or unit is not known, or whose value is no number."""
    present: list[str]
    """Findings evaluated as present."""
    images: frozenset[str]
    series: frozenset[str]
    segments: list[Dataset]
    """References to segments or frames of a segmentation."""
    regions: list[Dataset]
    """Coordinates."""


@dataclasses.dataclass(frozen=True)
class _Report:
    source: str
    instance: str
    replaces: frozenset[str]
    groups: list[_Group]
    evidence: dict[str, tuple[str, str]]
    num_empty: int
    """Measurements that state no value."""

    @property
    def image_series(self) -> set[str]:
        """Series of the evidence that are no label objects."""
        return {series for sop_class, series in self.evidence.values() if not dicom_labels.is_label_class(sop_class)}


def attach(
    records: list[SeriesRecord],
    image_paths: Sequence[Path],
    paths: Mapping[str, Path],
    label_paths: Mapping[str, Path],
    limits: ReadLimits,
) -> tuple[list[SeriesRecord], list[ReadError]]:
    """Give the volumes of a series what reports say of them: `measurements`, `boxes` and `classes`.

    A finding has a box where its region can be placed on the volume and it is abnormal: an organ that was measured is
    no finding. A finding is a class where a qualitative evaluation codes it as present (SNOMED 52101004).

    Args:
        records: Volumes of one series.
        image_paths: Files of the series.
        paths: Name of each report in errors, and its file.
        label_paths: The same of label objects that refer to the series.
        limits: Bounds on sizes.
    """
    if not records:
        return [], [
            ReadError(source, "The series that it refers to was not read.", "See its line.") for source in paths
        ]
    reports, errors = [], []
    for source, path in sorted(paths.items()):
        try:
            with quiet_libraries():
                reports.append(_load(source, path))
        except UNREADABLE as error:
            reason = f"The measurement report cannot be read ({type(error).__name__})."
            errors.append(ReadError(source, reason, _KEPT))
    replaced = frozenset().union(*(report.replaces for report in reports))
    try:
        with quiet_libraries():
            drawings = Drawings(image_paths, label_paths, limits)
    except UNREADABLE as error:
        return records, errors + [_unusable(report, error) for report in reports]
    for report in reports:
        if report.instance in replaced:
            errors.append(ReadError(report.source, "Not used: a later version of the report is there.", _KEPT))
            continue
        try:
            with quiet_libraries():
                records, refused = _apply(report, records, drawings)
        except UNREADABLE as error:
            refused = [_unusable(report, error)]
        errors += refused
    return records, errors


def _unusable(report: _Report, error: Exception) -> ReadError:
    return ReadError(report.source, f"The measurement report cannot be used ({type(error).__name__}).", _KEPT)


def _load(source: str, path: Path) -> _Report:
    dataset = pydicom.dcmread(path, force=True)
    num_empty = _drop_empty_numbers(dataset)
    document = _DOCUMENTS[dataset.SOPClassUID].from_dataset(dataset, copy=False)
    content = document.content
    if not isinstance(content, MeasurementReport):
        raise ValueError("no measurement report")
    groups = [
        *content.get_planar_roi_measurement_groups(),
        *content.get_volumetric_roi_measurement_groups(),
        *content.get_image_measurement_groups(),
    ]
    return _Report(
        source=source,
        instance=str(dataset.get("SOPInstanceUID")),
        replaces=frozenset(
            str(instance.ReferencedSOPInstanceUID)
            for study in dataset.get("PredecessorDocumentsSequence") or []
            for series in study.ReferencedSeriesSequence
            for instance in series.ReferencedSOPSequence
        ),
        groups=[_group(group) for group in groups],
        evidence=_evidence(dataset),
        num_empty=num_empty,
    )


def _drop_empty_numbers(item: Dataset) -> int:
    """Take out NUM items that state no value, which highdicom does not read; returns their number."""
    children = item.get("ContentSequence") or []
    kept = [c for c in children if c.get("ValueType") != "NUM" or c.get("MeasuredValueSequence")]
    if len(kept) < len(children):
        item.ContentSequence = kept
    return len(children) - len(kept) + sum(map(_drop_empty_numbers, kept))


def _group(group: Any) -> _Group:
    """What a measurement group of highdicom says."""
    root = group[0]
    items = list(root.ContentSequence)
    finding = group.finding_type
    said = {"finding": concept_name(finding), **_where(group.finding_sites)}
    numbers = [item for item in items if item.ValueType == "NUM"]
    measurements = [(frozenset(_images(item)), row) for item in numbers if (row := _measurement(item, said))]
    return _Group(
        **said,
        is_abnormal=finding is not None and is_abnormal(finding, group.finding_category),
        measurements=measurements,
        num_unknown=len(numbers) - len(measurements),
        present=_present(items, said["finding"]),
        images=frozenset(uid for item in items if item.ValueType != "NUM" for uid in _images(item)),
        series=frozenset(
            str(item.value)
            for item in items
            if item.ValueType == "UIDREF" and item.name == codes.DCM.SourceSeriesForSegmentation
        ),
        segments=[item for item in items if item.ValueType == "IMAGE" and _is_segmentation(item)],
        regions=[
            item
            for item in items
            if item.ValueType in ("SCOORD", "SCOORD3D")
            and item.name in (codes.DCM.ImageRegion, codes.DCM.VolumeSurface)
        ],
    )


def _where(sites: Sequence[highdicom.sr.FindingSite]) -> dict[str, str]:
    """Names of finding sites, and the side if they agree on it."""
    sides = {side_name(site.laterality) for site in sites}
    names = dict.fromkeys(filter(None, (concept_name(site.value) for site in sites)))
    return {"site": ", ".join(names), "laterality": sides.pop() if len(sides) == 1 else ""}


def _measurement(item: Any, said: Mapping[str, str]) -> dict[str, Any] | None:
    """Columns of a NUM item; a site or a derivation (mean, maximum) of its own counts. None if it is not understood."""
    name, unit, value = concept_name(item.name), unit_code(item.unit), float(item.value)
    children = [child for child in item.get("ContentSequence") or [] if child.ValueType == "CODE"]
    derivations = [concept_name(child.value) for child in children if child.name == codes.DCM.Derivation]
    if not (name and unit and math.isfinite(value) and all(derivations)):
        return None
    row = {"name": ", ".join([name, *derivations]), "value": value, "unit": unit, **said}
    if sites := [child for child in children if child.name == codes.SCT.FindingSite]:
        row |= _where([highdicom.sr.FindingSite.from_dataset(site) for site in sites])
    return {key: None if text == "" else text for key, text in row.items()}


def _present(items: Sequence[Any], finding: str) -> list[str]:
    """Findings that the group evaluates as present: by name, or as the presence of its own finding."""
    evaluated = [item for item in items if item.ValueType == "CODE" and item.value == codes.SCT.Present]
    names = [finding if item.name == _PRESENCE else concept_name(item.name) for item in evaluated]
    return list(filter(None, names))


def _images(item: Dataset) -> Iterator[str]:
    """SOP Instance UIDs of all images that a content item and what lies below it name; segmentations are none."""
    if item.ValueType == "IMAGE" and not _is_segmentation(item):
        yield str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
    for child in item.get("ContentSequence") or []:
        yield from _images(child)


def _is_segmentation(item: Dataset) -> bool:
    return dicom_labels.is_label_class(item.ReferencedSOPSequence[0].ReferencedSOPClassUID)


@dataclasses.dataclass(frozen=True)
class _Said:
    """What a report says of one volume, with the numbers of its groups of which that holds."""

    measurements: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    boxes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    classes: list[str] = dataclasses.field(default_factory=list)
    used: set[int] = dataclasses.field(default_factory=set)
    placed: set[int] = dataclasses.field(default_factory=set)
    unplaced: set[int] = dataclasses.field(default_factory=set)
    ambiguous: set[int] = dataclasses.field(default_factory=set)


def _apply(
    report: _Report, records: list[SeriesRecord], drawings: Drawings
) -> tuple[list[SeriesRecord], list[ReadError]]:
    """The records with what one report says of each, and a line for each kind of thing that could not be used."""
    said = [_said_of(record, report, drawings) for record in records]
    used = set().union(*(one.used for one in said))
    unplaced = set().union(*(one.unplaced for one in said)) - set().union(*(one.placed for one in said))
    ambiguous = set().union(*(one.ambiguous for one in said))
    counts = {
        "name or unit of a measurement is in no dictionary, or it has no value": report.num_empty
        + sum(report.groups[index].num_unknown for index in used),
        "the region of a finding cannot be placed on the series": len(unplaced),
        "a measurement group does not say which images it speaks of, or they were not read": len(ambiguous)
        + sum(_is_lost(group, report, records) for index, group in enumerate(report.groups) if index not in used),
    }
    errors = [
        ReadError(report.source, f"Left out of the measurement report, {number} times: {what}.", _KEPT)
        for what, number in counts.items()
        if number
    ]
    return list(map(_described, records, said)), errors


def _said_of(record: SeriesRecord, report: _Report, drawings: Drawings) -> _Said:
    said = _Said()
    for index, group in enumerate(report.groups):
        rows = [
            (images, row) for images, row in group.measurements if _speaks_of(images, group, report, record, drawings)
        ]
        if not rows and not _speaks_of(frozenset(), group, report, record, drawings):
            continue
        said.used.add(index)
        of_volume = [row for images, row in rows if row["unit"] in _SIZES or _says_where(images, group, report)]
        said.measurements.extend(of_volume)
        if len(of_volume) < len(rows):
            said.ambiguous.add(index)
        said.classes.extend(group.present)
        if group.finding and group.is_abnormal and (group.regions or group.segments):
            box = _box(group, record, drawings)
            said.boxes.extend([box] if box else [])
            (said.placed if box else said.unplaced).add(index)
    return said


def _speaks_of(
    images: frozenset[str], group: _Group, report: _Report, record: SeriesRecord, drawings: Drawings
) -> bool:
    """Whether a group, or a measurement of it that names images itself, speaks of a volume."""
    if named := images or group.images:
        return bool(named & set(record.instances))
    if group.series:
        return record.series_key in group.series
    if any(instance_uid(segment) in drawings.segmentations for segment in group.segments):
        return True
    frames = {str(item.ReferencedFrameOfReferenceUID) for item in group.regions if item.ValueType == "SCOORD3D"}
    return frames == {drawings.frame_of_reference} if frames else report.image_series == {record.series_key}


def _says_where(images: frozenset[str], group: _Group, report: _Report) -> bool:
    """Whether it is clear which images were measured, beyond their frame of reference."""
    return bool(images or group.images or group.series) or len(report.image_series) == 1


def _is_lost(group: _Group, report: _Report, records: list[SeriesRecord]) -> bool:
    """Whether a group that was not used should have been: it names no images, or some of this series."""
    series_key = records[0].series_key
    if group.series and not group.images:
        return series_key in group.series
    named = group.images.union(*(images for images, _ in group.measurements))
    if not named:
        return not group.segments and not group.regions
    return any(report.evidence.get(uid, ("", ""))[1] == series_key for uid in named)


def _described(record: SeriesRecord, said: _Said) -> SeriesRecord:
    """The record with more of what reports say; what none speaks of stays None."""
    new_boxes = [box for box in said.boxes if box not in (record.boxes or [])]
    return dataclasses.replace(
        record,
        measurements=[*(record.measurements or []), *said.measurements] or None,
        boxes=[*(record.boxes or []), *new_boxes] or None,
        classes=list(dict.fromkeys([*(record.classes or []), *said.classes])) or None,
    )


def _box(group: _Group, record: SeriesRecord, drawings: Drawings) -> dict[str, Any] | None:
    """The box of a group's finding on a volume, or None if its region cannot be placed there."""
    try:
        corners = drawings.box(group.regions, group.segments, record.scan)
    except UNREADABLE:
        return None
    return {
        "label": group.finding,
        "side": group.laterality if group.laterality in SIDES else None,
        "box_voxel": corners,
    }
