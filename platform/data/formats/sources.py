"""Where files come from: a folder or a zip, listed in a fixed order and opened under bounds."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from omnimri.platform.data.formats.records import ReadError, ReadLimits

_MARK_BYTES = 65536
_RATIO_FREE_BYTES = 2**20
"""Members smaller than this may compress as well as they like: an empty mask does."""


class Folder:
    """The files below a folder, without hidden ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: dict[str, int] | None = None

    def names(self) -> dict[str, int]:
        """Name of every file and its bytes; symbolic links to folders are not followed."""
        if self._names is None:
            self._names = self._list()
        return self._names

    def _list(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for folder, folders, files in os.walk(self.path):
            folders[:] = sorted(name for name in folders if not _is_hidden(name))
            for name in files:
                path = Path(folder) / name
                if not _is_hidden(name) and path.is_file():
                    found[path.relative_to(self.path).as_posix()] = path.stat().st_size
        return dict(sorted(found.items()))

    def holds(self, name: str) -> bool:
        """Whether a file is there, listed or not."""
        return (self.path / name).is_file()

    def open(self, name: str) -> BinaryIO:
        """One file for reading."""
        return (self.path / name).open("rb")

    def mark(self, name: str) -> str:
        """Differs between files of other content, as far as their size, beginning and end tell."""
        with self.open(name) as stream:
            digest = hashlib.sha256(stream.read(_MARK_BYTES))
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _MARK_BYTES))
            digest.update(stream.read(_MARK_BYTES))
        return f"{size}-{digest.hexdigest()}"

    @contextlib.contextmanager
    def local(self, names: Iterable[str]) -> Iterator[dict[str, Path]]:
        """The named files where they lie."""
        yield {name: self.path / name for name in names}


class SingleFile(Folder):
    """One file of a folder; its neighbours (sidecar, annotations) can be opened but are not listed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.parent)
        self.name = path.name

    def _list(self) -> dict[str, int]:
        return {self.name: (self.path / self.name).stat().st_size}


class Archive:
    """The members of a zip, checked against the limits before anything is unpacked.

    Raises:
        ReadError: If the file is no zip, is encrypted, or breaks a limit.
    """

    def __init__(self, path: Path, limits: ReadLimits) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = [info for info in archive.infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
            raise ReadError(path.name, "Not a readable zip.", "Make it again, or unpack it and name the folder.") from (
                error
            )
        _check_members(path.name, members, limits)
        self._sizes = {info.filename: info.file_size for info in members if not _is_hidden(info.filename)}
        self._marks = {info.filename: f"{info.file_size}-{info.CRC:08x}" for info in members}

    def names(self) -> dict[str, int]:
        """Name of every member and its unpacked bytes."""
        return dict(sorted(self._sizes.items()))

    def holds(self, name: str) -> bool:
        """Whether a member of that name is there."""
        return name in self._sizes

    def mark(self, name: str) -> str:
        """Differs between members of other content: size and checksum of the directory."""
        return self._marks[name]

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """One member for reading; no more bytes come out than the checked directory declares."""
        with zipfile.ZipFile(self.path) as archive, archive.open(name) as member:
            yield member  # type: ignore[misc]

    @contextlib.contextmanager
    def local(self, names: Iterable[str]) -> Iterator[dict[str, Path]]:
        """The named members unpacked in a folder that lives as long as the block."""
        with tempfile.TemporaryDirectory(prefix="omnimri-zip-") as folder, zipfile.ZipFile(self.path) as archive:
            paths = {}
            for name in names:
                paths[name] = Path(folder) / name
                paths[name].parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as member, paths[name].open("wb") as target:
                    shutil.copyfileobj(member, target, 2**20)
            yield paths


def open_container(path: Path, limits: ReadLimits) -> Folder | Archive:
    """The container at a path: a folder, a zip, or a single file.

    Raises:
        FileNotFoundError: If nothing is there.
        ReadError: If a zip cannot be opened or breaks a limit.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.is_dir():
        return Folder(path)
    return Archive(path, limits) if path.suffix.lower() == ".zip" else SingleFile(path)


@dataclass(frozen=True)
class Source:
    """A container, the files of it that are to be read, and how the ledger calls them."""

    container: Folder | Archive
    prefix: str
    """Put before names in records and the ledger."""
    sizes: dict[str, int]
    """Name to bytes."""
    named_alone: bool = False
    """The caller named this one file."""


def open_sources(paths: Sequence[Path], limits: ReadLimits) -> tuple[list[Source], list[ReadError]]:
    """Open everything the caller named; a zip that lies in a folder is a source of its own.

    Returns:
        Sources in a fixed order, and the zips that could not be opened.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a path is named twice.
    """
    sources: list[Source] = []
    errors: list[ReadError] = []
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"{path} is named twice. Name it once.")
        seen.add(path.resolve())
        try:
            container = open_container(path, limits)
        except ReadError as error:
            errors.append(error)
            continue
        if isinstance(container, Archive):
            sources.append(Source(container, f"{path.name}/", container.names()))
        elif isinstance(container, SingleFile):
            sources.append(Source(container, "", container.names(), named_alone=True))
        else:
            # One folder is the root of its names; several are told apart by theirs.
            prefix = "" if len(paths) == 1 else f"{path.resolve().name}/"
            sources += _open_folder(container, prefix, limits, errors)
    return sorted(sources, key=lambda source: (source.prefix, str(source.container.path))), errors


def _open_folder(folder: Folder, prefix: str, limits: ReadLimits, errors: list[ReadError]) -> list[Source]:
    """The folder without its zips, and each of its zips."""
    zips = [name for name in folder.names() if name.lower().endswith(".zip")]
    sources = [Source(folder, prefix, {name: size for name, size in folder.names().items() if name not in zips})]
    for name in zips:
        try:
            archive = Archive(folder.path / name, limits)
            sources.append(Source(archive, f"{prefix}{name}/", archive.names()))
        except ReadError as error:
            errors.append(ReadError(f"{prefix}{name}", error.reason, error.hint))
    return sources


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _check_members(source: str, members: list[zipfile.ZipInfo], limits: ReadLimits) -> None:
    """Refuse a zip that would fill the disk or write outside its folder."""
    if len(members) > limits.max_files:
        raise ReadError(source, f"The zip holds {len(members)} files, more than {limits.max_files}.", "Split it.")
    total = sum(info.file_size for info in members)
    if total > limits.max_unpacked_bytes:
        raise ReadError(
            source,
            f"The zip unpacks to {total / 2**20:.0f} MiB, more than {limits.max_unpacked_bytes / 2**20:.0f} MiB.",
            "Split it.",
        )
    for info in members:
        if info.file_size > _RATIO_FREE_BYTES and info.file_size > limits.max_ratio * max(info.compress_size, 1):
            raise ReadError(
                source, f"A member of the zip unpacks to more than {limits.max_ratio:.0f} times its size.",
                "That is how zip bombs look; unpack it yourself if you trust it.",
            )  # fmt: skip
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or stat.S_ISLNK(info.external_attr >> 16):
            raise ReadError(source, "A member of the zip points outside the zip.", "Make it again without such paths.")
        if info.flag_bits & 0x1:
            raise ReadError(source, "The zip is encrypted.", "Unpack it and name the folder.")
