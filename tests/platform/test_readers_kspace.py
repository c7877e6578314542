"""Raw data intake: one k-space convention whatever the layout, geometry from headers, masks of undersampled files."""

from __future__ import annotations

from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest
import torch

from omnimri.models import physics
from omnimri.platform.data.formats.kspace.fourier import centered_fft, centered_ifft
from omnimri.platform.data.formats.readers import read_path
from omnimri.platform.data.formats.records import ReadLimits
from tests.platform.intake_fakes import (
    coil_kspace,
    ismrmrd_header,
    oblique_affine,
    random_image,
    save_fastmri,
    save_ismrmrd,
)  # fmt: skip

SHAPE = (5, 8, 6)


def test_transform_is_that_of_the_model() -> None:
    array = np.random.default_rng(0).standard_normal((3, 7, 6, 2)).astype(np.float32).view(np.complex64)[..., 0]
    np.testing.assert_allclose(centered_fft(array, (-2, -1)), physics.fft2c(torch.from_numpy(array)), atol=1e-6)
    np.testing.assert_allclose(centered_ifft(array, (-2, -1)), physics.ifft2c(torch.from_numpy(array)), atol=1e-6)
    assert centered_fft(array, (-2, -1)).dtype == np.complex64


def test_fastmri_file_gives_kspace_image_and_affine(tmp_path: Path) -> None:
    image, affine = random_image(0, SHAPE), oblique_affine()
    kspace = coil_kspace(image)
    header = ismrmrd_header(SHAPE, (4.0, 2.0, 1.5))
    path = save_fastmri(tmp_path / "file1.h5", kspace, header, affine_ras=affine, patient_id="0a1b", acquisition="AXT2")
    [record], errors = read_path(path)
    assert errors == []
    np.testing.assert_array_equal(record.scan.kspace, kspace)
    np.testing.assert_allclose(record.scan.image, image, rtol=1e-4)
    np.testing.assert_array_equal(record.scan.affine, affine)
    assert record.scan.mask is None
    assert (record.source_format, record.patient_key) == ("fastmri", "0a1b")
    facts = record.scan.facts
    assert (facts["contrast"], facts["vendor"], facts["field_strength_t"], facts["te_ms"]) == ("T2w", "GE", 1.5, 95.0)


def test_fastmri_without_orientation_gets_the_spacing_of_its_header(tmp_path: Path) -> None:
    path = save_fastmri(
        tmp_path / "knee.h5", coil_kspace(random_image(1, SHAPE)), ismrmrd_header(SHAPE, (4.0, 2.0, 1.5)),
        acquisition="CORPDFS_FBK",
    )  # fmt: skip
    [record], _ = read_path(path)
    np.testing.assert_allclose(record.scan.spacing_mm, (4.0, 2.0, 1.5))
    np.testing.assert_allclose(record.scan.affine @ [2.5, 3.5, 2, 1], [0, 0, 0, 1], atol=1e-9)
    facts = record.scan.facts
    assert (facts["plane"], facts["body_part"], facts["contrast"]) == ("coronal", "knee", "PD")


def test_fastmri_readout_oversampling_is_removed(tmp_path: Path) -> None:
    image = random_image(2, SHAPE)
    wide = np.pad(image, ((0, 0), (4, 4), (0, 0)))
    header = ismrmrd_header(SHAPE, (4.0, 2.0, 1.5), oversampling=2)
    [record], _ = read_path(save_fastmri(tmp_path / "a.h5", coil_kspace(wide), header))
    assert record.scan.kspace.shape == (5, 3, 8, 6)
    np.testing.assert_allclose(record.scan.image, image, rtol=1e-3)
    np.testing.assert_allclose(record.scan.spacing_mm, (4.0, 2.0, 1.5))


def test_undersampled_fastmri_keeps_its_mask_and_a_zero_filled_image(tmp_path: Path) -> None:
    mask = np.array([True, False, True, True, False, True])
    kspace = coil_kspace(random_image(3, SHAPE)) * mask
    for name, attributes in (("with.h5", {"mask": mask}), ("without.h5", {})):
        [record], _ = read_path(save_fastmri(tmp_path / name, kspace, **attributes))
        np.testing.assert_array_equal(record.scan.mask, mask)
        expected = physics.root_sum_of_squares(physics.ifft2c(torch.from_numpy(kspace)))
        np.testing.assert_allclose(record.scan.image, expected, rtol=1e-4)


def test_zero_padding_on_both_sides_counts_as_fully_sampled_and_one_side_does_not(tmp_path: Path) -> None:
    kspace = coil_kspace(random_image(4, (2, 8, 16)))
    padded, partial = kspace.copy(), kspace.copy()
    padded[..., [0, 1, 14, 15]] = 0
    partial[..., :5] = 0
    [record], _ = read_path(save_fastmri(tmp_path / "padded.h5", padded))
    assert record.scan.mask is None
    [record], _ = read_path(save_fastmri(tmp_path / "partial.h5", partial))
    assert record.scan.mask.sum() == 11


def test_ismrmrd_file_gives_the_volume_it_was_written_from(tmp_path: Path) -> None:
    image, affine = random_image(5, SHAPE), oblique_affine()
    kspace = coil_kspace(image)
    [record], errors = read_path(save_ismrmrd(tmp_path / "scan.mrd.h5", kspace, affine))
    assert errors == []
    np.testing.assert_allclose(record.scan.kspace, kspace, atol=1e-5 * np.abs(kspace).max())
    np.testing.assert_allclose(record.scan.image, image, rtol=1e-3)
    np.testing.assert_allclose(record.scan.affine, affine, atol=1e-4)
    assert record.scan.mask is None
    assert (record.source_format, record.patient_key) == ("ismrmrd", "P-001")
    facts = record.scan.facts
    assert (facts["contrast"], facts["sex"], facts["plane"], facts["tr_ms"]) == ("T2w", "F", "axial", 4000.0)


