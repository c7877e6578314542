"""Anatomy of one simulated patient: a warped MNI152 brain inside a skull, a scalp and a face made here.

The ICBM 152 2009a template that nilearn ships is an average of 152 brains, without skull and exactly symmetric. Fluid
is what grey and white matter leave of the brain; outer layers follow the distance from the brain's surface; the warp
has a systematic asymmetric part (right frontal and left occipital lobes are the wider ones) and a random one.
"""

# Z Y X voxels of the fine grid: in-plane as acquired, several sub-slices to an acquired slice

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage

from omnimri.platform.corpus.fields import ramp, smooth_field
from omnimri.platform.corpus.geometry import Grid, Pose
from omnimri.platform.data.mni152 import load_map

CLASSES = (
    "cerebrospinal fluid", "grey matter", "white matter", "compact bone", "marrow", "fat", "muscle", "eye",
)  # fmt: skip
"""What a voxel is made of, besides air and lesions; the first three are those of `vocabulary.TISSUES`."""

_SHELL_SPACING_MM = 2.0
_SHELL_PAD = 15
"""Voxels of 2 mm added around the template for skull and scalp."""
_HEAD_DEPTH_MM = 14.0
"""From the brain's surface to the skin over the vault."""
_CLOSING_MM = 9.0
"""Fissures narrower than twice this do not dent the skull."""
_BASE_Z_MM = -16.0
"""MNI height below which the head is no longer the brain's hull but face and neck."""
_EYES_MM = ((-32.0, 57.0, -37.0), (32.0, 57.0, -37.0))
_EYE_RADIUS_MM = 12.0


@dataclass(frozen=True)
class Template:
    """The unwarped head, RAS."""

    grey: np.ndarray
    """Uint8 `(X, Y, Z)`, 255 is one, 1 mm."""
    white: np.ndarray
    affine: np.ndarray
    """`(4, 4)`: voxel of grey and white to MNI mm."""
    outside_mm: np.ndarray
    """Float32 `(X, Y, Z)`, 2 mm, padded: signed distance from the brain's surface, negative within."""
    depth_mm: np.ndarray
    """Float32 on the same grid: signed distance below the skin, negative in air."""
    shell_affine: np.ndarray

    def at(self, mni_mm: np.ndarray) -> tuple[float, float]:
        """Grey and white share at one point `(3,)`."""
        index = tuple(np.round(np.linalg.inv(self.affine) @ [*mni_mm, 1.0])[:3].astype(int))
        if any(not 0 <= i < size for i, size in zip(index, self.grey.shape, strict=True)):
            return 0.0, 0.0
        return float(self.grey[index]) / 255, float(self.white[index]) / 255


@dataclass(frozen=True, kw_only=True)
class Build:
    """What makes one patient's head differ from the template."""

    petalia: float
    """Relative widening of the right frontal and left occipital lobes."""
    ventricles: float
    """Relative widening of the lateral ventricles over the template's."""
    atrophy: float
    """0 none to 1 marked: width of the sulci and of the subarachnoid space."""
    marrow_mm: float
    fat_mm: float

    @property
    def is_wide(self) -> bool:
        """Whether a reader would call the ventricles and sulci widened."""
        return self.atrophy > 0.6


@dataclass(frozen=True, kw_only=True)
class Push:
    """Displacement of the brain around a space-occupying lesion."""

    centre_mm: np.ndarray
    """MNI `(3,)`."""
    radius_mm: float
    amount_mm: float


@dataclass(frozen=True)
class Head:
    """One patient's head on the fine grid."""

    tissues: np.ndarray
    """Float32 `(8, Z, Y, X)`, shares in the order of CLASSES."""
    mni_mm: np.ndarray
    """Float32 `(3, Z, Y, X)`: where each voxel lies in the template."""

    @cached_property
    def brain(self) -> np.ndarray:
        """Share `(Z, Y, X)` of fluid, grey and white matter together."""
        return self.tissues[:3].sum(0)


