"""K-space as public sets store it beside fastMRI's own layout, brought to the one convention of `Scan`.

Calgary-Campinas (CC-359), SKM-TEA, fastMRI prostate and CMRxRecon. K-space of the first two is hybrid: the readout is
already an image axis, which becomes our slices, and both phase encodings remain. None of these files states directions:
voxels are 1 mm cubes around the origin, and the plane is unknown.
"""

# Z slices, C coils, Y readout (first phase encoding of hybrid data), X phase encoding

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import h5py
import numpy as np

from omnimri.models.scan import Scan
from omnimri.platform.data.formats.facts import Facts
from omnimri.platform.data.formats.kspace.fourier import root_sum_of_squares_image
from omnimri.platform.data.formats.kspace.hdf5 import KSPACE_NAMES, RawVolume, finite_image, mask_or_none, read_scans
from omnimri.platform.data.formats.records import (
    ReadError,
    ReadLimits,
    SeriesRecord,
    check_array_bytes,
)  # fmt: skip
from omnimri.platform.data.formats.sequences import contrast_of


def read_layout(path: Path, source: str, limits: ReadLimits) -> tuple[list[SeriesRecord], list[ReadError]]:
    """Read one file of a layout of `LAYOUTS`.

    Returns:
        One record per volume (echo, phase of the heart cycle, weighting) and what was refused.
    """

    def read(file: h5py.File, layout: str, _: h5py.Group) -> list[RawVolume]:
        return [RawVolume(scan_of(kspace, source)) for kspace in LAYOUTS[layout](file, source, limits)]

    return read_scans(path, source, read)


def scan_of(kspace: np.ndarray, source: str) -> Scan:
    """A scan of k-space `(Z, C, Y, X)` without header; lines that hold nothing were not acquired.

    Raises:
        ReadError: If samples are missing along two directions, or are not finite.
    """
    sampled = (kspace != 0).any((0, 1))  # (Y, X)
    mask = np.asarray(sampled.any(0))
    rows = np.asarray(sampled.any(1))
    if mask_or_none(rows) is not None or not sampled[np.ix_(rows, mask)].all():
        raise ReadError(
            source, "The acquired samples are no full lines: sampling along two phase-encoding directions.",
            "Only sampling along one phase-encoding direction is read.",
        )  # fmt: skip
    image = finite_image(kspace, source)
    affine = np.eye(4)
    affine[:3, 3] = -(np.array(image.shape[::-1]) - 1) / 2
    facts: Facts = {"contrast": contrast_of(PurePosixPath(source).name.split(".")[0])}
    return Scan(image=image, affine=affine, kspace=kspace, mask=mask_or_none(mask), facts=facts)


def _check_axes(
    dataset: h5py.Dataset, num_axes: tuple[int, ...], expected: str, source: str, limits: ReadLimits
) -> None:
    if dataset.ndim not in num_axes:
        raise ReadError(source, f"kspace {dataset.shape}, expected {expected}.", "Read the data set's own files.")
    check_array_bytes(8 * int(np.prod(dataset.shape)), source, limits)


def _calgary(file: h5py.File, source: str, limits: ReadLimits) -> Iterator[np.ndarray]:
    """Real numbers `(slices, ky, kz, 2 coils)`, real and imaginary parts interleaved."""
    dataset = file["kspace"]
    _check_axes(dataset, (4,), "(slices, ky, kz, 2 x coils) of real and imaginary parts", source, limits)
    if dataset.shape[-1] % 2:
        raise ReadError(source, f"kspace {dataset.shape}, expected pairs in the last axis.", "Copy the file again.")
    parts = dataset[...].astype(np.float32, copy=False)
    kspace = (parts[..., ::2] + 1j * parts[..., 1::2]).transpose(0, 3, 1, 2)  # (Z, C, ky, kz)
    yield _with_the_object_in_the_middle(np.ascontiguousarray(kspace, dtype=np.complex64))


def _with_the_object_in_the_middle(kspace: np.ndarray) -> np.ndarray:
    """K-space whose image is not rolled by half a field of view.

    Files of this set are read with a plain inverse FFT, for which the image begins at the first voxel; ours has its
    origin in the middle. Which of the two a file follows shows in the image: air is at its border, not in its middle.
    """
    image = root_sum_of_squares_image(kspace).sum(0)
    if _inner_share(image) >= _inner_share(np.fft.ifftshift(image)):
        return kspace
    # A phase ramp rolls the image and leaves zeros where no line was acquired.
    y, x = (_half_turn(size) for size in kspace.shape[-2:])
    return (kspace * y[:, None] * x).astype(np.complex64)


def _half_turn(size: int) -> np.ndarray:
    """Factors on centred k-space that roll an image back by half its size, as `ifftshift` does."""
    frequency = np.arange(size) - size // 2
    return np.exp(2j * np.pi * frequency * (size // 2) / size)


def _inner_share(image: np.ndarray) -> float:
    """Share of the signal that lies in the middle half of both axes."""
    y, x = image.shape
    return float(image[y // 4 : y - y // 4, x // 4 : x - x // 4].sum() / max(float(image.sum()), 1e-30))


def _skm_tea(file: h5py.File, source: str, limits: ReadLimits) -> Iterator[np.ndarray]:
    """Complex `(x, ky, kz, echo, coil)`; one volume per echo."""
    dataset = file["kspace"]
    _check_axes(dataset, (5,), "(x, ky, kz, echo, coil)", source, limits)
    for echo in range(dataset.shape[3]):
        yield np.ascontiguousarray(dataset[:, :, :, echo].transpose(0, 3, 1, 2), dtype=np.complex64)


def _fastmri_prostate(file: h5py.File, source: str, limits: ReadLimits) -> Iterator[np.ndarray]:
    """Complex `(averages, slices, coils, readout, phase)`; a line is the mean of the averages that acquired it."""
    dataset = file["kspace"]
    _check_axes(dataset, (5,), "(averages, slices, coils, readout, phase)", source, limits)
    total = np.zeros(dataset.shape[1:], dtype=np.complex64)
    counts = np.zeros((dataset.shape[1], 1, 1, dataset.shape[4]), dtype=np.float32)
    for average in dataset:
        total += average
        counts += (average != 0).any((1, 2))[:, None, None, :]
    yield total / np.maximum(counts, 1)


def _cmrxrecon(file: h5py.File, source: str, limits: ReadLimits) -> Iterator[np.ndarray]:
    """MATLAB's `(nx, ny, [coils,] slices, times)` of structs `real`, `imag`: h5py shows the axes reversed."""
    dataset = file[next(name for name in KSPACE_NAMES if name in file)]
    _check_axes(dataset, (4, 5), "(times, slices, [coils,] ny, nx)", source, limits)
    kspace = dataset[...]
    kspace = (kspace["real"] + 1j * kspace["imag"]).astype(np.complex64)
    if kspace.ndim == 4 and "singlecoil" in source.lower():
        kspace = kspace[:, :, None]
    elif kspace.ndim == 4:  # MATLAB drops a last axis of one time
        kspace = kspace[None]
    for time in kspace:
        yield np.ascontiguousarray(time.swapaxes(-2, -1))  # (Z, C, readout nx, phase ny)


LAYOUTS: dict[str, Callable[[h5py.File, str, ReadLimits], Iterator[np.ndarray]]] = {
    "cc359": _calgary,
    "skm-tea": _skm_tea,
    "fastmri-prostate": _fastmri_prostate,
    "cmrxrecon": _cmrxrecon,
}
"""Layout as `kspace.probe` names it, and who yields k-space `(Z, C, Y, X)` of each volume."""
