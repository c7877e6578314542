"""Prewhitening: white noise of unit strength, the formula of ismrmrd-python-tools, and nothing where it cannot be."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from omnimri.models import physics
from omnimri.platform.data.formats.kspace.prewhitening import (
    bandwidth_scale,
    noise_covariance,
    prewhitened,
    whitening_matrix,
)
from omnimri.platform.data.formats.readers import read_path
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.ingest import ingest
from omnimri.platform.data.shards import Shards, load_row
from tests.platform.intake_fakes import coil_kspace, oblique_affine, random_image, save_ismrmrd

COILS = 4
SHAPE = (8, 64, 48)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Complex noise with unit variance of the real and of the imaginary part."""
    return rng.standard_normal((*shape, 2)) @ [1, 1j]


def _mixing(rng: np.random.Generator) -> np.ndarray:
    """Makes coils of very different loudness hear each other, `(C, C)`."""
    return np.diag([1.0, 3.0, 0.2, 10.0]) @ (np.eye(COILS) + 0.4 * _normal(rng, COILS, COILS))


def _calculate_prewhitening(noise: np.ndarray, scale_factor: float = 1.0) -> np.ndarray:
    """As ismrmrd-python-tools defines it (ismrmrdtools/coils.py), written out."""
    covariance = (1 / (noise.shape[1] - 1)) * noise @ noise.conj().T
    return np.linalg.inv(np.linalg.cholesky(covariance)) * np.sqrt(2) * np.sqrt(scale_factor)


