"""NIfTI intake: the grid of the file as nibabel reads it, 4D files, sidecars, and files that only claim to be NIfTI."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from omnimri.platform.data.formats.readers import read_path
from omnimri.platform.data.formats.records import ReadLimits
from tests.platform.intake_fakes import oblique_affine, random_image, save_nifti

NIBABEL_FILES = Path(nib.__file__).parent / "tests" / "data"


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "SAL"])
def test_grid_is_that_of_the_file(tmp_path: Path, axes: str) -> None:
    image = random_image(0)
    transform = nib.orientations.axcodes2ornt(axes)
    affine = oblique_affine() @ nib.orientations.inv_ornt_aff(transform, image.shape[::-1])
    [record], errors = read_path(save_nifti(tmp_path / "scan.nii.gz", image, affine))
    assert errors == []
    np.testing.assert_array_equal(record.scan.image, image)
    np.testing.assert_allclose(record.scan.affine, affine, atol=1e-4)


def test_real_4d_file_gives_one_record_per_volume() -> None:
    path = NIBABEL_FILES / "example4d.nii.gz"
    reference = nib.load(path)
    records, errors = read_path(path)
    assert errors == []
    assert [(record.volume, record.num_volumes) for record in records] == [(0, 2), (1, 2)]
    data = reference.get_fdata(dtype=np.float32)
    for record in records:
        np.testing.assert_array_equal(record.scan.image, data[..., record.volume].transpose(2, 1, 0))
        np.testing.assert_array_equal(record.scan.affine, reference.affine)
        np.testing.assert_allclose(record.scan.spacing_mm, (2.2, 2.0, 2.0), atol=1e-5)
        assert record.scan.facts["plane"] == "axial"


def test_scale_factors_and_big_endian_files_are_honoured() -> None:
    path = NIBABEL_FILES / "anatomical.nii"
    [record], _ = read_path(path)
    np.testing.assert_allclose(record.scan.image, nib.load(path).get_fdata().transpose(2, 1, 0), rtol=1e-6)


def test_nifti2_is_read() -> None:
    records, errors = read_path(NIBABEL_FILES / "example_nifti2.nii.gz")
    assert errors == []
    assert len(records) == 2


def test_units_other_than_mm_are_converted(tmp_path: Path) -> None:
    image = nib.Nifti1Image(random_image(1).T, np.diag([0.002, 0.002, 0.003, 1]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "scan.nii")
    [record], _ = read_path(tmp_path / "scan.nii")
    np.testing.assert_allclose(record.scan.spacing_mm, (3, 2, 2), rtol=1e-5)


def test_sidecar_and_bids_name_give_facts_and_keys(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "sub-07" / "ses-2" / "anat" / "sub-07_ses-2_FLAIR.nii.gz", random_image(2), np.eye(4))
    sidecar = {
        "Manufacturer": "Philips", "MagneticFieldStrength": 3, "RepetitionTime": 9.0, "EchoTime": 0.12,
        "InversionTime": 2.5, "FlipAngle": 90, "BodyPartExamined": "HEAD", "PatientName": "Doe^Jane",
    }  # fmt: skip
    path.with_name("sub-07_ses-2_FLAIR.json").write_text(json.dumps(sidecar))
    [record], errors = read_path(tmp_path)
    assert errors == []
    assert (record.patient_key, record.study_key) == ("sub-07", "sub-07|ses-2")
    facts = record.scan.facts
    assert (facts["contrast"], facts["vendor"], facts["body_part"]) == ("FLAIR", "Philips", "brain")
    assert (facts["tr_ms"], facts["te_ms"], facts["ti_ms"], facts["field_strength_t"]) == (9000, 120, 2500, 3.0)
    assert "Doe" not in str(facts)


def test_a_single_slice_is_a_volume_of_depth_one(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(random_image(3)[0].T, np.eye(4)), tmp_path / "slice.nii")
    [record], _ = read_path(tmp_path / "slice.nii")
    np.testing.assert_array_equal(record.scan.image, random_image(3)[:1])


def test_a_text_file_named_nii_gz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "brain.nii.gz"
    path.write_text("this is not a brain")
    records, [error] = read_path(path)
    assert records == []
    assert str(error).startswith("brain.nii.gz: Not a NIfTI file, whatever its name says")


def test_a_file_cut_off_in_the_voxels_is_refused(tmp_path: Path) -> None:
    whole = gzip.decompress(save_nifti(tmp_path / "whole.nii.gz", random_image(4), np.eye(4)).read_bytes())
    path = tmp_path / "cut" / "brain.nii"
    path.parent.mkdir()
    path.write_bytes(whole[:-100])
    records, [error] = read_path(path)
    assert records == []
    assert "Not a readable NIfTI file" in error.reason


@pytest.mark.parametrize("dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_complex_and_colour_files_are_refused(tmp_path: Path, dtype: object) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), dtype=dtype), np.eye(4)), tmp_path / "x.nii")
    records, [error] = read_path(tmp_path / "x.nii")
    assert records == []
    assert "expected real numbers" in error.reason


def test_a_header_that_declares_a_huge_array_is_refused_before_reading(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "scan.nii.gz", random_image(5), np.eye(4))
    records, [error] = read_path(path, ReadLimits(max_array_bytes=100))
    assert records == []
    assert "max_array_bytes" in error.hint


def test_label_maps_are_no_volumes(tmp_path: Path) -> None:
    save_nifti(tmp_path / "sub-1_dseg.nii.gz", random_image(6), np.eye(4))
    records, [error] = read_path(tmp_path)
    assert records == []
    assert "label map" in error.reason
