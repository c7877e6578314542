"""docs/kspace.md: one phantom in every layout, and the convention's own Fourier sums give it back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from omnimri.platform.data.formats.readers import read_path
from tests.platform.catalogue_writers import (
    phantom,
    save_calgary,
    save_matlab,
    save_prostate,
    save_skm_tea,
)
from tests.platform.intake_fakes import (
    coil_kspace,
    fft,
    ismrmrd_header,
    oblique_affine,
    save_fastmri,
    save_ismrmrd,
)  # fmt: skip

SHAPES = [(4, 12, 16), (3, 13, 15)]
SPACING = (4.0, 2.0, 1.5)
PADDED_LINES = 2


def complex_phantom(shape: tuple[int, int, int]) -> np.ndarray:
    """An object without symmetry, in the middle, whose phase tells a transform from its conjugate; complex128."""
    _, y, x = (np.arange(size) - size // 2 for size in shape)
    wave = 2 * y[:, None] / shape[1] - 1 * x / shape[2]
    return phantom(0, shape) * np.exp(2j * np.pi * wave)


def interpolated(image: np.ndarray) -> np.ndarray:
    """The image as a scanner interpolates it: outer lines of k-space are empty."""
    kspace = fft(image, (-2, -1))
    kspace[..., :PADDED_LINES] = kspace[..., -PADDED_LINES:] = 0
    axes = (-2, -1)
    return np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(kspace, axes=axes), axes=axes, norm="ortho"), axes=axes)


def inverse_sums(size: int) -> np.ndarray:
    """The convention's inverse transform along one axis as a matrix `(voxel, sample)`, written as its sum."""
    index = np.arange(size) - size // 2
    return np.exp(2j * np.pi * np.outer(index, index) / size) / np.sqrt(size)


def _m4raw(path: Path, image: np.ndarray) -> None:
    """M4Raw: fastMRI's layout with fewer lines than the grid holds (195 of 256)."""
    kspace = coil_kspace(image, num_coils=4)
    kspace[..., :PADDED_LINES] = kspace[..., -PADDED_LINES:] = 0
    save_fastmri(path / "2022061003_T101.h5", kspace, ismrmrd_header(image.shape, SPACING))


def _fastmri(path: Path, image: np.ndarray) -> None:
    size = image.shape[1]
    before = size - size // 2  # the middle of twice the field of view stays at its middle voxel
    wide = np.pad(image, ((0, 0), (before, size - before), (0, 0)))
    save_fastmri(path / "a.h5", coil_kspace(wide), ismrmrd_header(image.shape, SPACING, oversampling=2))


def _matlab(path: Path, image: np.ndarray) -> None:
    scipy.io.savemat(path / "a.mat", {"any": coil_kspace(image).transpose(2, 3, 1, 0)})


LAYOUTS: dict[str, tuple[str, Callable[[Path, np.ndarray], object]]] = {
    "fastmri": ("fastmri", _fastmri),
    "fastmri-single-coil": (
        "fastmri", lambda path, image: save_fastmri(path / "a.h5", fft(image, (-2, -1)).astype(np.complex64)),
    ),
    "m4raw": ("fastmri", _m4raw),
    "fastmri-prostate": ("fastmri-prostate", lambda path, image: save_prostate(path / "a.h5", image)),
    "ismrmrd": ("ismrmrd", lambda path, image: save_ismrmrd(path / "a.h5", coil_kspace(image), oblique_affine())),
    "cc359": ("cc359", lambda path, image: save_calgary(path / "a.h5", image, rolled=False)),
    "cc359-plain-fft": ("cc359", lambda path, image: save_calgary(path / "a.h5", image, rolled=True)),
    "skm-tea": ("skm-tea", lambda path, image: save_skm_tea(path / "a.h5", image[None])),
    "cmrxrecon": ("cmrxrecon", lambda path, image: save_matlab(path / "a.mat", image[None])),
    "matlab-7.3": ("matlab", lambda path, image: save_matlab(path / "a.mat", image[None], name="any")),
    "matlab-5": ("matlab", _matlab),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_meets_the_convention(tmp_path: Path, layout: str, shape: tuple[int, int, int]) -> None:
    """Every coil sees the phantom times a number of its own: same place, same orientation, same phase."""
    image = complex_phantom(shape)
    if layout == "m4raw":
        image = interpolated(image)
    source_format, save = LAYOUTS[layout]
    save(tmp_path, image)
    [record], errors = read_path(tmp_path)
    kspace = record.scan.kspace
    assert (errors, record.source_format, kspace.dtype) == ([], source_format, np.complex64)
    assert kspace.shape == (shape[0], kspace.shape[1], *shape[1:])
    assert record.scan.mask is None
    seen = np.einsum("yk,zckl,xl->zcyx", inverse_sums(shape[1]), kspace, inverse_sums(shape[2]))
    for coil in seen.swapaxes(0, 1):
        weight = np.vdot(image, coil) / np.vdot(image, image)
        assert np.linalg.norm(coil - weight * image) < 1e-3 * np.linalg.norm(coil)
    np.testing.assert_allclose(record.scan.image, np.abs(image), rtol=1e-3, atol=0.5)
