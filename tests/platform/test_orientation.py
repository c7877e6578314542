"""World coordinates: every voxel value lies where nibabel (NIfTI) and dcm2niix (DICOM) say, whatever the axes."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from omnimri.platform.data.formats.readers import read_path
from tests.platform.intake_fakes import (
    assert_same_voxels,
    dicom_slices,
    oblique_affine,
    random_image,
    rescalable,
    save_dicom,
    save_nifti,
)

SHAPE = (4, 6, 5)

AXES = [
    "".join(letters)
    for permuted in itertools.permutations(("LR", "PA", "IS"))
    for letters in itertools.product(*permuted)
]
"""All 48 ways to lay three axes along those of the body."""


def _affine(axes: str) -> np.ndarray:
    """Axis-aligned affine with three spacings, or the oblique one."""
    if axes == "oblique":
        return oblique_affine()
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    affine[:3, 3] = (-31.0, 12.5, 7.0)
    for axis, (letter, spacing_mm) in enumerate(zip(axes, (1.5, 2.0, 4.0), strict=True)):
        affine["RAS".index(letter) if letter in "RAS" else "LPI".index(letter), axis] = (
            spacing_mm if letter in "RAS" else -spacing_mm
        )
    return affine


@pytest.mark.parametrize("axes", [*AXES, "oblique"])
def test_nifti_has_the_affine_and_the_voxels_of_nibabel(tmp_path: Path, axes: str) -> None:
    path = save_nifti(tmp_path / "scan.nii", random_image(0, SHAPE), _affine(axes))
    assert axes in ("oblique", "".join(nib.aff2axcodes(_affine(axes))))
    [record], errors = read_path(path)
    reference = nib.load(path)
    assert errors == []
    np.testing.assert_array_equal(record.scan.affine, reference.affine)
    np.testing.assert_array_equal(record.scan.image.transpose(2, 1, 0), reference.get_fdata())


@pytest.mark.parametrize("axes", [*AXES, "oblique"])
def test_dicom_has_every_voxel_where_it_was_put(tmp_path: Path, axes: str) -> None:
    image, affine = rescalable(random_image(1, SHAPE)), _affine(axes)
    [record], errors = read_path(save_dicom(dicom_slices(image, affine), tmp_path))
    assert errors == []
    assert_same_voxels(record.scan, nib.Nifti1Image(np.ascontiguousarray(image.T), affine))
    assert np.linalg.det(record.scan.affine) > 0


@pytest.mark.parametrize("axes", [*AXES, "oblique"])
def test_dicom_equals_dcm2niix(tmp_path: Path, axes: str) -> None:
    dcm2niix = shutil.which("dcm2niix")
    if dcm2niix is None:
        pytest.skip("dcm2niix is not installed: the reference converter of DICOM")
    slices = dicom_slices(rescalable(random_image(2, SHAPE)), _affine(axes))
    for number, dataset in enumerate(slices, start=1):
        dataset.InstanceNumber = number  # dcm2niix sorts by it and takes shuffled numbers for missing slices
        dataset.StudyDate, dataset.StudyTime, dataset.SeriesNumber = "20200101", "120000", 1
        # One slope for all: dcm2niix keeps one, and rounds when slices have their own.
        stored = np.frombuffer(dataset.PixelData, np.uint16)
        dataset.PixelData = np.ascontiguousarray(stored % 4096, np.uint16).tobytes()
        del dataset.RescaleSlope, dataset.RescaleIntercept
    [record], _ = read_path(save_dicom(slices, tmp_path / "in"))
    (tmp_path / "out").mkdir()
    command = [dcm2niix, "-b", "n", "-z", "n", "-f", "scan", "-o", str(tmp_path / "out"), str(tmp_path / "in")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert_same_voxels(record.scan, nib.load(tmp_path / "out" / "scan.nii"))
