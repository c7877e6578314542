"""Siemens mosaics: one image file that holds all slices of a volume as tiles, unpacked into one instance per slice.

The position of a mosaic is that of a single image as large as the whole mosaic, around the same centre; the rule that
undoes it stands in nibabel's documentation (https://nipy.org/nibabel/dicom/dicom_mosaic.html).
"""

from __future__ import annotations

import math

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import ExplicitVRLittleEndian

from omnimri.platform.data.formats.records import UNREADABLE, ReadError, quiet_libraries

with quiet_libraries():  # nibabel calls its DICOM readers experimental on import; we use the parser of one header
    from nibabel.nicom import csareader

_OVERLAY_GROUPS = range(0x6000, 0x6100)
_CSA_GROUP = 0x0029
_PIXEL_GROUP = 0x7FE0
_OWN_TAGS = frozenset(map(Tag, ("ImagePositionPatient", "Rows", "Columns")))

_PARALLEL = 0.999
"""Cosine between the slice normal of the private header and that of Image Orientation, whatever its sign."""

_HINT = "Export it with its private headers, or convert it with dcm2niix and ingest the NIfTI."


def is_mosaic(dataset: Dataset) -> bool:
    """Whether Image Type says so."""
    return "MOSAIC" in [str(value).upper() for value in dataset.get("ImageType") or []]


def unpack(mosaic: Dataset, source: str) -> list[Dataset]:
    """One single-slice instance per tile, in the order of the tiles, each with its own position.

    Args:
        mosaic: An instance with geometry; what is not pixel data, overlay or private vendor header goes to every slice.
        source: Name of the series in errors.

    Raises:
        ReadError: If the number of slices or the direction of the stack cannot be known.
    """
    csa = _csa_header(mosaic)
    num_slices = _num_slices(mosaic, csa)
    if num_slices < 1:
        raise ReadError(source, "A Siemens mosaic that does not say how many slices it holds.", _HINT)
    side = math.ceil(math.sqrt(num_slices))
    if mosaic.Rows % side or mosaic.Columns % side:
        size = f"{mosaic.Rows} x {mosaic.Columns} pixels"
        reason = f"A Siemens mosaic of {size} does not divide into the {num_slices} slices it claims."
        raise ReadError(source, reason, _HINT)
    first, step = _first_position_and_step(mosaic, csa, side, source)
    # Tiles are stored row by row; the square is filled up with empty ones.
    tiles = mosaic.pixel_array.reshape(side, mosaic.Rows // side, side, mosaic.Columns // side)
    planes = tiles.transpose(0, 2, 1, 3).reshape(side * side, *tiles.shape[1::2])[:num_slices]
    return [_slice(mosaic, plane, first + step * index) for index, plane in enumerate(planes)]


def _csa_header(mosaic: Dataset) -> dict:
    """Siemens' private image header by tag name; empty where de-identification removed it or it is broken."""
    try:
        return csareader.get_csa_header(mosaic) or {}
    except (*UNREADABLE, csareader.CSAError):
        return {}


def _num_slices(mosaic: Dataset, csa: dict) -> int:
    """Number of tiles in use: from the CSA header, else from (0019,100A); 0 if neither knows."""
    number = csareader.get_n_mosaic(csa) if csa else None
    if not number:
        try:
            number = mosaic.private_block(0x0019, "SIEMENS MR HEADER")[0x0A].value
        except KeyError:
            return 0
    return int(number)


def _first_position_and_step(mosaic: Dataset, csa: dict, side: int, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Position of the first voxel of the first slice, and the way from slice to slice; mm in LPS."""
    orientation = np.array(mosaic.ImageOrientationPatient, dtype=float)
    row, column = orientation[:3], orientation[3:]
    row_spacing, column_spacing = (float(value) for value in mosaic.PixelSpacing)
    surplus = 0.5 * (1 - 1 / side)
    first = np.array(mosaic.ImagePositionPatient, dtype=float)
    first += surplus * (mosaic.Columns * column_spacing * row + mosaic.Rows * row_spacing * column)
    spacing_mm = float(mosaic.get("SpacingBetweenSlices") or mosaic.get("SliceThickness") or 0.0)
    if spacing_mm <= 0:
        raise ReadError(source, "A Siemens mosaic without distance between its slices.", "Export it with geometry.")
    stated = csareader.get_slice_normal(csa) if csa else None
    if stated is None:
        # The sagittal mosaics of dcm_qa_sag run against row x column, the axial ones of dcm_qa_nih along it: a guess
        # could swap left and right.
        raise ReadError(source, "A Siemens mosaic without the private header that orders its slices.", _HINT)
    normal = np.cross(row, column)
    cosine = float(normal @ np.array(stated, dtype=float))
    if abs(cosine) < _PARALLEL:
        raise ReadError(source, "The two slice normals of a Siemens mosaic contradict each other.", _HINT)
    return first, math.copysign(spacing_mm, cosine) * normal


def _slice(mosaic: Dataset, plane: np.ndarray, position: np.ndarray) -> Dataset:
    """An instance `(row, column)` that shares the header of its mosaic."""
    dataset = Dataset()
    dataset.update({tag: mosaic.get_item(tag) for tag in mosaic.keys() if not _is_left_out(tag)})  # noqa: SIM118
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.ImagePositionPatient = [float(value) for value in position]
    dataset.Rows, dataset.Columns = plane.shape
    dataset.PixelData = np.ascontiguousarray(plane, dtype=plane.dtype.newbyteorder("<")).tobytes()
    return dataset


def _is_left_out(tag: BaseTag) -> bool:
    """What a slice has of its own or does without; elements that are copied are shared by all slices."""
    return tag.group in (_CSA_GROUP, _PIXEL_GROUP, *_OVERLAY_GROUPS) or tag in _OWN_TAGS
