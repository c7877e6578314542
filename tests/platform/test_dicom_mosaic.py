"""Siemens mosaics: against dcm2niix on real files, and a mosaic made here from a known volume."""

from __future__ import annotations

import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from omnimri.platform.data.formats.readers import read_path
from tests.platform.intake_fakes import assert_same_voxels, dicom_slices, oblique_affine, random_image

DATA = Path(__file__).parents[3] / "shared" / "data"
"""dcm2niix's own conversions (github.com/neurolabusc/dcm_qa_nih and dcm_qa_sag), where they are present."""

REAL = [
    ("dcm_qa_nih/In/20180918Si/mr_0003", "dcm_qa_nih/Ref/EPI_PE=AP_3.nii"),
    ("dcm_qa_nih/In/20180918Si/mr_0004", "dcm_qa_nih/Ref/EPI_PE=PA_4.nii"),
    ("dcm_qa_nih/In/20180918Si/mr_0005", "dcm_qa_nih/Ref/EPI_PE=RL_5.nii"),
    ("dcm_qa_nih/In/20180918Si/mr_0006", "dcm_qa_nih/Ref/EPI_PE=LR_6.nii"),
    ("dcm_qa_sag/In/2_fmri_SagAP", "dcm_qa_sag/Ref/2_fmri_SagAP.nii"),
]
SHAPE = (5, 8, 6)


def _csa_header(tags: dict[str, list[str]]) -> bytes:
    """Siemens' CSA2 format: https://nipy.org/nibabel/dicom/siemens_csa.html."""
    packed = b"SV10\x04\x03\x02\x01" + struct.pack("<2I", len(tags), 77)
    for name, values in tags.items():
        packed += struct.pack("<64si4s3i", name.encode(), len(values), b"FD\0\0", 4, len(values), 77)
        for value in values:
            text = value.encode() + b"\0"
            packed += struct.pack("<4i", len(text), len(text), 77, len(text)) + text + b"\0" * (-len(text) % 4)
    return packed


def _mosaic(
    image: np.ndarray, affine: np.ndarray, time: int = 1, *, number_in_csa: bool = True, flipped: bool = False
) -> Dataset:
    """One mosaic of an image `(Z, Y, X)`; `flipped` lets the private header reverse the order of slices."""
    first = dicom_slices(image, affine)[-1 if flipped else 0]
    num_slices, rows, columns = image.shape
    side = int(np.ceil(np.sqrt(num_slices)))
    tiles = np.zeros((side * side, rows, columns), dtype=np.uint16)
    tiles[:num_slices] = image[::-1] if flipped else image
    plane = tiles.reshape(side, side, rows, columns).transpose(0, 2, 1, 3).reshape(side * rows, side * columns)
    mosaic = Dataset()
    mosaic.update({tag: first[tag] for tag in first.keys() if tag.group != 0x7FE0})  # noqa: SIM118
    mosaic.file_meta = FileMetaDataset()
    mosaic.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    mosaic.SOPInstanceUID, mosaic.InstanceNumber, mosaic.AcquisitionNumber = generate_uid(), time, time
    mosaic.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    del mosaic.RescaleSlope, mosaic.RescaleIntercept
    orientation = np.array(first.ImageOrientationPatient, dtype=float)
    spacing = np.array(first.PixelSpacing, dtype=float)
    # The scanner centres an image as large as the mosaic where the slice is.
    shift = spacing[1] * columns * (side - 1) / 2 * orientation[:3]
    shift += spacing[0] * rows * (side - 1) / 2 * orientation[3:]
    mosaic.ImagePositionPatient = [float(v) for v in np.array(first.ImagePositionPatient, dtype=float) - shift]
    mosaic.SpacingBetweenSlices = float(np.linalg.norm(affine[:3, 2]))
    mosaic.Rows, mosaic.Columns = plane.shape
    mosaic.PixelData = plane.tobytes()
    normal = np.cross(orientation[:3], orientation[3:]) * (-1 if flipped else 1)
    tags = {"SliceNormalVector": [f"{v:.8f}" for v in normal]}
    if number_in_csa:
        tags["NumberOfImagesInMosaic"] = [str(num_slices)]
    else:
        mosaic.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", num_slices)
    mosaic.private_block(0x0029, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB", _csa_header(tags))
    return mosaic


def _save(mosaic: Dataset, folder: Path) -> None:
    mosaic.save_as(folder / f"{mosaic.SOPInstanceUID}.dcm", enforce_file_format=True)


@pytest.mark.parametrize(("folder", "reference"), REAL)
def test_mosaics_equal_dcm2niix(folder: str, reference: str) -> None:
    if not (DATA / reference).is_file():
        pytest.skip(f"{DATA / reference} is absent: real mosaics with reference conversions")
    records, errors = read_path(DATA / folder)
    expected = nib.load(DATA / reference)
    assert errors == []
    assert len(records) == expected.shape[3]
    for volume, record in enumerate(records):
        assert_same_voxels(record.scan, expected.slicer[..., volume])


@pytest.mark.parametrize(("number_in_csa", "flipped"), [(True, False), (True, True), (False, False)])
def test_volumes_of_a_mosaic_series_come_back(tmp_path: Path, number_in_csa: bool, flipped: bool) -> None:
    images, affine = [random_image(seed, SHAPE) for seed in (0, 1, 2)], oblique_affine()
    for time, image in enumerate(images, start=1):
        _save(_mosaic(image, affine, time, number_in_csa=number_in_csa, flipped=flipped), tmp_path)
    records, errors = read_path(tmp_path)
    assert errors == []
    for record, image in zip(records, images, strict=True):
        np.testing.assert_array_equal(record.scan.image, image)
        np.testing.assert_allclose(record.scan.affine, affine, atol=1e-5)


def test_a_mosaic_without_its_private_headers_is_refused(tmp_path: Path) -> None:
    mosaic = _mosaic(random_image(3, SHAPE), oblique_affine())
    mosaic.remove_private_tags()
    _save(mosaic, tmp_path)
    records, [error] = read_path(tmp_path)
    assert records == []
    assert error.reason == "A Siemens mosaic that does not say how many slices it holds."
    assert "dcm2niix" in error.hint


def test_the_order_of_slices_is_never_guessed(tmp_path: Path) -> None:
    mosaic = _mosaic(random_image(6, SHAPE), oblique_affine(), number_in_csa=False)
    del mosaic[0x0029, 0x1010]
    _save(mosaic, tmp_path)
    records, [error] = read_path(tmp_path)
    assert records == []
    assert error.reason == "A Siemens mosaic without the private header that orders its slices."


def test_a_mosaic_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    mosaic = _mosaic(random_image(4, SHAPE), oblique_affine(), number_in_csa=False)
    mosaic.private_block(0x0019, "SIEMENS MR HEADER")[0x0A].value = 50
    _save(mosaic, tmp_path)
    records, [error] = read_path(tmp_path)
    assert records == []
    assert error.reason == "A Siemens mosaic of 24 x 18 pixels does not divide into the 50 slices it claims."


def test_contradicting_slice_normals_are_refused(tmp_path: Path) -> None:
    mosaic = _mosaic(random_image(5, SHAPE), oblique_affine())
    mosaic.ImageOrientationPatient = [1, 0, 0, 0, 0, 1]
    _save(mosaic, tmp_path)
    records, [error] = read_path(tmp_path)
    assert records == []
    assert "two slice normals" in error.reason
