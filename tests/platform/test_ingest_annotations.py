"""The annotations.json sidecar: which entry counts for a series, and label maps on other grids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from omnimri.models.scan import Scan
from omnimri.platform.data.formats.records import ReadError
from omnimri.platform.data.intake.annotations import check_boxes, load_label_map, merge_facts, parse_sidecars
from tests.platform.intake_fakes import oblique_affine, random_image, save_nifti


def _content(series: dict[str, Any], **patient: Any) -> bytes:
    return json.dumps({"patient": patient, "series": series}).encode()


def test_the_nearest_file_that_lists_a_series_counts() -> None:
    sidecars, errors = parse_sidecars(
        {
            "annotations.json": _content({"sub-1/T1w": {"report": "far"}, "sub-1/T2w": {"report": "only far"}}),
            "sub-1/annotations.json": _content(
                {"T1w": {"report": "near"}}, participant_id="sub-1", sex="F", age_years=40
            ),
        },
        prefix="",
    )
    assert errors == []
    near = sidecars.find(("sub-1/T1w/a.dcm", "sub-1/T1w/b.dcm"))
    assert (near.report, near.participant_id) == ("near", "sub-1")
    assert sidecars.find(("sub-1/T2w/a.dcm",)).report == "only far"
    assert sidecars.find(("sub-1/T1w/a.dcm", "sub-1/PD/b.dcm")) is None


def test_absent_and_empty_annotations_are_told_apart() -> None:
    sidecars, _ = parse_sidecars({"annotations.json": _content({"a.nii": {"boxes": []}})}, prefix="")
    annotation = sidecars.find(("a.nii",))
    assert annotation.boxes == []
    assert annotation.classes is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"boxes": [{"label": "x", "box_voxel": [1, 2, 3]}]}, "box_voxel"),
        ({"boxes": {"label": "x"}}, "`boxes` holds dict, expected list"),
        ({"classes": "normal"}, "`classes` holds str, expected list"),
        ({"report": 5}, "`report` holds int, expected str"),
        ({"description": {"diagnosis": {}}}, "`description` has unknown keys"),
        (
            {"description": {"diagnostic_impression": {"suggestive_of": ["Jane Doe"]}}},
            "`description` has unknown keys or values that are no strings in diagnostic_impression",
        ),
    ],
)
def test_wrong_entries_say_which_key(entry: dict[str, Any], message: str) -> None:
    sidecars, _ = parse_sidecars({"annotations.json": _content({"a.nii": entry})}, prefix="")
    with pytest.raises(ValueError, match=message):
        sidecars.find(("a.nii",))


@pytest.mark.parametrize("content", [b"not json", b"[]", b'{"series": 3}', b"\xff\xfe"])
def test_files_that_are_no_annotation_are_refused(content: bytes) -> None:
    _, [error] = parse_sidecars({"sub/annotations.json": content}, prefix="root/")
    assert error.source == "root/sub/annotations.json"
    assert "Not a valid annotation file" in error.reason


def test_paths_that_leave_the_folder_are_refused() -> None:
    content = _content({"../other/T1w": {}, "T1w": {"label_map": "../../etc/labels.nii"}})
    sidecars, [error] = parse_sidecars({"sub/annotations.json": content}, prefix="")
    assert "above it" in error.reason
    assert sidecars.find(("sub/T1w/a.dcm",)).label_map == ""


def test_patient_block_fills_gaps_only() -> None:
    sidecars, _ = parse_sidecars(
        {"annotations.json": _content({"a.nii": {}}, participant_id="1", sex="F", age_years=30)}, prefix=""
    )
    facts = merge_facts({"sex": "M", "age_years": None, "contrast": "T1w"}, sidecars.find(("a.nii",)))
    assert facts == {"sex": "M", "age_years": 30.0, "contrast": "T1w"}


@pytest.mark.parametrize("axes", ["RAS", "LPI", "SAR"])
def test_label_map_with_other_axes_is_turned_to_the_grid_of_its_series(tmp_path: Path, axes: str) -> None:
    labels = (random_image(0) % 4).astype(np.uint8)
    scan = Scan(image=random_image(0), affine=oblique_affine())
    image = nib.Nifti1Image(labels.T, scan.affine)
    start = nib.orientations.axcodes2ornt("RAS")
    turned = image.as_reoriented(nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(axes)))
    nib.save(turned, tmp_path / "labels.nii")
    np.testing.assert_array_equal(load_label_map(tmp_path / "labels.nii", scan, "x"), labels)


def test_label_map_on_another_grid_is_refused(tmp_path: Path) -> None:
    scan = Scan(image=random_image(1), affine=oblique_affine())
    shifted = scan.affine.copy()
    shifted[0, 3] += 1.0
    save_nifti(tmp_path / "shifted.nii", random_image(1) % 4, shifted)
    with pytest.raises(ReadError, match=r"lies up to 1\.0 mm from that of its series"):
        load_label_map(tmp_path / "shifted.nii", scan, "x")
    save_nifti(tmp_path / "small.nii", random_image(1)[1:] % 4, scan.affine)
    with pytest.raises(ReadError, match=r"has shape \(4, 8, 6\), its series \(5, 8, 6\)"):
        load_label_map(tmp_path / "small.nii", scan, "x")
    save_nifti(tmp_path / "half.nii", random_image(1) / 2, scan.affine)
    with pytest.raises(ReadError, match=r"whole numbers from 0 to 255"):
        load_label_map(tmp_path / "half.nii", scan, "x")


def test_label_map_with_axes_that_are_all_but_parallel_is_refused(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[:2, :2] = [[1e8, 1e8], [0, 1e-9]]
    save_nifti(tmp_path / "flat.nii", random_image(2) % 4, affine)
    with pytest.raises(ReadError, match="all but parallel"):
        load_label_map(tmp_path / "flat.nii", Scan(image=random_image(2), affine=np.eye(4)), "x")


@pytest.mark.parametrize("box", [[0, 0, 0, 6, 1, 1], [2, 0, 0, 2, 1, 1], [-1, 0, 0, 1, 1, 1]])
def test_boxes_outside_the_volume_are_refused(box: list[int]) -> None:
    check_boxes([{"box_voxel": [0, 0, 0, 5, 8, 6]}], (5, 8, 6))
    with pytest.raises(ValueError, match="is empty or outside the volume"):
        check_boxes([{"box_voxel": box}], (5, 8, 6))
