"""K-space layouts of public sets: the phantom that went in is the image that comes out, in our one convention."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from omnimri.models import physics
from omnimri.platform.data.formats.readers import read_path
from omnimri.platform.data.formats.records import SeriesRecord
from tests.platform.catalogue_writers import (
    SHAPE,
    phantom,
    save_calgary,
    save_matlab,
    save_prostate,
    save_skm_tea,
)
from tests.platform.intake_fakes import coil_kspace, random_image


def _check(record: SeriesRecord, image: np.ndarray, *, num_coils: int, rtol: float = 1e-3) -> None:
    """K-space is `(Z, C, Y, X)`, centred and orthonormal: the model's own transform gives the phantom back."""
    kspace = record.scan.kspace
    assert kspace is not None
    assert kspace.dtype == np.complex64
    assert kspace.shape == (image.shape[0], num_coils, *image.shape[1:])
    again = physics.root_sum_of_squares(physics.ifft2c(torch.from_numpy(kspace)))
    np.testing.assert_allclose(again, image, rtol=rtol, atol=0.5)
    np.testing.assert_allclose(record.scan.image, image, rtol=rtol, atol=0.5)


@pytest.mark.parametrize("rolled", [True, False])
@pytest.mark.parametrize("shape", [SHAPE, (5, 11, 13)])
def test_calgary_campinas(tmp_path: Path, rolled: bool, shape: tuple[int, int, int]) -> None:
    image = phantom(0, shape)
    save_calgary(tmp_path / "e14089s3_P53248.7.h5", image, rolled=rolled)
    [record], errors = read_path(tmp_path)
    assert (errors, record.source_format) == ([], "cc359")
    _check(record, image, num_coils=4)
    assert record.scan.mask is None


def test_calgary_campinas_keeps_the_share_of_lines_that_was_acquired(tmp_path: Path) -> None:
    save_calgary(tmp_path / "a.h5", phantom(1), lines=8)
    [record], _ = read_path(tmp_path)
    np.testing.assert_array_equal(record.scan.mask, np.arange(12) < 8)
    assert not record.scan.kspace[..., 8:].any()


def test_sampling_along_two_directions_is_refused(tmp_path: Path) -> None:
    path = save_calgary(tmp_path / "a.h5", phantom(2))
    with h5py.File(path, "r+") as file:
        file["kspace"][...] *= np.random.default_rng(0).integers(0, 2, size=(1, 10, 12, 1))
    _, [error] = read_path(path)
    assert "sampling along two phase-encoding directions" in error.reason


def test_skm_tea_gives_one_volume_per_echo(tmp_path: Path) -> None:
    echoes = np.stack([random_image(3, SHAPE), random_image(4, SHAPE)])
    save_skm_tea(tmp_path / "MTR_001.h5", echoes)
    records, errors = read_path(tmp_path)
    assert (errors, [record.source_format for record in records]) == ([], ["skm-tea"] * 2)
    for record, echo in zip(records, echoes, strict=True):
        _check(record, echo, num_coils=3)


def test_fastmri_prostate_joins_the_averages(tmp_path: Path) -> None:
    image = random_image(5, SHAPE)
    save_prostate(tmp_path / "file_prostate_AXT2_001.h5", image)
    [record], errors = read_path(tmp_path)
    assert (errors, record.source_format) == ([], "fastmri-prostate")
    _check(record, image, num_coils=3)
    assert record.scan.mask is None


@pytest.mark.parametrize(("folder", "num_coils", "expected_coils"), [("MultiCoil", 3, 3), ("SingleCoil", 0, 1)])
@pytest.mark.parametrize("name", ["kspace_full", "kspace"])
def test_cmrxrecon(tmp_path: Path, folder: str, num_coils: int, expected_coils: int, name: str) -> None:
    times = np.stack([random_image(6, SHAPE), random_image(7, SHAPE)])
    (tmp_path / folder).mkdir()
    save_matlab(tmp_path / folder / "cine_sax.mat", times, name=name, num_coils=num_coils)
    records, errors = read_path(tmp_path)
    assert (errors, [record.source_format for record in records]) == ([], ["cmrxrecon"] * 2)
    for record, image in zip(records, times, strict=True):
        _check(record, image, num_coils=expected_coils)


def test_cmrxrecon_of_one_time_has_no_time_axis(tmp_path: Path) -> None:
    image = random_image(8, SHAPE)
    path = save_matlab(tmp_path / "T1map.mat", image[None])
    with h5py.File(path, "r+") as file:
        one = file["kspace_full"][0]
        del file["kspace_full"]
        file["kspace_full"] = one
    [record], _ = read_path(tmp_path)
    _check(record, image, num_coils=3)


def test_undersampled_cmrxrecon_keeps_its_lines(tmp_path: Path) -> None:
    path = save_matlab(tmp_path / "cine_sax.mat", random_image(9, SHAPE)[None])
    lines = np.array([1, 0, 0, 1, 1, 1, 1, 0, 1, 0, 0, 1])
    with h5py.File(path, "r+") as file:
        parts = file["kspace_full"][...]
        for part in ("real", "imag"):
            parts[part] *= lines[:, None]
        file["kspace_full"][...] = parts
    [record], _ = read_path(tmp_path)
    np.testing.assert_array_equal(record.scan.mask, lines.astype(bool))


def test_a_broken_file_of_an_older_matlab_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mat").write_bytes(b"MATLAB 5.0 MAT-file, Platform: PCWIN64".ljust(512))
    _, [error] = read_path(tmp_path)
    assert error.source == "a.mat"


def test_fastmri_is_told_from_the_others_by_its_axes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["kspace"] = coil_kspace(random_image(10, SHAPE))
    [record], _ = read_path(tmp_path)
    assert record.source_format == "fastmri"