def test_the_matrix_is_that_of_ismrmrd_python_tools() -> None:
    rng = np.random.default_rng(0)
    noise = _mixing(rng) @ _normal(rng, COILS, 500)
    scale = bandwidth_scale(8.0, 2.0, 0.79)
    assert scale == pytest.approx(4 * 0.79)
    matrix = whitening_matrix(noise_covariance(noise) / scale)
    np.testing.assert_allclose(matrix, _calculate_prewhitening(noise, scale), rtol=1e-9, atol=1e-12)
    # Its first version took the singular vectors instead: another rotation of the same white noise.
    u, s, _ = np.linalg.svd(noise, full_matrices=False)
    first = np.sqrt(2 * (noise.shape[1] - 1)) * np.diag(1 / s) @ u.conj().T
    unscaled = whitening_matrix(noise_covariance(noise))
    np.testing.assert_allclose(unscaled.conj().T @ unscaled, first.conj().T @ first, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dwell_us", [(5.0, 5.0), (2.5, 10.0)])
def test_noise_of_the_image_becomes_white_and_of_unit_strength(tmp_path: Path, dwell_us: tuple[float, float]) -> None:
    """A slower readout lets less noise in; the filter of the noise scan (0.79) held some of it back."""
    rng = np.random.default_rng(1)
    mixing = _mixing(rng)
    strength = np.sqrt(dwell_us[0] / dwell_us[1] / 0.79)
    kspace = strength * np.einsum("cd,zdyx->zcyx", mixing, _normal(rng, SHAPE[0], COILS, *SHAPE[1:]))
    path = save_ismrmrd(
        tmp_path / "a.h5", kspace.astype(np.complex64), oblique_affine(),
        noise=mixing @ _normal(rng, COILS, 40_000), dwell_us=dwell_us,
    )  # fmt: skip
    [record], _ = read_path(path)
    before = record.scan.kspace.swapaxes(0, 1).reshape(COILS, -1)
    assert np.linalg.cond(noise_covariance(before)) > 1000
    white = prewhitened(record)
    assert white.flags == ("prewhitened",)
    samples = white.scan.kspace.swapaxes(0, 1).reshape(COILS, -1)
    real = np.concatenate([samples.real, samples.imag])  # (2 C, N)
    error = np.cov(real) - np.eye(2 * COILS)
    assert np.abs(error).max() < 5 * np.sqrt(2 / samples.shape[1]) + 0.03
    expected = physics.root_sum_of_squares(physics.ifft2c(torch.from_numpy(white.scan.kspace)))
    np.testing.assert_allclose(white.scan.image, expected, rtol=1e-4)
    assert np.square(white.scan.image).mean() == pytest.approx(2 * COILS, rel=0.03)


def test_a_noiseless_object_keeps_its_sense_image_and_gets_the_optimal_combination(tmp_path: Path) -> None:
    """Whitened maps with whitened data are the same equations; the root sum of squares is `sqrt(2 m^H cov^-1 m)`."""
    rng = np.random.default_rng(2)
    noise = _mixing(rng) @ _normal(rng, COILS, 2000)
    maps = _normal(rng, COILS, *SHAPE[1:])
    truth = random_image(3, SHAPE) / 2000
    kspace = physics.fft2c(torch.from_numpy(maps * truth[:, None])).to(torch.complex64)
    path = save_ismrmrd(tmp_path / "a.h5", kspace.numpy(), oblique_affine(), noise=noise)
    [record], _ = read_path(path)
    white = prewhitened(record).scan
    matrix = _calculate_prewhitening(noise, 0.79)
    white_maps = np.einsum("cd,dyx->cyx", matrix, maps)
    inverse = np.linalg.inv(noise_covariance(noise) / 0.79)
    power = np.einsum("cyx,cd,dyx->yx", maps.conj(), inverse, maps).real
    np.testing.assert_allclose(white.image, truth * np.sqrt(2 * power), rtol=2e-3, atol=1e-3)
    length = np.sqrt((np.abs(white_maps) ** 2).sum(0))
    everything = torch.ones(SHAPE[2], dtype=torch.bool)
    operator = physics.SenseOperator(torch.from_numpy((white_maps / length).astype(np.complex64))[None], everything)
    recovered = operator.adjoint(torch.from_numpy(white.kspace))
    np.testing.assert_allclose(recovered.numpy() / length, truth, atol=2e-3)
    assert physics.relative_residual(recovered, torch.from_numpy(white.kspace), operator).max() < 1e-3


def test_a_file_without_noise_scan_is_read_bit_by_bit_as_before(tmp_path: Path) -> None:
    kspace = coil_kspace(random_image(4))
    save_ismrmrd(tmp_path / "a.h5", kspace, oblique_affine(), noise=np.zeros((3, 0)))
    [record], _ = read_path(tmp_path / "a.h5")
    assert record.noise_covariance is None
    assert prewhitened(record) is record
    digests = set()
    for prewhiten in (True, False):
        ingest([tmp_path / "a.h5"], tmp_path / str(prewhiten), IngestConfig(prewhiten=prewhiten))
        [ref] = Shards.open(tmp_path / str(prewhiten)).rows
        assert not any("whitened" in flag for flag in ref.flags)
        row = load_row(ref, ["image", "kspace"])
        digests.add((row["kspace"].tobytes(), row["image"].tobytes()))
    assert digests == {(record.scan.kspace.tobytes(), record.scan.image.tobytes())}


@pytest.mark.parametrize(
    ("noise", "reason"),
    [
        (np.ones((3, 64)), "singular noise covariance"),
        (np.random.default_rng(0).standard_normal((3, 2)), "singular noise covariance"),
        (np.random.default_rng(0).standard_normal((3, 64)) * [[1], [0], [1]], "singular noise covariance"),
        (np.random.default_rng(0).standard_normal((3, 64)) * [[1], [np.nan], [1]], "singular noise covariance"),
        (np.random.default_rng(0).standard_normal((2, 64)), "noise scan of other coils"),
    ],
    ids=["copies", "few samples", "dead coil", "not a number", "other coils"],
)
def test_a_noise_scan_that_cannot_be_used_leaves_kspace_and_a_flag(
    tmp_path: Path, noise: np.ndarray, reason: str
) -> None:
    path = save_ismrmrd(tmp_path / "a.h5", coil_kspace(random_image(5)), oblique_affine(), noise=noise)
    [record], errors = read_path(path)
    assert errors == []
    left = prewhitened(record)
    assert left.flags == (f"not prewhitened: {reason}",)
    assert left.scan is record.scan


def test_ingest_whitens_before_it_compresses_coils_unless_told_otherwise(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    noise = np.diag([1.0, 100.0, 0.1]) @ _normal(rng, 3, 300)
    path = save_ismrmrd(tmp_path / "a.h5", coil_kspace(random_image(6)), oblique_affine(), noise=noise)
    [record], _ = read_path(path)
    white = torch.from_numpy(prewhitened(record).scan.kspace)
    expected = {
        "white": (IngestConfig(max_coils=2), physics.compress_coils(white, 2).numpy(), True),
        "raw": (IngestConfig(prewhiten=False), record.scan.kspace, False),
    }
    for name, (config, kspace, is_white) in expected.items():
        ingest([path], tmp_path / name, config)
        [ref] = Shards.open(tmp_path / name).rows
        np.testing.assert_array_equal(load_row(ref, ["kspace"])["kspace"], kspace)
        assert ("prewhitened" in ref.flags) == is_white


def test_a_noise_scan_that_does_not_match_its_head_leaves_the_file_and_a_flag(tmp_path: Path) -> None:
    path = save_ismrmrd(tmp_path / "a.h5", coil_kspace(random_image(7)), oblique_affine())
    with h5py.File(path, "r+") as file:
        acquisition = file["dataset/data"][0]
        acquisition["head"]["number_of_samples"] += 1
        file["dataset/data"][0] = acquisition
    [record], errors = read_path(path)
    assert errors == []
    left = prewhitened(record)
    assert left.flags == ("not prewhitened: unreadable noise scan",)
    assert left.scan is record.scan
    ingest([path], tmp_path / "raw", IngestConfig(prewhiten=False))
    assert not any("whitened" in flag for flag in Shards.open(tmp_path / "raw").rows[0].flags)
