"""DICOM: finding the instances of a series and reading its volumes of magnitude images.

Mosaics are unpacked first (`mosaic`). Labels come from overlays (`overlays`) and from segmentations and
structure sets that refer to the series (`labels`), measurements from structured reports (`reports`).
Geometry comes from highdicom. A series is sorted by position along the slice normal, never by Instance Number; the
rescale is applied slice by slice; several images at one position become several volumes.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import highdicom
import numpy as np
import pydicom
from highdicom.spatial import get_volume_positions
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, pixel_array
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

from omnimri.models.scan import Scan
from omnimri.platform.data.deid import header_identifiers
from omnimri.platform.data.formats.dicom import labels as dicom_labels
from omnimri.platform.data.formats.dicom import mosaic as dicom_mosaic
from omnimri.platform.data.formats.dicom import reports as dicom_reports
from omnimri.platform.data.formats.dicom.overlays import overlay_labels
from omnimri.platform.data.formats.dicom.refusals import (
    ENHANCED_MR_IMAGE,
    TRUNCATED,
    refusal,
    slice_normal,
    why_unreadable,
)
from omnimri.platform.data.formats.facts import dicom_facts
from omnimri.platform.data.formats.records import (
    LPS_TO_RAS,
    UNREADABLE,
    ReadError,
    ReadLimits,
    SeriesRecord,
    check_array_bytes,
    quiet_libraries,
)  # fmt: skip

_DEFLATED = b"1.2.840.10008.1.2.1.99"

_POSITION_TOLERANCE_MM = 0.01
_SPACING_TOLERANCE = 0.05
"""Slice gaps may differ from their mean by this share; headers round positions."""
_LOCALISER_COSINE = 0.7
"""Stacks of one series whose normals are further apart than 45 degrees are a three-plane localiser."""

PROBE_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "Modality", "ImageType", "SeriesDescription", "BurnedInAnnotation", "Rows",
    "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "PhotometricInterpretation", "NumberOfFrames", "Columns",
    "SamplesPerPixel", "BitsAllocated", *dicom_labels.REFERENCE_TAGS, *dicom_reports.REFERENCE_TAGS,
]  # fmt: skip

_SPLIT_KEYS: tuple[Callable[[Dataset], Any], ...] = (
    lambda d: _number(d, "EchoTime"),
    lambda d: _number(d, "EchoNumbers"),
    lambda d: _b_value(d),
    lambda d: str(d.get("DiffusionGradientOrientation", "")),
    lambda d: _number(d, "InversionTime"),
    lambda d: _number(d, "FlipAngle"),
    lambda d: str(d.get("ImageType", "")),
    lambda d: _number(d, "TemporalPositionIdentifier"),
    lambda d: _number(d, "TriggerTime"),
    lambda d: _number(d, "AcquisitionNumber"),
    lambda d: str(d.get("AcquisitionTime", "")),
)
"""What tells images at one position apart, in the order it is tried."""


def probe(stream: BinaryIO, source: str, num_bytes: int) -> Dataset:
    """Read the few header values that decide what an instance is; pixels stay on disk.

    Raises:
        ReadError: If this is no DICOM, or neither a magnitude image of MR nor labels or measurements on one, with the
            reason.
    """
    if _DEFLATED in stream.read(1024):
        raise ReadError(source, "The DICOM object is deflated as a whole, which bounds nothing.", "Inflate it first.")
    stream.seek(0)
    try:
        with quiet_libraries():
            header = pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=PROBE_TAGS)
            is_dicom = bool(header.get("SOPClassUID") and header.get("SeriesInstanceUID"))
            num_pixel_bytes = num_bytes - stream.tell()
    except UNREADABLE as error:
        raise ReadError(source, "Not a readable DICOM file.", "Export it again.") from error
    if not is_dicom:
        raise ReadError(source, "Not a DICOM image: no SOP class or series in its header.", "Export it again.")
    speaks_of_images = dicom_labels.is_label_object(header) or dicom_reports.is_report(header)
    reason = None if speaks_of_images else refusal(header)
    if reason:
        raise ReadError(source, *reason)
    if not _is_compressed(header) and num_pixel_bytes < _pixel_bytes(header):
        raise ReadError(source, *TRUNCATED)
    return header


def _is_compressed(header: Dataset) -> bool:
    syntax = header.file_meta.get("TransferSyntaxUID") if hasattr(header, "file_meta") else None
    return syntax is not None and syntax.is_encapsulated


def _pixel_bytes(header: Dataset) -> int:
    """Bytes that uncompressed pixels take."""
    counts = [int(header.get(name) or 1) for name in ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")]
    has_pixels = header.get("Rows") is not None
    return int(np.prod(counts)) * int(header.get("BitsAllocated") or 8) // 8 if has_pixels else 0


def keys(header: Dataset) -> tuple[str, str, str]:
    """Raw patient, study and series identifiers; a study stands in for a patient without one."""
    study = str(header.get("StudyInstanceUID") or "")
    series = str(header.get("SeriesInstanceUID") or "")
    return str(header.get("PatientID") or "") or study or series, study, series


def read_series(
    paths: Sequence[Path],
    source: str,
    limits: ReadLimits,
    label_paths: Mapping[str, Path] | None = None,
    report_paths: Mapping[str, Path] | None = None,
) -> tuple[list[SeriesRecord], list[ReadError]]:
    """Read the instances of one series, given in any order, and what is said of it.

    Args:
        paths: Files of one Series Instance UID.
        source: Name of the series in records and errors.
        limits: Bounds on sizes.
        label_paths: Segmentations and structure sets that refer to the series, by their names in errors.
        report_paths: Measurement reports that refer to the series, by their names in errors.

    Returns:
        One record per volume, ordered by stack and then by what tells the volumes apart, and what was refused.
    """
    records, errors, frame_of_reference = _read_volumes(paths, source, limits)
    if label_paths:
        records, refused = dicom_labels.attach(records, label_paths, frame_of_reference, limits)
        errors += refused
    if report_paths:
        records, refused = dicom_reports.attach(records, paths, report_paths, label_paths or {}, limits)
        errors += refused
    return records, errors


def _read_volumes(
    paths: Sequence[Path], source: str, limits: ReadLimits
) -> tuple[list[SeriesRecord], list[ReadError], str]:
    """Volumes with their overlays, what was refused, and the UID of the frame of reference."""
    frame_of_reference = ""
    try:
        with quiet_libraries():
            datasets = [pydicom.dcmread(path, force=True) for path in paths]
            # The first one speaks for the series: it must not depend on the names of files.
            datasets.sort(key=lambda dataset: str(dataset.get("SOPInstanceUID") or ""))
            for dataset in datasets:
                _check_size(dataset, source, limits)
            frame_of_reference = str(datasets[0].get("FrameOfReferenceUID") or "")
            instances = [instance for dataset in datasets for instance in _unpacked(dataset, source)]
            volumes = [volume for stack in _stacks(instances, source) for volume in _split(stack, source)]
    except ReadError as error:
        return [], [error], frame_of_reference
    except UNREADABLE as error:
        reason = f"The headers of the series cannot be read ({type(error).__name__})."
        return [], [ReadError(source, reason)], frame_of_reference
    records, errors = [], []
    for index, volume in enumerate(volumes):
        try:
            with quiet_libraries():
                record = _record(volume, source, index, len(volumes))
        except ReadError as error:
            errors.append(error)
            continue
        record, refused = _with_overlays(record, volume)
        records.append(record)
        errors += refused
    return records, errors, frame_of_reference


def _unpacked(dataset: Dataset, source: str) -> list[Dataset]:
    """The slices of a mosaic; any other instance as it is."""
    if not dicom_mosaic.is_mosaic(dataset) or dataset.SOPClassUID == ENHANCED_MR_IMAGE:
        return [dataset]
    _check_geometry(dataset, source)
    try:
        return dicom_mosaic.unpack(dataset, source)
    except ReadError:
        raise
    except UNREADABLE as error:
        raise ReadError(source, *why_unreadable(error, [dataset])) from error


def _check_geometry(dataset: Dataset, source: str) -> None:
    if not all(dataset.get(name) for name in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing")):
        raise ReadError(
            source, "Image Position, Image Orientation or Pixel Spacing is missing.", "Export it with geometry."
        )


def _with_overlays(record: SeriesRecord, volume: list[Dataset]) -> tuple[SeriesRecord, list[ReadError]]:
    """The record with what was drawn on its slices, or the reason why that is left out."""
    if volume[0].SOPClassUID == ENHANCED_MR_IMAGE:
        return record, []
    try:
        with quiet_libraries():
            labels = overlay_labels(volume, record.scan, record.source)
    except ReadError as error:
        return record, [error]
    except UNREADABLE as error:
        reason = f"The overlays of the series cannot be read ({type(error).__name__})."
        return record, [ReadError(record.source, reason, "The volume was kept.")]
    if labels is None:
        return record, []
    label_map, names, covered = labels.painted()
    return dataclasses.replace(record, label_map=label_map, label_names=names), covered


def _check_size(dataset: Dataset, source: str, limits: ReadLimits) -> None:
    num_voxels = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("NumberOfFrames") or 1)
    check_array_bytes(4 * num_voxels, source, limits)


def _stacks(datasets: Sequence[Dataset], source: str) -> list[list[Dataset]]:
    """Instances grouped by matrix, orientation and spacing; an enhanced object is a stack of its own."""
    stacks: dict[tuple[Any, ...], list[Dataset]] = defaultdict(list)
    for index, dataset in enumerate(datasets):
        if dataset.SOPClassUID == ENHANCED_MR_IMAGE:
            stacks[(index,)].append(dataset)
            continue
        _check_geometry(dataset, source)
        orientation = tuple(round(float(v), 3) + 0.0 for v in dataset.ImageOrientationPatient)
        spacing = tuple(round(float(v), 4) for v in dataset.PixelSpacing)
        stacks[(int(dataset.Rows), int(dataset.Columns), *orientation, *spacing)].append(dataset)
    normals = [slice_normal(stack[0]) for stack in stacks.values() if stack[0].SOPClassUID != ENHANCED_MR_IMAGE]
    if any(abs(a @ b) < _LOCALISER_COSINE for a in normals for b in normals):
        raise ReadError(source, "A localiser: slices in several orientations.", "Nothing to do: they are left out.")
    return [stacks[key] for key in sorted(stacks)]


def _position_indices(stack: list[Dataset]) -> list[int]:
    """Which of the distinct positions along the normal each instance has."""
    normal = slice_normal(stack[0])
    offsets = np.array([normal @ np.array(d.ImagePositionPatient, dtype=float) for d in stack])
    order = np.argsort(offsets, kind="stable")
    steps = np.diff(offsets[order], prepend=offsets[order[0]]) > _POSITION_TOLERANCE_MM
    indices = np.empty(len(stack), dtype=int)
    indices[order] = np.cumsum(steps)
    return indices.tolist()


def _split(stack: list[Dataset], source: str) -> list[list[Dataset]]:
    """Split a stack with several images at one position into volumes with one image at each."""
    if stack[0].SOPClassUID == ENHANCED_MR_IMAGE:
        return [stack]
    positions = dict(zip(map(id, stack), _position_indices(stack), strict=True))
    return _split_group(stack, positions, _SPLIT_KEYS, source)


def _split_group(
    group: list[Dataset], positions: dict[int, int], split_keys: Sequence[Callable[[Dataset], Any]], source: str
) -> list[list[Dataset]]:
    num_positions = len({positions[id(d)] for d in group})
    if num_positions == len(group):
        return [group]
    for index, key in enumerate(split_keys):
        parts: dict[Any, list[Dataset]] = defaultdict(list)
        for dataset in group:
            parts[key(dataset)].append(dataset)
        # A value that varies from slice to slice (an acquisition time) is no volume: every part must be complete.
        complete = all(len({positions[id(d)] for d in part}) == num_positions for part in parts.values())
        if len(parts) > 1 and complete:
            rest = split_keys[index + 1 :]
            return [v for value in sorted(parts) for v in _split_group(parts[value], positions, rest, source)]
    return _split_by_rank(group, positions, source)


def _split_by_rank(group: list[Dataset], positions: dict[int, int], source: str) -> list[list[Dataset]]:
    """Volume k takes the k-th image at each position by Instance Number: all that older time series leave us."""
    by_position: dict[int, list[Dataset]] = defaultdict(list)
    for dataset in group:
        by_position[positions[id(dataset)]].append(dataset)
    counts = sorted({len(images) for images in by_position.values()})
    if len(counts) > 1:
        raise ReadError(
            source,
            f"{len(group)} images at {len(by_position)} positions, {counts[0]} to {counts[-1]} at each: "
            "an incomplete volume.",
            "Export the whole series.",
        )
    ranked = [sorted(images, key=lambda d: _number(d, "InstanceNumber")) for images in by_position.values()]
    return [list(volume) for volume in zip(*ranked, strict=True)]


def _number(dataset: Dataset, keyword: str) -> float:
    """A header number for sorting and grouping; missing sorts first."""
    value = dataset.get(keyword)
    return float("-inf") if value is None or value == "" else round(float(np.atleast_1d(value)[0]), 4)


def _b_value(dataset: Dataset) -> float:
    """b-value from the standard element or the private ones of Siemens, Philips and GE."""
    for tag in ((0x0018, 0x9087), (0x0019, 0x100C), (0x2001, 0x1003), (0x0043, 0x1039)):
        value = dataset.get(tag)
        if value is not None and not isinstance(value.value, bytes):
            number = np.atleast_1d(value.value)[0]
            # GE adds 1e9 to mark the value as valid.
            return float(number) % 1e9
    return float("-inf")


def _record(volume: list[Dataset], source: str, index: int, num_volumes: int) -> SeriesRecord:
    enhanced = volume[0].SOPClassUID == ENHANCED_MR_IMAGE
    try:
        geometry = _enhanced_volume(volume[0]) if enhanced else _classic_volume(volume)
    except UNREADABLE as error:
        raise ReadError(source, *why_unreadable(error, volume)) from error
    image, affine = _to_scan_axes(geometry.array, geometry.affine)
    header = _flat_header(volume[0]) if enhanced else volume[0]
    patient, study, series = keys(volume[0])
    return SeriesRecord(
        scan=Scan(image=image, affine=affine, facts=dicom_facts(header, affine)),
        source=source, source_format="dicom", patient_key=patient, study_key=study, series_key=series,
        volume=index, num_volumes=num_volumes, identifiers=header_identifiers(volume[0]),
        instances=tuple(str(dataset.get("SOPInstanceUID") or "") for dataset in volume),
    )  # fmt: skip


def _classic_volume(volume: list[Dataset]) -> highdicom.Volume:
    """Volume of single-frame images: highdicom puts them in order and in place, pydicom rescales each.

    Highdicom's own `get_volume_from_series` looks the attributes of every slice up in the standard, which takes longer
    than all the rest.
    """
    first = volume[0]
    thickness = first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 1.0
    spacing: float | None = abs(float(thickness)) or 1.0
    order: list[int] | None = [0]
    if len(volume) > 1:
        positions = [dataset.ImagePositionPatient for dataset in volume]
        spacing, order = get_volume_positions(positions, first.ImageOrientationPatient, rtol=_SPACING_TOLERANCE)
    if spacing is None or order is None:
        raise ValueError("The slices are not regularly spaced.")
    ordered = [volume[order.index(position)] for position in range(len(volume))]
    return highdicom.Volume.from_attributes(
        array=_measured(ordered),
        image_position=ordered[0].ImagePositionPatient,
        image_orientation=first.ImageOrientationPatient,
        pixel_spacing=first.PixelSpacing,
        spacing_between_slices=spacing,
        coordinate_system="PATIENT",
    )


def _measured(ordered: list[Dataset]) -> np.ndarray:
    """Slices with their own rescale, `(slice, row, column)`; MONOCHROME1 stores the darkest as the largest value."""
    # Laid out backwards: highdicom's order of slices is right-handed in (slice, row, column), a scan's in (x, y, z).
    array = np.empty((len(ordered), int(ordered[0].Rows), int(ordered[0].Columns)), dtype=np.float32)[::-1]
    for section, dataset in zip(array, ordered, strict=True):
        section[...] = apply_modality_lut(pixel_array(dataset, view_only=True), dataset)
    return array.max() - array if ordered[0].PhotometricInterpretation == "MONOCHROME1" else array


def _enhanced_volume(dataset: Dataset) -> highdicom.Volume:
    _make_little_endian(dataset)
    image = highdicom.Image.from_dataset(dataset, copy=False)
    return image.get_volume(dtype=np.float32, apply_real_world_transform=False, rtol=_SPACING_TOLERANCE)


def _make_little_endian(dataset: Dataset) -> None:
    """Turn the bytes of a big-endian object's pixels, the only values that stay encoded; highdicom refuses it else."""
    if dataset.file_meta.get("TransferSyntaxUID") == ExplicitVRBigEndian:
        pixels = pixel_array(dataset)
        dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


def _to_scan_axes(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From highdicom's `(slice, row, column)` in LPS to `(Z, Y, X)` in RAS with z along the slice normal."""
    ras = LPS_TO_RAS @ affine[:, [2, 1, 0, 3]]
    if np.linalg.det(ras[:3, :3]) < 0:
        array = array[::-1]
        ras[:3, 3] += ras[:3, 2] * (array.shape[0] - 1)
        ras[:3, 2] *= -1
    return np.ascontiguousarray(array, dtype=np.float32), ras


def _flat_header(dataset: Dataset) -> dict[str, Any]:
    """Header values of an enhanced object by the keywords of a classic one, functional groups included."""
    flat = {element.keyword: element.value for element in dataset if element.VR != "SQ" and element.keyword}
    for name in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for macro in next(iter(dataset.get(name) or []), ()):
            for item in list(macro.value or [])[:1] if macro.VR == "SQ" else []:
                flat.update({e.keyword: e.value for e in item if e.VR != "SQ" and e.keyword})
    flat.setdefault("EchoTime", flat.get("EffectiveEchoTime"))
    flat.setdefault("InversionTime", flat.get("InversionTimes"))
    return flat
