"""Label maps in the making: named masks put together on the grid of a scan."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np

from omnimri.models.scan import Scan
from omnimri.platform.data.formats.records import ReadError

_GRID_TOLERANCE = 0.1
"""Voxels by which a mask's grid may be displaced; headers round."""
_MAX_LABELS = 255


_CONTAINED = 0.95
"""Share of a region's voxels from which it lies inside another one."""
_BORDER = 0.05
"""Share of the smaller of two neighbours that their borders may have in common."""


@dataclass(frozen=True)
class _Region:
    """A mask cut to the part of the grid that it fills."""

    place: tuple[slice, ...]
    mask: np.ndarray
    num_voxels: int

    @classmethod
    def of(cls, mask: np.ndarray) -> _Region:
        low, high = extent(mask) or ((0, 0, 0), (0, 0, 0))
        place = tuple(map(slice, low, high))
        return cls(place, mask[place].copy(), int(np.count_nonzero(mask)))

    def num_shared(self, other: _Region) -> int:
        """Voxels that belong to both."""
        both = list(zip(self.place, other.place, strict=True))
        common = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in both]
        if any(first >= last for first, last in common):
            return 0
        return int(np.count_nonzero(self._part(common) & other._part(common)))

    def _part(self, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
        """The mask between two voxels of the grid on every axis."""
        inside = zip(bounds, self.place, strict=True)
        return self.mask[tuple(slice(first - place.start, last - place.start) for (first, last), place in inside)]


def extent(mask: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """First voxel and the one after the last of a mask, along every axis; None for an empty one."""
    others = [tuple(other for other in range(mask.ndim) if other != axis) for axis in range(mask.ndim)]
    filled = [np.flatnonzero(mask.any(axis=axes)) for axes in others]
    if not all(map(len, filled)):
        return None
    return tuple(int(f[0]) for f in filled), tuple(int(f[-1]) + 1 for f in filled)


class Labels:
    """Named regions of one grid, of which `painted` makes a label map.

    Every region has a value and a name of its own: the second of one name is called `lesion 2`. A voxel of a label map
    holds one value, so regions that share voxels are painted from the largest to the smallest:

    - a region of which 95 % lie in another one (a lesion in an organ) is kept whole, and the outer one around it;
    - neighbours whose borders share up to 5 % of the smaller one are kept, and the smaller one has the border;
    - any other overlap is refused, and so are two regions that are the same to 95 %.
    """

    def __init__(self, shape: tuple[int, ...], source: str) -> None:
        self._shape = shape
        self._source = source
        self._regions: dict[str, _Region] = {}

    def __len__(self) -> int:
        return len(self._regions)

    def copy(self, source: str) -> Labels:
        """The same labels, to be added to by another file."""
        labels = Labels(self._shape, source)
        labels._regions = dict(self._regions)
        return labels

    def add(self, name: str, mask: np.ndarray) -> None:
        """Make the voxels of a mask, bool `(Z, Y, X)`, a region of this name.

        Raises:
            ReadError: If it overlaps with another region in a way that a label map cannot hold, or is the 256th.
        """
        if len(self) == _MAX_LABELS:
            raise ReadError(self._source, f"More than {_MAX_LABELS} segments.", "Split it; the volume was kept.")
        region = _Region.of(mask)
        for other in self._regions.values():
            if reason := _conflict(region, other):
                raise ReadError(self._source, reason, "Store them without overlap; the volume was kept.")
        self._regions[self._unused(name)] = region

    def _unused(self, name: str) -> str:
        numbered = (f"{name} {number}" for number in itertools.count(2))
        return next(candidate for candidate in itertools.chain([name], numbered) if candidate not in self._regions)

    def painted(self) -> tuple[np.ndarray, dict[int, str], list[ReadError]]:
        """The label map, uint8 `(Z, Y, X)`, the names of its values, and whether regions are missing in it.

        Values follow the order in which regions were added. A region that inner ones cover whole has no voxels left,
        and no value.
        """
        label_map = np.zeros(self._shape, dtype=np.uint8)
        values = {name: value for value, name in enumerate(self._regions, start=1)}
        for name, region in sorted(self._regions.items(), key=lambda item: -item[1].num_voxels):
            label_map[region.place][region.mask] = values[name]
        counts = np.bincount(label_map.ravel(), minlength=len(values) + 1)
        covered = [name for name, region in self._regions.items() if region.num_voxels and not counts[values[name]]]
        names = {value: name for name, value in values.items() if name not in covered}
        return label_map, names, [self._why_covered(covered)] if covered else []

    def _why_covered(self, covered: list[str]) -> ReadError:
        reason = f"Inner segments leave no voxel of {', '.join(covered)}, and a label map holds one value in each."
        return ReadError(self._source, reason, "Nothing to do: the inner ones are kept.")


def _conflict(region: _Region, other: _Region) -> str:
    """Why a label map cannot hold both regions; nothing if it can."""
    num_shared = region.num_shared(other)
    small, large = sorted((region.num_voxels, other.num_voxels))
    if num_shared <= _BORDER * small:
        return ""
    if num_shared < _CONTAINED * small:
        return f"Segments overlap: {num_shared} voxels belong to two of them, and neither lies inside the other."
    if num_shared >= _CONTAINED * large:
        return f"Segments overlap: {num_shared} voxels belong to two of them, which are the same region."
    return ""


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
