"""DICOM SEG and RTSTRUCT: label maps on the grid of the series they refer to, under names that tell nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from omnimri.models.vocabulary import structure_of
from omnimri.platform.data.formats.dicom.names import coded_name, label_name, plain_name
from omnimri.platform.data.formats.label_maps import Labels
from omnimri.platform.data.formats.readers import group, probe_files, read_path
from omnimri.platform.data.formats.records import ReadError, ReadLimits
from omnimri.platform.data.formats.sources import open_sources
from omnimri.platform.data.intake.annotations import parse_sidecars
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.writer import PlannedItem, write_shard
from tests.platform.intake_fakes import (
    dicom_slices,
    enhanced_object,
    random_image,
    rescalable,
    save_dicom,
    save_nifti,
)
from tests.platform.label_fakes import PATIENT, save_rtstruct, save_seg, turned_affine

SHAPE = (5, 8, 6)
ORIENTATIONS = ["RAS", "LPS", "PSR", "SRA", "LAI", "ASL", "IPR"]
RECTANGLE = np.array([[1.5, 2.5], [4.5, 2.5], [4.5, 5.5], [1.5, 5.5]])
"""In-plane contour `x y` around the voxels 2..4 by 3..5."""


def _labels(seed: int = 0) -> np.ndarray:
    """0, 1 or 2 without symmetry; the first and the last slice are empty."""
    labels = np.random.default_rng(seed).integers(0, 3, size=SHAPE).astype(np.uint8)
    labels[[0, -1]] = 0
    return labels


def _series(folder: Path, axes: str = "LPS", seed: int = 0) -> tuple[list[pydicom.Dataset], np.ndarray]:
    """A series saved in `folder / "mr"`, and the affine that it was made with."""
    affine = turned_affine(axes, SHAPE)
    slices = dicom_slices(rescalable(random_image(seed, SHAPE)), affine, **PATIENT)
    save_dicom(slices, folder / "mr")
    return slices, affine


def _as_read(labels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Reading makes z run along row direction x column direction."""
    return labels if np.linalg.det(affine) > 0 else labels[::-1]


def _on_slice(z: int, contour: np.ndarray = RECTANGLE) -> np.ndarray:
    return np.c_[contour, np.full(len(contour), z)]


def _rectangle(*z: int) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[list(z), 3:6, 2:5] = 1
    return mask


