"""How a head is scanned: slice geometry, receive coils, phase, noise, k-space."""

# N Y X slices and in-plane voxels, C coils

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from omnimri.models.vocabulary import FINDINGS, TISSUES
from omnimri.platform.corpus import signal
from omnimri.platform.corpus.anatomy import TISSUE_CLASSES, Head
from omnimri.platform.corpus.lesions import Lesions

LABEL_NAMES = {value: name for value, name in enumerate((*TISSUES, *FINDINGS), start=1)}
SUBSAMPLES = 3
"""Truth planes averaged into one slice."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """An axial 2D multi-slice prescription, the same for all series of a patient."""

    num_slices: int
    matrix: tuple[int, int]
    """Voxels `(Y, X)`; phase encoding runs along X."""
    spacing_mm: tuple[float, float, float]
    """`(z, y, x)`."""
    affine: np.ndarray
    """`(4, 4)`: voxel `(x, y, z)` to RAS mm; x to the patient's left and y to the back, as axial slices are shown."""


@dataclass(frozen=True)
class Sampled:
    """A head as its slices see it."""

    fractions: dict[str, np.ndarray]
    """Tissue or lesion part to float32 `(N, Y, X)`, partial volumes included."""
    label_map: np.ndarray
    """Uint8 `(N, Y, X)`, values of LABEL_NAMES."""
    mni_mm: np.ndarray
    """Float32 `(3, N, Y, X)`: place in the template."""


@dataclass(frozen=True)
class Acquisition:
    """One series as the scanner measured it."""

    kspace: np.ndarray
    """Complex64 `(N, C, Y, X)`, centred, orthonormal, fully sampled."""
    image: np.ndarray
    """Float32 `(N, Y, X)`: root sum of squares of the coil images."""


def prescribe(rng: np.random.Generator, *, num_slices: int, matrix: tuple[int, int], spacing_mm: tuple) -> Grid:
    """Axial slices around the brain, tilted and shifted a little, as a technologist leaves them."""
    tilt = Rotation.from_euler("xyz", [rng.normal(0, 3.0), rng.normal(0, 1.2), rng.normal(0, 1.5)], degrees=True)
    dz, dy, dx = spacing_mm
    axes = tilt.as_matrix() @ np.diag([-1.0, -1.0, 1.0])
    affine = np.eye(4)
    affine[:3, :3] = axes * np.array([dx, dy, dz])
    centre_mm = np.array([0.0, -18.0, 6.0]) + rng.normal(0, 2.5, 3)
    middle = (np.array([matrix[1], matrix[0], num_slices]) - 1) / 2
    affine[:3, 3] = centre_mm - affine[:3, :3] @ middle
    return Grid(num_slices=num_slices, matrix=matrix, spacing_mm=spacing_mm, affine=affine)


