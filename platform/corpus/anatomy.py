"""Anatomy of one simulated patient: tissue fractions of a warped MNI152 brain with a skull and a scalp around it.

The template is the average of 152 brains, skull-stripped and exactly symmetric; the outer shells are built here, and
the warp has an asymmetric part, so that left is not right.
"""

# X Y Z voxels of the 2 mm truth grid, RAS order (x to the right, y to the front, z upwards)

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import nilearn
import numpy as np
from scipy import ndimage

TISSUE_CLASSES = ("cerebrospinal fluid", "grey matter", "white matter", "skull", "marrow", "scalp")
SPACING_MM = 2.0
_SHAPE = (104, 124, 104)
_FILES = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


@dataclass(frozen=True)
class Template:
    """The unwarped head."""

    tissues: np.ndarray
    """Float32 `(6, X, Y, Z)`, fractions in the order of TISSUE_CLASSES."""
    affine: np.ndarray
    """`(4, 4)`: voxel `(x, y, z)` to MNI mm."""


@dataclass(frozen=True)
class Head:
    """One patient's head on the truth grid."""

    tissues: np.ndarray
    """Float32 `(6, X, Y, Z)`."""
    mni_mm: np.ndarray
    """Float32 `(3, X, Y, Z)`: where each voxel lay in the template, in MNI mm."""
    affine: np.ndarray
    """`(4, 4)`: voxel to patient RAS mm."""

    @property
    def brain(self) -> np.ndarray:
        """Bool `(X, Y, Z)`: cerebrospinal fluid, grey and white matter together."""
        return self.tissues[:3].sum(0) > 0.5


def load_template() -> Template:
    """Read the maps that nilearn ships and build the head at 2 mm."""
    folder = Path(nilearn.__file__).parent / "datasets" / "data"
    image = nib.load(folder / _FILES.format("t1"))
    grey, white = (_read(folder / _FILES.format(name)) for name in ("gm", "wm"))
    brain = ndimage.binary_closing(np.pad(grey + white > 0.3, 8), iterations=6)
    brain = ndimage.binary_fill_holes(brain)[8:-8, 8:-8, 8:-8].astype(np.float32)
    grey, white, brain = (_halve(values) for values in (grey, white, brain))
    tissues = _with_shells(grey, white, brain)
    affine = image.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = image.affine[:3, 3] + 0.5 - np.array(_margin(grey.shape)) * SPACING_MM
    return Template(tissues, affine)


def _read(path: Path) -> np.ndarray:
    values = np.asarray(nib.load(path).dataobj, dtype=np.float32)
    return values / max(1.0, float(values.max()))


def _halve(values: np.ndarray) -> np.ndarray:
    """Mean over 2 x 2 x 2 voxels, the odd edge cut."""
    x, y, z = (size // 2 for size in values.shape)
    return values[: 2 * x, : 2 * y, : 2 * z].reshape(x, 2, y, 2, z, 2).mean(axis=(1, 3, 5))


def _margin(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple((target - size) // 2 for target, size in zip(_SHAPE, shape, strict=True))


def _with_shells(grey: np.ndarray, white: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Fractions of the six classes: fluid is what the brain leaves, bone and skin are shells by distance."""
    before = _margin(grey.shape)
    widths = [(b, target - size - b) for b, target, size in zip(before, _SHAPE, grey.shape, strict=True)]
    grey, white, brain = (np.pad(values, widths) for values in (grey, white, brain))
    outside_mm = SPACING_MM * ndimage.distance_transform_edt(brain < 0.5)

    def shell(inner_mm: float, outer_mm: float) -> np.ndarray:
        ramp = np.clip((outside_mm - inner_mm) / SPACING_MM + 0.5, 0, 1)
        return ramp * np.clip((outer_mm - outside_mm) / SPACING_MM + 0.5, 0, 1) * (outside_mm > 0)

    inside = brain >= 0.5
    subarachnoid = shell(0.0, 3.0)
    fluid = np.where(inside, np.clip(1 - grey - white, 0, 1), subarachnoid)
    classes = [
        fluid,
        grey * inside,
        white * inside,
        shell(3.0, 5.0) + shell(8.0, 9.5),
        shell(5.0, 8.0),
        shell(9.5, 15.0),
    ]
    tissues = np.stack(classes).astype(np.float32)
    return tissues / np.maximum(1.0, tissues.sum(0))


def draw_head(template: Template, rng: np.random.Generator, age_years: float) -> Head:
    """Warp the template: overall size, a smooth random displacement with no symmetry, wider ventricles with age."""
    shape = template.tissues.shape[1:]
    grid = np.stack(np.meshgrid(*[np.arange(size, dtype=np.float32) for size in shape], indexing="ij"))
    centre = (np.array(shape, np.float32)[:, None, None, None] - 1) / 2
    scale = 1 / rng.uniform(0.94, 1.04, 3).astype(np.float32)[:, None, None, None]
    source = centre + (grid - centre) * scale + _smooth_field(rng, shape)
    source += _ventricle_pull(grid, template.affine, (age_years - 45) / 40)
    tissues = np.stack([ndimage.map_coordinates(t, source, order=1, mode="nearest") for t in template.tissues])
    linear, offset = template.affine[:3, :3], template.affine[:3, 3]
    mni_mm = np.einsum("ij,jxyz->ixyz", linear, source) + offset[:, None, None, None]
    return Head(tissues, mni_mm.astype(np.float32), template.affine)


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Displacement in voxels `(3, X, Y, Z)`: random at 6 nodes an axis, cubic in between, standard deviation 2.6 mm there."""
    coarse = rng.normal(0, 1.3, (3, 6, 6, 6)).astype(np.float32)
    factors = [size / 6 for size in shape]
    return np.stack([ndimage.zoom(field, factors, order=3, mode="nearest", grid_mode=True) for field in coarse])


def _ventricle_pull(grid: np.ndarray, affine: np.ndarray, strength: float) -> np.ndarray:
    """Sample nearer to the lateral ventricles' middle as age goes up, which widens them there."""
    middle = np.linalg.inv(affine) @ np.array([0.0, -20.0, 15.0, 1.0])
    offset = grid - middle[:3, None, None, None].astype(np.float32)
    distance_mm = SPACING_MM * np.sqrt((offset**2).sum(0))
    return -0.18 * np.clip(strength, -0.5, 1.2) * offset * np.exp(-((distance_mm / 30.0) ** 2))
