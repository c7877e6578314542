"""What the readers of every format share: the record of a volume, the error of a file, and the limits."""

from __future__ import annotations

import contextlib
import sqlite3
import struct
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from nibabel.orientations import OrientationError
from pydicom.errors import BytesLengthException, InvalidDicomError

from omnimri.models.scan import Scan

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From the world axes of DICOM, NRRD and MetaImage to ours."""


@dataclass(frozen=True, kw_only=True)
class ReadLimits:
    """Bounds on what a reader accepts, so that a hostile or broken file costs an error and not the machine."""

    max_files: int = 200_000
    """Files in one zip."""
    max_unpacked_bytes: int = 16 * 2**30
    """Bytes of one zip after unpacking."""
    max_ratio: float = 400.0
    """Unpacked over packed bytes of one member of a zip; real images stay far below."""
    max_array_bytes: int = 2**31 - 2**20
    """Bytes of one volume's image or k-space as stored; Parquet pages hold no more than 2 GiB."""


class ReadError(ValueError):
    """A file or series that was not read: where, why, and what to do.

    All three arguments reach `ValueError`, so that the error survives the way between processes. They must carry
    nothing that identifies a patient.
    """

    def __init__(self, source: str, reason: str, hint: str = "") -> None:
        super().__init__(source, reason, hint)
        self.source = source
        self.reason = reason
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}" + (f" {self.hint}" if self.hint else "")

    def as_row(self) -> dict[str, str]:
        """The line of the reject ledger."""
        return {"source": self.source, "reason": self.reason, "hint": self.hint}


@dataclass(frozen=True, kw_only=True)
class SeriesRecord:
    """One volume as read, before it is de-identified.

    The three keys and `identifiers` are raw. They never leave the process that read them.
    """

    scan: Scan
    source: str
    """Path relative to what the caller named."""
    source_format: str
    """Of `readers.VOLUME_KINDS`."""
    patient_key: str
    study_key: str
    series_key: str
    volume: int = 0
    """Which of the series' volumes (echo, b-value, time point, repetition)."""
    num_volumes: int = 1
    identifiers: tuple[str, ...] = ()
    """What its header says of person, place and day (`deid.header_identifiers`), to be removed from texts about it."""
    label_map: np.ndarray | None = None
    """Labels that came with the series (overlays, DICOM segmentations), uint8 `(Z, Y, X)`; None: not annotated."""
    label_names: dict[int, str] = field(default_factory=dict)
    """Label value to plain name."""
    instances: tuple[str, ...] = ()
    """SOP Instance UIDs of the images of a DICOM volume; raw, for reports that name them."""
    measurements: list[dict[str, Any]] | None = None
    """Measurements of a report, as `schema.MEASUREMENT` has them; None: not reported on."""
    boxes: list[dict[str, Any]] | None = None
    """Findings of a report that it localises, as `schema.BOX` has them; None: it localises none."""
    classes: list[str] | None = None
    """Findings that a report states to be present; None: it states none."""
    noise_covariance: np.ndarray | None = None
    """Complex `(C, C)`, of the noise in one sample of its k-space; None where its file has no noise scan, and empty
    where that cannot be read."""
    flags: tuple[str, ...] = ()
    """What was done to it that a reader of the row should know."""


def check_array_bytes(num_bytes: int, source: str, limits: ReadLimits) -> None:
    """Refuse an array before memory is taken for it.

    Raises:
        ReadError: If one volume would be larger than `limits.max_array_bytes`.
    """
    if num_bytes > limits.max_array_bytes:
        raise ReadError(
            source,
            f"The array would take {num_bytes / 2**20:.0f} MiB, more than {limits.max_array_bytes / 2**20:.0f} MiB.",
            "Split it, or raise max_array_bytes.",
        )


_WARNINGS_LOCK = threading.RLock()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence warnings of file libraries: their texts quote header values, which may name a patient.

    The warning filters belong to the whole process, hence the lock.
    """
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


UNREADABLE = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, LookupError, ArithmeticError, RuntimeError,
    OSError, EOFError, MemoryError, AssertionError, struct.error, zlib.error, zipfile.BadZipFile, sqlite3.Error,
    BytesLengthException, InvalidDicomError, OrientationError,
)  # fmt: skip
"""What pydicom, highdicom (by way of SQLite), nibabel, h5py and ismrmrd raise on files that are broken in some way.

They promise no common base class; each reader turns these into a `ReadError` at its own border.
"""
