"""Label maps in the making: named masks put together on the grid of a scan."""

from __future__ import annotations

import nibabel as nib
import numpy as np

from omnimri.models.scan import Scan
from omnimri.platform.data.formats.records import ReadError

_GRID_TOLERANCE = 0.1
"""Voxels by which a mask's grid may be displaced; headers round."""
_MAX_LABELS = 255


class Labels:
    """A label map, uint8 `(Z, Y, X)`, and the names of its values; masks of one name share a value."""

    def __init__(self, shape: tuple[int, ...], source: str) -> None:
        self.label_map = np.zeros(shape, dtype=np.uint8)
        self.names: dict[int, str] = {}
        self._source = source

    def copy(self, source: str) -> Labels:
        """The same labels, to be added to by another file."""
        labels = Labels(self.label_map.shape, source)
        labels.label_map[:] = self.label_map
        labels.names = dict(self.names)
        return labels

    def add(self, name: str, mask: np.ndarray) -> None:
        """Give the voxels of a mask, bool `(Z, Y, X)`, this name.

        Raises:
            ReadError: If some have another name already, or there are more than 255 names.
        """
        known = {named: value for value, named in self.names.items()}
        value = known.get(name, len(known) + 1)
        if value > _MAX_LABELS:
            raise ReadError(self._source, f"More than {_MAX_LABELS} segments.", "Split it; the volume was kept.")
        num_shared = int(np.count_nonzero(mask & (self.label_map > 0) & (self.label_map != value)))
        if num_shared:
            reason = f"Segments overlap: {num_shared} voxels belong to two of them, and a label map holds one."
            raise ReadError(self._source, reason, "Store them without overlap; the volume was kept.")
        self.names[value] = name
        self.label_map[mask] = value


def on_grid(mask: np.ndarray, affine: np.ndarray, scan: Scan, source: str) -> np.ndarray:
    """A mask on the grid of a scan: turned, flipped and put in its place, never resampled.

    Args:
        mask: Bool `(z, y, x)` of any size.
        affine: Of the mask, index `(x, y, z, 1)` to RAS mm.
        scan: Whose grid it shall have.
        source: Name of the mask's file in errors.

    Returns:
        Bool `(Z, Y, X)`.

    Raises:
        ReadError: If the grids do not fall together, or the mask reaches outside.
    """
    transform = nib.orientations.io_orientation(np.linalg.inv(scan.affine) @ affine)
    turned = nib.orientations.apply_orientation(mask.transpose(2, 1, 0), transform)
    turned_affine = affine @ nib.orientations.inv_ornt_aff(transform, mask.shape[::-1])
    offset = np.round((np.linalg.inv(scan.affine) @ turned_affine)[:3, 3]).astype(int)
    _check_displacement(turned.shape, turned_affine, offset, scan, source)
    placed = np.zeros(scan.image.shape[::-1], dtype=bool)
    last = np.minimum(offset + turned.shape, placed.shape)
    kept = turned[tuple(map(slice, np.maximum(-offset, 0), np.maximum(last - offset, 0)))]
    if np.count_nonzero(kept) != np.count_nonzero(turned):
        raise ReadError(source, "A segment reaches outside the volume of its series.", "The volume was kept.")
    first = np.maximum(offset, 0)
    placed[tuple(map(slice, first, first + kept.shape))] = kept
    return placed.transpose(2, 1, 0)


def _check_displacement(
    shape_xyz: tuple[int, ...], affine: np.ndarray, offset: np.ndarray, scan: Scan, source: str
) -> None:
    """Compare the centres of the mask's corner voxels with those of the scan's voxels that they should be."""
    corners = np.array([[x, y, z, 1] for x in (0, shape_xyz[0]) for y in (0, shape_xyz[1]) for z in (0, shape_xyz[2])])
    corners[:, :3] = np.maximum(corners[:, :3] - 1, 0)
    shifted = corners + np.append(offset, 0)
    displacement_mm = np.linalg.norm((corners @ affine.T - shifted @ scan.affine.T)[:, :3], axis=1).max()
    if not displacement_mm <= _GRID_TOLERANCE * min(scan.spacing_mm):
        raise ReadError(
            source, f"The grid of the segmentation lies up to {displacement_mm:.1f} mm from that of its series.",
            "Resample it to the grid of its series; the volume was kept.",
        )  # fmt: skip
