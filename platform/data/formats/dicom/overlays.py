"""Overlay planes (groups 60xx): what a reader drew onto the slices becomes a label map.

A plane of type R (region of interest) is taken as it is. A plane of type G (graphics) also holds text, arrows and
logos, and nothing in it says which is which; of it only closed outlines count: connected strokes that enclose one area
of at least 64 pixels and of twice the pixels drawn. Letters enclose less, open strokes and blobs enclose nothing. An
outline that encloses more than half of the image is a frame, and one that returns unchanged on every slice of a series
is a stamp. Text of an overlay is only compared with a vocabulary (`names`), it goes nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydicom.dataset import Dataset
from scipy import ndimage

from omnimri.models.scan import Scan
from omnimri.platform.data.formats.dicom.names import label_name
from omnimri.platform.data.formats.label_maps import Labels

_GROUPS = range(0x6000, 0x6020, 2)
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)

_MIN_ENCLOSED_PIXELS = 64
_MIN_ENCLOSED_PER_DRAWN = 2.0
_MAX_SHARE_OF_IMAGE = 0.5
_MIN_SLICES_OF_STAMP = 3


def overlay_labels(volume: Sequence[Dataset], scan: Scan, source: str) -> Labels | None:
    """Labels drawn as overlays on the slices of a volume; None if nothing in them counts.

    Args:
        volume: Classic single-slice instances of the scan, in any order.
        scan: What was read of them.
        source: Name of the series in errors.

    Raises:
        ReadError: If outlines of different planes overlap.
    """
    labels = None
    for group in _GROUPS:
        drawn = [dataset for dataset in volume if (group, 0x3000) in dataset]
        regions = {_slice_index(dataset, scan): _regions(dataset, group) for dataset in drawn}
        mask = _without_stamps(regions, scan.image.shape)
        if mask.any():
            labels = labels or Labels(scan.image.shape, source)
            labels.add(_name(drawn[0], group), mask)
    return labels


def _slice_index(dataset: Dataset, scan: Scan) -> int:
    x, y, z = (float(value) for value in dataset.ImagePositionPatient)
    return round(float((np.linalg.inv(scan.affine) @ [-x, -y, z, 1.0])[2]))


def _name(dataset: Dataset, group: int) -> str:
    """From the vocabulary; the series description may only say that a lesion was marked."""
    texts = [element.value for tag in (0x1500, 0x0022) if (element := dataset.get((group, tag))) is not None]
    return label_name(*texts, dataset.get("SeriesDescription"), otherwise=f"overlay {(group - 0x6000) // 2 + 1}")


def _regions(dataset: Dataset, group: int) -> list[np.ndarray]:
    """Filled regions of one plane, each bool `(row, column)` on the pixels of the image."""
    plane = np.zeros((dataset.Rows, dataset.Columns), dtype=bool)
    overlay = dataset.overlay_array(group).astype(bool)
    if overlay.ndim != 2:
        return []
    origin = dataset.get((group, 0x0050))
    top, left = (int(value) - 1 for value in (origin.value if origin is not None else (1, 1)))
    visible = overlay[max(-top, 0) :, max(-left, 0) :][: plane.shape[0] - max(top, 0), : plane.shape[1] - max(left, 0)]
    plane[max(top, 0) :, max(left, 0) :][: visible.shape[0], : visible.shape[1]] = visible
    kind = dataset.get((group, 0x0040))
    if kind is not None and str(kind.value).upper() == "R":
        return [ndimage.binary_fill_holes(plane)] if plane.any() else []
    return [region for stroke in _strokes(plane) if (region := enclosed_region(stroke)) is not None]


def _strokes(plane: np.ndarray) -> list[np.ndarray]:
    """Connected components, each as large as the plane."""
    components, number = ndimage.label(plane, _EIGHT_NEIGHBOURS)
    return [components == index for index in range(1, number + 1)]


def enclosed_region(stroke: np.ndarray) -> np.ndarray | None:
    """What a connected stroke outlines, the stroke included; None if it is no closed outline.

    Args:
        stroke: Bool `(row, column)`.
    """
    filled = ndimage.binary_fill_holes(stroke)
    holes, number = ndimage.label(filled & ~stroke)
    largest = int(np.bincount(holes.ravel())[1:].max()) if number else 0
    is_outline = largest >= max(_MIN_ENCLOSED_PIXELS, _MIN_ENCLOSED_PER_DRAWN * stroke.sum())
    return filled if is_outline and filled.mean() <= _MAX_SHARE_OF_IMAGE else None


def _without_stamps(regions: dict[int, list[np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
    """Union of the regions by slice, bool `(Z, Y, X)`, without those that are the same on every slice."""
    mask = np.zeros(shape, dtype=bool)
    on_slices: dict[bytes, int] = {}
    for found in regions.values():
        for region in found:
            on_slices[region.tobytes()] = on_slices.get(region.tobytes(), 0) + 1
    for z, found in regions.items():
        for region in found:
            if not _MIN_SLICES_OF_STAMP <= shape[0] == on_slices[region.tobytes()]:
                mask[z] |= region
    return mask
