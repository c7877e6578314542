"""Four kinds of lesion that differ in signal, size, shape and place, with their exact masks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from omnimri.models.vocabulary import FINDINGS
from omnimri.platform.corpus.anatomy import SPACING_MM, Head

FINDING_OF_DIAGNOSIS = {
    "old infarct": "old infarct",
    "demyelinating disease": "demyelinating plaque",
    "oedematous mass": "oedematous mass",
    "haemorrhage": "haemorrhage",
}


@dataclass(frozen=True)
class Lesions:
    """What was put into one head."""

    finding: str | None
    """Of FINDINGS; None in a healthy head."""
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    """Fraction `(X, Y, Z)` of each lesion part of `signal.LESIONS`, not overlapping."""

    @property
    def mask(self) -> np.ndarray | None:
        """Bool `(X, Y, Z)`: all parts together."""
        return sum(self.parts.values()) > 0.5 if self.parts else None


def draw_lesions(head: Head, diagnosis: str, rng: np.random.Generator) -> Lesions:
    """The lesions that a diagnosis means; nothing for a normal head."""
    finding = FINDING_OF_DIAGNOSIS.get(diagnosis)
    if finding is None:
        return Lesions(None)
    painter = dict(zip(FINDINGS, (_infarct, _plaques, _mass, _haemorrhage), strict=True))[finding]
    return Lesions(finding, painter(head, rng))


def _infarct(head: Head, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A cortical wedge: fluid-filled cavity with a gliotic rim, 20 to 45 mm."""
    centre = _place(head, rng, tissue=1, low_mm=(12, -85, -5), high_mm=(58, 45, 55))
    whole = _connected(_blob(head, centre, rng.uniform(10, 20, 3), rng, roughness=0.35) * head.brain, head, centre)
    cavity = ndimage.binary_erosion(whole > 0.5, iterations=2).astype(np.float32)
    if cavity.sum() < 20:
        cavity = ndimage.binary_erosion(whole > 0.5).astype(np.float32)
    return {"cavity": cavity, "gliosis": whole - cavity}


def _plaques(head: Head, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Three to nine ovoid plaques of 6 to 13 mm in the periventricular white matter of both hemispheres."""
    plaques = np.zeros(head.brain.shape, np.float32)
    for index in range(int(rng.integers(4, 10))):
        centre = _place(head, rng, tissue=2, low_mm=(14, -65, 5), high_mm=(34, 40, 38), side=(-1) ** index)
        plaques = np.maximum(plaques, _blob(head, centre, rng.uniform(3.0, 6.5, 3), rng, roughness=0.1))
    return {"plaque": plaques * (head.tissues[2] + head.tissues[1] > 0.5)}


def _mass(head: Head, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A solid mass of 16 to 30 mm with vasogenic oedema along the white matter around it."""
    centre = _place(head, rng, tissue=2, low_mm=(18, -70, 0), high_mm=(45, 45, 50))
    mass = _blob(head, centre, rng.uniform(8, 15, 3), rng, roughness=0.2) * head.brain
    halo = _blob(head, centre, rng.uniform(17, 25, 3), rng, roughness=0.4) * (head.tissues[2] > 0.35)
    whole = _connected(np.maximum(mass, halo), head, centre)
    return {"mass": mass * whole, "oedema": whole * (1 - mass)}


def _haemorrhage(head: Head, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A deep bleed of 12 to 30 mm: core with short T1, dark rim."""
    centre = _place(head, rng, tissue=None, low_mm=(16, -25, -5), high_mm=(36, 15, 22))
    whole = _connected(_blob(head, centre, rng.uniform(7, 14, 3), rng, roughness=0.15) * head.brain, head, centre)
    core = ndimage.binary_erosion(whole > 0.5).astype(np.float32)
    return {"blood core": core, "blood rim": whole - core}


def _connected(lesion: np.ndarray, head: Head, centre: np.ndarray) -> np.ndarray:
    """The part of a lesion that hangs together with its centre and stays in its hemisphere."""
    same_side = head.mni_mm[0] * head.mni_mm[0][tuple(centre)] > 0
    components, _ = ndimage.label(ndimage.binary_opening(lesion * same_side > 0.5))
    values = components[tuple(slice(max(c - 3, 0), c + 4) for c in centre)]
    nearest = np.bincount(values[values > 0], minlength=1).argmax() if (values > 0).any() else 1
    return (components == nearest).astype(np.float32)


def _place(
    head: Head, rng: np.random.Generator, *, tissue: int | None, low_mm: tuple[float, ...], high_mm: tuple[float, ...],
    side: int | None = None,
) -> np.ndarray:  # fmt: skip
    """A voxel in a box of the template given for the right side (x > 0), mirrored at random, in a tissue if named."""
    side = side or (-1) ** int(rng.integers(2))
    position = head.mni_mm * np.array([side, 1, 1], np.float32)[:, None, None, None]
    bounds = zip(position, low_mm, high_mm, strict=True)
    allowed = np.logical_and.reduce([(axis >= low) & (axis <= high) for axis, low, high in bounds])
    allowed &= head.brain if tissue is None else head.tissues[tissue] > 0.6
    candidates = np.argwhere(allowed)
    return candidates[int(rng.integers(len(candidates)))]


def _blob(
    head: Head, centre: np.ndarray, radii_mm: np.ndarray, rng: np.random.Generator, *, roughness: float
) -> np.ndarray:
    """An ellipsoid with a wavy surface; 0 or 1 as float32 `(X, Y, Z)`."""
    shape = head.brain.shape
    reach = np.ceil(radii_mm.max() * (1 + 2 * roughness) / SPACING_MM).astype(int) + 1
    low = np.maximum(centre - reach, 0)
    high = np.minimum(centre + reach + 1, shape)
    window = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    axes = np.meshgrid(*[np.arange(a, b) for a, b in zip(low, high, strict=True)], indexing="ij")
    distance = sum(((axis - c) * SPACING_MM / r) ** 2 for axis, c, r in zip(axes, centre, radii_mm, strict=True)) ** 0.5
    waves = ndimage.gaussian_filter(rng.normal(size=distance.shape), 2.0)
    waves *= roughness / max(float(waves.std()), 1e-6) * 0.5
    blob = np.zeros(shape, np.float32)
    blob[window] = distance * (1 + waves) < 1
    return blob
