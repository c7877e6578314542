"""Regions of structured reports: coordinates and segments as boxes on the grid of a volume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
from highdicom.spatial import ImageToReferenceTransformer, PixelToReferenceTransformer
from pydicom.dataset import Dataset
from pydicom.pixels import pixel_array
from pydicom.uid import SegmentationStorage

from omnimri.models.scan import Scan
from omnimri.platform.data.formats.dicom import labels as dicom_labels
from omnimri.platform.data.formats.dicom import mosaic as dicom_mosaic
from omnimri.platform.data.formats.label_maps import extent
from omnimri.platform.data.formats.records import LPS_TO_RAS, ReadLimits

_ON_EDGE = 1e-2
"""Voxels by which a centre may lie outside an outline through it: coordinates are stored as 32-bit floats."""

_Box = tuple[np.ndarray, np.ndarray]
"""Lowest and highest voxel index `x y z` of a region, fractional, both within."""


class NotPlacedError(ValueError):
    """A region that cannot be put on the grid of the volume."""


def _voxels(low: np.ndarray, high: np.ndarray, shape: tuple[int, ...]) -> list[int]:
    """Half-open box `z1 y1 x1 z2 y2 x2` of the voxels whose centres lie in an extent `x y z`, cut to the volume.

    A region between two centres has the voxel that its middle lies in.

    Raises:
        NotPlacedError: If nothing of it lies in the volume.
    """
    if not np.isfinite([low, high]).all():
        raise NotPlacedError
    first, last = np.ceil(low - _ON_EDGE), np.floor(high + _ON_EDGE)
    middle = np.round((low + high) / 2)
    first, last = np.where(first > last, middle, first), np.where(first > last, middle, last)
    start = np.maximum(first, 0).astype(int)[::-1]
    stop = np.minimum(last + 1, shape[::-1]).astype(int)[::-1]
    if (start >= stop).any():
        raise NotPlacedError
    return [*start.tolist(), *stop.tolist()]


class Drawings:
    """The images and segmentations of a series that regions are drawn on; files are opened when a region asks."""

    def __init__(self, image_paths: Sequence[Path], label_paths: Mapping[str, Path], limits: ReadLimits) -> None:
        self._limits = limits
        self._images = {str(_header(path).get("SOPInstanceUID")): path for path in image_paths}
        self.segmentations = {
            str(header.SOPInstanceUID): path
            for path in label_paths.values()
            if (header := _header(path)).get("SOPClassUID") == SegmentationStorage
        }
        self._loaded: dict[str, highdicom.seg.Segmentation] = {}
        self.frame_of_reference = str(_header(self._images[min(self._images)]).get("FrameOfReferenceUID") or "")

    def box(self, regions: Sequence[Any], segments: Sequence[Any], scan: Scan) -> list[int]:
        """Half-open box `z1 y1 x1 z2 y2 x2` on a volume around coordinates and segments, at least one of them.

        Raises:
            ValueError: If one of them cannot be placed on the volume; also what the libraries raise on broken files.
        """
        extents = [self.extent_of_region(item, scan) for item in regions]
        extents += [self.extent_of_segment(item, scan) for item in segments]
        low = np.min([low for low, _ in extents], axis=0)
        high = np.max([high for _, high in extents], axis=0)
        return _voxels(low, high, scan.image.shape)

    def extent_of_region(self, item: Any, scan: Scan) -> _Box:
        """Extent of coordinates in voxel indices of a volume.

        Raises:
            NotPlacedError: If they mark a point, or lie on an image or in a frame of reference that is not known.
        """
        kind, points = str(item.GraphicType), np.asarray(item.value, dtype=float)
        if item.ValueType == "SCOORD":
            if kind == "CIRCLE":
                kind, points = "ELLIPSE", _circle(*points)
            points = self._plane(item)(points)
        elif str(item.ReferencedFrameOfReferenceUID) != self.frame_of_reference:
            raise NotPlacedError
        return graphic_extent(kind, _indices(points, scan))

    def _plane(self, item: Any) -> ImageToReferenceTransformer:
        """From coordinates of the image that a region was drawn on to LPS mm."""
        [source] = [child for child in item.ContentSequence if child.ValueType == "IMAGE"]
        header = self._header_of(instance_uid(source))
        if dicom_mosaic.is_mosaic(header):
            raise NotPlacedError
        frames = _frames(source)
        if not header.get("NumberOfFrames"):
            return ImageToReferenceTransformer.for_image(header)
        if not frames and int(header.NumberOfFrames) == 1:
            frames = [1]
        [frame] = frames
        return ImageToReferenceTransformer.for_image(header, frame_number=frame)

    def _header_of(self, uid: str) -> Dataset:
        if uid not in self._images:
            raise NotPlacedError
        return pydicom.dcmread(self._images[uid], stop_before_pixels=True, force=True)

    def extent_of_segment(self, item: Any, scan: Scan) -> _Box:
        """Extent of a segment, or of the frames of it that are named, in voxel indices of a volume.

        Raises:
            NotPlacedError: If the segmentation is not there, or the segment is empty.
            ReadError: If it does not fit the volume.
        """
        segmentation = self._segmentation(instance_uid(item))
        numbers = np.atleast_1d(item.ReferencedSOPSequence[0].get("ReferencedSegmentNumber") or []).astype(int)
        if frames := _frames(item):
            places = [_frame_voxels(segmentation, frame, numbers.tolist()) for frame in frames]
            points = _indices(np.concatenate(places), scan)
            if not len(points):
                raise NotPlacedError
            return points.min(axis=0), points.max(axis=0)
        masks = [dicom_labels.segment_mask(segmentation, n, scan, "") for n in numbers.tolist()]
        box = extent(np.any(masks, axis=0))
        if box is None:
            raise NotPlacedError
        return np.array(box[0][::-1], dtype=float), np.array(box[1][::-1], dtype=float) - 1

    def _segmentation(self, uid: str) -> highdicom.seg.Segmentation:
        if uid not in self.segmentations:
            raise NotPlacedError
        if uid not in self._loaded:
            dataset = pydicom.dcmread(self.segmentations[uid], force=True)
            self._loaded[uid] = dicom_labels.load_segmentation(dataset, "", self._limits)
        return self._loaded[uid]


def _header(path: Path) -> Dataset:
    tags = ["SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID"]
    return pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=tags)


def instance_uid(item: Dataset) -> str:
    """SOP Instance UID of the image that a content item names."""
    return str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)


def _frames(item: Dataset) -> list[int]:
    return np.atleast_1d(item.ReferencedSOPSequence[0].get("ReferencedFrameNumber") or []).astype(int).tolist()


def _frame_voxels(segmentation: highdicom.seg.Segmentation, frame: int, numbers: list[int]) -> np.ndarray:
    """Centres of the pixels that belong to a segment in one frame of a SEG, `(points, 3)` in LPS mm."""
    pixels = pixel_array(segmentation, index=frame - 1)
    if segmentation.SegmentationType == "LABELMAP":
        inside = np.isin(pixels, numbers) if numbers else pixels > 0
    else:
        inside = pixels >= max(1, dicom_labels.FULL * int(segmentation.get("MaximumFractionalValue") or 1))
    return PixelToReferenceTransformer.for_image(segmentation, frame_number=frame)(np.argwhere(inside)[:, ::-1])


def _indices(points: np.ndarray, scan: Scan) -> np.ndarray:
    """LPS mm to fractional voxel indices `x y z` of a scan, both `(points, 3)`."""
    to_index = np.linalg.inv(scan.affine) @ LPS_TO_RAS
    return np.c_[points, np.ones(len(points))] @ to_index[:3].T


def _circle(centre: np.ndarray, on_circle: np.ndarray) -> np.ndarray:
    """Ends of two diameters of a circle, as an ellipse has them."""
    radius = np.linalg.norm(on_circle - centre)
    return centre + radius * np.array([[-1, 0], [1, 0], [0, -1], [0, 1]])


def graphic_extent(kind: str, points: np.ndarray) -> _Box:
    """Extent of a graphic type of DICOM along the axes.

    Args:
        kind: Graphic Type; of an ELLIPSE and an ELLIPSOID, `points` are the ends of its axes, two by two.
        points: `(points, 3)`, mapped by an affine from where it was drawn: half axes stay conjugate.

    Raises:
        NotPlacedError: If the graphic is a point, a set of points or a line, which have no extent.
    """
    if kind in ("ELLIPSE", "ELLIPSOID"):
        half_axes = (points[1::2] - points[::2]) / 2
        reach = np.sqrt((half_axes**2).sum(axis=0))
        centre = points.mean(axis=0)
        return centre - reach, centre + reach
    if kind not in ("POLYLINE", "POLYGON") or len(np.unique(points, axis=0)) < 3:
        raise NotPlacedError
    return points.min(axis=0), points.max(axis=0)
