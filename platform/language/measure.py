"""What a label map says in numbers: how many lesions, on which side, how large, in what, and how bright.

Everything but boxes is invariant to how the volume is stored: the same voxels with other axes and the affine to match
give the same numbers.
"""

# Z Y X voxels of the native grid

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage

from omnimri.platform.language.words import (
    finding_field,
    midline_organ,
    plain_name,
    side_of,
    signal_word,
    structure_kind,
)

MIN_VOXELS = 3
"""Smaller specks of a label count for nothing, as in the built-in corpus."""
MAX_SPACING_RATIO = 1.5
"""Axes whose voxels are this much longer than those of the finest one are too coarse to measure along."""
SHELL_MM = 5.0
"""Along each axis of the grid: how far around a lesion its surroundings reach."""
MIN_REFERENCE_VOXELS = 20
"""Fewer voxels of a tissue are no reference for signal."""

_NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All lesions of one name."""

    name: str
    count: int
    sides: tuple[str, ...]
    """`left`, `right` or `midline` of each; empty where the surroundings tell no midline, which is taken to be the
    plane of constant x through the centre of the labelled organ."""
    extent_mm: float
    """Largest edge of a lesion's bounding box along the image axes that are finely sampled (`fine_extent_mm`)."""
    volume_ml: float
    """Of all together."""
    site: str
    """Structure that more than half of the surroundings are labelled as; empty if there is none."""
    signal: str
    """`hypointense`, `isointense` or `hyperintense`; empty without a reference."""
    reference: str
    """Structure that the signal is compared with."""
    boxes_voxel: tuple[tuple[int, ...], ...]
    """Half-open `[z1, y1, x1, z2, y2, x2]` of each, in the order of `sides`; on the grid as it is stored."""


class LabelledVolume:
    """A label map with its names and geometry, and the image behind it where signals may be compared."""

    def __init__(
        self, label_map: np.ndarray, label_names: Mapping[int, str], affine: np.ndarray, image: np.ndarray | None
    ) -> None:
        """Look at which labels are there.

        Args:
            label_map: uint8 `(Z, Y, X)`.
            label_names: What its values mean.
            affine: `(4, 4)`, voxel index `(x, y, z, 1)` to RAS mm.
            image: Magnitudes `(Z, Y, X)`, or None where brightness says nothing, as in a map of a quantity.
        """
        self._labels = label_map
        self._affine = affine
        self._image = image
        self.spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)[::-1]
        self.num_voxels = np.bincount(label_map.ravel(), minlength=256)
        names = {value: plain_name(name) for value, name in sorted(label_names.items())}
        self._names = {value: name for value, name in names.items() if 0 < value < 256 and self.num_voxels[value]}

    @property
    def structures(self) -> list[str]:
        """Plain names of the normal structures that have voxels, in the order of their values."""
        return list(dict.fromkeys(name for name in self._names.values() if structure_kind(name)))

    def lesions(self) -> list[Measured]:
        """Every finding with at least one lesion, in the order of the labels' values."""
        names = dict.fromkeys(name for name in self._names.values() if finding_field(name))
        measured = (self._measure(name) for name in names)
        return [lesions for lesions in measured if lesions is not None]

    def signals(self, reference: str, names: Sequence[str]) -> dict[str, str]:
        """Signal words of whole structures against that of another one; nothing where there is none of it."""
        tissue = self._where([reference])
        compared = {name: self._compared(self._where([name]), tissue, reference)[0] for name in names}
        return {name: signal for name, signal in compared.items() if signal}

    def _measure(self, name: str) -> Measured | None:
        parts = [part for value in self._values([name]) for part in self._components(value)]
        if not parts:
            return None
        mask = np.zeros(self._labels.shape, dtype=bool)
        mask[tuple(np.concatenate(parts).T)] = True
        around = self._surroundings(mask)
        signal, reference = self._signal(mask, around)
        return Measured(
            name=name,
            count=len(parts),
            sides=self._sides(parts, around),
            extent_mm=max(fine_extent_mm(np.ptp(part, axis=0) + 1, self.spacing_mm) for part in parts),
            volume_ml=int(mask.sum()) * abs(float(np.linalg.det(self._affine[:3, :3]))) / 1000,
            site=around.site,
            signal=signal,
            reference=reference,
            boxes_voxel=tuple((*part.min(axis=0).tolist(), *(part.max(axis=0) + 1).tolist()) for part in parts),
        )

    def _values(self, names: Sequence[str]) -> list[int]:
        return [value for value, name in self._names.items() if name in names]

    def _where(self, names: Sequence[str]) -> np.ndarray:
        """Bool `(Z, Y, X)`: labelled with one of these names."""
        chosen = np.zeros(256, dtype=bool)
        chosen[self._values(names)] = True
        return chosen[self._labels]

    @cached_property
    def _findings(self) -> np.ndarray:
        return self._where([name for name in self._names.values() if finding_field(name)])

    def _components(self, value: int) -> list[np.ndarray]:
        """Voxel indices `(N, 3)` in z y x of each connected part (26 neighbours) of one value."""
        place = _place(self._labels == value)
        pieces, count = ndimage.label(self._labels[place] == value, structure=_NEIGHBOURS)
        voxels = np.argwhere(pieces)
        owner = pieces[tuple(voxels.T)]
        order = np.argsort(owner, kind="stable")
        shifted = voxels[order] + [part.start for part in place]
        groups = np.split(shifted, np.searchsorted(owner[order], np.arange(2, count + 1)))
        return [group for group in groups if len(group) >= MIN_VOXELS]

    def _surroundings(self, mask: np.ndarray) -> _Surroundings:
        """What is near a mask, outside of it, and no finding."""
        reach = np.floor(SHELL_MM / self.spacing_mm + 1e-6).astype(int)
        edges = zip(_place(mask), reach, strict=True)
        place = tuple(slice(max(part.start - steps, 0), part.stop + steps) for part, steps in edges)
        near = ndimage.maximum_filter(mask[place].view(np.uint8), size=tuple(2 * reach + 1), mode="constant") > 0
        where = np.zeros_like(mask)
        where[place] = near & ~mask[place] & ~self._findings[place]
        found = np.bincount(self._labels[where], minlength=256)
        counts = {name: int(found[self._values([name])].sum()) for name in self.structures}
        common = sorted(((name, count) for name, count in counts.items() if count), key=_commonest)
        return _Surroundings(where=where, num_voxels=int(where.sum()), counts=dict(common))

    def _parts_of(self, organ: str) -> list[str]:
        return [name for name in self.structures if midline_organ(name) == organ]

    def _sides(self, parts: Sequence[np.ndarray], around: _Surroundings) -> tuple[str, ...]:
        """Sides of centroids, against the centroid of the organ with all findings."""
        if around.organ is None:
            return ()
        organ = self._where(self._parts_of(around.organ)) | self._findings
        across = 2 - int(np.argmax(np.abs(self._affine[0, :3])))
        if np.take(organ, [0, -1], axis=across).any():
            return ()  # cut off at a border, its middle need not be the body's
        middle = self._x_mm(_centroid(organ))
        return tuple(side_of(self._x_mm(part.mean(axis=0)) - middle) for part in parts)

    def _x_mm(self, index_zyx: np.ndarray) -> float:
        """RAS x of a voxel index."""
        return float(self._affine[0] @ [*index_zyx[::-1], 1.0])

    def _signal(self, mask: np.ndarray, around: _Surroundings) -> tuple[str, str]:
        """Signal word and what it is relative to: the solid tissue around, else another one of the same organ."""
        for name, count in around.counts.items():
            if structure_kind(name) != "space" and count >= MIN_REFERENCE_VOXELS:
                return self._compared(mask, around.where & self._where([name]), name)
        parts = [name for name in self._parts_of(around.organ or "") if structure_kind(name) != "space"]
        sizes = [(name, int(self.num_voxels[self._values([name])].sum())) for name in parts]
        name, size = min(sizes, key=_commonest, default=("", 0))
        return self._compared(mask, self._where([name]), name) if size >= MIN_REFERENCE_VOXELS else ("", "")

    def _compared(self, mask: np.ndarray, tissue: np.ndarray, name: str) -> tuple[str, str]:
        lesion, level = self._median(mask), self._median(tissue)
        return (signal_word(lesion / level), name) if lesion is not None and level is not None else ("", "")

    def _median(self, mask: np.ndarray) -> float | None:
        """Median signal; None without an image or voxels, or where it is not positive."""
        if self._image is None or not mask.any():
            return None
        median = float(np.median(self._image[mask]))
        return median if median > 0 else None