def test_undersampled_ismrmrd_keeps_its_mask(tmp_path: Path) -> None:
    kspace = coil_kspace(random_image(6, SHAPE))
    mask = np.array([True, True, False, True, True, False])
    [record], _ = read_path(save_ismrmrd(tmp_path / "a.h5", kspace, oblique_affine(), lines=mask))
    np.testing.assert_array_equal(record.scan.mask, mask)
    np.testing.assert_allclose(record.scan.kspace, kspace * mask, atol=1e-5 * np.abs(kspace).max())


def test_interleaved_repetitions_are_undersampled_volumes_of_their_own(tmp_path: Path) -> None:
    # ismrmrd_generate_cartesian_shepp_logan -a2 writes such files: put together they would be fully sampled.
    kspace = coil_kspace(random_image(7, SHAPE))
    repetition = np.arange(6) % 2
    path = save_ismrmrd(tmp_path / "a.h5", kspace, oblique_affine(), repetition_of_line=repetition)
    records, _ = read_path(path)
    assert len(records) == 2
    for record in records:
        np.testing.assert_array_equal(record.scan.mask, repetition == record.volume)


def test_ismrmrd_without_directions_has_the_axes_of_the_world(tmp_path: Path) -> None:
    path = save_ismrmrd(tmp_path / "a.h5", coil_kspace(random_image(8, SHAPE)), oblique_affine())
    with h5py.File(path, "r+") as file:
        data = file["dataset/data"][...]
        for name in ("read_dir", "phase_dir", "slice_dir", "position"):
            data["head"][name] = 0
        file["dataset/data"][...] = data
    [record], _ = read_path(path)
    np.testing.assert_allclose(record.scan.affine[:3, :3], np.diag([1.5, 2.0, 4.0]), atol=1e-5)


def test_lines_that_differ_between_slices_are_refused(tmp_path: Path) -> None:
    path = save_ismrmrd(tmp_path / "a.h5", coil_kspace(random_image(9, SHAPE)), oblique_affine())
    with h5py.File(path, "r+") as file:
        data = file["dataset/data"][...]
        data["head"]["flags"][-1] |= 1 << (ismrmrd.ACQ_IS_NAVIGATION_DATA - 1)
        file["dataset/data"][...] = data
    records, [error] = read_path(path)
    assert records == []
    assert "differ between slices" in error.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("cartesian", "radial"), "Trajectory radial, expected Cartesian."),
        (("<?xml version", "<!DOCTYPE bomb>\n<?xml version"), "The XML header declares a document type."),
        (("<encoding>", "<enc>"), "Not a readable HDF5 file"),
    ],
)
def test_headers_that_cannot_be_trusted_are_refused(tmp_path: Path, change: tuple[str, str], reason: str) -> None:
    path = save_ismrmrd(tmp_path / "a.h5", coil_kspace(random_image(10, SHAPE)), oblique_affine())
    with h5py.File(path, "r+") as file:
        file["dataset/xml"][0] = file["dataset/xml"][0].decode().replace(*change)
    records, [error] = read_path(path)
    assert records == []
    assert reason in error.reason


def test_hdf5_without_kspace_is_refused_with_what_it_holds_as_a_hint(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        file["layer1"] = np.zeros(3)
    records, [error] = read_path(tmp_path / "weights.h5")
    assert records == []
    assert "layer1" not in error.reason, "a name in a file may be that of a person"
    assert "It holds layer1" in error.hint


def test_hdf5_that_reaches_into_other_files_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"\x00" * 4096)
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("kspace", shape=(1, 1, 8, 8), dtype=np.complex64, external=[(str(secret), 0, 512)])
    with h5py.File(tmp_path / "linked.h5", "w") as file:
        file["kspace"] = h5py.ExternalLink("elsewhere.h5", "/kspace")
    for name in ("external.h5", "linked.h5"):
        records, [error] = read_path(tmp_path / name)
        assert records == []
        assert error.hint == "Copy the data into one file."


def test_kspace_larger_than_the_limit_is_refused_before_reading(tmp_path: Path) -> None:
    for path in (
        save_fastmri(tmp_path / "a.h5", coil_kspace(random_image(11, SHAPE))),
        save_ismrmrd(tmp_path / "b.h5", coil_kspace(random_image(11, SHAPE)), oblique_affine()),
    ):
        records, [error] = read_path(path, ReadLimits(max_array_bytes=1000))
        assert records == []
        assert "max_array_bytes" in error.hint


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_kspace_that_is_not_finite_costs_one_line(tmp_path: Path, value: float) -> None:
    kspace = coil_kspace(random_image(12, SHAPE))
    save_fastmri(tmp_path / "good.h5", kspace)
    kspace[2, 1, 3, 3] = value
    save_fastmri(tmp_path / "a.h5", kspace)
    with np.errstate(all="ignore"):
        save_ismrmrd(tmp_path / "b.h5", kspace, oblique_affine(), oversampling=1)
    with h5py.File(tmp_path / "c.mat", "w") as file:
        file["kspace"] = (
            np.ascontiguousarray(kspace.swapaxes(-2, -1))[None]
            .astype(np.complex128)
            .view([("real", "<f8"), ("imag", "<f8")])
        )
    records, errors = read_path(tmp_path)
    assert [record.source for record in records] == ["good.h5"]
    assert {error.source for error in errors} == {"a.h5", "b.h5", "c.mat"}
    assert {error.reason for error in errors} == {"K-space holds values that are not finite, or too large."}
