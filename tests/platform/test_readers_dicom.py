"""DICOM intake: geometry against pydicom and dcm2niix, sorting, splitting, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import UID, ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEGLosslessSV1, RLELossless

from omnimri.platform.data.formats.readers import read_path
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.ingest import ingest
from omnimri.platform.data.shards import Shards
from tests.platform.intake_fakes import (
    assert_same_voxels,
    dicom_slices,
    enhanced_object,
    oblique_affine,
    random_image,
    rescalable,
    save_dicom,
)

REFERENCE = Path(__file__).parents[3] / "shared" / "data" / "dcm_qa_nih"
"""dcm2niix's own conversions (github.com/neurolabusc/dcm_qa_nih), where they are present."""


def test_series_is_sorted_by_position_and_rescaled_slice_by_slice(tmp_path: Path) -> None:
    image, affine = rescalable(random_image(0)), oblique_affine()
    save_dicom(dicom_slices(image, affine), tmp_path)
    [record], errors = read_path(tmp_path)
    assert errors == []
    np.testing.assert_array_equal(record.scan.image, image)
    np.testing.assert_allclose(record.scan.affine, affine, atol=1e-5)
    assert record.scan.image.dtype == np.float32
    assert record.patient_key == "P-001"


def test_a_row_does_not_depend_on_the_names_of_files(tmp_path: Path) -> None:
    """Slices whose headers differ a little: rounded orientations, a phase of the pulse sequence of their own."""
    slices = dicom_slices(rescalable(random_image(3)), oblique_affine())
    for z, dataset in enumerate(slices):
        dataset.ImageOrientationPatient = [float(f"{v + 1e-5 * z:.9f}") for v in dataset.ImageOrientationPatient]
        dataset.EchoTime = 90 + 0.1 * z
    digests = set()
    for order, folder in ((slices, "forward"), (slices[::-1], "backward")):
        (tmp_path / folder).mkdir()
        for index, dataset in enumerate(order):
            dataset.save_as(tmp_path / folder / f"{index}.dcm", enforce_file_format=True)
        ingest([tmp_path / folder], tmp_path / f"{folder}-out", IngestConfig())
        digests |= {row.digest for row in Shards.open(tmp_path / f"{folder}-out").rows}
    assert len(digests) == 1


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "SRA", "LAI"])
def test_geometry_holds_in_every_orientation(tmp_path: Path, axes: str) -> None:
    image = rescalable(random_image(1, (4, 6, 7)))
    transform = nib.orientations.axcodes2ornt(axes)
    affine = oblique_affine() @ nib.orientations.inv_ornt_aff(transform, image.shape[::-1])
    save_dicom(dicom_slices(image, affine), tmp_path)
    [record], _ = read_path(tmp_path)
    expected = image if np.linalg.det(affine) > 0 else image[::-1]  # z runs along row direction x column direction
    np.testing.assert_array_equal(record.scan.image, expected)
    world = affine @ [2, 3, 1, 1]
    z = 1 if np.linalg.det(affine) > 0 else 2
    np.testing.assert_allclose(record.scan.affine @ [2, 3, z, 1], world, atol=1e-4)


@pytest.mark.parametrize("name", ["MR_small.dcm", "examples_overlay.dcm"])
def test_real_single_slices_have_the_geometry_of_their_header(name: str) -> None:
    path = get_testdata_file(name)
    header = pydicom.dcmread(path)
    [record], errors = read_path(Path(path))
    assert errors == []
    np.testing.assert_array_equal(record.scan.image[0], header.pixel_array)
    x, y, z = header.ImagePositionPatient
    np.testing.assert_allclose(record.scan.affine[:3, 3], [-x, -y, z])
    dy, dx = header.PixelSpacing
    np.testing.assert_allclose(record.scan.spacing_mm, [header.SliceThickness, dy, dx])
    np.testing.assert_allclose(np.sign(np.diag(record.scan.affine)), [-1, -1, 1, 1])