def sample(head: Head, lesions: Lesions, grid: Grid) -> Sampled:
    """Average the truth over each slice's thickness."""
    where = _truth_index(head, grid)
    replaced = 1 - np.clip(sum(lesions.parts.values()), 0, 1) if lesions.parts else 1.0
    truth = {name: head.tissues[i] * replaced for i, name in enumerate(TISSUE_CLASSES)} | lesions.parts
    fractions = {name: _slice_mean(values, where) for name, values in truth.items()}
    brain = np.stack([fractions[name] for name in TISSUES])
    labels = np.where(brain.sum(0) > 0.5, brain.argmax(0) + 1, 0)
    if lesions.finding is not None:
        lesion = sum(fractions[name] for name in lesions.parts)
        labels = np.where(lesion >= 0.5, len(TISSUES) + 1 + FINDINGS.index(lesions.finding), labels)
    middle = where[:, :, SUBSAMPLES // 2]
    mni = np.stack([ndimage.map_coordinates(axis, middle, order=1, mode="nearest") for axis in head.mni_mm])
    return Sampled(fractions, labels.astype(np.uint8), mni)


def _truth_index(head: Head, grid: Grid) -> np.ndarray:
    """Truth voxel index `(3, N, SUBSAMPLES, Y, X)` of every point that is averaged."""
    z = np.arange(grid.num_slices)[:, None] + ((np.arange(SUBSAMPLES) + 0.5) / SUBSAMPLES - 0.5)
    y, x = np.arange(grid.matrix[0]), np.arange(grid.matrix[1])
    to_truth = np.linalg.inv(head.affine) @ grid.affine
    shape = (grid.num_slices, SUBSAMPLES, *grid.matrix)
    along = (x, y[:, None], z[:, :, None, None])
    return np.stack(
        [np.broadcast_to(sum(row[i] * along[i] for i in range(3)) + row[3], shape) for row in to_truth[:3]]
    ).astype(np.float32)


def _slice_mean(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    return ndimage.map_coordinates(values, where, order=1, mode="constant").mean(axis=1).astype(np.float32)


def ideal_image(sampled: Sampled, protocol: signal.Protocol, field_strength_t: float) -> np.ndarray:
    """Noise-free magnitude `(N, Y, X)` of a protocol."""
    known = signal.TISSUES[field_strength_t] | signal.LESIONS
    return sum(fraction * signal.signal(known[name], protocol) for name, fraction in sampled.fractions.items())


def scan(image: np.ndarray, rng: np.random.Generator, *, num_coils: int, snr: float) -> Acquisition:
    """Receive an ideal image `(N, Y, X)` by coils with noise.

    Args:
        image: Magnitude.
        rng: Draws texture, coils, phase and noise.
        num_coils: Receive coils around the head.
        snr: Median signal of the object over the noise's standard deviation, in the combined image.
    """
    shape = image.shape[1:]
    texture = 1 + 0.03 * ndimage.gaussian_filter(rng.normal(size=image.shape), 1.0) / 0.2
    phase = _smooth_phase(rng, shape)
    maps = _coil_maps(rng, num_coils, shape)
    coil_images = (image * texture)[:, None] * maps * phase
    deviation = float(np.median(image[image > 0.2 * image.max()])) / snr
    noise = rng.normal(size=coil_images.shape) + 1j * rng.normal(size=coil_images.shape)
    coil_images = coil_images + deviation / np.sqrt(2) * noise
    axes = (-2, -1)
    shifted = np.fft.ifftshift(coil_images, axes=axes)
    kspace = np.fft.fftshift(np.fft.fft2(shifted, norm="ortho"), axes=axes).astype(np.complex64)
    combined = np.sqrt((np.abs(coil_images) ** 2).sum(1)).astype(np.float32)
    return Acquisition(kspace, combined)


def _plane(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates `(Y, X)` from -1 to 1."""
    return tuple(np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij"))  # type: ignore[return-value]


def _smooth_phase(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Unit complex `(Y, X)`: a quadratic phase as field inhomogeneity leaves it."""
    y, x = _plane(shape)
    terms = (np.ones_like(y), y, x, x * y, y * y, x * x)
    return np.exp(1j * sum(rng.normal(0, 0.8) * term for term in terms))


def _coil_maps(rng: np.random.Generator, num_coils: int, shape: tuple[int, int]) -> np.ndarray:
    """Complex `(C, Y, X)`: coils on a ring, falling off with distance, brighter near the rim when combined."""
    y, x = _plane(shape)
    maps = []
    start = rng.uniform(0, 2 * np.pi)
    for coil in range(num_coils):
        angle = start + 2 * np.pi * coil / num_coils + rng.normal(0, 0.1)
        cy, cx = 1.15 * np.sin(angle), 1.15 * np.cos(angle)
        magnitude = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 1.7)
        turn = rng.uniform(0, 2 * np.pi) + 0.8 * (np.cos(angle) * x + np.sin(angle) * y)
        maps.append(magnitude * np.exp(1j * turn))
    maps = np.stack(maps)
    combined = np.sqrt((np.abs(maps) ** 2).sum(0))
    # Scanners even out most of the combined profile and leave some of it.
    return maps / combined**0.75 / np.median(combined) ** 0.25
