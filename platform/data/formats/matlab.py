"""Arrays of MATLAB files under any name: version 7.3 (HDF5) by h5py, versions 5 to 7 by SciPy.

K-space is the only complex array of three or more axes, or the one that is named. An array of real numbers is an image
only when it is named, by the catalogue or the caller: nothing in the file tells an image from a mask or a table.

MATLAB counts the first axis fastest, so HDF5 shows the axes of version 7.3 reversed; here they are named in MATLAB's
order, as `size()` prints them. K-space is `(readout, phase, coils[, slices[, volumes]])`, as CMRxRecon stores it, and
an image `(rows, columns[, slices[, volumes]])`. MATLAB drops last axes of one. No geometry is stored: voxels are 1 mm
cubes and the plane is unknown. Objects, structs of version 5 to 7, cells and text are never read.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
import scipy.io
from scipy.io.matlab import MatReadError

from omnimri.platform.data.formats.kspace.layouts import scan_of
from omnimri.platform.data.formats.records import (
    UNREADABLE,
    ReadError,
    ReadLimits,
    SeriesRecord,
    check_array_bytes,
    quiet_libraries,
)
from omnimri.platform.data.formats.volumes import array_record, keys

MAGIC_HDF5 = b"MATLAB 7.3 MAT-file"
MAGIC_OLD = b"MATLAB 5.0 MAT-file"

KNOB = "Name the array: --set matlab_array=NAME, or matlab_array in its row of the catalogue."
_KSPACE_AXES, _IMAGE_AXES = "(readout, phase, coils, slices, volumes)", "(rows, columns, slices, volumes)"

_NUMBERS = frozenset({"double", "single", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))})
"""Classes of MATLAB whose values are numbers; `logical` beside them."""
_COMPRESSED = 15
_CHUNK_BYTES = 2**20
_MAX_NAMES = 6


@dataclass(frozen=True)
class Variable:
    """A numeric array of a file."""

    name: str
    """Fields of structs after a slash."""
    shape: tuple[int, ...]
    """In MATLAB's order."""
    num_bytes: int
    """After reading, as complex64 or in its own type."""
    is_complex: bool

    def __str__(self) -> str:
        return f"{self.name} ({' x '.join(map(str, self.shape))})"


def read_matlab(
    path: Path, source: str, limits: ReadLimits, array: str = ""
) -> tuple[list[SeriesRecord], list[ReadError]]:
    """Read the k-space, or the image that is named, of a MATLAB file.

    Args:
        path: The file.
        source: Its name in records and errors.
        limits: Bounds on sizes.
        array: Which array; empty takes the only complex one of three or more axes.

    Returns:
        One record per volume and what was refused.
    """
    try:
        values = load_array(path, array, source, limits)
        return _records(values, source), []
    except ReadError as error:
        return [], [error]


def load_array(path: Path, array: str, source: str, limits: ReadLimits) -> np.ndarray:
    """An array with MATLAB's first two axes last and the others before them in reverse: `(..., rows, columns)`.

    Raises:
        ReadError: If the file cannot be read, or the array is not there, not told from others, a list,
            or too large.
    """
    with path.open("rb") as stream:
        is_old = stream.read(len(MAGIC_OLD)) == MAGIC_OLD
    try:
        with quiet_libraries():
            values = _load_old(path, array, source, limits) if is_old else _load_hdf5(path, array, source, limits)
    except ReadError:
        raise
    except (*UNREADABLE, MatReadError) as error:
        raise ReadError(
            source, f"The MATLAB file cannot be read ({type(error).__name__}).", "Save it again with `save -v7.3`."
        ) from error
    if values.ndim < 2:
        raise ReadError(source, f"An array of {values.ndim} axes, expected rows and columns.", KNOB)
    return np.ascontiguousarray(values.transpose(*range(values.ndim - 1, 1, -1), 0, 1))


def _records(values: np.ndarray, source: str) -> list[SeriesRecord]:
    """Records of k-space `(volumes, Z, C, Y, X)` or of images `(volumes, Z, Y, X)`, leading axes of one left out."""
    is_kspace = np.iscomplexobj(values)
    most = 5 if is_kspace else 4
    if values.size == 0 or not (3 if is_kspace else 2) <= values.ndim <= most:
        expected = _KSPACE_AXES if is_kspace else _IMAGE_AXES
        raise ReadError(
            source, f"An array of {values.ndim} axes, expected {expected} in MATLAB's order.", "Permute it, or " + KNOB
        )
    volumes = values.reshape(*(1,) * (most - values.ndim), *values.shape)
    if not is_kspace:
        records = [array_record(volume, source, index, len(volumes)) for index, volume in enumerate(volumes)]
        return [replace(record, source_format="matlab") for record in records]
    patient, study, series = keys(source)
    return [
        SeriesRecord(
            scan=scan_of(volume, source), source=source, source_format="matlab", patient_key=patient, study_key=study,
            series_key=series, volume=index, num_volumes=len(volumes),
        )
        for index, volume in enumerate(volumes)
    ]  # fmt: skip


