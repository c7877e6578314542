"""Quality measures on images whose quality is known, and fingerprints of copies and of others."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from omnimri.platform.data.intake.quality import (
    QualityLimits,
    entropy_focus,
    fingerprint,
    ghost_to_signal,
    image_quality,
    near_copies,
    quality_flags,
)  # fmt: skip

SHAPE = (8, 64, 48)


def ball(radius: float = 0.3) -> np.ndarray:
    """True inside an ellipsoid in the middle of the field of view."""
    axes = np.meshgrid(*(np.linspace(-0.5, 0.5, size) for size in SHAPE), indexing="ij")
    return sum((axis / (radius if number else 1.0)) ** 2 for number, axis in enumerate(axes)) < 1


def noisy(image: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    """Magnitude of an image with complex Gaussian noise."""
    rng = np.random.default_rng(seed)
    return np.abs(image + sigma * (rng.normal(size=image.shape) + 1j * rng.normal(size=image.shape))).astype(np.float32)


def anatomy(seed: int) -> np.ndarray:
    """Smooth random structure inside the ellipsoid."""
    from scipy.ndimage import gaussian_filter

    rough = gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), (1, 4, 4))
    return (ball() * (1 + 3 * rough / rough.std()).clip(0.1)).astype(np.float32)


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1])
def test_snr_is_signal_over_the_sigma_of_the_complex_noise(sigma: float) -> None:
    assert image_quality(noisy(1.0 * ball(), sigma))["snr"] == pytest.approx(1 / sigma, rel=0.05)


@pytest.mark.parametrize("strength", [0.1, 0.15, 0.3])
def test_a_ghost_of_known_strength_is_measured(strength: float) -> None:
    head = ball(0.2)
    image = head + strength * np.roll(head, SHAPE[1] // 2, axis=1)
    assert ghost_to_signal(image, head, axis=1) == pytest.approx(strength, abs=0.02)
    assert ghost_to_signal(1.0 * head, head, axis=1) == 0
    values = image_quality(noisy(image, 0.01))
    assert values["ghosting"] == pytest.approx(strength, abs=0.03)
    assert "ghosting" in quality_flags(SHAPE, values, QualityLimits(max_ghosting=0.05), t1_weighted=True)


def test_entropy_focus_is_one_for_a_flat_image_and_zero_for_a_point() -> None:
    point = np.zeros(SHAPE)
    point[4, 30, 20] = 7
    assert entropy_focus(np.full(SHAPE, 3.0)) == pytest.approx(1)
    assert entropy_focus(point) == pytest.approx(0, abs=1e-6)


def test_joint_variation_of_known_tissues() -> None:
    rng = np.random.default_rng(1)
    labels = np.zeros(SHAPE, np.uint8)
    labels[:, :32], labels[:, 32:] = 1, 2
    image = np.where(labels == 1, rng.normal(100, 10, SHAPE), rng.normal(60, 6, SHAPE)).astype(np.float32)
    names = {1: "white matter", 2: "grey matter"}
    assert image_quality(image, labels, names)["cjv"] == pytest.approx(16 / 40, rel=0.02)
    assert image_quality(image, labels, {1: "white matter"})["cjv"] is None
    halves = np.where((labels == 1) & (np.arange(image.shape[-1]) % 2 == 0), 9, labels)
    cut = image_quality(image, halves, {**names, 9: f"{names[1]} 2"})["cjv"]
    assert cut == image_quality(image, labels, names)["cjv"]


def test_tissues_are_expected_apart_only_where_t1_weighting_does_it() -> None:
    values = dict.fromkeys(("snr", "efc", "fber", "ghosting")) | {"cjv": 3.0}
    assert quality_flags(SHAPE, values, QualityLimits(), t1_weighted=True) == ["tissues not separable"]
    assert quality_flags(SHAPE, values, QualityLimits(), t1_weighted=False) == []


def test_what_cannot_be_computed_is_none_and_raises_no_flag() -> None:
    """A skull-stripped volume has no noise in air; a good one has nothing to flag."""
    values = image_quality(anatomy(0))
    assert values["snr"] is values["fber"] is values["ghosting"] is values["cjv"] is None
    assert quality_flags(SHAPE, values, QualityLimits(), t1_weighted=True) == []
    assert quality_flags(SHAPE, image_quality(noisy(anatomy(0), 0.02)), QualityLimits(), t1_weighted=True) == []
    assert (
        quality_flags(SHAPE, image_quality(noisy(anatomy(0), 2.0)), QualityLimits(), t1_weighted=True)[0] == "low SNR"
    )


def test_copies_have_near_fingerprints_and_others_have_not() -> None:
    affine = np.diag([-2.0, -2.0, 5.0, 1.0])
    volumes = [noisy(anatomy(seed), 0.02, seed) for seed in range(12)]
    prints = [fingerprint(volume, affine) for volume in volumes]
    # The same voxels, rescaled, stored in other axes, and slightly blurred.
    turned = nib.orientations.apply_orientation(volumes[3].transpose(2, 1, 0), [[1, -1], [0, 1], [2, 1]])
    turned_affine = affine @ nib.orientations.inv_ornt_aff([[1, -1], [0, 1], [2, 1]], volumes[3].shape[::-1])
    prints.append(fingerprint(7.5 * turned.transpose(2, 1, 0), turned_affine))
    prints.append(fingerprint(noisy(volumes[5], 0.02, 99), affine))
    assert list(near_copies(prints, 8)) == [(3, 12), (5, 13)]


def test_limits_that_cannot_be_searched_are_refused() -> None:
    with pytest.raises(ValueError, match="0 to 15, found 20"):
        QualityLimits(max_copy_distance=20)