def test_facts_of_real_headers_are_normalised() -> None:
    [overlay], _ = read_path(Path(get_testdata_file("examples_overlay.dcm")))
    facts = overlay.scan.facts
    assert (facts["vendor"], facts["contrast"], facts["plane"], facts["body_part"]) == (
        "Siemens", "T1w", "axial", "abdomen",
    )  # fmt: skip
    assert (facts["field_strength_t"], facts["sex"], facts["age_years"], facts["te_ms"]) == (1.5, "M", 58.0, 2.81)
    [small], _ = read_path(Path(get_testdata_file("MR_small.dcm")))
    assert (small.scan.facts["vendor"], small.scan.facts["contrast"]) == ("Canon", "T2w")


@pytest.mark.parametrize(
    "name",
    ["MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_bigendian.dcm",
     "MR_small_expb.dcm", "MR_small_implicit.dcm", "MR_small_padded.dcm"],
)  # fmt: skip
def test_every_encoding_of_one_image_gives_the_same_voxels(name: str) -> None:
    [record], errors = read_path(Path(get_testdata_file(name)))
    assert errors == []
    np.testing.assert_array_equal(record.scan.image[0], pydicom.dcmread(get_testdata_file("MR_small.dcm")).pixel_array)


def test_a_series_may_mix_encodings(tmp_path: Path) -> None:
    image, affine = rescalable(random_image(17)), oblique_affine()
    slices = dicom_slices(image, affine)
    slices[1].compress(RLELossless)
    slices[2].file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    save_dicom(slices, tmp_path)
    [record], errors = read_path(tmp_path)
    assert errors == []
    np.testing.assert_array_equal(record.scan.image, image)
    np.testing.assert_allclose(record.scan.affine, affine, atol=1e-5)


def test_a_missing_decoder_is_named(tmp_path: Path) -> None:
    if get_decoder(JPEGLosslessSV1).is_available:
        pytest.skip("a decoder of JPEG Lossless is installed: nothing is missing")
    slices = dicom_slices(rescalable(random_image(18)), oblique_affine())
    for dataset in slices:
        dataset.PixelData = encapsulate([b"\xff\xd8not decoded\xff\xd9"])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    save_dicom(slices, tmp_path)
    records, [error] = read_path(tmp_path)
    assert records == []
    assert error.reason.startswith("No decoder for JPEG Lossless")
    assert "pylibjpeg-libjpeg" in error.hint


def test_broken_compressed_pixels_are_refused(tmp_path: Path) -> None:
    slices = dicom_slices(rescalable(random_image(19)), oblique_affine())
    for dataset in slices:
        dataset.PixelData = encapsulate([b"\0" * 70])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = RLELossless
    save_dicom(slices, tmp_path)
    records, [error] = read_path(tmp_path)
    assert records == []
    assert error.reason in (
        "The compressed pixel data cannot be decoded.",
        "The pixel data is too short: a truncated file.",
    )


@pytest.mark.parametrize("number", [4, 5])
def test_voxels_and_affine_equal_dcm2niix_on_ge_time_series(number: int) -> None:
    if not REFERENCE.is_dir():
        pytest.skip(f"{REFERENCE} is absent: real DICOM with reference conversions")
    records, errors = read_path(REFERENCE / "In" / "20180918GE" / f"mr_000{number}")
    reference = nib.load(REFERENCE / "Ref" / f"DCM2NIIX_regression_test_{number}.nii")
    assert errors == []
    assert len(records) == reference.shape[3]
    for volume, record in enumerate(records):
        assert_same_voxels(record.scan, reference.slicer[..., volume])


def test_echoes_become_volumes_in_order_of_echo_time(tmp_path: Path) -> None:
    affine = oblique_affine()
    images = [rescalable(random_image(seed)) for seed in (2, 3)]
    for te, image in zip((90.0, 15.0), images, strict=True):
        save_dicom(dicom_slices(image, affine, EchoTime=te, SeriesDescription=""), tmp_path, prefix=f"E{te:.0f}")
    records, errors = read_path(tmp_path)
    assert errors == []
    assert [record.scan.facts["te_ms"] for record in records] == [15.0, 90.0]
    assert [(record.volume, record.num_volumes) for record in records] == [(0, 2), (1, 2)]
    np.testing.assert_array_equal(records[0].scan.image, images[1])
    np.testing.assert_array_equal(records[1].scan.image, images[0])


