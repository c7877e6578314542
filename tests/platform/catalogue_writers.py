"""Tiny volumes in every format and layout that catalogued data sets use, written by another hand than the readers."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import numpy as np

from tests.platform.intake_fakes import (
    coil_kspace,
    dicom_slices,
    fft,
    ismrmrd_header,
    oblique_affine,
    random_image,
    rescalable,
    save_dicom,
    save_fastmri,
    save_nifti,
)  # fmt: skip

SHAPE = (8, 10, 12)
"""Voxels `(Z, Y, X)` of a fixture."""

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

Writer = Callable[[Path], object]


def image_of(path: str, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Voxels that no other path has."""
    return random_image(zlib.crc32(path.encode()), shape)  # type: ignore[arg-type]


def label_array(values: tuple[int, ...], shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Zeros in the first slice, then the values in turn."""
    labels = np.resize(np.array(values, dtype=np.float32), shape)
    labels[0] = 0
    return labels


def save_volume(path: Path, image: np.ndarray) -> Path:
    """Save `(Z, Y, X)` in the format that the suffix names, on the one oblique grid of the fixtures."""
    suffix = path.suffix.lower()
    if suffix in (".mha", ".mhd"):
        return save_metaimage(path, image, oblique_affine())
    if suffix in (".nrrd", ".nhdr"):
        return save_nrrd(path, image, oblique_affine())
    if suffix == ".npy":
        np.save(path, image.astype(np.uint8))
        return path
    return save_nifti(path, image, oblique_affine())


def save_metaimage(path: Path, image: np.ndarray, affine: np.ndarray, *, compressed: bool = False) -> Path:
    """Save `(Z, Y, X)` as float32; `.mhd` gets its `.raw` beside it."""
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    data = image.astype("<f4").tobytes()
    data = zlib.compress(data) if compressed else data
    detached = path.suffix == ".mhd"
    header = {
        "ObjectType": "Image", "NDims": 3, "BinaryData": True, "BinaryDataByteOrderMSB": False,
        "CompressedData": compressed, "TransformMatrix": (lps[:3, :3] / spacing).T.ravel(), "Offset": lps[:3, 3],
        "ElementSpacing": spacing, "DimSize": image.shape[::-1], "ElementType": "MET_FLOAT",
        "ElementDataFile": path.with_suffix(".raw").name if detached else "LOCAL",
    }  # fmt: skip
    lines = "".join(f"{key} = {_numbers(value, ' ')}\n" for key, value in header.items())
    path.write_bytes(lines.encode() + (b"" if detached else data))
    if detached:
        path.with_suffix(".raw").write_bytes(data)
    return path


def save_nrrd(path: Path, image: np.ndarray, affine: np.ndarray, *, encoding: str = "raw", space: str = "lps") -> Path:
    """Save `(Z, Y, X)` as float32; `.nhdr` gets its `.raw` beside it."""
    stored = LPS @ affine if space == "lps" else affine
    data = image.astype("<f4").tobytes()
    if encoding == "gzip":
        packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
        data = packer.compress(data) + packer.flush()
    name = {"lps": "left-posterior-superior", "ras": "right-anterior-superior"}[space]
    directions = " ".join(f"({_numbers(stored[:3, k], ',')})" for k in range(3))
    lines = [
        "NRRD0005", "# made by a test", "type: float", "dimension: 3", f"space: {name}",
        f"sizes: {_numbers(image.shape[::-1], ' ')}", f"space directions: {directions}", "endian: little",
        f"encoding: {encoding}", f"space origin: ({_numbers(stored[:3, 3], ',')})",
    ]  # fmt: skip
    detached = path.suffix == ".nhdr"
    if detached:
        lines.append(f"data file: {path.with_suffix('.raw').name}")
        path.with_suffix(".raw").write_bytes(data)
    path.write_bytes("\n".join([*lines, "", ""]).encode() + (b"" if detached else data))
    return path


def _numbers(value: object, separator: str) -> str:
    if isinstance(value, (np.ndarray, tuple)):
        return separator.join(f"{number:.12g}" for number in value)
    return str(value)


# ---- k-space


def phantom(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """An object in the middle of every slice with air around it, `(Z, Y, X)`."""
    image = random_image(seed, shape)
    image[:, [0, 1, -2, -1]] = 0
    image[:, :, [0, 1, 2, -3, -2, -1]] = 0
    return image


def save_calgary(path: Path, image: np.ndarray, *, rolled: bool = True, lines: int | None = None) -> Path:
    """CC-359: real and imaginary parts in turn, hybrid `(x, ky, kz, 2 coils)`, the last lines not acquired.

    Args:
        path: File to make.
        image: `(Z, Y, X)`.
        rolled: As a plain inverse FFT reads it: the image begins at the first voxel.
        lines: Lines that were acquired; all by default.
    """
    coils = coil_kspace(np.fft.fftshift(image, axes=(1, 2)) if rolled else image, num_coils=4)
    coils[..., coils.shape[-1] if lines is None else lines :] = 0
    moved = coils.transpose(0, 2, 3, 1)  # (Z, ky, kz, C)
    with h5py.File(path, "w") as file:
        file["kspace"] = np.stack([moved.real, moved.imag], axis=-1).reshape(*moved.shape[:3], -1).astype(np.float32)
    return path


def save_skm_tea(path: Path, echoes: np.ndarray) -> Path:
    """SKM-TEA: `(x, ky, kz, echo, coil)` of echoes `(E, Z, Y, X)`, with maps and target beside."""
    kspace = np.stack([coil_kspace(echo) for echo in echoes], axis=-1)  # (Z, C, Y, X, E)
    with h5py.File(path, "w") as file:
        file["kspace"] = kspace.transpose(0, 2, 3, 4, 1)
        file["maps"] = np.ones((*echoes.shape[1:], kspace.shape[1], 1), np.complex64)
        file["target"] = np.ones((*echoes.shape[1:], len(echoes), 1), np.complex64)
    return path


def save_prostate(path: Path, image: np.ndarray) -> Path:
    """FastMRI prostate: `(averages, slices, coils, readout, phase)`, odd and even lines in averages of their own."""
    averages = np.stack([coil_kspace(image)] * 3)
    averages[0, ..., 1::2] = averages[1, ..., ::2] = averages[2, ..., 1::2] = 0
    with h5py.File(path, "w") as file:
        file["kspace"] = averages
    return path


def save_matlab(path: Path, images: np.ndarray, *, name: str = "kspace_full", num_coils: int = 3) -> Path:
    """CMRxRecon: MATLAB v7.3 of images `(T, Z, Y, X)`; without coils for `num_coils=0`."""
    kspace = np.stack([coil_kspace(image, max(num_coils, 1)) for image in images])  # (T, Z, C, Y readout, X phase)
    stored = kspace.swapaxes(-1, -2)  # MATLAB's (nx, ny, nc, nz, nt), as h5py shows it
    if num_coils == 0:
        # One coil weighs the image by a phase alone.
        stored = fft(images, (-2, -1)).astype(np.complex64).swapaxes(-1, -2)
    parts = np.empty(stored.shape, dtype=[("real", "<f4"), ("imag", "<f4")])
    parts["real"], parts["imag"] = stored.real, stored.imag
    with h5py.File(path, "w", userblock_size=512) as file:
        file[name] = parts
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, made by a test".ljust(128))
    return path


def fastmri_writer(path: str, acquisition: str, **attributes: object) -> Writer:
    header = ismrmrd_header(SHAPE, (4.0, 2.0, 1.5)).replace("t2_tse_tra", "series")
    return lambda target: save_fastmri(
        target, coil_kspace(image_of(path)), header, acquisition=acquisition, patient_id=f"id-{path}", **attributes
    )


def large_fastmri_writer(path: str) -> Writer:
    """Wide enough for the 320 x 320 grid that the boxes of fastMRI+ count in."""
    return lambda target: save_fastmri(target, coil_kspace(image_of(path, (3, 330, 324)), 1), patient_id=f"id-{path}")


# ---- DICOM and archives


def dicom_writer(patient: str, seed: int, name: str = "IM{n:04d}.dcm", description: str = "t1_mprage") -> Writer:
    """A series in the folder of the path, its instances named in turn."""

    def write(target: Path) -> None:
        image = rescalable(random_image(seed, SHAPE))
        slices = dicom_slices(image, oblique_affine(), seed=seed, PatientID=patient, SeriesDescription=description)
        folder = save_dicom(slices, target.parent)
        for number, path in enumerate(sorted(folder.glob("IM*-*.dcm")), start=1):
            path.rename(folder / name.format(n=number))

    return write


def npz_writer(**arrays: np.ndarray) -> Writer:
    return lambda target: np.savez(target, **arrays)  # type: ignore[arg-type, return-value]


def zip_writer(names: Mapping[str, np.ndarray]) -> Writer:
    """A zip of NIfTI files."""

    def write(target: Path) -> None:
        with zipfile.ZipFile(target, "w") as archive:
            for name, image in names.items():
                part = save_nifti(target.parent / "part.nii.gz", image, oblique_affine())
                archive.write(part, name)
                part.unlink()

    return write


def four_d_writer(path: str, num_volumes: int) -> Writer:
    return lambda target: save_nifti(target, image_of(path, (num_volumes, *SHAPE)), oblique_affine())


def volume_writer(path: str) -> dict[str, Writer]:
    return {path: lambda target: save_volume(target, image_of(path))}
