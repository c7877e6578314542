"""Measurement reports (TID 1500): numbers, units and sites as highdicom wrote them, boxes where regions were drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from omnimri.platform.data.formats.dicom.names import unit_code
from omnimri.platform.data.formats.dicom.regions import graphic_extent
from omnimri.platform.data.formats.readers import group as group_files
from omnimri.platform.data.formats.readers import probe_files, read_path
from omnimri.platform.data.formats.records import ReadLimits
from omnimri.platform.data.formats.sources import open_sources
from omnimri.platform.data.intake.annotations import Annotation
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.summary import summarise
from omnimri.platform.data.intake.writer import PlannedItem, write_shard
from tests.platform.intake_fakes import LPS, dicom_slices, enhanced_object, random_image, rescalable, save_dicom
from tests.platform.label_fakes import PATIENT, save_seg, turned_affine
from tests.platform.report_fakes import (
    ADC,
    COMMENT,
    CUBIC_MM,
    OBSERVER,
    PERIPHERAL_ZONE,
    PLANTED,
    TRANSITION_ZONE,
    VOLUME,
    frame_of,
    image_region,
    make_report,
    measured,
    of_images,
    planar,
    save_report,
    segment_of,
    volumetric,
    world,
)  # fmt: skip

SHAPE = (5, 8, 6)
ORIENTATIONS = ["RAS", "LPS", "PSR", "SRA", "LAI", "ASL", "IPR"]
OUTLINE = np.array([[2.0, 3.0], [5.0, 3.0], [5.0, 6.0], [2.0, 6.0], [2.0, 3.0]])
"""Along the outer edges of the columns 2..4 and the rows 3..5, in image coordinates."""


def _series(folder: Path, axes: str = "LPS", name: str = "mr", seed: int = 0, **header: Any) -> tuple[list, np.ndarray]:
    """A series saved in `folder / name`, and the affine that it was made with."""
    affine = turned_affine(axes, SHAPE)
    slices = dicom_slices(rescalable(random_image(seed, SHAPE)), affine, seed=seed, **PATIENT, **header)
    save_dicom(slices, folder / name)
    return slices, affine


def _box(affine: np.ndarray, first_slice: int, last_slice: int) -> list[int]:
    """The outline on some slices as read: z runs along row direction x column direction."""
    if np.linalg.det(affine) < 0:
        first_slice, last_slice = SHAPE[0] - 1 - last_slice, SHAPE[0] - 1 - first_slice
    return [first_slice, 3, 2, last_slice + 1, 6, 5]


def _lesion(side: str | None = "left", **box: list[int]) -> list[dict]:
    return [{"label": "lesion", "side": side, **box}]


VOLUME_ROW = {
    "name": "volume", "value": 1234.5678901234567, "unit": "mm3", "finding": "lesion",
    "site": "peripheral zone of the prostate", "laterality": "left",
}  # fmt: skip


def _volume() -> sr.Measurement:
    return measured(VOLUME, 1234.5678901234567, CUBIC_MM)


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_region_drawn_on_an_image_is_a_box_on_every_orientation(tmp_path: Path, axes: str) -> None:
    slices, affine = _series(tmp_path, axes)
    region = image_region(slices[1], "POLYLINE", OUTLINE)
    save_report(tmp_path / "sr.dcm", slices, [planar(referenced_region=region, measurements=[_volume()])])
    [record], errors = read_path(tmp_path)
    assert errors == []
    assert record.measurements == [VOLUME_ROW]
    assert record.boxes == _lesion(box_voxel=_box(affine, 1, 1))
    assert record.classes is None


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_regions_on_several_images_are_one_box(tmp_path: Path, axes: str) -> None:
    slices, affine = _series(tmp_path, axes)
    regions = [image_region(slices[z], "POLYLINE", OUTLINE) for z in (1, 3)]
    save_report(tmp_path / "sr.dcm", slices, [volumetric(referenced_regions=regions, measurements=[_volume()])])
    [record], errors = read_path(tmp_path)
    assert errors == []
    assert record.boxes == _lesion(box_voxel=_box(affine, 1, 3))


@pytest.mark.parametrize("axes", ["LPS", "ASL", "IPR"])
def test_region_in_space_is_a_box(tmp_path: Path, axes: str) -> None:
    slices, affine = _series(tmp_path, axes)
    corners = np.c_[OUTLINE - 0.5, np.full(len(OUTLINE), 2.0)]
    region = sr.ImageRegion3D("POLYGON", world(corners, affine), slices[0].FrameOfReferenceUID)
    save_report(tmp_path / "sr.dcm", slices, [planar(referenced_region=region, measurements=[_volume()])])
    [record], errors = read_path(tmp_path)
    assert errors == []
    assert record.measurements == [VOLUME_ROW]
    assert record.boxes == _lesion(box_voxel=_box(affine, 2, 2))


@pytest.mark.parametrize("axes", ["LPS", "ASL", "IPR"])
def test_ellipsoid_is_the_box_of_the_voxels_within(tmp_path: Path, axes: str) -> None:
    slices, affine = _series(tmp_path, axes)
    centre, half_axes = np.array([2.6, 3.7, 2.0]), np.array([[1.6, 0.8, 0.0], [-0.7, 1.9, 0.2], [0.1, 0.0, 1.4]])
    # Axes of an ellipsoid are at right angles in space, not in voxels of any size.
    half_axes = np.linalg.svd(half_axes @ affine[:3, :3].T)
    half_axes = half_axes.S[:, None] * half_axes.Vh
    middle = world(centre[None], affine)[0]
    ends = np.concatenate([[middle - half, middle + half] for half in half_axes])
    source = sr.SourceSeriesForSegmentation(slices[0].SeriesInstanceUID)
    surface = sr.VolumeSurface("ELLIPSOID", ends[None], slices[0].FrameOfReferenceUID, source_series=source)
    save_report(tmp_path / "sr.dcm", slices, [volumetric(referenced_volume_surface=surface)])
    [record], errors = read_path(tmp_path)
    assert errors == []
    # The extent of an ellipsoid, drawn densely instead of by its formula.
    sphere = np.random.default_rng(0).standard_normal((200_000, 3))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    drawn = np.c_[middle + sphere @ half_axes, np.ones(len(sphere))]
    lps_to_index = np.linalg.inv(LPS @ record.scan.affine)
    indices = (drawn @ lps_to_index.T)[:, :3]
    low = np.maximum(np.ceil(indices.min(axis=0)), 0).astype(int)[::-1]
    high = np.minimum(np.floor(indices.max(axis=0)) + 1, SHAPE[::-1]).astype(int)[::-1]
    assert record.boxes == _lesion(box_voxel=[*low.tolist(), *high.tolist()])


@pytest.mark.parametrize(
    ("kind", "points", "columns", "rows"),
    [
        ("CIRCLE", [[3.0, 4.0], [3.0, 5.5]], (1, 5), (2, 6)),
        ("ELLIPSE", [[1.0, 4.0], [5.0, 4.0], [3.0, 2.9], [3.0, 5.1]], (1, 5), (3, 5)),
        ("ELLIPSE", [[1.0, 2.0], [5.0, 6.0], [2.0, 5.0], [4.0, 3.0]], (1, 5), (2, 6)),
    ],
)
def test_circles_and_ellipses(tmp_path: Path, kind: str, points: list, columns: tuple, rows: tuple) -> None:
    slices, _ = _series(tmp_path, "RAS")
    region = image_region(slices[2], kind, np.array(points))
    save_report(tmp_path / "sr.dcm", slices, [planar(referenced_region=region)])
    [record], errors = read_path(tmp_path)
    assert errors == []
    [box] = record.boxes
    z = box["box_voxel"][0]
    assert box["box_voxel"] == [z, rows[0], columns[0], z + 1, rows[1], columns[1]]


@pytest.mark.parametrize("axes", ["LPS", "ASL"])
def test_segment_and_frame_of_a_segmentation(tmp_path: Path, axes: str) -> None:
    slices, affine = _series(tmp_path, axes)
    masks = np.zeros((*SHAPE, 2), dtype=np.uint8)
    masks[1:4, 3:6, 2:5, 1] = 1
    masks[0, 0, 0, 0] = 1
    seg = save_seg(tmp_path / "seg.dcm", slices, masks, ["lesion", "lesion"])
    frames = pydicom.dcmread(seg).PerFrameFunctionalGroupsSequence
    [frame, *_] = [
        number
        for number, item in enumerate(frames, start=1)
        if item.SegmentIdentificationSequence[0].ReferencedSegmentNumber == 2
        and np.allclose(item.PlanePositionSequence[0].ImagePositionPatient, slices[3].ImagePositionPatient)
    ]
    evidence = [*slices, pydicom.dcmread(seg)]
    save_report(
        tmp_path / "sr.dcm", evidence,
        [
            volumetric(referenced_segment=segment_of(seg, 2), measurements=[_volume()]),
            planar(referenced_segment=frame_of(seg, frame, 2), finding_type=codes.SCT.Neoplasm),
        ],
    )  # fmt: skip
    [record], errors = read_path(tmp_path)
    assert errors == []
    assert record.label_names == {1: "lesion", 2: "lesion 2"}
    assert record.measurements == [VOLUME_ROW]
    by_label = {box["label"]: box["box_voxel"] for box in record.boxes or []}
    assert by_label == {"lesion": _box(affine, 1, 3), "neoplasm": _box(affine, 3, 3)}
    where = np.argwhere(record.label_map == 2)
    assert by_label["lesion"] == [*where.min(axis=0), *(where.max(axis=0) + 1)]


def test_report_that_lists_the_segmentation_alone_finds_the_series(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    masks = np.zeros((*SHAPE, 2), dtype=np.uint8)
    masks[1:4, 3:6, 2:5, 0] = masks[0, 0, 0, 1] = 1
    seg = save_seg(tmp_path / "seg.dcm", slices, masks, ["lesion", "liver"])
    report = make_report([*slices, pydicom.dcmread(seg)], [volumetric(referenced_segment=segment_of(seg, 1))])
    [study] = report.CurrentRequestedProcedureEvidenceSequence
    of_images = slices[0].SeriesInstanceUID
    study.ReferencedSeriesSequence = [s for s in study.ReferencedSeriesSequence if s.SeriesInstanceUID != of_images]
    report.save_as(tmp_path / "sr.dcm")
    [record], errors = read_path(tmp_path)
    assert errors == []
    assert record.boxes == _lesion(box_voxel=_box(affine, 1, 3))


def test_frame_of_an_enhanced_object(tmp_path: Path) -> None:
    affine = turned_affine("ASL", SHAPE)
    slices = dicom_slices(rescalable(random_image(0, SHAPE)), affine, **PATIENT)
    enhanced = enhanced_object(slices)
    enhanced.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    frame = int(np.argsort([dataset.InstanceNumber for dataset in slices]).tolist().index(3)) + 1
    region = image_region(enhanced, "POLYLINE", OUTLINE, frames=[frame])
    save_report(tmp_path / "sr.dcm", [enhanced], [planar(referenced_region=region)])
    [record], errors = read_path(tmp_path)
    assert errors == []
    assert record.boxes == _lesion(box_voxel=_box(affine, 3, 3))


def test_numbers_units_derivations_and_sites_of_their_own(tmp_path: Path) -> None:
    slices, _ = _series(tmp_path)
    elsewhere = sr.FindingSite(TRANSITION_ZONE, laterality=codes.SCT.Right)
    numbers = [
        measured(ADC, 0.8125e-3, Code("mm2/s", "UCUM", ""), derivation=codes.SCT.Mean),
        measured(ADC, 1.1e-3, Code("mm2/s", "UCUM", ""), derivation=codes.SCT.Maximum, finding_sites=[elsewhere]),
        measured(Code("G-D7FE", "SRT", OBSERVER), 17.25, codes.UCUM.Millimeter),
        measured(Code("SKGS", "IBSI", COMMENT), -3.5, codes.UCUM.NoUnits),
    ]
    save_report(tmp_path / "sr.dcm", slices, [of_images(measurements=numbers, finding_type=codes.SCT.Prostate)])
    [record], errors = read_path(tmp_path)
    assert errors == []
    zone = "peripheral zone of the prostate"
    transition = "transition zone of the prostate"
    found = [tuple(row.values()) for row in record.measurements or []]
    assert [row[:3] for row in found][:2] == [
        ("apparent diffusion coefficient, mean", 0.8125e-3, "mm2/s"),
        ("apparent diffusion coefficient, maximum", 1.1e-3, "mm2/s"),
    ]
    assert found[2][0] == "length"
    assert found[2][1:3] == (17.25, "mm")
    assert found[3][:3] == ("compactness 1", -3.5, "1")
    assert [row[4:] for row in found] == [(zone, "left"), (transition, "right"), (zone, "left"), (zone, "left")]
    assert record.boxes is None


def test_an_organ_that_was_measured_is_no_finding(tmp_path: Path) -> None:
    slices, _ = _series(tmp_path)
    region = image_region(slices[1], "POLYLINE", OUTLINE)
    said = {"referenced_region": region, "finding_type": codes.SCT.Prostate, "measurements": [_volume()]}
    save_report(tmp_path / "sr.dcm", slices, [planar(**said)])
    [record], errors = read_path(tmp_path)
    assert errors == []
    assert record.measurements is not None
    assert record.boxes is None
    abnormal = {**said, "finding_category": codes.SCT.MorphologicallyAbnormalStructure}
    save_report(tmp_path / "sr.dcm", slices, [planar(**abnormal)])
    [record], _ = read_path(tmp_path)
    assert [box["label"] for box in record.boxes or []] == ["prostate"]


def test_only_findings_coded_as_present_are_classes(tmp_path: Path) -> None:
    slices, _ = _series(tmp_path)
    absent = Code("272519000", "SCT", "Absent")
    evaluations = [
        sr.QualitativeEvaluation(codes.SCT.Hemorrhage, codes.SCT.Present),
        sr.QualitativeEvaluation(Code("705057003", "SCT", "Presence"), codes.SCT.Present),
        sr.QualitativeEvaluation(codes.SCT.Cyst, absent),
        sr.QualitativeEvaluation(codes.SCT.Edema, codes.SCT.Mild),
        sr.QualitativeEvaluation(Code("1", "99X", OBSERVER), codes.SCT.Present),
    ]
    save_report(tmp_path / "sr.dcm", slices, [of_images(qualitative_evaluations=evaluations)])
    [record], errors = read_path(tmp_path)
    assert errors == []
    assert (record.classes, record.boxes, record.measurements) == (["hemorrhage", "lesion"], None, None)


def test_groups_reach_the_volume_and_the_series_that_they_name(tmp_path: Path) -> None:
    affine = turned_affine("LPS", SHAPE)
    echoes = {
        te: dicom_slices(rescalable(random_image(int(te), SHAPE)), affine, seed=1, EchoTime=te, **PATIENT)
        for te in (10.0, 80.0)
    }
    for te, slices in echoes.items():
        save_dicom(slices, tmp_path / "echoes", prefix=f"{te:.0f}")
    other, _ = _series(tmp_path, name="other", seed=2)
    for dataset in other:
        dataset.StudyInstanceUID = echoes[10.0][0].StudyInstanceUID
    save_dicom(other, tmp_path / "other")
    drawn = {10.0: 1.0, 80.0: 2.0}
    groups = [
        planar(
            referenced_region=image_region(echoes[te][1], "POLYLINE", OUTLINE),
            measurements=[measured(VOLUME, value, CUBIC_MM)],
        )
        for te, value in drawn.items()
    ]
    named = sr.SourceImageForMeasurement(other[0].SOPClassUID, other[0].SOPInstanceUID)
    groups.append(of_images(measurements=[measured(VOLUME, 3.0, CUBIC_MM, referenced_images=[named])]))
    save_report(tmp_path / "sr.dcm", [*echoes[10.0], *echoes[80.0], *other], groups)
    records, errors = read_path(tmp_path)
    assert errors == []
    values = {(r.source, r.scan.facts["te_ms"]): [m["value"] for m in r.measurements or []] for r in records}
    assert values == {("echoes", 10.0): [1.0], ("echoes", 80.0): [2.0], ("other", None): [3.0]}


def test_group_that_names_no_image_is_used_for_one_series_and_counted_for_several(tmp_path: Path) -> None:
    slices, _ = _series(tmp_path)
    groups = [of_images(measurements=[_volume()])]
    save_report(tmp_path / "sr.dcm", slices, groups)
    [record], errors = read_path(tmp_path)
    assert errors == []
    assert record.measurements == [VOLUME_ROW]
    other, _ = _series(tmp_path, name="other", seed=2, StudyInstanceUID=slices[0].StudyInstanceUID)
    save_report(tmp_path / "sr.dcm", [*slices, *other], groups)
    records, errors = read_path(tmp_path)
    assert [record.measurements for record in records] == [None, None]
    assert {error.source for error in errors} == {"sr.dcm"}
    assert "1 times: a measurement group does not say which images it speaks of" in errors[0].reason


def test_region_in_space_is_on_all_series_of_its_frame_but_intensities_are_not(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    frame = {"FrameOfReferenceUID": slices[0].FrameOfReferenceUID, "StudyInstanceUID": slices[0].StudyInstanceUID}
    other, _ = _series(tmp_path, "RAS", name="other", seed=2, **frame)
    corners = np.c_[OUTLINE - 0.5, np.full(len(OUTLINE), 2.0)]
    region = sr.ImageRegion3D("POLYGON", world(corners, affine), slices[0].FrameOfReferenceUID)
    numbers = [_volume(), measured(ADC, 1.0, Code("mm2/s", "UCUM", ""))]
    save_report(tmp_path / "sr.dcm", [*slices, *other], [planar(referenced_region=region, measurements=numbers)])
    records, errors = read_path(tmp_path)
    assert [record.measurements for record in records] == [[VOLUME_ROW]] * 2
    where = []
    for record in records:
        [box] = record.boxes or []
        low, high = np.array(box["box_voxel"][:3])[::-1], np.array(box["box_voxel"][3:])[::-1] - 1
        ends = np.array([[*low, 1], [*high, 1]]) @ record.scan.affine.T
        where.append(np.sort(ends[:, :3], axis=0))
    np.testing.assert_allclose(where[0], where[1], atol=1e-3)
    assert {error.reason for error in errors} == {
        "Left out of the measurement report, 1 times: a measurement group does not say which images it speaks of, or "
        "they were not read."
    }


def test_what_cannot_be_named_or_placed_is_counted(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    numbers = [
        _volume(),
        measured(Code("1", "99X", OBSERVER), 1.0, CUBIC_MM),
        measured(VOLUME, 1.0, Code(f"{{{OBSERVER}}}", "UCUM", "")),
        measured(VOLUME, 1.0, CUBIC_MM, derivation=Code("1", "99X", OBSERVER)),
    ]
    corners = world(np.c_[OUTLINE - 0.5, np.full(len(OUTLINE), 9.0)], affine)
    outside = sr.ImageRegion3D("POLYGON", corners, slices[0].FrameOfReferenceUID)
    point = image_region(slices[1], "POINT", np.array([[3.0, 3.0]]))
    named = [of_images(measurements=numbers), planar(referenced_region=point)]
    report = make_report(slices, [*named, planar(referenced_region=outside)])
    empty = sr.NumContentItem(VOLUME, 1.0, codes.UCUM.NoUnits, relationship_type="CONTAINS")
    report.ContentSequence[-1].ContentSequence[0].ContentSequence.append(empty)
    empty.MeasuredValueSequence = []
    report.save_as(tmp_path / "sr.dcm")
    [record], errors = read_path(tmp_path)
    assert record.measurements == [VOLUME_ROW]
    assert record.boxes is None
    assert [error.reason for error in errors] == [
        "Left out of the measurement report, 4 times: name or unit of a measurement is in no dictionary, or it has no "
        "value.",
        "Left out of the measurement report, 2 times: the region of a finding cannot be placed on the series.",
    ]


def test_several_sites_are_all_named_and_a_side_only_if_they_agree(tmp_path: Path) -> None:
    slices, _ = _series(tmp_path)
    zones = [(PERIPHERAL_ZONE, codes.SCT.Left), (TRANSITION_ZONE, codes.SCT.Right)]
    sites = [sr.FindingSite(zone, laterality=side) for zone, side in zones]
    save_report(tmp_path / "sr.dcm", slices, [of_images(measurements=[_volume()], finding_sites=sites)])
    [record], _ = read_path(tmp_path)
    both = "peripheral zone of the prostate, transition zone of the prostate"
    assert record.measurements == [VOLUME_ROW | {"site": both, "laterality": None}]


def test_a_later_version_replaces_a_report(tmp_path: Path) -> None:
    slices, _ = _series(tmp_path)
    first = make_report(slices, [of_images(measurements=[measured(VOLUME, 1.0, CUBIC_MM)])])
    first.save_as(tmp_path / "a.dcm")
    save_report(tmp_path / "b.dcm", slices, [of_images(measurements=[_volume()])], previous_versions=[first])
    [record], [error] = read_path(tmp_path)
    assert record.measurements == [VOLUME_ROW]
    assert (error.source, error.reason) == ("a.dcm", "Not used: a later version of the report is there.")


def test_broken_report_costs_a_line_and_not_the_images(tmp_path: Path) -> None:
    slices, _ = _series(tmp_path)
    report = make_report(slices, [of_images(measurements=[_volume()])])
    del report.ContentSequence[-1].ContentSequence[0].ContentSequence[-1].ConceptNameCodeSequence
    report.save_as(tmp_path / "broken.dcm")
    path = save_report(tmp_path / "cut.dcm", slices, [of_images(measurements=[_volume()])])
    path.write_bytes(path.read_bytes()[:-300])
    records, errors = read_path(tmp_path)
    assert [record.measurements for record in records] == [None]
    assert {error.source: error.reason for error in errors} == {
        "broken.dcm": "The measurement report cannot be read (AttributeError).",
        "cut.dcm": "The pixel data is too short: a truncated file.",
    }
    assert not any(name in str(error) for error in errors for name in PLANTED)


def test_report_without_a_frame_of_reference_costs_a_line_and_not_the_others(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    corners = np.c_[OUTLINE - 0.5, np.full(len(OUTLINE), 2.0)]
    region = sr.ImageRegion3D("POLYGON", world(corners, affine), slices[0].FrameOfReferenceUID)
    report = make_report(slices, [planar(referenced_region=region, measurements=[_volume()])])
    [item] = _regions(report)
    del item.ReferencedFrameOfReferenceUID
    report.save_as(tmp_path / "broken.dcm")
    save_report(tmp_path / "good.dcm", slices, [of_images(measurements=[_volume()])])
    [record], [error] = read_path(tmp_path)
    assert len(record.measurements) == 1
    assert (error.source, error.reason) == ("broken.dcm", "The measurement report cannot be used (AttributeError).")


def _regions(item: Dataset) -> list[Dataset]:
    """Coordinates in space below a content item."""
    children = item.get("ContentSequence") or []
    return [c for c in children if c.ValueType == "SCOORD3D"] + [region for c in children for region in _regions(c)]


def test_reports_of_other_templates_and_series_are_refused(tmp_path: Path) -> None:
    slices, _ = _series(tmp_path)
    elsewhere = dicom_slices(rescalable(random_image(3, SHAPE)), turned_affine("LPS", SHAPE), seed=9, **PATIENT)
    save_report(tmp_path / "elsewhere.dcm", elsewhere, [of_images(measurements=[_volume()])])
    other = make_report(slices, [of_images(measurements=[_volume()])])
    other.ContentTemplateSequence[0].TemplateIdentifier = "2000"
    (tmp_path / "text").mkdir()
    other.save_as(tmp_path / "text" / "other.dcm")
    [record], errors = read_path(tmp_path)
    assert record.measurements is None
    assert {error.source: error.reason for error in errors} == {
        "elsewhere.dcm": "A measurement report whose series is not among the MR series of this source.",
        "text/other.dcm": "Modality SR, expected MR.",
    }


def _shard(folder: Path, annotation: Annotation | None = None) -> tuple[dict, dict, str]:
    """The one row that the folder gives, its manifest entry, and everything that was written or said."""
    [source], _ = open_sources([folder], ReadLimits())
    [item], errors = group_files(probe_files(source.container, source.sizes), source)
    planned = PlannedItem(
        item=item, dataset="set", licence=None, simulated=False, split="train", patient_id="p", study_id="s",
        series_id="s", person_id="o", item_id="i", annotation=annotation,
    )  # fmt: skip
    path = folder.parent / "shard.parquet"
    report = write_shard([planned], path, IngestConfig())
    [row] = pq.read_table(path).to_pylist()
    rejects = [*(error.as_row() for error in errors), *report.rejects]
    texts = {k: v for k, v in row.items() if k not in ("image", "label_map")}
    said = json.dumps([rejects, report.rows, texts], default=str) + path.read_bytes().decode("latin-1")
    return row, report.rows[0], said


def test_row_has_the_measurements_and_no_text_of_the_report(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path / "in")
    region = image_region(slices[1], "POLYLINE", OUTLINE)
    unknown = Code("1", "99X", OBSERVER)
    groups = [
        planar(referenced_region=region, measurements=[_volume(), measured(unknown, 1.0, CUBIC_MM)]),
        of_images(finding_type=unknown, finding_sites=[sr.FindingSite(unknown)], measurements=[_volume()]),
    ]
    save_report(tmp_path / "in" / "sr.dcm", slices, groups)
    broken = save_report(tmp_path / "in" / "broken.dcm", slices, groups)
    broken.write_bytes(broken.read_bytes()[:-40])
    row, entry, said = _shard(tmp_path / "in")
    assert row["measurements"] == [VOLUME_ROW, VOLUME_ROW | {"finding": None, "site": None, "laterality": None}]
    assert row["boxes"] == _lesion(box_voxel=_box(affine, 1, 1))
    assert (entry["has_measurements"], entry["has_boxes"]) == (True, True)
    assert summarise([entry], [])["annotation"]["measurements"]["volumes"] == 1
    assert [name for name in (*PLANTED, "Tracking") if name.lower() in said.lower()] == []


def test_what_annotations_say_of_boxes_and_classes_wins(tmp_path: Path) -> None:
    slices, _ = _series(tmp_path / "in")
    region = image_region(slices[1], "POLYLINE", OUTLINE)
    present = [sr.QualitativeEvaluation(codes.SCT.Hemorrhage, codes.SCT.Present)]
    save_report(tmp_path / "in" / "sr.dcm", slices, [planar(referenced_region=region, qualitative_evaluations=present)])
    row, entry, _ = _shard(tmp_path / "in", Annotation(boxes=[], classes=["normal"]))
    assert (row["boxes"], row["classes"], row["measurements"]) == ([], ["normal"], None)
    assert not entry["has_measurements"]
    row, *_ = _shard(tmp_path / "in")
    assert (len(row["boxes"]), row["classes"]) == (1, ["hemorrhage"])


@pytest.mark.parametrize(
    ("unit", "code"),
    [
        ("mm3", "mm3"),
        ("10-6.mm2/s", "10-6.mm2/s"),
        ("ml/min/g", "ml/min/g"),
        ("{ratio}", "{ratio}"),
        ("g/ml{SUVbw}", "g/ml{SUVbw}"),
        ("{Doe}", ""),
        ("Doe", ""),
        ("mm.19700131", ""),
        ("", ""),
    ],
)
def test_units_are_made_of_parts_that_the_standard_knows(unit: str, code: str) -> None:
    concept = pydicom.Dataset()
    concept.CodeValue, concept.CodingSchemeDesignator, concept.CodeMeaning = unit, "UCUM", "Doe"
    assert unit_code(concept) == code
    concept.CodingSchemeDesignator = "99X"
    assert unit_code(concept) == ""


def test_extent_of_an_ellipse_follows_a_shear() -> None:
    angle = np.linspace(0, 2 * np.pi, 10_001)
    ends = np.array([[-3.0, 0, 0], [3.0, 0, 0], [0, -1.0, 0], [0, 1.0, 0]])
    shear = np.array([[1.0, 0.7, 0.2], [0.1, 2.0, -0.4], [0.3, 0.0, 1.0]])
    outline = np.c_[3 * np.cos(angle), np.sin(angle), np.zeros_like(angle)] @ shear.T
    low, high = graphic_extent("ELLIPSE", ends @ shear.T)
    np.testing.assert_allclose(low, outline.min(axis=0), atol=1e-6)
    np.testing.assert_allclose(high, outline.max(axis=0), atol=1e-6)
