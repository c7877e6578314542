"""Noise prewhitening: coils combined so that their noise is white and of unit strength.

Scanners measure the receivers' noise without excitation. Its covariance says which coils are loud and which hear the
same noise; without it, a root sum of squares or a least-squares reconstruction trusts loud coils as much as quiet ones.
Afterwards the noise of k-space, and with the orthonormal transform that of coil images, has a standard deviation of one
in its real and in its imaginary part: images are in SNR units (Kellman and McVeigh, Image reconstruction in SNR units,
MRM 2005), less the gain of averages, whose mean is stored.
"""

# C coils, N noise samples, Z slices, Y readout, X phase encoding

from __future__ import annotations

from dataclasses import replace

import numpy as np

from omnimri.platform.data.formats.kspace.fourier import root_sum_of_squares_image
from omnimri.platform.data.formats.records import SeriesRecord

RECEIVER_NOISE_BANDWIDTH = 0.79
"""Share of the receiver's bandwidth that its filter lets noise through, where the header states none."""

PREWHITENED = "prewhitened"
NOT_PREWHITENED = "not prewhitened"
"""Beginning of the flag that says why."""

_LEAST_EIGENVALUE = 1e-6
"""Of the noise correlation, below which coils are copies or mixtures of each other (or samples fewer than coils)."""


def noise_covariance(noise: np.ndarray) -> np.ndarray:
    """Covariance `(C, C)` of noise `(C, N)`, whose mean is known to be zero."""
    samples = noise.astype(np.complex128)
    return samples @ samples.conj().T / max(samples.shape[1] - 1, 1)


def bandwidth_scale(image_dwell_us: float, noise_dwell_us: float, receiver_noise_bandwidth: float) -> float:
    """Noise power of the noise scan over that of image lines, by dwell times and filter; 1 where no time is stated."""
    dwell = image_dwell_us / noise_dwell_us if image_dwell_us > 0 < noise_dwell_us else 1.0
    return dwell * receiver_noise_bandwidth


def whitening_matrix(covariance: np.ndarray) -> np.ndarray | None:
    """`sqrt(2) L^-1` with `L L^H` the covariance `(C, C)`.

    With the covariance of a noise scan over its `bandwidth_scale` this is `calculate_prewhitening` of
    ismrmrd-python-tools.

    Returns:
        Lower triangular `(C, C)`; None for a singular covariance, which has no inverse.
    """
    deviation = np.sqrt(np.diagonal(covariance).real)
    if not (np.isfinite(covariance).all() and deviation.all()):
        return None
    correlation = covariance / np.outer(deviation, deviation)
    if np.linalg.eigvalsh(correlation)[0] < _LEAST_EIGENVALUE:
        return None
    return np.sqrt(2) * np.linalg.inv(np.linalg.cholesky(covariance))


def prewhitened(record: SeriesRecord) -> SeriesRecord:
    """The record with white k-space and the image of it; as it is where its file has no noise scan.

    A noise scan that cannot be used (unreadable, singular covariance, other coils) leaves k-space as it was measured:
    it is sound, only its noise is not white. Either way a flag says so.
    """
    kspace, covariance = record.scan.kspace, record.noise_covariance
    if kspace is None or covariance is None:
        return record
    if covariance.size == 0:
        return _flagged(record, f"{NOT_PREWHITENED}: unreadable noise scan")
    if len(covariance) != kspace.shape[1]:
        return _flagged(record, f"{NOT_PREWHITENED}: noise scan of other coils")
    matrix = whitening_matrix(covariance)
    if matrix is None:
        return _flagged(record, f"{NOT_PREWHITENED}: singular noise covariance")
    white = np.stack([np.tensordot(matrix.astype(np.complex64), coils, 1) for coils in kspace])
    scan = replace(record.scan, kspace=white, image=root_sum_of_squares_image(white))
    return _flagged(replace(record, scan=scan, noise_covariance=None), PREWHITENED)


def _flagged(record: SeriesRecord, flag: str) -> SeriesRecord:
    return replace(record, flags=(*record.flags, flag))
