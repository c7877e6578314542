"""Raw k-space in HDF5: the fastMRI layout and ISMRMRD datasets, brought to the one convention of docs/kspace.md.

K-space is `(Z, C, Y, X)`, centred, orthonormal, readout along Y without oversampling, phase encoding along X. The image
is the root sum of squares of its inverse transform, zero-filled where lines were not acquired.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from omnimri.models.scan import Scan
from omnimri.platform.data.deid import header_identifiers
from omnimri.platform.data.formats.facts import Facts, body_part, ismrmrd_facts, ismrmrd_identifiers, plane
from omnimri.platform.data.formats.kspace.fourier import centered_ifft, crop_readout, root_sum_of_squares_image
from omnimri.platform.data.formats.kspace.prewhitening import (
    RECEIVER_NOISE_BANDWIDTH,
    bandwidth_scale,
    noise_covariance,
)
from omnimri.platform.data.formats.records import (
    UNREADABLE,
    ReadError,
    ReadLimits,
    SeriesRecord,
    check_array_bytes,
    quiet_libraries,
)  # fmt: skip
from omnimri.platform.data.formats.sequences import contrast_of

with warnings.catch_warnings():
    # ismrmrd.hdf5 sets the process's warning filter to "default" when it is imported.
    import ismrmrd

# Z slices, C coils, Y readout, X phase encoding, L acquisitions

LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])

_OTHER_SCANS = (
    ismrmrd.ACQ_IS_NOISE_MEASUREMENT, ismrmrd.ACQ_IS_NAVIGATION_DATA, ismrmrd.ACQ_IS_PHASECORR_DATA,
    ismrmrd.ACQ_IS_DUMMYSCAN_DATA, ismrmrd.ACQ_IS_RTFEEDBACK_DATA, ismrmrd.ACQ_IS_HPFEEDBACK_DATA,
    ismrmrd.ACQ_IS_SURFACECOILCORRECTIONSCAN_DATA, ismrmrd.ACQ_IS_PARALLEL_CALIBRATION,
    ismrmrd.ACQ_IS_PHASE_STABILIZATION, ismrmrd.ACQ_IS_PHASE_STABILIZATION_REFERENCE,
)  # fmt: skip
"""Flags of acquisitions that are no image lines."""

_FASTMRI_ORIENTATION = {"AX": ("axial", "brain"), "COR": ("coronal", "knee")}
"""Prefix of fastMRI's `acquisition` attribute (AXT2, CORPDFS_FBK) and what it stands for."""

KSPACE_NAMES = ("kspace", "kspace_full", "kus")
"""Arrays of raw data at the top of an HDF5 file; MATLAB v7.3 files are HDF5 too."""

_PADDING_TOLERANCE = 2
"""Lines by which zero padding left and right may differ; more is partial Fourier."""


@dataclass(frozen=True)
class RawVolume:
    """One volume of a raw data file."""

    scan: Scan
    noise_covariance: np.ndarray | None = None
    """As `SeriesRecord` has it."""


@dataclass(frozen=True)
class RawKeys:
    """What a probe learns from an HDF5 file without reading k-space."""

    layout: str
    """`fastmri`, `ismrmrd`, `matlab`, or one of `layouts.LAYOUTS`."""
    patient: str
    study: str
    identifiers: tuple[str, ...] = ()
    """What the header says of person, place and day, as `deid.header_identifiers` gives it."""


def probe(path: Path, source: str) -> RawKeys:
    """Find the layout and the raw identifiers of an HDF5 file.

    Raises:
        ReadError: If it is no HDF5 or holds no k-space that we know.
    """
    stem = PurePosixPath(source).name.split(".")[0]
    try:
        with quiet_libraries(), open_kspace(path, source) as (file, layout, group):
            if layout != "ismrmrd":
                stated = _text(file.attrs.get("patient_id"))
                patient = stated or stem
                found = _header(file["ismrmrd_header"][()], source) if "ismrmrd_header" in file else None
                named = ismrmrd_identifiers(found) if found is not None else {}
                return RawKeys(layout, patient, patient, header_identifiers(named | {"PatientID": stated}))
            header = _header(group["xml"][0], source)
            patient = str(getattr(header.subjectInformation, "patientID", None) or stem)
            study = getattr(header.studyInformation, "studyInstanceUID", None)
            study = str(study or getattr(header.studyInformation, "studyID", None) or patient)
            return RawKeys(layout, patient, study, header_identifiers(ismrmrd_identifiers(header)))
    except ReadError:
        raise
    except UNREADABLE as error:
        raise ReadError(source, f"Not a readable HDF5 file ({type(error).__name__}).", "Copy it again.") from error


