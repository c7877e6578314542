"""NRRD, MetaImage and NumPy arrays: volume formats that some public sets use beside NIfTI and DICOM.

NRRD and MetaImage are a short text header before raw or deflated voxels, in the same file or in one beside it. Both are
parsed here because their libraries unpack without a bound and follow the header to any path. NumPy files are read
without pickle; they carry no geometry, so their voxels count as 1 mm cubes and their plane as unknown.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from omnimri.models.scan import Scan
from omnimri.platform.data.formats import nifti
from omnimri.platform.data.formats.facts import Facts, sidecar_facts
from omnimri.platform.data.formats.records import (
    LPS_TO_RAS,
    UNREADABLE,
    ReadError,
    ReadLimits,
    SeriesRecord,
    check_array_bytes,
)
from omnimri.platform.data.formats.sources import Archive, Folder

KINDS = {
    ".nrrd": "nrrd", ".nhdr": "nrrd", ".mha": "metaimage", ".mhd": "metaimage", ".npy": "numpy", ".npz": "numpy",
}  # fmt: skip
"""Suffix of a file to the format that it names."""

_HEADER_BYTES = 2**16
_CHUNK_BYTES = 2**20

_NRRD_TYPES = {
    "i1": ("signed char", "int8", "int8_t"), "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"), "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "int64", "int64_t"), "u8": ("ulonglong", "uint64", "uint64_t"),
    "f4": ("float",), "f8": ("double",),
}  # fmt: skip
_META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_SPACES = {
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1), "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
}  # fmt: skip
"""Signs that turn a NRRD space into RAS."""


@dataclass(frozen=True, kw_only=True)
class VolumeHeader:
    """What the text header of a NRRD or MetaImage file says."""

    shape: tuple[int, ...]
    """As stored, fastest axis first."""
    dtype: np.dtype
    affine: np.ndarray
    """RAS, of the three spatial axes in their order."""
    list_axis: int | None
    """The axis that is not spatial, if there is one."""
    encoding: str
    """`raw`, `gzip` or `zlib`."""
    data_file: str
    """Name of the file beside the header that holds the voxels; empty where they follow the header."""
    offset: int
    """Byte of the data file at which the voxels begin; -1 counts their size back from its end."""

    @property
    def num_bytes(self) -> int:
        """Of the voxels after unpacking."""
        return math.prod(self.shape) * self.dtype.itemsize


def kind_of(name: str) -> str | None:
    """`nrrd`, `metaimage` or `numpy` by the suffix of a file; None for others."""
    return KINDS.get(PurePosixPath(name).suffix.lower())


def keys(name: str) -> tuple[str, str, str]:
    """Patient, study and series keys: BIDS entities of the path, else the file name."""
    patient, study, _ = nifti.keys(PurePosixPath(name).with_suffix("").as_posix())
    return patient, study, name


def read_header(stream: BinaryIO, name: str) -> VolumeHeader:
    """Parse the header of a NRRD or MetaImage file.

    Raises:
        ReadError: If it is none, or declares what is not read.
    """
    head = stream.read(_HEADER_BYTES)
    try:
        header = _nrrd_header(head, name) if kind_of(name) == "nrrd" else _meta_header(head, name)
    except ReadError:
        raise
    except UNREADABLE as error:
        raise ReadError(name, f"The header cannot be parsed ({type(error).__name__}).", "Export it again.") from error
    if "/" in header.data_file or "\\" in header.data_file:
        raise ReadError(name, "The header names voxels in another folder.", "Put them beside the header.")
    if not np.isfinite(header.affine).all() or abs(np.linalg.det(header.affine[:3, :3])) < 1e-9:
        raise ReadError(name, "The directions of the header are singular.", "Repair the header.")
    return header


def _nrrd_header(head: bytes, name: str) -> VolumeHeader:
    if not re.match(rb"NRRD000\d", head):
        raise ReadError(name, "Not a NRRD file, whatever its name says.", "Export it again.")
    end = re.search(rb"\r?\n\r?\n", head)
    fields = _fields(head[: end.start() if end else len(head)], r":=?")
    detached = fields.get("data file", fields.get("datafile", ""))
    if detached.upper().startswith("LIST") or "%" in detached:
        raise ReadError(name, "The voxels lie in several files.", "Save the volume as one file.")
    encoding = {"gz": "gzip"}.get(fields["encoding"].lower(), fields["encoding"].lower())
    if encoding not in ("raw", "gzip"):
        raise ReadError(name, f"Encoding {encoding}, expected raw or gzip.", "Save it again with one of these.")
    if "line skip" in fields or "lineskip" in fields:
        raise ReadError(name, "The header skips lines before the voxels.", "Save it again without `line skip`.")
    shape = tuple(int(size) for size in fields["sizes"].split())
    affine, list_axis = _nrrd_affine(fields, len(shape), name)
    skip = int(fields.get("byte skip", fields.get("byteskip", "0")))
    if skip < -1 or (skip and encoding == "gzip"):
        raise ReadError(name, f"Byte skip {skip} of {encoding} voxels.", "Save it again without `byte skip`.")
    start = 0 if detached or end is None else end.end()
    return VolumeHeader(
        shape=shape, dtype=_nrrd_dtype(fields, name), affine=affine, list_axis=list_axis, encoding=encoding,
        data_file=detached, offset=-1 if skip == -1 else start + skip,
    )  # fmt: skip


def _nrrd_dtype(fields: dict[str, str], name: str) -> np.dtype:
    word = fields["type"].lower()
    code = next((code for code, words in _NRRD_TYPES.items() if word in words), None)
    if code is None:
        raise ReadError(name, f"Voxels of type {word}, expected numbers.", "Save it as one of them.")
    return np.dtype(("<" if fields.get("endian", "little").lower() == "little" else ">") + code)


def _nrrd_affine(fields: dict[str, str], num_axes: int, name: str) -> tuple[np.ndarray, int | None]:
    """RAS affine of the spatial axes, and the axis that is none."""
    directions = re.findall(r"none|\([^)]*\)", fields.get("space directions", ""))
    if directions:
        spatial = [axis for axis, text in enumerate(directions) if text != "none"]
        columns = [_vector(directions[axis]) for axis in spatial]
        origin = _vector(fields.get("space origin", "(0,0,0)"))
        space = fields.get("space", "").lower()
        if space not in _SPACES:
            raise ReadError(name, f"Space {space or 'not given'}, expected RAS, LAS or LPS.", "Save it again with one.")
        signs = np.array(_SPACES[space], dtype=np.float64)
    else:
        spacings = [float(text) for text in fields.get("spacings", "1 " * num_axes).split()]
        spatial = [axis for axis, spacing in enumerate(spacings) if math.isfinite(spacing)][:3]
        columns = [np.eye(3)[k] * spacings[axis] for k, axis in enumerate(spatial)]
        origin, signs = np.zeros(3), np.ones(3)
    if len(spatial) != 3 or num_axes not in (3, 4):
        raise ReadError(
            name, f"{num_axes} axes, {len(spatial)} of them spatial; expected 3 spatial and at most one more.",
            "Split the file.",
        )  # fmt: skip
    affine = np.eye(4)
    affine[:3, :3] = np.stack(columns, axis=1)
    affine[:3, 3] = origin
    affine[:3] *= signs[:, None]
    return affine, next((axis for axis in range(num_axes) if axis not in spatial), None)


def _vector(text: str) -> np.ndarray:
    return np.array([float(part) for part in text.strip("() ").split(",")], dtype=np.float64)


def _meta_header(head: bytes, name: str) -> VolumeHeader:
    end = re.search(rb"^\s*ElementDataFile\s*=[^\n]*(\n|$)", head, flags=re.MULTILINE)
    if end is None:
        raise ReadError(name, "Not a MetaImage file: no ElementDataFile in its header.", "Export it again.")
    fields = _fields(head[: end.end()], "=")
    num_axes = int(fields["ndims"])
    if num_axes not in (3, 4) or int(fields.get("elementnumberofchannels", "1")) != 1:
        raise ReadError(name, f"{num_axes} axes, expected 3 or 4 and one channel.", "Split the file.")
    detached = "" if fields["elementdatafile"].upper() == "LOCAL" else fields["elementdatafile"]
    if detached.upper().startswith("LIST") or "%" in detached:
        raise ReadError(name, "The voxels lie in several files.", "Save the volume as one file.")
    if fields["elementtype"] not in _META_TYPES:
        raise ReadError(name, f"Voxels of type {fields['elementtype']}, expected numbers.", "Save it as one of them.")
    is_big = _is_true(fields, "elementbyteordermsb", "binarydatabyteordermsb")
    skip = int(fields.get("headersize", "0"))
    return VolumeHeader(
        shape=tuple(int(size) for size in fields["dimsize"].split()),
        dtype=np.dtype((">" if is_big else "<") + _META_TYPES[fields["elementtype"]]),
        affine=_meta_affine(fields, num_axes),
        list_axis=3 if num_axes == 4 else None,
        encoding="zlib" if _is_true(fields, "compresseddata") else "raw",
        data_file=detached,
        offset=skip if skip == -1 or detached else end.end() + skip,
    )


def _meta_affine(fields: dict[str, str], num_axes: int) -> np.ndarray:
    """RAS affine; MetaImage is LPS, and row k of its TransformMatrix is the direction of axis k."""

    def numbers(default: np.ndarray, *keys: str) -> np.ndarray:
        text = next((fields[key] for key in keys if key in fields), None)
        return default if text is None else np.array([float(part) for part in text.split()])

    spacing = numbers(np.ones(num_axes), "elementspacing", "elementsize")[:3]
    rows = numbers(np.eye(num_axes).ravel(), "transformmatrix", "rotation", "orientation").reshape(num_axes, num_axes)
    affine = np.eye(4)
    affine[:3, :3] = rows[:3, :3].T * spacing
    affine[:3, 3] = numbers(np.zeros(num_axes), "offset", "position", "origin")[:3]
    return LPS_TO_RAS @ affine


def _is_true(fields: dict[str, str], *keys: str) -> bool:
    return any(fields.get(key, "").lower() == "true" for key in keys)


def _fields(head: bytes, separator: str) -> dict[str, str]:
    """Lines `key: value` or `key = value`; the first of a key counts."""
    fields: dict[str, str] = {}
    for line in head.decode("ascii", "replace").splitlines():
        key, *value = re.split(separator, line, maxsplit=1)
        if value and not line.startswith("#"):
            fields.setdefault(key.strip().lower(), value[0].strip())
    return fields


def load(path: Path, source: str, limits: ReadLimits) -> tuple[np.ndarray, np.ndarray]:
    """Voxels `(X, Y, Z, volumes)` in their own type and the RAS affine of a NRRD or MetaImage file.

    Raises:
        ReadError: If it cannot be read, or would take more memory than the limits allow.
    """
    with path.open("rb") as stream:
        header = read_header(stream, source if kind_of(source) == kind_of(path.name) else path.name)
    if min(header.shape) < 1:
        raise ReadError(source, f"Shape {header.shape}, expected sizes of 1 or more.", "Repair the header.")
    check_array_bytes(max(4, header.dtype.itemsize) * math.prod(header.shape), source, limits)
    data_path = path.with_name(header.data_file) if header.data_file else path
    if not data_path.is_file():
        raise ReadError(source, "The file with the voxels is not beside its header.", "Copy both.")
    data = _voxel_bytes(data_path, header)
    if len(data) != header.num_bytes:
        raise ReadError(source, f"{len(data)} bytes of voxels, expected {header.num_bytes}.", "Copy it again.")
    array = np.frombuffer(data, dtype=header.dtype).reshape(header.shape, order="F")
    if header.list_axis is not None:
        array = np.moveaxis(array, header.list_axis, -1)
    return array.reshape(*array.shape[:3], -1), header.affine


def _voxel_bytes(path: Path, header: VolumeHeader) -> bytes:
    """The voxels, unpacked; one byte more than the header declares shows that there are too many."""
    with path.open("rb") as stream:
        if header.offset == -1:
            stream.seek(max(0, path.stat().st_size - header.num_bytes))
        else:
            stream.seek(header.offset)
        if header.encoding == "raw":
            return stream.read(header.num_bytes)
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | (16 if header.encoding == "gzip" else 0))
        unpacked = bytearray()
        while len(unpacked) <= header.num_bytes and (chunk := unpacker.unconsumed_tail or stream.read(_CHUNK_BYTES)):
            unpacked += unpacker.decompress(chunk, _CHUNK_BYTES)
        # Not `flush` of what was left on purpose: it would unpack all of it.
        return bytes(unpacked) if len(unpacked) > header.num_bytes else bytes(unpacked + unpacker.flush())


def detached(container: Folder | Archive, name: str) -> list[str]:
    """The file with the voxels of a detached NRRD or MetaImage header, if it lies in the container."""
    if PurePosixPath(name).suffix.lower() not in (".nhdr", ".mhd"):
        return []
    with container.open(name) as stream:
        data_file = read_header(stream, name).data_file
    beside = PurePosixPath(name).with_name(data_file).as_posix() if data_file else name
    return [beside] if beside != name and container.holds(beside) else []


# ---- NumPy


def array_members(stream: BinaryIO, name: str) -> tuple[str, ...]:
    """Names of the arrays in a `.npz`; empty for `.npy`, which is one array.

    Raises:
        ReadError: If the file is neither.
    """
    if not name.lower().endswith(".npz"):
        _array_header(stream, name)
        return ()
    try:
        with zipfile.ZipFile(stream) as archive:
            return tuple(info.filename.removesuffix(".npy") for info in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ReadError(name, "Not a readable .npz file.", "Copy it again.") from error


def load_array(path: Path, member: str, source: str, limits: ReadLimits) -> np.ndarray:
    """One array of a `.npy` or `.npz` file; its size is checked before memory is taken.

    Raises:
        ReadError: If it is not there, is no plain array of real numbers, or is too large.
    """
    try:
        if not member:
            with path.open("rb") as stream:
                return _load_array(stream, source, limits)
        with zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as packed:
            return _load_array(packed, source, limits)  # type: ignore[arg-type]
    except ReadError:
        raise
    except UNREADABLE as error:
        raise ReadError(source, f"The array cannot be read ({type(error).__name__}).", "Copy it again.") from error


def _load_array(stream: BinaryIO, source: str, limits: ReadLimits) -> np.ndarray:
    shape, fortran, dtype = _array_header(stream, source)
    check_array_bytes(max(4, dtype.itemsize) * math.prod(shape), source, limits)
    num_bytes = math.prod(shape) * dtype.itemsize
    data = stream.read(num_bytes)
    if len(data) != num_bytes:
        raise ReadError(source, f"{len(data)} bytes of numbers, expected {num_bytes}.", "Copy it again.")
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")


def _array_header(stream: BinaryIO, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, EOFError) as error:
        raise ReadError(name, "Not a NumPy array.", "Save it with numpy.save.") from error
    if dtype.hasobject or dtype.kind not in "biuf":
        raise ReadError(name, f"An array of {dtype}, expected real numbers.", "Pickled objects are never read.")
    return shape, fortran, dtype


# ---- Records


def read_volume(
    path: Path, source: str, limits: ReadLimits, *, member: str = "", samples: bool = False
) -> tuple[list[SeriesRecord], list[ReadError]]:
    """Read a NRRD, MetaImage or NumPy file.

    Args:
        path: The file.
        source: Its name in records and errors.
        limits: Bounds on sizes.
        member: Array of a `.npz` file.
        samples: The first axis of an array counts samples: `(N, Y, X)` are N single slices, not one volume.

    Returns:
        One record per volume and what was refused.
    """
    try:
        if kind_of(path.name) == "numpy":
            volumes = _array_volumes(load_array(path, member, source, limits), samples, source)
            return [array_record(volume, source, index, len(volumes)) for index, volume in enumerate(volumes)], []
        array, affine = load(path, source, limits)
        volumes = [array[..., v].transpose(2, 1, 0) for v in range(array.shape[3])]
        facts = sidecar_facts({}, affine, PurePosixPath(source).name)
    except ReadError as error:
        return [], [error]
    return [
        _record(volume, affine, facts, source, index, len(volumes)) for index, volume in enumerate(volumes)
    ], []  # fmt: skip


def _array_volumes(array: np.ndarray, samples: bool, source: str) -> list[np.ndarray]:
    """Volumes `(Z, Y, X)` of an array."""
    expected = (3, 4) if samples else (2, 3, 4)
    if array.ndim not in expected or array.size == 0:
        wanted = "(N, Y, X) or (N, Z, Y, X)" if samples else "(Y, X), (Z, Y, X) or (N, Z, Y, X)"
        raise ReadError(source, f"An array of shape {array.shape}, expected {wanted}.", "Save one volume to a file.")
    if samples and array.ndim == 3:
        return [sample[None] for sample in array]
    return list(array) if array.ndim == 4 else [array if array.ndim == 3 else array[None]]


def array_record(volume: np.ndarray, source: str, index: int, num_volumes: int) -> SeriesRecord:
    """Record of an image `(Z, Y, X)` without geometry: voxels of 1 mm, its plane unknown."""
    facts = {**sidecar_facts({}, np.eye(4), PurePosixPath(source).name), "plane": None}
    return _record(volume, np.eye(4), facts, source, index, num_volumes)


def _record(
    volume: np.ndarray, affine: np.ndarray, facts: Facts, source: str, index: int, num_volumes: int
) -> SeriesRecord:
    patient, study, series = keys(source)
    image = np.nan_to_num(np.ascontiguousarray(volume, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    return SeriesRecord(
        scan=Scan(image=image, affine=affine, facts=dict(facts)),
        source=source, source_format=kind_of(source.partition("#")[0]) or "numpy",
        patient_key=patient, study_key=study, series_key=series, volume=index, num_volumes=num_volumes,
    )  # fmt: skip