def test_a_value_that_varies_by_slice_does_not_split_a_volume(tmp_path: Path) -> None:
    image = rescalable(random_image(4))
    slices = dicom_slices(image, oblique_affine())
    for number, dataset in enumerate(slices):
        dataset.AcquisitionTime = f"1200{number:02d}"
    save_dicom(slices, tmp_path)
    [record], _ = read_path(tmp_path)
    np.testing.assert_array_equal(record.scan.image, image)


def test_time_points_without_a_telling_header_are_split_by_instance_number(tmp_path: Path) -> None:
    affine, images = oblique_affine(), [rescalable(random_image(seed)) for seed in (5, 6, 7)]
    for time, image in enumerate(images):
        slices = dicom_slices(image, affine)
        for dataset in slices:
            dataset.InstanceNumber += 100 * time
        random.Random(time).shuffle(slices)
        save_dicom(slices, tmp_path, prefix=f"{3 - time}-")
    records, _ = read_path(tmp_path)
    for record, image in zip(records, images, strict=True):
        np.testing.assert_array_equal(record.scan.image, image)


def test_a_missing_slice_is_refused_with_the_gaps(tmp_path: Path) -> None:
    slices = dicom_slices(rescalable(random_image(8)), oblique_affine())
    save_dicom(slices[:2] + slices[3:], tmp_path)
    records, [error] = read_path(tmp_path)
    assert records == []
    assert error.reason == "Slices are 4.00 to 8.00 mm apart, expected even gaps: slices are missing."


def test_an_incomplete_time_series_is_refused(tmp_path: Path) -> None:
    affine = oblique_affine()
    save_dicom(dicom_slices(rescalable(random_image(9)), affine), tmp_path, prefix="a")
    save_dicom(dicom_slices(rescalable(random_image(10)), affine)[:3], tmp_path, prefix="b")
    records, [error] = read_path(tmp_path)
    assert records == []
    assert "8 images at 5 positions" in error.reason


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"Modality": "CT"}, "Modality CT, expected MR."),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "A localiser."),
        ({"SeriesDescription": "3-plane scout"}, "A localiser."),
        ({"ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]}, "A derived map or projection"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}, "A phase, real or imaginary image"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "Secondary Capture Image Storage"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66"}, "Raw Data Storage"),
        ({"BurnedInAnnotation": "YES"}, "Text is burned into the pixels"),
        ({"ImageOrientationPatient": None}, "Image Position, Image Orientation or Pixel Spacing is missing."),
    ],
)
def test_what_is_no_volume_is_refused_once_per_series(tmp_path: Path, header: dict, reason: str) -> None:
    save_dicom(dicom_slices(rescalable(random_image(11)), oblique_affine(), **header), tmp_path)
    records, [error] = read_path(tmp_path)
    assert records == []
    assert reason in error.reason


def test_slices_in_several_orientations_are_a_localiser(tmp_path: Path) -> None:
    image = rescalable(random_image(12, (2, 6, 6)))
    for number, axes in enumerate(("RAS", "RSA", "ASR")):
        transform = nib.orientations.axcodes2ornt(axes)
        affine = np.diag([2.0, 2.0, 2.0, 1.0]) @ nib.orientations.inv_ornt_aff(transform, (6, 6, 6))
        save_dicom(dicom_slices(image, affine), tmp_path, prefix=str(number))
    records, [error] = read_path(tmp_path)
    assert records == []
    assert "several orientations" in error.reason


