"""DICOM segmentations (SEG) and RT structure sets: label maps on the series that they refer to.

Both come as files of their own. `references` finds the series they belong to while planning; `attach` puts their
segments on the grid of its volumes. Nothing is resampled: a segmentation on another grid is refused, and the volume
kept. Regions that lie inside others are kept, true overlaps are refused (`label_maps.Labels` states the rule).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import RTStructureSetStorage, SegmentationStorage
from skimage.draw import polygon

from omnimri.models.scan import Scan
from omnimri.platform.data.formats.dicom.names import label_name, segment_name
from omnimri.platform.data.formats.label_maps import Labels, on_grid
from omnimri.platform.data.formats.records import (
    LPS_TO_RAS,
    UNREADABLE,
    ReadError,
    ReadLimits,
    SeriesRecord,
    check_array_bytes,
    quiet_libraries,
)  # fmt: skip

_LABEL_MAP_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.7"
_KINDS = {
    SegmentationStorage: "DICOM segmentation",
    _LABEL_MAP_SEGMENTATION: "DICOM segmentation",
    RTStructureSetStorage: "RT structure set",
}
_KEPT = "The volume was kept."

REFERENCE_TAGS = ["ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"]
"""Header elements that `references` looks at."""

_SPACING_TOLERANCE = 0.05
FULL = 0.5
"""Fraction from which a voxel of a fractional segmentation belongs to its segment."""
_PLANE_TOLERANCE = 0.25
"""Slices by which the points of a contour may lie beside the slice they are drawn on."""
_EDGE_TOLERANCE = 1.0
"""Pixels by which a contour may leave the image: outlines run along the outer edge of voxels."""
_NOT_ANATOMY = frozenset({"EXTERNAL", "BOLUS", "SUPPORT", "FIXATION", "ISOCENTER", "REGISTRATION"})
"""Interpreted types of regions that serve the irradiation; the body outline would overlap with everything."""


def is_label_object(header: Dataset) -> bool:
    """Whether an instance is a segmentation or a structure set."""
    return is_label_class(header.SOPClassUID)


def is_label_class(sop_class: str) -> bool:
    """The same by SOP Class UID."""
    return sop_class in _KINDS


def references(header: Dataset) -> tuple[str, ...]:
    """Series Instance UIDs that a label object refers to, each once; none where it refers to no series."""
    series = list(header.get("ReferencedSeriesSequence") or [])
    for frame in header.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            series += study.get("RTReferencedSeriesSequence") or []
    uids = dict.fromkeys(str(item.get("SeriesInstanceUID") or "") for item in series)
    return tuple(filter(None, uids))


@dataclasses.dataclass(frozen=True)
class _LabelObject:
    """A label object in memory."""

    source: str
    kind: str
    dataset: Dataset


def attach(
    records: list[SeriesRecord], paths: Mapping[str, Path], frame_of_reference: str, limits: ReadLimits
) -> tuple[list[SeriesRecord], list[ReadError]]:
    """Give the volumes of a series the labels of its label objects.

    Segmentations come before structure sets, and both before what the volume brought (overlays). Several of one kind
    are put together as long as one label map can hold them (`Labels`). An object has to fit one of the volumes; echoes
    and time points on the same grid all get its labels.

    Args:
        records: Volumes of one series.
        paths: Name of each label object in errors, and its file.
        frame_of_reference: UID of the series; empty if it has none.
        limits: Bounds on sizes.
    """
    if not records:
        return [], [
            ReadError(source, "The series that it refers to was not read.", "See its line.") for source in paths
        ]
    objects, errors = [], []
    for source, path in paths.items():
        try:
            objects.append(_load(source, path, frame_of_reference))
        except ReadError as error:
            errors.append(error)
    objects.sort(key=lambda o: (o.kind != _KINDS[SegmentationStorage], o.source))
    by_grid: dict[tuple[bytes, tuple[int, ...]], tuple[dict[str, Any], dict[str, ReadError]]] = {}
    labelled = []
    for record in records:
        grid = (record.scan.affine.round(4).tobytes(), record.scan.image.shape)
        if grid not in by_grid:
            labels, failed = _labels(record.scan, objects, limits)
            label_map, names, covered = labels.painted() if labels else (None, {}, [])
            by_grid[grid] = ({"label_map": label_map, "label_names": names} if labels else {}), failed
            errors += covered
        labelled.append(dataclasses.replace(record, **by_grid[grid][0]))
    refused = [failed for _, failed in by_grid.values()]
    nowhere = [o.source for o in objects if all(o.source in failed for failed in refused)]
    return labelled, errors + [refused[0][source] for source in nowhere]


def _load(source: str, path: Path, frame_of_reference: str) -> _LabelObject:
    try:
        with quiet_libraries():
            dataset = pydicom.dcmread(path, force=True)
            frames = _frames_of_reference(dataset)
    except UNREADABLE as error:
        raise ReadError(source, f"The label object cannot be read ({type(error).__name__}).", _KEPT) from error
    if frame_of_reference and frames != {frame_of_reference}:
        raise ReadError(source, "Its frame of reference is not that of the series it refers to.", _KEPT)
    return _LabelObject(source, _KINDS[dataset.SOPClassUID], dataset)


def _frames_of_reference(dataset: Dataset) -> set[str]:
    regions = dataset.get("StructureSetROISequence") or []
    return {str(roi.ReferencedFrameOfReferenceUID) for roi in regions} or {str(dataset.get("FrameOfReferenceUID"))}


def _labels(scan: Scan, objects: list[_LabelObject], limits: ReadLimits) -> tuple[Labels | None, dict[str, ReadError]]:
    """What the objects say of one grid, and by source why some do not count."""
    labels: Labels | None = None
    chosen = ""
    refused = {}
    for label_object in objects:
        source, kind = label_object.source, label_object.kind
        try:
            if chosen not in ("", kind):
                raise ReadError(source, f"Not used: a {chosen} goes before an {kind}.", _KEPT)
            labels = _with_segments(labels, label_object, scan, limits)
            chosen = kind
        except ReadError as error:
            refused[source] = error
        except UNREADABLE as error:
            reason = f"The {kind} cannot be put on the grid of its series ({type(error).__name__})."
            refused[source] = ReadError(source, reason, _KEPT)
    return labels, refused


def _with_segments(labels: Labels | None, label_object: _LabelObject, scan: Scan, limits: ReadLimits) -> Labels:
    """The labels so far with those of one more object; the labels given stay as they are."""
    source = label_object.source
    grown = Labels(scan.image.shape, source) if labels is None else labels.copy(source)
    dataset = label_object.dataset
    is_rt = dataset.SOPClassUID == RTStructureSetStorage
    regions = _contoured_regions(dataset, scan, source) if is_rt else _segments(dataset, scan, source, limits)
    with quiet_libraries():
        for name, mask in regions:
            grown.add(name, mask)
    if not len(grown):
        raise ReadError(source, f"The {label_object.kind} holds no region.", _KEPT)
    return grown


def _segments(dataset: Dataset, scan: Scan, source: str, limits: ReadLimits) -> Iterator[tuple[str, np.ndarray]]:
    """Names and masks `(Z, Y, X)` of the segments of a SEG."""
    segmentation = load_segmentation(dataset, source, limits)
    for number in segmentation.segment_numbers:
        # One at a time, so that a segmentation of a hundred organs takes the memory of one.
        name = segment_name(segmentation.get_segment_description(number), otherwise=f"structure {number}")
        yield name, segment_mask(segmentation, number, scan, source)


def load_segmentation(dataset: Dataset, source: str, limits: ReadLimits) -> highdicom.seg.Segmentation:
    """A SEG whose segments may be asked for.

    Raises:
        ReadError: If its frames form no volume, or one that is too large.
    """
    segmentation = highdicom.seg.Segmentation.from_dataset(dataset, copy=False)
    geometry = segmentation.get_volume_geometry(rtol=_SPACING_TOLERANCE)
    if geometry is None:
        raise ReadError(source, "The frames of the DICOM segmentation are not evenly spaced.", _KEPT)
    check_array_bytes(4 * int(np.prod(geometry.spatial_shape)), source, limits)
    return segmentation


def segment_mask(segmentation: highdicom.seg.Segmentation, number: int, scan: Scan, source: str) -> np.ndarray:
    """Mask of one segment on the grid of a scan, bool `(Z, Y, X)`; empty slices need not be stored in the SEG.

    Raises:
        ReadError: If the grids do not fall together.
    """
    volume = segmentation.get_volume(segment_numbers=[number], rtol=_SPACING_TOLERANCE)
    affine = LPS_TO_RAS @ volume.affine[:, [2, 1, 0, 3]]
    return on_grid(volume.array[..., 0] >= FULL, affine, scan, source)


def _contoured_regions(dataset: Dataset, scan: Scan, source: str) -> Iterator[tuple[str, np.ndarray]]:
    """Names and masks `(Z, Y, X)` of the regions of a structure set; points and open lines enclose nothing."""
    names = {int(roi.ROINumber): roi.get("ROIName") for roi in dataset.StructureSetROISequence}
    ignored = {
        int(item.ReferencedROINumber)
        for item in dataset.get("RTROIObservationsSequence") or []
        if str(item.get("RTROIInterpretedType") or "").upper() in _NOT_ANATOMY
    }
    for region in dataset.get("ROIContourSequence") or []:
        number = int(region.ReferencedROINumber)
        contours = region.get("ContourSequence") or []
        closed = [c for c in contours if str(c.ContourGeometricType).upper().startswith("CLOSED_PLANAR")]
        if closed and number not in ignored:
            yield label_name(names[number], otherwise=f"structure {number}"), _fill(closed, scan, source)


def _fill(contours: list[Dataset], scan: Scan, source: str) -> np.ndarray:
    """Voxels whose centres lie within an odd number of the contours: an inner contour is a hole."""
    mask = np.zeros(scan.image.shape, dtype=bool)
    to_index = np.linalg.inv(scan.affine) @ LPS_TO_RAS
    for contour in contours:
        points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
        x, y, z = (to_index @ np.c_[points, np.ones(len(points))].T)[:3]
        plane = round(float(z.mean()))
        if not np.abs(z - plane).max() <= _PLANE_TOLERANCE:
            raise ReadError(source, "Contours do not lie in the slices of the series.", _KEPT)
        num_slices, *in_plane = scan.image.shape
        is_inside = 0 <= plane < num_slices and all(
            values.min() >= -0.5 - _EDGE_TOLERANCE and values.max() <= size - 0.5 + _EDGE_TOLERANCE
            for values, size in zip((y, x), in_plane, strict=True)
        )
        if not is_inside:
            raise ReadError(source, "A contour lies outside the volume of its series.", _KEPT)
        rows, columns = polygon(y, x, shape=in_plane)
        mask[plane, rows, columns] ^= True
    return mask