def load_template() -> Template:
    """Read the maps that nilearn ships and lay the distance maps of the outer layers around them.

    Raises:
        ValueError: If nilearn is not installed or does not hold the files.
    """
    image, grey, white = load_map("t1"), load_map("gm"), load_map("wm")
    brain = np.asarray(image.dataobj)[::2, ::2, ::2] > 0
    affine = np.asarray(image.affine, dtype=np.float64)
    shell_affine = affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    shell_affine[:3, 3] -= _SHELL_PAD * _SHELL_SPACING_MM
    outside_mm, depth_mm = _distances(np.pad(brain, _SHELL_PAD), shell_affine)
    return Template(np.asarray(grey.dataobj), np.asarray(white.dataobj), affine, outside_mm, depth_mm, shell_affine)


def _distances(brain: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance maps of the brain's hull and of the skin; below the vault, the head is its outline carried down."""
    near = _signed_mm(brain) < _CLOSING_MM
    outside_mm = _signed_mm(_signed_mm(near) < -_CLOSING_MM)
    head = outside_mm < _HEAD_DEPTH_MM
    base = round((_BASE_Z_MM - affine[2, 3]) / _SHELL_SPACING_MM)
    outline = head[:, :, base]
    inset_mm = _SHELL_SPACING_MM * ndimage.distance_transform_edt(outline)
    for z in range(base):
        head[:, :, z] |= inset_mm > 0.15 * (base - z) * _SHELL_SPACING_MM
    return outside_mm, -_signed_mm(head)


def _signed_mm(mask: np.ndarray) -> np.ndarray:
    outside, inside = (ndimage.distance_transform_edt(side) for side in (~mask, mask))
    return (_SHELL_SPACING_MM * np.where(mask, 0.5 - inside, outside - 0.5)).astype(np.float32)


def draw_build(rng: np.random.Generator, age_years: float) -> Build:
    """How one patient's head differs; ventricles and sulci widen with age."""
    atrophy = float(np.clip((age_years - 35) / 50 + rng.normal(0, 0.12), 0, 1))
    return Build(
        petalia=float(np.clip(rng.normal(0.045, 0.015), 0.01, 0.08)),
        ventricles=float(np.clip(0.05 + 0.32 * atrophy + rng.normal(0, 0.05), 0, 0.45)),
        atrophy=atrophy,
        marrow_mm=float(rng.uniform(1.5, 3.0)),
        fat_mm=float(rng.uniform(3.0, 5.0)),
    )


def draw_head(
    template: Template, build: Build, pose: Pose, grid: Grid, rng: np.random.Generator, push: Push | None = None
) -> Head:
    """The head of one patient on the fine grid of an acquisition.

    Args:
        template: The unwarped head.
        build: How this head differs.
        pose: Size and position of the head in the scanner.
        grid: The acquisition.
        rng: Source of the random part of the warp.
        push: Displacement by a lesion, if there is one.
    """
    mni = pose.to_template(grid)
    for scale_mm, amount_mm in ((60.0, 1.9), (26.0, 0.9), (13.0, 0.6)):
        for axis in range(3):
            mni[axis] += amount_mm * smooth_field(rng, grid.fine_shape, grid.fine_spacing_mm, scale_mm)
    mni[0] /= 1 + build.petalia * np.tanh(mni[1] / 35) * np.tanh(mni[0] / 15)
    inner = _pushed(_with_ventricles(mni, build), push)
    grey, white = (_sample(values, template.affine, inner) / 255 for values in (template.grey, template.white))
    outside_mm, depth_mm = (
        _sample(values, template.shell_affine, mni) for values in (template.outside_mm, template.depth_mm)
    )
    noise = [smooth_field(rng, grid.fine_shape, grid.fine_spacing_mm, scale) for scale in (5.0, 12.0, 6.0)]
    outside_mm += 0.3 * noise[1]
    layers = _layers(outside_mm, depth_mm, noise[2], build)
    tissues = np.stack([*_brain(grey, white, outside_mm, layers[0], noise[0], build), *layers[1:], 0 * grey])
    _insert_eyes(tissues, mni, outside_mm)
    return Head(tissues.astype(np.float32), mni)


def _sample(values: np.ndarray, affine: np.ndarray, mni_mm: np.ndarray) -> np.ndarray:
    """Values of a map at points, linear; the template's voxels stand along its axes."""
    step, origin = np.diag(affine)[:3], affine[:3, 3]
    index = (mni_mm - origin[:, None, None, None].astype(np.float32)) / step[:, None, None, None].astype(np.float32)
    return ndimage.map_coordinates(values, index, output=np.float32, order=1, mode="nearest")


def _with_ventricles(mni: np.ndarray, build: Build) -> np.ndarray:
    """Sample nearer to the midline around the lateral ventricles, which widens them; the left a little more."""
    x, y, z = mni
    near = np.exp(-((x / 26) ** 2) - ((y + 15) / 50) ** 2 - ((z - 14) / 22) ** 2)
    pull = build.ventricles * near * (1 - 0.12 * np.tanh(x / 6))
    return np.stack([x * (1 - pull), y, 14 + (z - 14) * (1 - 0.6 * pull)])


def _pushed(mni: np.ndarray, push: Push | None) -> np.ndarray:
    """Coordinates from which tissue was displaced radially: most at the lesion's surface, fading over 25 mm."""
    if push is None:
        return mni
    offset = mni - push.centre_mm.astype(np.float32)[:, None, None, None]
    distance = np.sqrt((offset**2).sum(0)) + 1e-3
    excess = np.maximum(distance - push.radius_mm, 0)
    amount = push.amount_mm * np.minimum(distance / push.radius_mm, 1) * np.exp(-((excess / 25) ** 2))
    return mni - offset * (amount / distance)


def _layers(outside_mm: np.ndarray, depth_mm: np.ndarray, noise: np.ndarray, build: Build) -> list[np.ndarray]:
    """Shares of the cranial cavity, compact bone, marrow, fat and muscle by distance from the brain and the skin."""
    cavity_mm = 1.2 + 1.6 * build.atrophy
    edges = np.cumsum([cavity_mm, 2.0, build.marrow_mm, 2.0, build.fat_mm])
    cavity, inner, marrow, outer, near = (ramp(edge - outside_mm) for edge in edges)
    skin = ramp(2.0 - depth_mm)
    fat_layer = np.maximum(near, ramp(2.0 + build.fat_mm - depth_mm))
    # Face and skull base: muscle with fat planes, and pieces of bone and air that give no signal.
    soft = 1 - outer
    streaks = 0.8 * ramp(noise - 0.8, 1.2)
    hollow = 0.85 * ramp(-1.2 - noise, 1.0) * (1 - fat_layer)
    fat = soft * (1 - skin) * np.maximum(fat_layer, streaks) * (1 - hollow)
    muscle = soft * (1 - hollow) - fat
    air = ramp(depth_mm)
    bone = inner - cavity + outer - marrow + 0.5 * soft * hollow
    return [cavity * air, bone * air, (marrow - inner) * air, fat * air, np.maximum(muscle, 0) * air]


def _brain(
    grey: np.ndarray, white: np.ndarray, outside_mm: np.ndarray, cavity: np.ndarray, noise: np.ndarray, build: Build
) -> list[np.ndarray]:
    """Fluid, grey and white shares that fill the cranial cavity.

    The average of 152 brains is blurred; squared odds bring back one brain's edges, and a random field opens some
    sulci and closes others.
    """
    inside = ramp(0.5 - outside_mm)
    fluid = np.clip(1 - grey - white, 0, 1) * np.exp(0.15 + 0.55 * build.atrophy + 0.35 * noise)
    odds = np.stack([fluid, grey, white]) ** 2
    odds *= (cavity * inside) / np.maximum(odds.sum(0), 1e-6)
    odds[0] += cavity * (1 - inside)
    return list(odds)


def _insert_eyes(tissues: np.ndarray, mni: np.ndarray, outside_mm: np.ndarray) -> None:
    """Two globes in orbital fat, outside the skull."""
    for centre in _EYES_MM:
        offset = mni - np.array(centre, np.float32)[:, None, None, None]
        distance = np.sqrt((offset**2).sum(0))
        free = ramp(outside_mm - 5.0)
        orbit = ramp(_EYE_RADIUS_MM + 5.0 - distance) * free
        globe = ramp(_EYE_RADIUS_MM - distance) * free
        tissues *= 1 - orbit
        tissues[CLASSES.index("fat")] += orbit - globe
        tissues[CLASSES.index("eye")] += globe
