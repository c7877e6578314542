"""The files a scanner or a data set would give: one writer for each format, and what they have in common."""

# Z Y X slices and in-plane voxels, C coils

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from omnimri.platform.corpus.acquisition import Received, add_noise, combine
from omnimri.platform.corpus.dicom_writer import write_dicom_series
from omnimri.platform.corpus.geometry import Grid, flip_rows
from omnimri.platform.corpus.kspace_writers import write_fastmri_file, write_ismrmrd_file
from omnimri.platform.corpus.series import SeriesHeader, integer_scale

_ROWS_TURNED = ("nifti", "fastmri")
"""Formats whose rows run from back to front: dcm2niix turns them, and fastMRI's images are upside down to DICOM's."""


@dataclass(frozen=True)
class Written:
    """Where a series lies and on which grid."""

    path: Path
    """A file, or the folder of a DICOM series."""
    affine: np.ndarray
    """`(4, 4)`: voxel `(x, y, z)` of the file to RAS mm."""
    rows_turned: bool
    """The file's y runs against the acquisition's."""


def write_series(
    source_format: str, header: SeriesHeader, received: Received, grid: Grid, folder: Path, rng: np.random.Generator
) -> Written:
    """Add the noise of one measurement and write it.

    Args:
        source_format: Of FORMATS.
        header: What the header states.
        received: Coil images without noise.
        grid: The acquisition.
        folder: The patient's folder.
        rng: Source of the noise and of the vendor's habits.
    """
    turned = source_format in _ROWS_TURNED
    coil_images = received.coil_images[..., ::-1, :] if turned else received.coil_images
    affine = flip_rows(grid.affine, grid.shape[1]) if turned else grid.affine
    path = FORMATS[source_format](header, coil_images, received.noise_std, affine, folder, rng)
    return Written(path, affine, turned)


def _dicom(
    header: SeriesHeader, coil_images: np.ndarray, noise_std: float, affine: np.ndarray, folder: Path,
    rng: np.random.Generator,
) -> Path:  # fmt: skip
    path = folder / "dicom" / header.protocol.contrast
    write_dicom_series(header, combine(add_noise(coil_images, noise_std, rng)), affine, path, rng)
    return path


def _nifti(
    header: SeriesHeader, coil_images: np.ndarray, noise_std: float, affine: np.ndarray, folder: Path,
    rng: np.random.Generator,
) -> Path:  # fmt: skip
    """`.nii.gz` with a JSON sidecar as BIDS and dcm2niix name its keys; times in seconds."""
    path = folder / "anat" / f"{header.participant_id}_{header.protocol.contrast}.nii.gz"
    image = combine(add_noise(coil_images, noise_std, rng))
    save_nifti(np.round(image * integer_scale(image, header.scanner.vendor)).astype(np.int16), affine, path)
    path.with_name(path.name.replace(".nii.gz", ".json")).write_text(json.dumps(_sidecar(header), indent=1))
    return path


def _sidecar(header: SeriesHeader) -> dict[str, object]:
    protocol, sequence = header.protocol, header.protocol.sequence
    sidecar: dict[str, object] = {
        "Modality": "MR",
        "Manufacturer": header.scanner.manufacturer,
        "ManufacturersModelName": header.scanner.model,
        "MagneticFieldStrength": header.scanner.field_strength_t,
        "BodyPartExamined": "BRAIN",
        "PatientSex": header.sex,
        "SeriesDescription": protocol.name,
        "ProtocolName": protocol.name,
        "ScanningSequence": "_".join(protocol.scanning_sequence),
        "SequenceVariant": "_".join(protocol.sequence_variant),
        "MRAcquisitionType": "2D",
        "RepetitionTime": sequence.tr_ms / 1000,
        "EchoTime": sequence.te_ms / 1000,
        "FlipAngle": sequence.flip_angle_deg,
        "EchoTrainLength": protocol.echo_train_length,
        "SliceThickness": header.spacing_mm[0],
    }
    return sidecar | ({"InversionTime": sequence.ti_ms / 1000} if sequence.ti_ms is not None else {})


def save_nifti(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """An array `(Z, Y, X)` with the affine of its `(x, y, z)` index; the same array gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))


def _fastmri(
    header: SeriesHeader, coil_images: np.ndarray, noise_std: float, affine: np.ndarray, folder: Path,
    rng: np.random.Generator,
) -> Path:  # fmt: skip
    path = folder / "raw" / f"{header.participant_id}_{header.protocol.contrast}.h5"
    write_fastmri_file(header, coil_images, noise_std, affine, path, rng)
    return path


def _ismrmrd(
    header: SeriesHeader, coil_images: np.ndarray, noise_std: float, affine: np.ndarray, folder: Path,
    rng: np.random.Generator,
) -> Path:  # fmt: skip
    path = folder / "raw" / f"{header.participant_id}_{header.protocol.contrast}.mrd.h5"
    write_ismrmrd_file(header, coil_images, noise_std, affine, path, rng)
    return path


FORMATS: dict[str, Callable[..., Path]] = {
    "dicom": _dicom,
    "fastmri": _fastmri,
    "nifti": _nifti,
    "ismrmrd": _ismrmrd,
}
"""By name, in the order in which they rotate over contrasts and patients: image and raw data alternate."""
