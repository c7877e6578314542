"""What is true of a simulated patient: label map, lesions measured on it, and how each part shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from omnimri.models.vocabulary import FINDINGS, TISSUES
from omnimri.platform.corpus.places import region_of
from omnimri.platform.language.words import side_of

LABEL_NAMES = dict(enumerate((*TISSUES, *FINDINGS), start=1))
"""Values of the label map; 0 is everything outside the brain."""

_LESION_SHARE = 0.4
"""Share of a voxel from which it counts as lesion: a plaque may fill less than half of a thick slice."""
_MIN_VOXELS = 3
"""Smaller specks of lesion are given back to the tissue around them."""


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """One connected lesion of the label map."""

    label: str
    side: str
    region: str
    box_voxel: tuple[int, int, int, int, int, int]
    """Half-open `[z1, y1, x1, z2, y2, x2]` on the acquisition's own grid."""
    size_mm: int
    """Longest in-plane edge of the box, rounded; slices are too thick to measure across."""


def label_map(tissues: np.ndarray, lesion: np.ndarray, finding: str | None) -> np.ndarray:
    """Uint8 `(Z, Y, X)` with the values of LABEL_NAMES.

    Args:
        tissues: Shares `(3, Z, Y, X)` of fluid, grey and white matter before the lesion came.
        lesion: Share of the finding.
        finding: Of FINDINGS, or None.
    """
    labels = np.where(tissues.sum(0) > 0.5, tissues.argmax(0) + 1, 0).astype(np.uint8)
    if finding is None:
        return labels
    is_lesion = lesion >= _LESION_SHARE
    components, count = ndimage.label(is_lesion, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    # Kinds that occur once keep one piece; plaques keep every piece that is more than a speck.
    enough = _MIN_VOXELS if finding == "demyelinating plaque" else max(_MIN_VOXELS, int(sizes[1:].max(initial=0)))
    keep = np.flatnonzero(sizes >= enough)
    is_lesion &= np.isin(components, keep[keep > 0])
    return np.where(is_lesion, len(TISSUES) + 1 + FINDINGS.index(finding), labels).astype(np.uint8)


def find_lesions(labels: np.ndarray, mni_mm: np.ndarray, spacing_mm: tuple[float, float, float]) -> list[Lesion]:
    """Connected lesions (26 neighbours), the largest first.

    Args:
        labels: Label map `(Z, Y, X)`.
        mni_mm: Place of each voxel in the template `(3, Z, Y, X)`.
        spacing_mm: Voxel edges `(z, y, x)`.
    """
    components, count = ndimage.label(labels > len(TISSUES), structure=np.ones((3, 3, 3)))
    sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
    boxes = ndimage.find_objects(components)
    return [
        _measure(labels, components == index + 1, boxes[index], mni_mm, spacing_mm)
        for index in np.argsort(-sizes, kind="stable")
    ]


def _measure(
    labels: np.ndarray, mask: np.ndarray, box: tuple[slice, ...], mni_mm: np.ndarray,
    spacing_mm: tuple[float, float, float],
) -> Lesion:  # fmt: skip
    centre = [float(axis[mask].mean()) for axis in mni_mm]
    edges_mm = [(part.stop - part.start) * step for part, step in zip(box[1:], spacing_mm[1:], strict=True)]
    return Lesion(
        label=LABEL_NAMES[int(labels[mask][0])],
        side=side_of(centre[0]),
        region=region_of(*centre),
        box_voxel=(*(part.start for part in box), *(part.stop for part in box)),
        size_mm=round(max(edges_mm)),
    )
