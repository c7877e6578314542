"""Orientation of volumes whose arrays are `z y x` and whose affines act on `(x, y, z)`; without torch, for readers."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np


@dataclass(frozen=True)
class Canonical:
    """A volume turned, by flips and axis swaps alone, so that x grows to the right, y to the front, z upwards."""

    array: np.ndarray
    """`(Z, Y, X)` in RAS order."""
    affine: np.ndarray
    """`(4, 4)` of the turned array."""
    transform: np.ndarray
    """nibabel orientation transform from the native `(x, y, z)` axes."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)


def to_canonical(array: np.ndarray, affine: np.ndarray) -> Canonical:
    """Turn `(Z, Y, X)` to the RAS axes closest to its own; oblique volumes stay oblique, nothing is interpolated."""
    xyz = array.transpose(2, 1, 0)
    transform = nib.orientations.io_orientation(affine)
    turned = nib.orientations.apply_orientation(xyz, transform)
    turned_affine = affine @ nib.orientations.inv_ornt_aff(transform, xyz.shape)
    return Canonical(turned.transpose(2, 1, 0), turned_affine, transform)


def from_canonical(array: np.ndarray, canonical: Canonical) -> np.ndarray:
    """Turn an array on the canonical grid `(Z, Y, X)` back to the native axes of the volume it came from."""
    ras = nib.orientations.axcodes2ornt("RAS")
    back = nib.orientations.ornt_transform(ras, canonical.transform)
    return nib.orientations.apply_orientation(array.transpose(2, 1, 0), back).transpose(2, 1, 0)


def voxel_box_to_mm(box_voxel: list[int], affine: np.ndarray) -> list[float]:
    """Axis-aligned RAS bounds `[x1, y1, z1, x2, y2, z2]` in mm of a half-open voxel box `[z1, y1, x1, z2, y2, x2]`."""
    z1, y1, x1, z2, y2, x2 = box_voxel
    edges = np.array([[x, y, z, 1] for x in (x1, x2) for y in (y1, y2) for z in (z1, z2)], dtype=float)
    edges[:, :3] -= 0.5
    corners = (edges @ affine.T)[:, :3]
    return [round(float(v), 2) for v in (*corners.min(0), *corners.max(0))]