@pytest.mark.parametrize("axes", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_segmentation_comes_back_voxel_by_voxel(tmp_path: Path, axes: str, kind: str) -> None:
    slices, affine = _series(tmp_path, axes)
    labels = _labels()
    order = np.random.default_rng(1).permutation(len(slices))
    stored = labels if kind == "LABELMAP" else np.stack([labels == 1, labels == 2], axis=-1)
    save_seg(
        tmp_path / "seg.dcm", [slices[z] for z in order], stored[order].astype(np.uint8),
        ["left kidney", "Lesion 1"], kind=kind,
    )  # fmt: skip
    [record], errors = read_path(tmp_path)
    assert errors == []
    assert record.label_map is not None
    np.testing.assert_array_equal(record.label_map, _as_read(labels, affine))
    assert record.label_names == {1: "left kidney", 2: "lesion"}


def test_several_segmentations_of_a_series_are_put_together(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    labels = _labels(1)
    for value, name in ((1, "liver"), (2, "spleen")):
        save_seg(tmp_path / f"{name}.dcm", slices, (labels == value)[..., None].astype(np.uint8), [name])
    [record], errors = read_path(tmp_path)
    assert errors == []
    np.testing.assert_array_equal(record.label_map, _as_read(labels, affine))
    assert record.label_names == {1: "liver", 2: "spleen"}


def test_all_echoes_on_one_grid_get_the_labels(tmp_path: Path) -> None:
    affine = turned_affine("LPS", SHAPE)
    for te in (10.0, 80.0):
        image = rescalable(random_image(int(te), SHAPE))
        slices = dicom_slices(image, affine, EchoTime=te, **PATIENT)
        save_dicom(slices, tmp_path / "mr", prefix=f"{te:.0f}")
    save_seg(tmp_path / "seg.dcm", slices, (_labels() == 1)[..., None].astype(np.uint8), ["liver"])
    records, errors = read_path(tmp_path)
    assert errors == []
    assert [record.label_names for record in records] == [{1: "liver"}] * 2


def test_series_and_segmentation_in_a_zip(tmp_path: Path) -> None:
    slices, _ = _series(tmp_path / "in")
    save_seg(tmp_path / "in" / "seg.dcm", slices, (_labels() > 0)[..., None].astype(np.uint8), ["liver"])
    shutil.make_archive(str(tmp_path / "study"), "zip", tmp_path / "in")
    [record], errors = read_path(tmp_path / "study.zip")
    assert errors == []
    assert record.label_names == {1: "liver"}


@pytest.mark.parametrize("axes", ["LPS", "ASL"])
def test_labels_of_an_enhanced_object(tmp_path: Path, axes: str) -> None:
    affine, labels = turned_affine(axes, SHAPE), _labels()
    slices = dicom_slices(rescalable(random_image(0, SHAPE)), affine, **PATIENT)
    enhanced = enhanced_object(slices)
    enhanced.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    frames = np.argsort([dataset.InstanceNumber for dataset in slices])
    save_seg(tmp_path / "seg.dcm", [enhanced], (labels == 1)[frames, ..., None].astype(np.uint8), ["liver"])
    [record], errors = read_path(tmp_path)
    assert errors == []
    np.testing.assert_array_equal(record.label_map, _as_read((labels == 1).astype(np.uint8), affine))


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_contour_of_a_structure_set_is_filled(tmp_path: Path, axes: str) -> None:
    slices, affine = _series(tmp_path, axes)
    save_rtstruct(tmp_path / "rt.dcm", slices, affine, {"GTV_1": [_on_slice(1), _on_slice(2)]})
    [record], errors = read_path(tmp_path)
    assert errors == []
    np.testing.assert_array_equal(record.label_map, _as_read(_rectangle(1, 2), affine))
    assert record.label_names == {1: "gtv"}


def test_an_inner_contour_is_a_hole(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    inner = np.array([[2.5, 3.5], [3.5, 3.5], [3.5, 4.5], [2.5, 4.5]])
    save_rtstruct(tmp_path / "rt.dcm", slices, affine, {"bladder": [_on_slice(3), _on_slice(3, inner)]})
    [record], _ = read_path(tmp_path)
    expected = _rectangle(3)
    expected[3, 4, 3] = 0
    np.testing.assert_array_equal(record.label_map, _as_read(expected, affine))


def test_body_outline_for_irradiation_is_left_out(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    save_rtstruct(tmp_path / "rt.dcm", slices, affine, {"BODY": [_on_slice(1)]}, interpreted_type="EXTERNAL")
    [record], [error] = read_path(tmp_path)
    assert record.label_map is None
    assert error.reason == "The RT structure set holds no region."


def test_a_segmentation_wins_over_a_structure_set_and_that_is_said(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    save_seg(tmp_path / "a.dcm", slices, (_labels() == 1)[..., None].astype(np.uint8), ["liver"])
    save_rtstruct(tmp_path / "rt.dcm", slices, affine, {"spleen": [_on_slice(1)]})
    [record], [error] = read_path(tmp_path)
    assert record.label_names == {1: "liver"}
    assert (error.source, error.hint) == ("rt.dcm", "The volume was kept.")
    assert error.reason == "Not used: a DICOM segmentation goes before an RT structure set."


def _block(z: slice, y: slice, x: slice) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[z, y, x] = 1
    return mask


ALL = slice(None)
WHOLE, INNER = _block(slice(0, 5), slice(1, 7), slice(0, 5)), _block(slice(1, 4), slice(2, 6), slice(1, 4))
INNERMOST = _block(slice(2, 3), slice(3, 5), slice(2, 3))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_segments_inside_others_are_painted_over_them(tmp_path: Path, order: tuple[int, ...]) -> None:
    slices, affine = _series(tmp_path)
    nested = {"liver": WHOLE, "kidney": INNER, "lesion": INNERMOST}
    names = [list(nested)[index] for index in order]
    save_seg(tmp_path / "seg.dcm", slices, np.stack([nested[name] for name in names], axis=-1), names)
    [record], errors = read_path(tmp_path)
    assert errors == []
    assert record.label_names == dict(enumerate(names, start=1))
    values = {name: value for value, name in record.label_names.items()}
    expected = np.select([INNERMOST > 0, INNER > 0, WHOLE > 0], [values[n] for n in ("lesion", "kidney", "liver")])
    np.testing.assert_array_equal(record.label_map, _as_read(expected, affine))


def test_a_lesion_of_another_file_is_painted_over_its_organ(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    save_seg(tmp_path / "a.dcm", slices, INNER[..., None], ["lesion"])
    save_seg(tmp_path / "b.dcm", slices, WHOLE[..., None], ["liver"])
    [record], errors = read_path(tmp_path)
    assert errors == []
    np.testing.assert_array_equal(record.label_map, _as_read(np.where(INNER, 1, 2 * WHOLE), affine))


def test_overlapping_segments_are_refused_and_the_volume_is_kept(tmp_path: Path) -> None:
    slices, _ = _series(tmp_path)
    moved = _block(slice(1, 4), slice(2, 6), slice(2, 5))
    masks = np.stack([INNER, moved], axis=-1)
    save_seg(tmp_path / "seg.dcm", slices, masks, ["liver", "spleen"])
    [record], [error] = read_path(tmp_path)
    assert record.label_map is None
    assert error.source == "seg.dcm"
    assert error.reason == "Segments overlap: 24 voxels belong to two of them, and neither lies inside the other."


def test_the_same_region_twice_is_refused(tmp_path: Path) -> None:
    slices, _ = _series(tmp_path)
    save_seg(tmp_path / "seg.dcm", slices, np.stack([INNER, INNER], axis=-1), ["lesion", "lesion"])
    [record], [error] = read_path(tmp_path)
    assert record.label_map is None
    assert error.reason == "Segments overlap: 36 voxels belong to two of them, which are the same region."


@pytest.mark.parametrize(("num_shared", "is_kept"), [(0, True), (5, True), (6, False), (94, False), (95, True)])
def test_borders_and_regions_inside_are_told_apart_by_twentieths(num_shared: int, *, is_kept: bool) -> None:
    large, small = np.zeros((10, 10, 10), bool), np.zeros((10, 10, 10), bool)
    large[:5] = True
    small.reshape(-1)[500 - num_shared : 600 - num_shared] = True
    labels = Labels(large.shape, "seg.dcm")
    labels.add("liver", large)
    if not is_kept:
        with pytest.raises(ReadError, match=f"{num_shared} voxels belong to two of them"):
            labels.add("spleen", small)
        return
    labels.add("spleen", small)
    label_map, names, covered = labels.painted()
    assert (names, covered) == ({1: "liver", 2: "spleen"}, [])
    np.testing.assert_array_equal(label_map, np.where(small, 2, large))


def test_a_region_that_inner_ones_cover_whole_is_said_to_be_missing(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    masks = np.stack([INNER, INNER * _block(slice(0, 2), ALL, ALL), INNER * _block(slice(2, 5), ALL, ALL)], axis=-1)
    save_seg(tmp_path / "seg.dcm", slices, masks, ["prostate", "transition zone", "peripheral zone"])
    [record], [error] = read_path(tmp_path)
    assert record.label_names == {2: "transition zone", 3: "peripheral zone"}
    np.testing.assert_array_equal(record.label_map, _as_read(2 * masks[..., 1] + 3 * masks[..., 2], affine))
    assert error.reason.startswith("Inner segments leave no voxel of prostate")


def test_segments_of_one_name_have_values_and_names_of_their_own(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    labels = np.random.default_rng(3).integers(0, 5, size=SHAPE).astype(np.uint8)
    masks = np.stack([labels == value for value in (1, 2, 3, 4)], axis=-1).astype(np.uint8)
    save_seg(tmp_path / "a.dcm", slices, masks[..., :3], ["Lesion 1", "liver", "tumour of Jane Doe"])
    save_seg(tmp_path / "b.dcm", slices, masks[..., 3:], ["lesion"])
    [record], errors = read_path(tmp_path)
    assert errors == []
    assert record.label_names == {1: "lesion", 2: "liver", 3: "lesion 2", 4: "lesion 3"}
    np.testing.assert_array_equal(record.label_map, _as_read(labels, affine))
    assert {structure_of(name) for name in record.label_names.values()} == {"lesion", "liver"}


def test_region_of_a_structure_set_inside_another_is_painted_over_it(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    inner = np.array([[2.5, 3.5], [3.5, 3.5], [3.5, 4.5], [2.5, 4.5]])
    regions = {"lesion": [_on_slice(1, inner)], "prostate": [_on_slice(z) for z in (1, 2)]}
    save_rtstruct(tmp_path / "rt.dcm", slices, affine, regions)
    [record], errors = read_path(tmp_path)
    assert errors == []
    expected = 2 * _rectangle(1, 2)
    expected[1, 4, 3] = 1
    np.testing.assert_array_equal(record.label_map, _as_read(expected, affine))
    assert record.label_names == {1: "lesion", 2: "prostate"}


def test_overlapping_regions_of_a_structure_set_are_refused(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    regions = {"bladder": [_on_slice(1), _on_slice(2)], "prostate": [_on_slice(2), _on_slice(3)]}
    save_rtstruct(tmp_path / "rt.dcm", slices, affine, regions)
    [record], [error] = read_path(tmp_path)
    assert record.label_map is None
    assert error.reason == "Segments overlap: 9 voxels belong to two of them, and neither lies inside the other."


def test_segmentation_of_another_grid_is_refused(tmp_path: Path) -> None:
    slices, _ = _series(tmp_path)
    for dataset in slices:
        dataset.ImagePositionPatient = [dataset.ImagePositionPatient[0] + 0.7, *dataset.ImagePositionPatient[1:]]
    save_seg(tmp_path / "seg.dcm", slices, (_labels() > 0)[..., None].astype(np.uint8), ["liver"])
    [record], [error] = read_path(tmp_path)
    assert record.label_map is None
    assert error.reason == "The grid of the segmentation lies up to 0.7 mm from that of its series."


def test_segmentation_that_reaches_outside_is_refused(tmp_path: Path) -> None:
    affine = turned_affine("LPS", SHAPE)
    slices = dicom_slices(rescalable(random_image(3, SHAPE)), affine, **PATIENT)
    save_dicom(slices[:3], tmp_path / "mr")
    save_seg(tmp_path / "seg.dcm", slices, (_labels() > 0)[..., None].astype(np.uint8), ["liver"])
    [record], [error] = read_path(tmp_path)
    assert record.label_map is None
    assert error.reason == "A segment reaches outside the volume of its series."


def test_contours_outside_across_and_of_other_frames_are_refused(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    upright = np.array([[1.0, 2.0, 0.0], [4.0, 2.0, 0.0], [4.0, 2.0, 3.0]])
    cases = {
        "a.dcm": ({"liver": [_on_slice(7)]}, {}, "A contour lies outside the volume of its series."),
        "b.dcm": ({"liver": [upright]}, {}, "Contours do not lie in the slices of the series."),
        "c.dcm": (
            {"liver": [_on_slice(1)]},
            {"frame_of_reference": "1.2.3"},
            "Its frame of reference is not that of the series it refers to.",
        ),
        "d.dcm": (
            {"liver": [_on_slice(1)]}, {"geometric_type": "OPEN_PLANAR"}, "The RT structure set holds no region."
        ),
    }  # fmt: skip
    for name, (regions, changed, _) in cases.items():
        save_rtstruct(tmp_path / name, slices, affine, regions, **changed)
    [record], errors = read_path(tmp_path)
    assert record.label_map is None
    assert {error.source: error.reason for error in errors} == {name: reason for name, (*_, reason) in cases.items()}


def test_label_objects_without_their_series_are_one_line() -> None:
    records, [error] = read_path(Path(get_testdata_file("liver_1frame.dcm")))
    assert records == []
    assert "whose series is not among the MR series of this source" in error.reason
    records, [error] = read_path(Path(get_testdata_file("rtstruct.dcm")))
    assert records == []
    assert "whose series is not among the MR series of this source" in error.reason


def test_labels_of_a_series_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    slices = dicom_slices(rescalable(random_image(4, SHAPE)), turned_affine("LPS", SHAPE), **PATIENT)
    save_dicom([*slices[:2], *slices[3:]], tmp_path / "mr")
    save_seg(tmp_path / "seg.dcm", slices, (_labels() == 1)[..., None].astype(np.uint8), ["liver"])
    records, errors = read_path(tmp_path)
    assert records == []
    assert [error.source for error in errors] == ["mr", "seg.dcm"]
    assert errors[1].reason == "The series that it refers to was not read."


def test_a_copy_of_a_segmentation_is_used_once(tmp_path: Path) -> None:
    slices, _ = _series(tmp_path)
    path = save_seg(tmp_path / "a.dcm", slices, (_labels() == 1)[..., None].astype(np.uint8), ["liver"])
    (tmp_path / "b.dcm").write_bytes(path.read_bytes())
    [record], [error] = read_path(tmp_path)
    assert record.label_names == {1: "liver"}
    assert (error.source, error.reason) == ("b.dcm", "A copy of an instance that is there already.")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Kidney_Left #2", "kidney left"),
        ("LESION 1", "lesion"),
        ("white matter", "white matter"),
        ("Doe^Jane tumour 12.3.1970", "lesion"),
        ("Jane Doe", "structure 3"),
        ("White", "structure 3"),
        ("Segment 1", "structure 3"),
        ("circle of Willis", "structure 3"),
        ("", "structure 3"),
        (None, "structure 3"),
    ],
)
def test_names_are_words_of_the_vocabulary_or_nothing(text: str | None, name: str) -> None:
    assert label_name(text, otherwise="structure 3") == name


def test_a_code_is_named_by_the_standard_and_not_by_the_file() -> None:
    segment = pydicom.Dataset()
    kind, side = pydicom.Dataset(), pydicom.Dataset()
    kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning = "T-71000", "SRT", "Jane Doe's kidney"
    side.CodeValue, side.CodingSchemeDesignator, side.CodeMeaning = "7771000", "SCT", "Left"
    kind.SegmentedPropertyTypeModifierCodeSequence = [side]
    segment.SegmentedPropertyTypeCodeSequence = [kind]
    assert coded_name(segment) == "left kidney"
    kind.CodeValue = "unknown"
    assert coded_name(segment) == ""


def test_code_names_a_segment_whose_label_says_nothing(tmp_path: Path) -> None:
    slices, _ = _series(tmp_path)
    masks = np.stack([_labels() == 1, _labels() == 2], axis=-1).astype(np.uint8)
    types = [codes.SCT.Liver, Code("1", "99X", "Doe")]
    save_seg(tmp_path / "seg.dcm", slices, masks, ["Jane Doe", "Doe"], types=types)
    [record], _ = read_path(tmp_path)
    assert record.label_names == {1: "liver", 2: "structure 2"}


def test_every_term_of_the_standard_is_spelt_with_its_vocabulary() -> None:
    assert plain_name("Cerebrospinal fluid") == "cerebrospinal fluid"
    assert plain_name("Doe") == ""


def _shard(folder: Path) -> tuple[dict, list[dict[str, str]], bytes]:
    """The one row that the folder gives, the ledger, and the bytes of the shard."""
    [source], _ = open_sources([folder], ReadLimits())
    sidecars, _ = parse_sidecars({n: (folder / n).read_bytes() for n in source.sizes if "annotations" in n}, "")
    items, errors = group(probe_files(source.container, source.sizes), source, label_maps=sidecars.label_maps())
    planned = [
        PlannedItem(
            item=item, dataset="set", licence=None, simulated=False, split="train", patient_id="p", study_id="s",
            series_id="s", person_id="o", item_id="i", annotation=sidecars.find(item.names),
        )
        for item in items
    ]  # fmt: skip
    report = write_shard(planned, folder / "shard.parquet", IngestConfig())
    [row] = pq.read_table(folder / "shard.parquet").to_pylist()
    return row, [*(e.as_row() for e in errors), *report.rejects], (folder / "shard.parquet").read_bytes()


def test_rows_carry_the_labels_and_no_text_of_the_file(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    labels = _labels()
    masks = np.stack([labels == 1, labels == 2], axis=-1).astype(np.uint8)
    save_seg(tmp_path / "seg.dcm", slices, masks, ["tumour of Jane Doe", "Doe"])
    row, ledger, written = _shard(tmp_path)
    assert ledger == []
    assert row["label_names"] == [(1, "lesion"), (2, "structure 2")]
    stored = np.frombuffer(row["label_map"]["data"], np.uint8).reshape(SHAPE)
    np.testing.assert_array_equal(stored, _as_read(labels, affine))
    assert b"Doe" not in written
    assert b"Jane" not in written


def test_annotations_json_wins_over_a_segmentation(tmp_path: Path) -> None:
    slices, affine = _series(tmp_path)
    save_seg(tmp_path / "seg.dcm", slices, (_labels() == 1)[..., None].astype(np.uint8), ["liver"])
    save_nifti(tmp_path / "labels.nii", _labels(5), affine)
    entry = {"label_map": "labels.nii", "label_names": {"1": "grey matter"}}
    (tmp_path / "annotations.json").write_text(json.dumps({"series": {"mr": entry}}))
    row, ledger, _ = _shard(tmp_path)
    assert ledger == []
    assert row["label_names"] == [(1, "grey matter")]
    stored = np.frombuffer(row["label_map"]["data"], np.uint8).reshape(SHAPE)
    np.testing.assert_array_equal(stored, _as_read(_labels(5), affine))