def _choose(variables: list[Variable], array: str, source: str, limits: ReadLimits) -> Variable:
    """The array that is named, else the only complex one of three or more axes.

    Names of arrays stand in the hint alone: reasons are copied into the corpus, and a name may be that of a person.

    Raises:
        ReadError: If it is not there, or there are none or several.
    """
    if array:
        chosen = [variable for variable in variables if variable.name == array]
        found, listed = f"{len(chosen)} arrays of numbers have the name that is asked for", variables
    else:
        chosen = [variable for variable in variables if variable.is_complex and len(variable.shape) >= 3]
        found, listed = f"{len(chosen)} complex arrays of three or more axes", chosen or variables
    if len(chosen) != 1:
        hint = f"The file holds {_listed(listed)}. {KNOB} K-space is {_KSPACE_AXES} in MATLAB's order."
        raise ReadError(source, f"{found}, expected one.", hint)
    check_array_bytes(chosen[0].num_bytes, source, limits)
    return chosen[0]


def _listed(variables: list[Variable]) -> str:
    names = [str(variable) for variable in variables]
    rest = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return (", ".join(names[:_MAX_NAMES]) or "no array of numbers") + rest


# ---- Version 7.3


def _load_hdf5(path: Path, array: str, source: str, limits: ReadLimits) -> np.ndarray:
    with h5py.File(path, "r") as file:
        found: list[h5py.Dataset] = []
        # Links to other files or places are not followed.
        file.visititems(lambda _, item: found.append(item) if _is_numeric(item) else None)
        variables = {item: _hdf5_variable(item) for item in found}
        chosen = _choose(list(variables.values()), array, source, limits)
        dataset = next(item for item, variable in variables.items() if variable is chosen)
        if dataset.external or dataset.is_virtual:
            raise ReadError(source, "The HDF5 file keeps its data in other files.", "Copy the data into one file.")
        values = dataset[...].T
    return (values["real"] + 1j * values["imag"]).astype(np.complex64) if chosen.is_complex else values


def _is_numeric(item: h5py.Dataset | h5py.Group) -> bool:
    """Whether an item is an array of numbers, not text, a cell, or what belongs to MATLAB's own bookkeeping."""
    if not isinstance(item, h5py.Dataset) or item.name.startswith("/#") or "MATLAB_empty" in item.attrs:
        return False
    word = item.attrs.get("MATLAB_class", b"double")
    word = word.decode("ascii", "replace") if isinstance(word, bytes) else str(word)
    return word in (*_NUMBERS, "logical") and (item.dtype.names == ("real", "imag") or item.dtype.kind in "biuf")


def _hdf5_variable(item: h5py.Dataset) -> Variable:
    is_complex = item.dtype.names is not None
    num_bytes = math.prod(item.shape) * (8 if is_complex else max(4, item.dtype.itemsize))
    return Variable(item.name.lstrip("/"), item.shape[::-1], num_bytes, is_complex)


# ---- Versions 5 to 7


def _load_old(path: Path, array: str, source: str, limits: ReadLimits) -> np.ndarray:
    """SciPy tells complex from real only when it reads, so without a name every array of three axes is looked at."""
    with path.open("rb") as stream:
        for num_bytes in _unpacked_bytes(stream, limits.max_array_bytes):
            check_array_bytes(num_bytes, source, limits)
    loaded: dict[str, np.ndarray] = {}
    variables = []
    for name, shape, word in scipy.io.whosmat(path):
        if word not in (*_NUMBERS, "logical"):
            continue
        if name == array or (not array and len(shape) >= 3):
            values = np.asarray(scipy.io.loadmat(path, variable_names=[name])[name])
            if name == array or np.iscomplexobj(values):
                loaded[name] = values
        is_complex = name in loaded and np.iscomplexobj(loaded[name])
        variables.append(Variable(name, shape, math.prod(shape) * 8, is_complex))
    chosen = _choose(variables, array, source, limits)
    return loaded[chosen.name].astype(np.complex64) if chosen.is_complex else loaded[chosen.name]


def _unpacked_bytes(stream: BinaryIO, limit: int) -> Iterator[int]:
    """Bytes of every variable after unpacking, counted without keeping them and no further than a limit."""
    stream.seek(0, 2)
    end = stream.tell()
    stream.seek(126)
    order = "little" if stream.read(2) == b"IM" else "big"
    while stream.tell() + 8 <= end:
        head = stream.read(8)
        kind, size = (int.from_bytes(part, order) for part in (head[:4], head[4:]))  # type: ignore[arg-type]
        following = stream.tell() + size
        yield _inflated_size(stream, size, limit) if kind == _COMPRESSED else min(size, end)
        stream.seek(following)


def _inflated_size(stream: BinaryIO, size: int, limit: int) -> int:
    unpacker, total = zlib.decompressobj(), 0
    while size > 0 and total <= limit and (chunk := stream.read(min(size, _CHUNK_BYTES))):
        size -= len(chunk)
        while chunk and total <= limit:
            total += len(unpacker.decompress(chunk, _CHUNK_BYTES))
            chunk = unpacker.unconsumed_tail
    return total
