"""Where the slices lie and how the head lies in the scanner.

The acquisition's own axes are those of an axial DICOM series: x towards the patient's left, y towards the back, z
upwards; other file formats store the same slices with y turned round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

_TEMPLATE_CENTRE_MM = np.array([0.0, -16.0, 6.0])
"""MNI point that a technologist would put in the middle of the slices."""


@dataclass(frozen=True)
class Grid:
    """The voxels of a multi-slice acquisition and the finer ones that the head is drawn on."""

    shape: tuple[int, int, int]
    """`(Z, Y, X)`."""
    affine: np.ndarray
    """`(4, 4)`: voxel `(x, y, z)` to RAS mm."""
    num_sub: int
    """Sub-slices that are averaged into one slice."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel edges `(z, y, x)`."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @property
    def fine_shape(self) -> tuple[int, int, int]:
        """`(Z * num_sub, Y, X)`."""
        return self.shape[0] * self.num_sub, self.shape[1], self.shape[2]

    @property
    def fine_spacing_mm(self) -> tuple[float, float, float]:
        """Voxel edges of the fine grid."""
        z, y, x = self.spacing_mm
        return z / self.num_sub, y, x

    def fine_points(self, affine: np.ndarray) -> np.ndarray:
        """Float32 `(3, Z * num_sub, Y, X)`: every fine voxel's index in slices taken through an affine."""
        z = (np.arange(self.fine_shape[0]) - (self.num_sub - 1) / 2) / self.num_sub
        y, x = np.arange(self.shape[1]), np.arange(self.shape[2])
        parts = [np.multiply.outer(affine[:3, axis], values) for axis, values in enumerate((x, y, z))]
        columns, rows, slices = parts
        points = columns[:, None, None, :] + rows[:, None, :, None] + slices[:, :, None, None]
        return (points + affine[:3, 3][:, None, None, None]).astype(np.float32)

    def average(self, values: np.ndarray) -> np.ndarray:
        """Mean over the sub-slices: `(..., Z * num_sub, Y, X)` to `(..., Z, Y, X)`."""
        return values.reshape(*values.shape[:-3], self.shape[0], self.num_sub, *self.shape[1:]).mean(-3)


@dataclass(frozen=True)
class Pose:
    """Rigid position and size of a head."""

    rotation: np.ndarray
    """`(3, 3)`: head axes (RAS) in the scanner."""
    centre_mm: np.ndarray
    """Where the template's centre lies in the scanner."""
    scale: np.ndarray
    """`(3,)`: size over the template's along x, y, z."""

    def to_template(self, grid: Grid) -> np.ndarray:
        """MNI mm `(3, Z * num_sub, Y, X)` of every fine voxel of a grid, before any warp."""
        linear = np.diag(1 / self.scale) @ self.rotation.T
        matrix = np.eye(4)
        matrix[:3, :3] = linear
        matrix[:3, 3] = _TEMPLATE_CENTRE_MM - linear @ self.centre_mm
        return grid.fine_points(matrix @ grid.affine)


def draw_geometry(
    rng: np.random.Generator, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], sex: str
) -> tuple[Grid, Pose]:
    """A head in the scanner and slices tilted along it, as a technologist angles them, but never exactly."""
    tilt = Rotation.from_euler("xyz", rng.normal(0, (6.0, 1.5, 1.5)), degrees=True)
    error = Rotation.from_euler("xyz", rng.normal(0, (2.0, 1.2, 1.2)), degrees=True)
    # The template is larger than most brains; men's heads are larger by about 3 % in length.
    size = (0.945 if sex == "M" else 0.915) * np.exp(rng.normal(0, 0.02)) * np.exp(rng.normal(0, 0.012, 3))
    centre = rng.normal(0, (3.0, 12.0, 15.0))
    pose = Pose((tilt * error).as_matrix(), centre, size)
    middle = centre + rng.normal(0, (2.0, 2.5, 2.0))
    num_sub = max(1, round(spacing_mm[0] / 2.0))
    affine = np.eye(4)
    affine[:3, :3] = tilt.as_matrix() @ np.diag([-spacing_mm[2], -spacing_mm[1], spacing_mm[0]])
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    return Grid(shape, affine, num_sub), pose


def flip_rows(affine: np.ndarray, num_rows: int) -> np.ndarray:
    """The affine of an array whose y axis was turned round."""
    flipped = affine.copy()
    flipped[:3, 3] += affine[:3, 1] * (num_rows - 1)
    flipped[:3, 1] *= -1
    return flipped
