"""Series of mixed kinds by the thousand, some of them broken in twenty ways, each with the reason it must be given."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset

from tests.platform.intake_fakes import (
    coil_kspace,
    dicom_slices,
    ismrmrd_header,
    oblique_affine,
    random_image,
    rescalable,
    save_dicom,
    save_fastmri,
    save_ismrmrd,
    save_nifti,
)  # fmt: skip

SHAPE = (4, 20, 16)
AFFINE = oblique_affine()
SPACING = tuple(float(v) for v in np.linalg.norm(AFFINE[:3, :3], axis=0)[::-1])


def write_good(folder: Path, number: int) -> None:
    """One good series: DICOM, NIfTI, fastMRI or ISMRMRD by turns."""
    image, name = rescalable(random_image(number, SHAPE)), f"s{number:05d}"
    kind = number % 4
    if kind == 0:
        save_dicom(dicom_slices(image, AFFINE, seed=number, PatientID=name), folder / name)
    elif kind == 1:
        save_nifti(folder / f"sub-{name}_T1w.nii.gz", image, AFFINE)
    elif kind == 2:
        save_fastmri(folder / f"{name}.h5", coil_kspace(image), ismrmrd_header(SHAPE, SPACING), patient_id=name)
    else:
        save_ismrmrd(folder / f"{name}.mrd.h5", coil_kspace(image), AFFINE, seed=number)


def _dicom(**header: Any) -> Callable[[Path, int], None]:
    def write(folder: Path, number: int) -> None:
        save_dicom(_slices(number, **header), folder / f"bad{number:05d}")

    return write


def _slices(number: int, **header: Any) -> list[Dataset]:
    return dicom_slices(
        rescalable(random_image(number, SHAPE)), AFFINE, seed=number, PatientID=f"bad{number}", **header
    )


def _gap(folder: Path, number: int) -> None:
    slices = sorted(_slices(number), key=lambda d: float(d.ImagePositionPatient[2]))
    save_dicom([slices[0], slices[1], slices[3]], folder / f"bad{number:05d}")


def _cut(folder: Path, number: int) -> None:
    for path in save_dicom(_slices(number), folder / f"bad{number:05d}").iterdir():
        path.write_bytes(path.read_bytes()[:-200])


def _write(suffix: str, content: Callable[[int], bytes]) -> Callable[[Path, int], None]:
    def write(folder: Path, number: int) -> None:
        path = (
            folder / f"bad{number:05d}" / f"file{suffix}" if suffix == ".dcm" else folder / f"bad{number:05d}{suffix}"
        )
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content(number))

    return write


def _nifti(number: int, shape: tuple[int, ...] = SHAPE, dtype: type = np.float32) -> bytes:
    values = np.random.default_rng(number).integers(1, 99, size=shape[::-1]).astype(dtype)
    return nib.Nifti1Image(values, AFFINE).to_bytes()


def _without_affine(number: int) -> bytes:
    """The three rows of the sform, which lie at byte 280 of the header, are zero."""
    whole = _nifti(number)
    return whole[:280] + bytes(48) + whole[328:]


def _hdf5(folder: Path, number: int) -> None:
    with h5py.File(folder / f"bad{number:05d}.h5", "w") as file:
        file["something"] = np.arange(number % 7 + 1)


def _flat(folder: Path, number: int) -> None:
    save_nifti(folder / f"sub-bad{number:05d}_T1w.nii.gz", np.full(SHAPE, 1.0 + number, np.float32), AFFINE)


def _kspace_shape(folder: Path, number: int) -> None:
    save_fastmri(folder / f"bad{number:05d}.h5", np.ones((2, 2), np.complex64))


BROKEN: tuple[tuple[Callable[[Path, int], None], str], ...] = (
    (_dicom(Modality="CT"), "Modality CT, expected MR."),
    (_dicom(SOPClassUID="1.2.840.10008.5.1.4.1.1.7"), "Not an MR image but Secondary Capture Image Storage."),
    (_dicom(PhotometricInterpretation="RGB"), "A colour image, not a measured one."),
    (_dicom(BurnedInAnnotation="YES"), "Text is burned into the pixels and may identify the patient."),
    (_dicom(SeriesDescription="3-plane localizer"), "A localiser."),
    (_dicom(ImageType=["DERIVED", "PRIMARY", "ADC"]), "A derived map or projection, not an acquired contrast."),
    (_dicom(ImageType=["ORIGINAL", "PRIMARY", "P"]), "A phase, real or imaginary image, not a magnitude."),
    (_dicom(PixelSpacing=None), "Image Position, Image Orientation or Pixel Spacing is missing."),
    (_gap, "slices are missing."),
    (_cut, "The pixel data is too short: a truncated file."),
    (_write(".dcm", lambda n: b""), "Not a"),
    (_write(".dcm", lambda n: b"\0" * 128 + b"DICM" + b"\xff" * (50 + n % 50)), "Not a"),
    (_write(".nii.gz", lambda n: b"no image %d" % n), "Not a NIfTI file"),
    (_write(".nii.gz", lambda n: gzip.compress(_nifti(n), mtime=0)[:700]), "Not a readable NIfTI file"),
    (_write(".nii", lambda n: _nifti(n, dtype=np.complex64)), "expected real numbers."),
    (_write(".nii", lambda n: _nifti(n, shape=(2, 2, *SHAPE))), "expected 3 spatial axes"),
    (_write(".nii", _without_affine), "The affine of the header is singular."),
    (_flat, "A blank volume"),
    (_hdf5, ""),
    (_kspace_shape, ""),
    (_write(".xyz", lambda n: b"%d" % n), "Unknown file type .xyz."),
)
"""How to write a broken series, and words of the reason that the ledger must give."""


def write_mixed(folder: Path, num_series: int, broken_share: float = 0.03) -> list[str]:
    """Write so many series; returns the reason that is expected of each broken one."""
    folder.mkdir(parents=True)
    every = round(1 / broken_share)
    reasons = []
    for number in range(num_series):
        if number % every == every - 1:
            write, reason = BROKEN[len(reasons) % len(BROKEN)]
            write(folder, number)
            reasons.append(reason)
        else:
            write_good(folder, number)
    return reasons