@dataclass(frozen=True, kw_only=True)
class _Surroundings:
    """What lies around the lesions of one name."""

    where: np.ndarray
    """Bool `(Z, Y, X)`."""
    num_voxels: int
    counts: dict[str, int]
    """Voxels of each normal structure, the commonest first."""

    @property
    def site(self) -> str:
        """The structure that more than half of it is; empty if there is none."""
        name, count = next(iter(self.counts.items()), ("", 0))
        return name if 2 * count > self.num_voxels else ""

    @property
    def organ(self) -> str | None:
        """The organ across the midline that more than half of what is labelled belongs to."""
        organs = Counter[str | None]()
        for name, count in self.counts.items():
            organs[midline_organ(name)] += count
        return next((organ for organ, share in organs.items() if 2 * share > organs.total()), None)


def _commonest(item: tuple[str, int]) -> tuple[int, str]:
    """Sorts names by falling counts, equal ones by name."""
    return -item[1], item[0]


def _place(mask: np.ndarray) -> tuple[slice, ...]:
    """The box that a mask fills; it has a voxel."""
    return ndimage.find_objects(mask.view(np.uint8))[0]


def _centroid(mask: np.ndarray) -> np.ndarray:
    """Mean voxel index `(3,)` in z y x, from the projections on the axes."""
    others = [tuple(other for other in range(3) if other != axis) for axis in range(3)]
    return np.array([np.average(np.arange(mask.shape[a]), weights=mask.sum(axis=others[a])) for a in range(3)])


def fine_extent_mm(num_voxels: Sequence[int] | np.ndarray, spacing_mm: Sequence[float] | np.ndarray) -> float:
    """Longest edge of a box of voxels, along the image axes that are finely sampled.

    Thick slices are no measure: axes with voxels more than 1.5 times as long as the shortest are left out.

    Args:
        num_voxels: Voxels along z, y, x.
        spacing_mm: Of the same axes.
    """
    edges, spacing = np.asarray(num_voxels) * spacing_mm, np.asarray(spacing_mm)
    return float(edges[spacing <= MAX_SPACING_RATIO * spacing.min() + 1e-6].max())