def test_phase_images_do_not_take_the_magnitudes_with_them(tmp_path: Path) -> None:
    image, affine = rescalable(random_image(13)), oblique_affine()
    save_dicom(dicom_slices(image, affine), tmp_path, prefix="m")
    save_dicom(dicom_slices(image, affine, ImageType=["ORIGINAL", "PRIMARY", "P"]), tmp_path, prefix="p")
    [record], [error] = read_path(tmp_path)
    np.testing.assert_array_equal(record.scan.image, image)
    assert "phase" in error.reason


def test_truncated_file_is_refused() -> None:
    records, [error] = read_path(Path(get_testdata_file("MR_truncated.dcm")))
    assert records == []
    assert error.reason == "The pixel data is too short: a truncated file."


def test_a_header_value_of_a_wrong_length_costs_one_line_without_the_value(tmp_path: Path) -> None:
    folder = save_dicom(dicom_slices(rescalable(random_image(21)), oblique_affine()), tmp_path)
    for path in folder.iterdir():
        content = path.read_bytes()
        rows = content.index(b"\x28\x00\x10\x00US\x02\x00") + 6
        path.write_bytes(content[:rows] + b"\x03\x00" + content[rows + 2 : rows + 4] + b"\x00" + content[rows + 4 :])
    records, [error] = read_path(folder)
    assert records == []
    assert error.reason == "The file cannot be opened (BytesLengthException)."


def test_a_copy_of_an_instance_is_counted_and_used_once(tmp_path: Path) -> None:
    image = rescalable(random_image(14))
    slices = dicom_slices(image, oblique_affine())
    save_dicom(slices, tmp_path / "a")
    save_dicom(slices, tmp_path / "b")
    [record], [error] = read_path(tmp_path)
    np.testing.assert_array_equal(record.scan.image, image)
    assert error.source.endswith("and 4 more")
    assert error.reason == "A copy of an instance that is there already."


def test_ct_is_refused() -> None:
    records, [error] = read_path(Path(get_testdata_file("CT_small.dcm")))
    assert records == []
    assert str(error) == "CT_small.dcm: Modality CT, expected MR. Only MR is read."


def test_enhanced_multi_frame_object_is_read(tmp_path: Path) -> None:
    image, affine = rescalable(random_image(15)), oblique_affine()
    path = tmp_path / "enhanced.dcm"
    enhanced_object(dicom_slices(image, affine)).save_as(path, enforce_file_format=True)
    [record], errors = read_path(path)
    assert errors == []
    np.testing.assert_array_equal(record.scan.image, image)
    np.testing.assert_allclose(record.scan.affine, affine, atol=1e-5)
    assert record.scan.facts["te_ms"] == 97.0


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless])
def test_enhanced_object_is_read_in_every_encoding(tmp_path: Path, syntax: UID) -> None:
    image = rescalable(random_image(20))
    enhanced = enhanced_object(dicom_slices(image, oblique_affine()))
    if syntax == RLELossless:
        enhanced.compress(syntax)
    else:
        enhanced.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        enhanced["PixelData"].VR = "OW"
        enhanced.PixelData = np.frombuffer(enhanced.PixelData, "<u2").astype(">u2").tobytes()
    enhanced.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    [record], errors = read_path(tmp_path)
    assert errors == []
    np.testing.assert_array_equal(record.scan.image, image)


def test_enhanced_object_with_two_frames_at_one_position_is_refused(tmp_path: Path) -> None:
    slices = dicom_slices(rescalable(random_image(16)), oblique_affine())
    slices[1].ImagePositionPatient = slices[0].ImagePositionPatient
    path = tmp_path / "enhanced.dcm"
    enhanced_object(slices).save_as(path, enforce_file_format=True)
    records, [error] = read_path(path)
    assert records == []
    assert "frames" in error.reason


def test_monochrome1_is_turned_so_that_bright_is_large(tmp_path: Path) -> None:
    image = rescalable(random_image(11, (3, 8, 6)))
    save_dicom(dicom_slices(image, oblique_affine(), PhotometricInterpretation="MONOCHROME1"), tmp_path / "series")
    [record], _ = read_path(tmp_path)
    np.testing.assert_allclose(record.scan.image, image.max() - image)