def read_kspace(path: Path, source: str, limits: ReadLimits) -> tuple[list[SeriesRecord], list[ReadError]]:
    """Read a raw data file of fastMRI or ISMRMRD.

    Returns:
        One record per volume (echoes, repetitions, phases and sets of an ISMRMRD file apart) and what was refused.
    """

    def read(file: h5py.File, layout: str, group: h5py.Group) -> list[RawVolume]:
        if layout == "fastmri":
            return [RawVolume(_read_fastmri(file, source, limits))]
        return _read_ismrmrd(group, source, limits)

    return read_scans(path, source, read)


def read_scans(
    path: Path, source: str, read: Callable[[h5py.File, str, h5py.Group], list[RawVolume]]
) -> tuple[list[SeriesRecord], list[ReadError]]:
    """Records of what `read` finds in a file (given the file, its layout and the group that holds it), and refusals."""
    try:
        keys = probe(path, source)
        with quiet_libraries(), open_kspace(path, source) as (file, layout, group):
            raw = read(file, layout, group)
    except ReadError as error:
        return [], [error]
    except UNREADABLE as error:
        return [], [ReadError(source, f"The raw data cannot be read ({type(error).__name__}).", "Copy it again.")]
    return [
        SeriesRecord(
            scan=volume.scan, source=source, source_format=keys.layout, patient_key=keys.patient, study_key=keys.study,
            series_key=source, volume=index, num_volumes=len(raw), identifiers=keys.identifiers,
            noise_covariance=volume.noise_covariance,
        )
        for index, volume in enumerate(raw)
    ], []  # fmt: skip


@contextlib.contextmanager
def open_kspace(path: Path, source: str) -> Iterator[tuple[h5py.File, str, h5py.Group]]:
    """The open file, its layout and the group that holds it.

    Raises:
        ReadError: If the layout is unknown, or a link or dataset points at other files.
    """
    with h5py.File(path, "r") as file:
        for name in file:
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                raise ReadError(source, "The HDF5 file links to other places.", "Copy the data into one file.")
        groups = {name: item for name, item in file.items() if isinstance(item, h5py.Group)}
        raw = [name for name, group in groups.items() if "xml" in group and "data" in group]
        array = next((name for name in KSPACE_NAMES if isinstance(file.get(name), h5py.Dataset)), None)
        if array:
            layout, group = _array_layout(file, array), file
        elif raw:
            layout, group = "ismrmrd", groups["dataset" if "dataset" in raw else raw[0]]
        elif path.suffix.lower() == ".mat":
            layout, group = "matlab", file
        else:
            found = ", ".join(sorted(file)[:6]) or "nothing"
            # Names in a file may be those of a person, and reasons are copied into the corpus.
            raise ReadError(
                source, "HDF5 without k-space that we know.",
                f"It holds {found}; expected `kspace` (fastMRI), `kspace_full` (CMRxRecon) or a group with `xml` and "
                "`data` (ISMRMRD).",
            )  # fmt: skip
        for name in (*KSPACE_NAMES, "data", "xml", "mask", "ismrmrd_header"):
            dataset = group.get(name)
            if isinstance(dataset, h5py.Dataset) and (dataset.external or dataset.is_virtual):
                raise ReadError(source, "The HDF5 file keeps its data in other files.", "Copy the data into one file.")
        yield file, layout, group


