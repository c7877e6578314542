"""Bounds on uploads, enforced before any image library parses a byte of pixel data.

Zips are unpacked here, member by member and counted, under names of our own: file names may hold a patient's name.
"""

from __future__ import annotations

import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import h5py
import nibabel as nib
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.uid import DeflatedExplicitVRLittleEndian

from omnimri.platform.data.formats.matlab import MAGIC_HDF5
from omnimri.serve.config import UploadLimits
from omnimri.serve.schemas import RequestError

MB = 1_000_000
CHUNK = 1 << 20
RATIO_FREE_BYTES = 16 * MB
"""Unpacked size below which the compression ratio is not looked at: empty slices compress without end."""


class Bounds:
    """Counts what one request brings, packed and unpacked, and refuses what exceeds the limits."""

    def __init__(self, limits: UploadLimits) -> None:
        self.limits = limits
        self.num_files = 0
        self.unpacked = 0

    def save(self, uploads: Iterable[tuple[str, BinaryIO]], folder: Path) -> None:
        """Write uploaded parts, given as (file name, stream), into `folder`, zips unpacked, and check every file.

        Raises:
            RequestError: 413 where something is too large, 422 where it is malformed.
        """
        names = PlainNames()
        for name, stream in uploads:
            path = folder / names.of(name)
            with path.open("wb") as file:
                shutil.copyfileobj(stream, file, CHUNK)
            if path.stat().st_size == 0:
                raise RequestError(422, "empty_file", "The uploaded file is empty.")
            if zipfile.is_zipfile(path):
                self._unzip(path, folder)
                path.unlink()
            else:
                self._count_file(path)
        for path in sorted(folder.iterdir()):
            self._check(path)

    def _unzip(self, archive: Path, folder: Path) -> None:
        names = PlainNames(prefix=archive.name.split(".")[0] + "-")
        try:
            with zipfile.ZipFile(archive) as opened:
                members = [member for member in opened.infolist() if _is_content(member)]
                self._expect_room(sum(member.file_size for member in members), archive.stat().st_size)
                for member in members:
                    path = folder / names.of(member.filename)
                    with opened.open(member) as source, path.open("wb") as target:
                        shutil.copyfileobj(source, target, CHUNK)
                    self._count_file(path)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise RequestError(422, "bad_zip", "The zip file is damaged or cut short; pack it again.") from error
        except RuntimeError as error:
            # zipfile's answer to an encrypted member.
            raise RequestError(422, "bad_zip", "The zip file is encrypted; send it without a password.") from error

    def _count_file(self, path: Path) -> None:
        self.num_files += 1
        self._add(path.stat().st_size)
        if self.num_files > self.limits.max_files:
            raise RequestError(
                413, "too_many_files", f"The upload holds more than {self.limits.max_files} files; send one series."
            )

    def _add(self, size: int) -> None:
        self.unpacked += size
        if self.unpacked > self.limits.max_unpacked_mb * MB:
            raise RequestError(
                413,
                "too_large",
                f"The upload unpacks to more than {self.limits.max_unpacked_mb:g} MB; send one series.",
            )

    def _expect_room(self, unpacked: int, packed: int) -> None:
        """Refuse by declared sizes, before anything is unpacked."""
        if unpacked > RATIO_FREE_BYTES and unpacked > self.limits.max_ratio * packed:
            raise RequestError(
                413,
                "zip_bomb",
                f"The upload unpacks to more than {self.limits.max_ratio:g} times its size, which no MRI series does.",
            )
        if self.unpacked + unpacked > self.limits.max_unpacked_mb * MB:
            self._add(unpacked)

    def _check(self, path: Path) -> None:
        """Bounds by kind of file, told from its first bytes."""
        with path.open("rb") as file:
            head = file.read(132)
        if zipfile.is_zipfile(path):
            raise RequestError(422, "nested_zip", "The upload holds a zip inside a zip; send the inner one.")
        if head[:2] == b"\x1f\x8b":
            self._check_gzip(path)
        if head.startswith((b"\x89HDF", MAGIC_HDF5)):
            self._check_hdf5(path)
        elif head[128:132] == b"DICM":
            self._check_dicom(path)
        elif path.name.endswith((".nii", ".nii.gz")):
            self._check_nifti(path)

    def _check_gzip(self, path: Path) -> None:
        packed, inflated = path.stat().st_size, 0
        inflater = zlib.decompressobj(wbits=31)
        with path.open("rb") as file:
            pending = file.read(CHUNK)
            while pending and not inflater.eof:
                try:
                    inflated += len(inflater.decompress(pending, CHUNK))
                except zlib.error as error:
                    raise RequestError(422, "bad_gzip", "The gzip file is damaged; send it again.") from error
                self._expect_room(inflated, packed)
                pending = inflater.unconsumed_tail or file.read(CHUNK)
        self._add(inflated)

    def _check_hdf5(self, path: Path) -> None:
        links: list[object] = []
        items: list[h5py.Dataset | h5py.Group] = []
        # The visitors only collect: h5py does not carry an exception out of them.
        try:
            with h5py.File(path, "r") as file:
                file.visititems_links(lambda _, link: links.append(link))
                file.visititems(lambda _, item: items.append(item))
                datasets = [item for item in items if isinstance(item, h5py.Dataset)]
                outside = any(isinstance(link, h5py.ExternalLink) for link in links)
                outside |= any(dataset.external or dataset.is_virtual for dataset in datasets)
                sizes = [(dataset.nbytes, dataset.id.get_storage_size()) for dataset in datasets]
        except OSError as error:
            raise RequestError(422, "bad_hdf5", "The HDF5 file is damaged or cut short; send it again.") from error
        if outside:
            raise RequestError(
                422, "external_data", "The HDF5 file points to other files; send one that holds all its data."
            )
        for unpacked, stored in sizes:
            self._expect_room(unpacked, max(stored, 1))

    def _check_dicom(self, path: Path) -> None:
        try:
            meta = pydicom.filereader.read_file_meta_info(path)
            if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
                raise RequestError(422, "deflated_dicom", "Deflated DICOM is not accepted; export it uncompressed.")
            header = pydicom.dcmread(
                path, stop_before_pixels=True, specific_tags=["Rows", "Columns", "NumberOfFrames", "BitsAllocated"]
            )
            axes = [int(header.get(name) or 1) for name in ("Rows", "Columns", "NumberOfFrames")]
            size = axes[0] * axes[1] * axes[2] * max(int(header.get("BitsAllocated") or 8) // 8, 1)
        except (InvalidDicomError, ValueError, TypeError, EOFError, AttributeError):
            return  # The reader says what is wrong with it.
        self._check_axes(axes)
        self._expect_room(size, path.stat().st_size)

    def _check_nifti(self, path: Path) -> None:
        try:
            shape = nib.load(path).shape
        except (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, OSError, EOFError, ValueError):
            return  # The reader says what is wrong with it.
        self._check_axes(list(shape))

    def _check_axes(self, axes: list[int]) -> None:
        voxels = 1
        for size in axes:
            voxels *= max(int(size), 1)
        if max(axes, default=0) > self.limits.max_axis or voxels > self.limits.max_voxels:
            raise RequestError(
                413,
                "too_many_voxels",
                f"The image declares {' x '.join(map(str, axes))} voxels; at most {self.limits.max_axis} per axis and "
                f"{self.limits.max_voxels} in all are accepted.",
            )


class PlainNames:
    """File names of our own that keep what readers need: which files share a stem, the BIDS suffix and the ending.

    They also keep what says that voxels are values of a quantity, and `sub-` in front, for BIDS prescribes their units.
    """

    _ENDING = re.compile(
        r"(_part-(mag|phase))?"
        r"(_(t1w?|t2w?|flair|pdw?|t2star|bold|dwi|dseg|mask|probseg|gre|megre|e?adc|ktrans|qsm|pdff|"
        r"(t1|t2|t2star|t1rho|r1|r2|r2star|pd|b0|b1|fa|md|ff|cbf|cbv|mtt|ttp)[_-]?map))?"
        r"(\.(nii|mrd))?(\.[a-z0-9]{1,6})?$",
        re.IGNORECASE,
    )

    def __init__(self, prefix: str = "file") -> None:
        self.prefix = prefix
        self._stems: dict[str, int] = {}
        self._used: set[str] = set()

    def of(self, original: str) -> str:
        """The plain name for an original one."""
        path = PurePosixPath(original.replace("\\", "/"))
        found = self._ENDING.search(path.name)
        ending = found.group(0) if found else ""
        stem = str(path).removesuffix(ending)
        name = self._name(stem, ending)
        if name in self._used:  # Two parts of one name: a browser sends no folders.
            name = self._name(f"{stem}#{len(self._used)}", ending)
        self._used.add(name)
        return name

    def _name(self, stem: str, ending: str) -> str:
        bids = "sub-" if PurePosixPath(stem).name.startswith("sub-") else ""
        return f"{bids}{self.prefix}{self._stems.setdefault(stem, len(self._stems)):05d}{ending}"


def _is_content(member: zipfile.ZipInfo) -> bool:
    """Whether a member is a file that a person meant to send."""
    parts = PurePosixPath(member.filename).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not member.is_dir() and not hidden and parts[-1:] != ("DICOMDIR",)
