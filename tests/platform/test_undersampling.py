"""Undersampling in retrospect."""

import numpy as np
import pytest

from omnimri.models.scan import Scan
from omnimri.platform.data.undersampling import undersample


def full_scan() -> Scan:
    """Two coils of random k-space, and an image that is not theirs."""
    rng = np.random.default_rng(0)
    kspace = (rng.normal(size=(3, 2, 32, 36)) + 1j * rng.normal(size=(3, 2, 32, 36))).astype(np.complex64)
    return Scan(image=np.ones((3, 32, 36), np.float32), affine=np.eye(4), kspace=kspace, facts={"contrast": "T1w"})


def test_undersampling_leaves_nothing_of_the_lines_it_drops() -> None:
    full = full_scan()
    scan = undersample(full, acceleration=4, kind="equispaced", seed=3)
    assert scan.mask is not None and scan.mask.sum() == 9
    assert np.all(scan.kspace[..., ~scan.mask] == 0)
    np.testing.assert_array_equal(scan.kspace[..., scan.mask], full.kspace[..., scan.mask])
    # The image is the aliased one, not the one that came with the file; the transform keeps energy (Parseval).
    assert np.square(scan.image).sum() == pytest.approx(np.square(np.abs(scan.kspace)).sum(), rel=1e-5)
    assert scan.facts == full.facts


def test_an_image_alone_cannot_be_undersampled() -> None:
    with pytest.raises(ValueError, match="holds no k-space"):
        undersample(
            Scan(image=np.ones((3, 32, 36), np.float32), affine=np.eye(4)), acceleration=4, kind="random", seed=0
        )