def _array_layout(file: h5py.File, name: str) -> str:
    """The layout of k-space in one array, by its type, its axes and what lies beside it (`layouts`)."""
    dataset = file[name]
    if dataset.dtype.names == ("real", "imag") or (dataset.dtype.names is None and name != "kspace"):
        return "cmrxrecon" if dataset.ndim > 3 else "matlab"
    if dataset.ndim == 4 and np.issubdtype(dataset.dtype, np.floating):
        return "cc359"
    if dataset.ndim == 5:
        return "skm-tea" if "maps" in file or "target" in file else "fastmri-prostate"
    return "fastmri"


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray):
        value = value.flat[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value if value is not None else "")


def _header(xml: bytes | str, source: str) -> Any:
    """The ISMRMRD header; document types are refused because entities may expand without bound."""
    text = _text(xml)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ReadError(source, "The XML header declares a document type.", "Write a plain ISMRMRD header.")
    return ismrmrd.xsd.CreateFromDocument(text)


# ---- fastMRI


def _read_fastmri(file: h5py.File, source: str, limits: ReadLimits) -> Scan:
    """FastMRI's layout (Zbontar et al., arXiv 1811.08839): `kspace` `(Z, C, Y, X)`, or `(Z, Y, X)` for one coil."""
    dataset = file["kspace"]
    if dataset.ndim not in (3, 4) or not np.issubdtype(dataset.dtype, np.complexfloating):
        raise ReadError(
            source, f"kspace {dataset.shape} of {dataset.dtype}, expected complex (slices, coils, readout, phase).",
            "Only the fastMRI layout is read.",
        )  # fmt: skip
    check_array_bytes(8 * int(np.prod(dataset.shape)), source, limits)
    kspace = dataset[...].astype(np.complex64, copy=False)
    kspace = kspace[:, None] if kspace.ndim == 3 else kspace
    header = _header(file["ismrmrd_header"][()], source) if "ismrmrd_header" in file else None
    spacing, size = _fastmri_grid(header, kspace.shape)
    kspace = np.stack([crop_readout(coils, size) for coils in kspace])
    mask = np.asarray(file["mask"]).astype(bool).ravel() if "mask" in file else (kspace != 0).any((0, 1, 2))
    if mask.shape != (kspace.shape[-1],):
        raise ReadError(
            source, f"mask {mask.shape}, expected one value for each of {kspace.shape[-1]} lines.", "Repair the mask."
        )
    kspace = kspace * mask
    image = finite_image(kspace, source)
    affine, is_oriented = _fastmri_affine(file, spacing, image.shape)
    facts = _fastmri_facts(file, header, affine, is_oriented)
    return Scan(image=image, affine=affine, kspace=kspace, mask=mask_or_none(mask), facts=facts)


def _fastmri_grid(header: Any, shape: tuple[int, ...]) -> tuple[tuple[float, float, float], int]:
    """Spacing `(x, y, z)` in mm and the readout size without oversampling, from the XML header if there is one."""
    if header is None:
        return (1.0, 1.0, 1.0), shape[2]
    encoded, recon = header.encoding[0].encodedSpace, header.encoding[0].reconSpace
    size = _cropped_size(shape[2], encoded.fieldOfView_mm.x, recon.fieldOfView_mm.x)
    spacing = (
        encoded.fieldOfView_mm.y / shape[3],
        encoded.fieldOfView_mm.x / shape[2],
        recon.fieldOfView_mm.z / max(recon.matrixSize.z, 1),
    )
    return tuple(value if value > 0 else 1.0 for value in spacing), size  # type: ignore[return-value]


def _cropped_size(num_samples: int, encoded_mm: float, recon_mm: float) -> int:
    return min(num_samples, round(num_samples * recon_mm / encoded_mm)) if encoded_mm > 0 < recon_mm else num_samples


def _fastmri_affine(
    file: h5py.File, spacing: tuple[float, float, float], shape: tuple[int, ...]
) -> tuple[np.ndarray, bool]:
    """The `affine_ras` attribute (16 numbers, index `(x, y, z)` to mm), else a box around the origin."""
    if "affine_ras" in file.attrs:
        return np.asarray(file.attrs["affine_ras"], dtype=np.float64).reshape(4, 4), True
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array(spacing) * (np.array(shape[::-1]) - 1) / 2
    return affine, False


