"""The one Fourier transform of k-space at rest, in NumPy: centred and orthonormal, as `physics.fft2c` is in torch."""

# Z slices, C coils, Y readout, X phase encoding

from __future__ import annotations

import numpy as np


def centered_fft(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Centred orthonormal Fourier transform in complex64; over the last two axes it equals `physics.fft2c`."""
    shifted = np.fft.ifftshift(array, axes=axes)
    return np.fft.fftshift(np.fft.fftn(shifted, axes=axes, norm="ortho"), axes=axes).astype(np.complex64, copy=False)


def centered_ifft(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Inverse of `centered_fft`."""
    shifted = np.fft.ifftshift(array, axes=axes)
    return np.fft.fftshift(np.fft.ifftn(shifted, axes=axes, norm="ortho"), axes=axes).astype(np.complex64, copy=False)


def root_sum_of_squares_image(kspace: np.ndarray) -> np.ndarray:
    """Magnitude image `(Z, Y, X)` float32 of k-space `(Z, C, Y, X)`, one slice at a time to bound memory."""
    image = np.empty((kspace.shape[0], *kspace.shape[2:]), dtype=np.float32)
    for z, coils in enumerate(kspace):
        image[z] = np.sqrt(np.square(np.abs(centered_ifft(coils, (-2, -1)))).sum(0))
    return image


def crop_readout(kspace: np.ndarray, size: int) -> np.ndarray:
    """K-space `(..., Y, X)` of the central `size` readout voxels: removes readout oversampling."""
    full = kspace.shape[-2]
    if size >= full:
        return kspace
    start = full // 2 - size // 2
    return centered_fft(centered_ifft(kspace, (-2,))[..., start : start + size, :], (-2,))
