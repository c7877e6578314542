"""How a head is received: signal, bias field, coils, phase, noise.

The object is drawn on the grid of the image and not finer, so k-space holds no ringing from beyond it: a simulation
that starts from images, which flatters reconstruction.
"""

# K tissue classes and lesion parts, C coils, Z Y X voxels

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omnimri.platform.corpus.anatomy import CLASSES
from omnimri.platform.corpus.fields import smooth_field
from omnimri.platform.corpus.geometry import Grid
from omnimri.platform.corpus.scanners import Scanner
from omnimri.platform.corpus.signal import RELAXATION, Relaxation, Sequence, signal

_PART_TISSUE = {"halo": "oedema"}
"""Parts of lesions that look like another one."""


@dataclass(frozen=True)
class Receiver:
    """What a patient's series have in common: the coil array and the patient in it."""

    sens_maps: np.ndarray
    """Complex64 `(C, Z, Y, X)`."""
    bias: np.ndarray
    """Float32 `(Z, Y, X)`: transmit inhomogeneity and texture, around one."""


@dataclass(frozen=True)
class Received:
    """One series as the coils saw it."""

    coil_images: np.ndarray
    """Complex64 `(Z, C, Y, X)`, without noise."""
    noise_std: float
    """Of the real and of the imaginary part in each voxel of each coil image."""
    snr: float
    """Signal of white matter in the combined image over `noise_std`."""


def draw_receiver(grid: Grid, num_coils: int, field_strength_t: float, rng: np.random.Generator) -> Receiver:
    """Coils on a ring around the head, each falling off with distance, and a bias that grows with field strength.

    Args:
        grid: The acquisition.
        num_coils: Receive coils.
        field_strength_t: 1.5 or 3.
        rng: Source of positions and phases.
    """
    place = _centred_mm(grid)
    start = rng.uniform(0, 2 * np.pi)
    angles = start + 2 * np.pi * np.arange(num_coils) / num_coils + rng.normal(0, 0.1, num_coils)
    sens_maps = np.stack([_coil_map(place, angle, rng) for angle in angles])
    # Scanners even out part of the array's own profile.
    combined = np.sqrt((np.abs(sens_maps) ** 2).sum(0))
    sens_maps /= (combined / combined.mean()) ** 0.6 * combined.mean()
    strength = 0.06 if field_strength_t < 2 else 0.11
    bias = 1 + strength * smooth_field(rng, grid.shape, grid.spacing_mm, 70.0)
    return Receiver(sens_maps, np.clip(bias, 0.6, 1.4).astype(np.float32))


def _centred_mm(grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances along z, y, x from the middle of the grid, each shaped to broadcast."""
    z, y, x = (
        (np.arange(size, dtype=np.float32) - (size - 1) / 2) * step
        for size, step in zip(grid.shape, grid.spacing_mm, strict=True)
    )
    return z[:, None, None], y[:, None], x


def _coil_map(place: tuple[np.ndarray, np.ndarray, np.ndarray], angle: float, rng: np.random.Generator) -> np.ndarray:
    """Complex64 `(Z, Y, X)`: a loop at an angle around the head; its phase turns with distance and direction."""
    z, y, x = place
    cy, cx, cz = 130 * np.sin(angle), 110 * np.cos(angle), rng.normal(0, 20)
    distance = ((z - cz) / 1.6) ** 2 + (y - cy) ** 2 + (x - cx) ** 2
    turn = (x * np.sin(angle) - y * np.cos(angle)) / rng.uniform(90, 160) + z * rng.normal(0, 0.004)
    return (np.exp(1j * (turn + rng.uniform(0, 2 * np.pi))) / (1 + distance / 95.0**2)).astype(np.complex64)


def ideal_image(
    shares: dict[str, np.ndarray], sequence: Sequence, field_strength_t: float, tissue_scale: dict[str, float]
) -> np.ndarray:
    """Magnitude `(Z, Y, X)` of a sequence without bias and noise; partial volumes add up.

    Args:
        shares: Tissue class or lesion part to its share of each voxel.
        sequence: Pulse sequence.
        field_strength_t: Key of RELAXATION.
        tissue_scale: Factor on both relaxation times, by tissue; people differ.
    """
    image = np.zeros(next(iter(shares.values())).shape, np.float32)
    for name, share in shares.items():
        image += np.float32(signal(relaxation(name, field_strength_t, tissue_scale), sequence)) * share
    return image


def relaxation(name: str, field_strength_t: float, tissue_scale: dict[str, float]) -> Relaxation:
    """Relaxation of a tissue class or lesion part in one patient."""
    known = RELAXATION[field_strength_t][_PART_TISSUE.get(name, name)]
    scale = tissue_scale.get(name, 1.0)
    return Relaxation(known.t1_ms * scale, known.t2_ms * scale, known.density)


def draw_tissue_scale(rng: np.random.Generator) -> dict[str, float]:
    """How far one patient's relaxation times are from the table's; fluid, to which FLAIR is set, hardly differs."""
    normal = {name: float(np.exp(rng.normal(0, 0.02))) for name in CLASSES[1:]}
    parts = ("gliosis", "plaque", "mass", "oedema", "blood core", "blood rim")
    return normal | {name: float(np.exp(rng.normal(0, 0.05))) for name in parts}


def receive(
    image: np.ndarray, white: np.ndarray, receiver: Receiver, grid: Grid, scanner: Scanner, rng: np.random.Generator
) -> Received:
    """One series: the object's phase, coil sensitivities, and the noise that will be added.

    Args:
        image: Ideal magnitude `(Z, Y, X)`.
        white: Share of white matter, on which the noise level is set.
        receiver: Coils and bias.
        grid: The acquisition.
        scanner: Its field strength sets the noise.
        rng: Source of phase and noise level.
    """
    texture = 1 + 0.015 * smooth_field(rng, grid.shape, grid.spacing_mm, 6.0)
    phase = np.exp(1j * _object_phase(grid, rng))
    coil_images = ((image * receiver.bias * texture * phase)[None] * receiver.sens_maps).astype(np.complex64)
    combined = np.sqrt((np.abs(coil_images) ** 2).sum(0))
    snr = float(rng.uniform(25, 32) if scanner.field_strength_t < 2 else rng.uniform(30, 40))
    noise_std = float(combined[white > 0.9].mean()) / snr
    return Received(np.ascontiguousarray(coil_images.transpose(1, 0, 2, 3)), noise_std, snr)


def _object_phase(grid: Grid, rng: np.random.Generator) -> np.ndarray:
    """Radians `(Z, Y, X)`: smooth inhomogeneity and a shift of the echo."""
    z, y, x = (np.linspace(-1, 1, size, dtype=np.float32) for size in grid.shape)
    linear = rng.normal(0, 0.8) * y[:, None] + rng.normal(0, 0.8) * x + rng.uniform(0, 2 * np.pi)
    drift = rng.normal(0, 0.5) * z[:, None, None]
    return linear + drift + 0.7 * smooth_field(rng, grid.shape, grid.spacing_mm, 50.0)


def add_noise(values: np.ndarray, noise_std: float, rng: np.random.Generator) -> np.ndarray:
    """Complex Gaussian noise; the orthonormal transform keeps its level, so it may be added in either domain."""
    noise = rng.standard_normal((*values.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    return values + np.float32(noise_std) * noise


def combine(coil_images: np.ndarray) -> np.ndarray:
    """Root sum of squares over the coils: `(Z, C, Y, X)` to float32 `(Z, Y, X)`."""
    return np.sqrt((np.abs(coil_images) ** 2).sum(1)).astype(np.float32)