def _fastmri_facts(file: h5py.File, header: Any, affine: np.ndarray, is_oriented: bool) -> Facts:
    acquisition = _text(file.attrs.get("acquisition"))
    facts: Facts = ismrmrd_facts(header, affine) if header is not None else {"plane": plane(affine)}
    facts["contrast"] = contrast_of(acquisition) or facts.get("contrast")
    prefix = next((key for key in _FASTMRI_ORIENTATION if acquisition.startswith(key)), None)
    known_plane, known_part = _FASTMRI_ORIENTATION.get(prefix or "", (None, None))
    if not is_oriented:
        facts["plane"] = known_plane
    facts["body_part"] = facts.get("body_part") or body_part(acquisition) or known_part
    return facts


def finite_image(kspace: np.ndarray, source: str) -> np.ndarray:
    """Root sum of squares `(Z, Y, X)` of k-space `(Z, C, Y, X)`.

    One sample that is no number spoils its whole slice, and zero in its place would be another measurement.

    Raises:
        ReadError: If the image holds values that are not finite.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        image = root_sum_of_squares_image(kspace)
    if not np.isfinite(image).all():
        raise ReadError(source, "K-space holds values that are not finite, or too large.", "Export it again.")
    return image


def mask_or_none(mask: np.ndarray) -> np.ndarray | None:
    """The mask, or None when only zero padding on both sides is missing (an interpolated, fully sampled grid)."""
    if not mask.any():
        return mask
    acquired = np.flatnonzero(mask)
    left, right = acquired[0], len(mask) - 1 - acquired[-1]
    is_full = len(acquired) == acquired[-1] - acquired[0] + 1 and abs(left - right) <= _PADDING_TOLERANCE
    return None if is_full else mask


# ---- ISMRMRD


@dataclass(frozen=True)
class _Encoding:
    """The Cartesian grid that acquisitions are sorted into."""

    readout: int
    """Samples along the readout, oversampled."""
    cropped: int
    """Readout voxels without oversampling."""
    lines: int
    line_center: int
    """Encoding step that is the centre of k-space."""
    partitions: int
    """Second phase-encoding steps; one for 2D."""
    partition_center: int
    cropped_partitions: int
    spacing_mm: tuple[float, float, float]
    """`(x, y, z)`: phase, readout, slice."""


def _read_ismrmrd(group: h5py.Group, source: str, limits: ReadLimits) -> list[RawVolume]:
    header = _header(group["xml"][0], source)
    encoding = _encoding(header, source)
    acquisitions = group["data"][...]
    heads = acquisitions["head"]
    others = sum(_bit(flag) for flag in _OTHER_SCANS)
    use = (heads["flags"] & others == 0) & (heads["encoding_space_ref"] == 0)
    if not use.any():
        raise ReadError(source, "The ISMRMRD file holds no image lines.", "Only noise or calibration was stored.")
    volumes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index in np.flatnonzero(use):
        counters = heads["idx"][index]
        key = tuple(int(counters[name]) for name in ("contrast", "repetition", "phase", "set"))
        volumes[key].append(int(index))
    noise = _noise_scan(acquisitions)
    return [
        RawVolume(
            _ismrmrd_volume(acquisitions[volumes[key]], encoding, header, key[0], source, limits),
            noise and _noise_of_lines(*noise, heads["sample_time_us"][volumes[key]], header),
        )
        for key in sorted(volumes)
    ]


def _noise_scan(acquisitions: np.ndarray) -> tuple[np.ndarray, float] | None:
    """Covariance `(C, C)` of the noise scan and its dwell time in microseconds; None without a noise scan.

    Noise scans of other dwell time or coils than the first are left out. The covariance is empty where samples do not
    fit what their header says of them.
    """
    heads = acquisitions["head"]
    is_noise = heads["flags"] & _bit(ismrmrd.ACQ_IS_NOISE_MEASUREMENT) != 0
    if not is_noise.any():
        return None
    for name in ("sample_time_us", "active_channels"):
        is_noise &= heads[name] == heads[name][is_noise][0]
    scans = acquisitions[is_noise]
    try:
        covariance = noise_covariance(np.concatenate([_samples(scan) for scan in scans], axis=1))
    except (ValueError, IndexError):
        covariance = np.empty((0, 0), dtype=np.complex128)
    return covariance, float(scans["head"]["sample_time_us"][0])


def _noise_of_lines(covariance: np.ndarray, noise_dwell_us: float, dwell_us: np.ndarray, header: Any) -> np.ndarray:
    """Covariance `(C, C)` of the noise in one sample of image lines with these dwell times, by that of a noise scan."""
    system = header.acquisitionSystemInformation
    bandwidth = getattr(system, "relativeReceiverNoiseBandwidth", None) or RECEIVER_NOISE_BANDWIDTH
    return covariance / bandwidth_scale(float(np.median(dwell_us)), noise_dwell_us, bandwidth)


def _bit(flag: int) -> np.uint64:
    return np.uint64(1) << np.uint64(flag - 1)


def _samples(acquisition: np.ndarray) -> np.ndarray:
    """Complex64 `(C, samples)`."""
    head = acquisition["head"]
    return acquisition["data"].view(np.complex64).reshape(int(head["active_channels"]), int(head["number_of_samples"]))


def _encoding(header: Any, source: str) -> _Encoding:
    first = header.encoding[0]
    trajectory = str(getattr(first.trajectory, "value", first.trajectory)).lower()
    if "cartesian" not in trajectory:
        raise ReadError(
            source, f"Trajectory {trajectory}, expected Cartesian.", "Reconstruct it and ingest the images."
        )
    encoded, recon, limit = first.encodedSpace, first.reconSpace, first.encodingLimits
    size, fov, recon_fov = encoded.matrixSize, encoded.fieldOfView_mm, recon.fieldOfView_mm
    steps = [getattr(limit, f"kspace_encoding_step_{n}", None) for n in (1, 2)]
    lines, partitions = max(size.y, 1), max(size.z, 1)
    return _Encoding(
        readout=size.x, cropped=_cropped_size(size.x, fov.x, recon_fov.x),
        lines=lines, line_center=steps[0].center if steps[0] else lines // 2,
        partitions=partitions, partition_center=steps[1].center if steps[1] else partitions // 2,
        cropped_partitions=_cropped_size(partitions, fov.z, recon_fov.z) if partitions > 1 else 1,
        spacing_mm=(fov.y / lines, fov.x / size.x, fov.z / partitions),
    )  # fmt: skip


def _ismrmrd_volume(
    acquisitions: np.ndarray, encoding: _Encoding, header: Any, echo: int, source: str, limits: ReadLimits
) -> Scan:
    """One volume from its image lines `(L,)`."""
    heads = acquisitions["head"]
    slices, first_of_slice = np.unique(heads["idx"]["slice"], return_index=True)
    if len(slices) > 1 and encoding.partitions > 1:
        raise ReadError(source, f"{len(slices)} 3D slabs in one file.", "Write one slab to a file.")
    num_coils = int(heads["active_channels"].max())
    num_grid = len(slices) * encoding.partitions * num_coils * encoding.readout * encoding.lines
    check_array_bytes(8 * num_grid, source, limits)
    affine, order = _ismrmrd_affine(heads[first_of_slice], encoding)
    rank = {int(slices[position]): z for z, position in enumerate(order)}
    kspace, mask = _grid_lines(acquisitions, encoding, rank, num_coils, source)
    image = finite_image(kspace, source)
    facts = ismrmrd_facts(header, affine, echo=echo)
    return Scan(image=image, affine=affine, kspace=kspace, mask=mask_or_none(mask), facts=facts)


def _grid_lines(
    acquisitions: np.ndarray, encoding: _Encoding, rank: dict[int, int], num_coils: int, source: str
) -> tuple[np.ndarray, np.ndarray]:
    """Sort lines into `(Z, C, Y, X)`, averaging repeats, and say which `(X,)` were acquired in every slice."""
    shape = (len(rank), encoding.partitions, num_coils, encoding.readout, encoding.lines)
    grid = np.zeros(shape, dtype=np.complex64)
    counts = np.zeros((shape[0], shape[1], shape[4]), dtype=np.int32)
    for acquisition in acquisitions:
        head = acquisition["head"]
        z = rank[int(head["idx"]["slice"])]
        line = int(head["idx"]["kspace_encode_step_1"]) - encoding.line_center + encoding.lines // 2
        partition = int(head["idx"]["kspace_encode_step_2"]) - encoding.partition_center + encoding.partitions // 2
        if not (0 <= line < encoding.lines and 0 <= partition < encoding.partitions):
            raise ReadError(source, "An acquisition lies outside the encoded matrix.", "Repair the header's limits.")
        start, samples = _placed_samples(acquisition, encoding.readout)
        grid[z, partition, : samples.shape[0], start : start + samples.shape[1], line] += samples
        counts[z, partition, line] += 1
    mask = np.asarray(counts.any((0, 1)))
    if (counts[..., mask] == 0).any():
        raise ReadError(
            source, "The acquired phase-encoding lines differ between slices or partitions.",
            "Only sampling along one phase-encoding direction is read.",
        )  # fmt: skip
    grid /= np.maximum(counts, 1)[:, :, None, None, :]
    if encoding.partitions > 1:
        start = encoding.partitions // 2 - encoding.cropped_partitions // 2
        grid = centered_ifft(grid, (1,))[:, start : start + encoding.cropped_partitions]
    kspace = grid.reshape(-1, *shape[2:])  # (Z, C, Y oversampled, X)
    return np.stack([crop_readout(coils, encoding.cropped) for coils in kspace]), mask


def _placed_samples(acquisition: np.ndarray, readout: int) -> tuple[int, np.ndarray]:
    """Where a readout starts on the grid so that its centre sample is the centre of k-space, and its `(C, samples)`."""
    head = acquisition["head"]
    samples = _samples(acquisition)
    num_samples = samples.shape[1]
    start = readout // 2 - int(head["center_sample"])
    first = max(int(head["discard_pre"]), -start, 0)
    last = min(num_samples - int(head["discard_post"]), readout - start)
    kept = samples[:, first:last]
    if int(head["flags"]) >> (ismrmrd.ACQ_IS_REVERSE - 1) & 1:
        kept = kept[:, ::-1]
    return start + first, kept


def _ismrmrd_affine(heads: np.ndarray, encoding: _Encoding) -> tuple[np.ndarray, np.ndarray]:
    """Affine to RAS and the order of the slices along their normal.

    A position is that of voxel `(X // 2, Y // 2)`: the centred Fourier transform puts the isocentre of the encoding
    there. Directions and positions are LPS. Without directions (simulators leave zeros) the axes are those of RAS.

    Args:
        heads: Acquisition header of one line for each slice `(Z,)`.
        encoding: The grid.
    """
    dx, dy, dz = encoding.spacing_mm
    phase, read, normal = (
        heads[0][name].astype(np.float64) * LPS_TO_RAS for name in ("phase_dir", "read_dir", "slice_dir")
    )
    if not (phase.any() and read.any()):
        phase, read, normal = np.eye(3)
    if not normal.any():
        normal = np.cross(phase, read)
    positions = heads["position"].astype(np.float64) * LPS_TO_RAS  # (Z, 3)
    offsets = positions @ normal
    order = np.argsort(offsets, kind="stable")
    if len(order) > 1 and np.ptp(offsets) > 0:
        dz = np.ptp(offsets) / (len(order) - 1)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([phase * dx, read * dy, normal * dz], axis=1)
    # For a 3D slab the position is that of its centre partition.
    center = [encoding.lines // 2, encoding.cropped // 2, encoding.cropped_partitions // 2]
    affine[:3, 3] = positions[order[0]] - affine[:3, :3] @ np.array(center)
    return affine, order
