"""NIfTI with its JSON sidecar. Voxels stay on the grid of the file; a 4D file gives one record per volume."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from omnimri.models.scan import Scan
from omnimri.platform.data.deid import header_identifiers
from omnimri.platform.data.formats.facts import Facts, sidecar_facts
from omnimri.platform.data.formats.records import (
    UNREADABLE,
    ReadError,
    ReadLimits,
    SeriesRecord,
    check_array_bytes,
    quiet_libraries,
)  # fmt: skip

_HEADER_BYTES = 540
"""Of NIfTI-2; NIfTI-1 takes 348 and its voxels follow."""

NIFTI_ERRORS = (*UNREADABLE, ImageFileError, HeaderDataError)


_MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}


def is_nifti(name: str) -> bool:
    """Whether a file name says NIfTI."""
    return name.lower().endswith((".nii", ".nii.gz"))


def stem(name: str) -> str:
    """File name without folder and extension."""
    return re.sub(r"\.nii(\.gz)?$", "", PurePosixPath(name).name, flags=re.IGNORECASE)


def keys(name: str) -> tuple[str, str, str]:
    """Patient, study and series keys from BIDS entities in the path (`sub-01/ses-2/...`), else from the file name."""
    subject = re.search(r"(?:^|[/_])(sub-[A-Za-z0-9]+)", name)
    session = re.search(r"(?:^|[/_])(ses-[A-Za-z0-9]+)", name)
    patient = subject[1] if subject else stem(name)
    return patient, f"{patient}|{session[1] if session else ''}", name


def load_sidecar(path: Path | None) -> dict[str, Any]:
    """The JSON sidecar as a dictionary; empty without one or when it is no JSON object."""
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def probe(stream: BinaryIO, name: str) -> None:
    """Check the first bytes of a NIfTI file, unpacked where it is compressed.

    Raises:
        ReadError: If they are no NIfTI header.
    """
    try:
        if name.lower().endswith(".gz"):
            with gzip.open(stream) as unpacked:
                head = unpacked.read(_HEADER_BYTES)
        else:
            head = stream.read(_HEADER_BYTES)
        is_header = len(head) >= 348 and any(
            kind.may_contain_header(head) for kind in (nib.Nifti1Header, nib.Nifti2Header)
        )
    except UNREADABLE:
        is_header = False
    if not is_header:
        raise ReadError(name, "Not a NIfTI file, whatever its name says: no NIfTI header.", "Convert it again.")


def read_nifti(
    path: Path, source: str, limits: ReadLimits, sidecar_path: Path | None = None
) -> tuple[list[SeriesRecord], list[ReadError]]:
    """Read a NIfTI file.

    Args:
        path: The file; compressed or not.
        source: Its name in records and errors; BIDS entities in it name the patient.
        limits: Bounds on sizes.
        sidecar_path: JSON sidecar, if there is one.

    Returns:
        One record per volume and what was refused.
    """
    try:
        with quiet_libraries():
            array, affine = _load(path, source, limits)
    except ReadError as error:
        return [], [error]
    except NIFTI_ERRORS as error:
        return [], [ReadError(source, f"Not a readable NIfTI file ({type(error).__name__}).", "Convert it again.")]
    sidecar = load_sidecar(sidecar_path)
    facts = sidecar_facts(sidecar, affine, PurePosixPath(source).name)
    records = [_record(array[..., v], affine, facts, source, v, array.shape[3]) for v in range(array.shape[3])]
    return [replace(record, identifiers=header_identifiers(sidecar)) for record in records], []


def _load(path: Path, source: str, limits: ReadLimits) -> tuple[np.ndarray, np.ndarray]:
    """The scaled array `(X, Y, Z, volumes)` and its affine."""
    image = nib.load(path)
    if not isinstance(image, nib.Nifti1Image):
        raise ReadError(source, f"A {type(image).__name__}, expected NIfTI.", "Convert it to NIfTI.")
    shape = image.shape
    if np.issubdtype(image.get_data_dtype(), np.complexfloating) or image.get_data_dtype().fields:
        raise ReadError(source, f"Voxels of type {image.get_data_dtype()}, expected real numbers.", "Store magnitudes.")
    if not 2 <= len(shape) <= 4 or min(shape) < 1 or min(shape[:2]) < 2:
        raise ReadError(source, f"Shape {shape}, expected 3 spatial axes and at most one more.", "Split the file.")
    check_array_bytes(4 * int(np.prod(shape)), source, limits)
    affine = np.asarray(image.affine, dtype=np.float64)
    affine[:3] *= _MM_PER_UNIT.get(image.header.get_xyzt_units()[0], 1.0)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ReadError(source, "The affine of the header is singular.", "Repair the header.")
    array = image.get_fdata(dtype=np.float32, caching="unchanged")
    if not np.isfinite(array).all():
        array = np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0)
    return array.reshape(*shape, *(1,) * (4 - len(shape))), affine


def _record(
    array: np.ndarray, affine: np.ndarray, facts: Facts, source: str, volume: int, num_volumes: int
) -> SeriesRecord:
    patient, study, series = keys(source)
    return SeriesRecord(
        scan=Scan(image=np.ascontiguousarray(array.transpose(2, 1, 0)), affine=affine, facts=dict(facts)),
        source=source, source_format="nifti", patient_key=patient, study_key=study, series_key=series,
        volume=volume, num_volumes=num_volumes,
    )  # fmt: skip
