"""One acquired volume as it travels between the rooms: arrays, geometry and the facts of its header."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A volume on its native grid, with k-space where it was kept.

    Arrays are `z y x`; `affine` maps the index `(x, y, z)` to RAS millimetres exactly as nibabel does
    for the transposed array, so `nibabel.Nifti1Image(scan.image.transpose(2, 1, 0), scan.affine)` is the file.
    """

    image: np.ndarray
    """Magnitude, `(Z, Y, X)` float32, arbitrary units unless it is a map of a quantity (`quantity_of(facts)`)."""
    affine: np.ndarray
    """`(4, 4)` float64, voxel index `(x, y, z, 1)` to RAS mm."""
    kspace: np.ndarray | None = None
    """Complex64 `(Z, C, Y, X)`, centred, orthonormal; phase encoding along X. Zero where not acquired."""
    mask: np.ndarray | None = None
    """Bool `(X,)`, phase-encoding lines that were acquired; None with `kspace` means fully sampled."""
    facts: dict[str, str | float | int | None] = field(default_factory=dict)
    """Header facts by the column names of the row schema (`contrast`, `plane`, `vendor`, `te_ms`...)."""

    def __post_init__(self) -> None:
        if self.image.ndim != 3:
            raise ValueError(f"Scan.image: expected (Z, Y, X), found shape {self.image.shape}.")
        if self.affine.shape != (4, 4):
            raise ValueError(f"Scan.affine: expected (4, 4), found {self.affine.shape}.")
        if self.kspace is not None and (self.kspace.ndim != 4 or self.kspace.shape[0] != self.image.shape[0]):
            raise ValueError(f"Scan.kspace: expected ({self.image.shape[0]}, C, Y, X), found {self.kspace.shape}.")

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel edge lengths `(z, y, x)` in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)
