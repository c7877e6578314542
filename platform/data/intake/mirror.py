"""Ingest from a DICOMweb service: its series are first retrieved to a folder beside the corpus, the spool.

The spool holds one folder per series, `<study>/<series>/`, that appears when all of its instances have come, so an
interrupted run retrieves only the others. It can be read by its owner alone, and goes when the corpus stands.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass
from pathlib import Path

from omnimri.platform.data.formats.dicom.web import DicomwebError, RemoteSeries, Service, quiet_http
from omnimri.platform.data.formats.dicom.web_query import SeriesQuery
from omnimri.platform.data.formats.records import ReadError
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.draft import try_lock
from omnimri.platform.data.intake.ingest import IngestSummary, existing, ingest, result_settings
from omnimri.platform.data.intake.writer import INTAKE_VERSION
from omnimri.platform.data.schema import SCHEMA_VERSION

logger = logging.getLogger(__name__)

_PARTIAL, _LOCK = ".partial", ".lock"
"""Hidden, so that ingest does not see them."""
_SECONDS_BETWEEN_LINES = 10.0


def ingest_dicomweb(url: str, out: Path, query: SeriesQuery, config: IngestConfig) -> IngestSummary:
    """Ingest the series of a DICOMweb service that match a query.

    The same request again, while the service lists the same series, finds its result and retrieves nothing. A series
    that cannot be retrieved is a line of the reject ledger.

    Args:
        url: Address of the service.
        out: Corpus folder to make; the spool `<out>.dicomweb` lies beside it.
        query: Which series.
        config: How, with `config.dicomweb` for the retrieval.

    Raises:
        ValueError: If no series matches, `out` is in the way, or no volume could be read.
        DicomwebError: If the service cannot be searched, stops answering, or no longer accepts the credentials.
    """
    out = out.absolute()
    with quiet_http(), Service(url, config.dicomweb) as service:
        listed, num_invalid = service.find_series(query)
        if not listed:
            raise ValueError("The DICOMweb service has no series that match. Loosen --query.")
        logger.info("found %d series of %d studies", len(listed), len({series.study for series in listed}))
        request = _request(listed, config)
        if (done := existing(out, request, config)) is not None:
            return done
        with open_spool(out, keep=config.dicomweb.keep_spool) as spool:
            spool.keep_only(listed)
            refused = mirror(service, listed, spool)
            complete = not refused
            if num_invalid:
                reason = f"{num_invalid} studies or series without a valid UID."
                refused.append(ReadError("search", reason, "Correct them in the archive."))
            return ingest([spool.folder], out, config, request=request, refused=refused, complete=complete)


def _request(listed: Sequence[RemoteSeries], config: IngestConfig) -> str:
    """SHA-256 of what was asked for: the series that match and the settings that change the result."""
    asked = [SCHEMA_VERSION, INTAKE_VERSION, result_settings(config), [astuple(series) for series in listed]]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Spool:
    """Retrieved series as folders of DICOM files."""

    folder: Path

    def path(self, series: RemoteSeries) -> Path:
        """Where a series belongs."""
        return self.folder / series.study / series.series

    def holds(self, series: RemoteSeries) -> bool:
        """Whether a series is there with as many instances as the service lists."""
        path = self.path(series)
        return path.is_dir() and sum(1 for _ in path.iterdir()) == series.num_instances

    def keep_only(self, listed: Sequence[RemoteSeries]) -> None:
        """Remove what an interrupted retrieval left half done, and series that are not listed."""
        shutil.rmtree(self.folder / _PARTIAL, ignore_errors=True)
        wanted = {self.path(series) for series in listed}
        for path in set(self.folder.glob("[0-9]*/*")) - wanted:
            shutil.rmtree(path)

    def fetch(self, service: Service, series: RemoteSeries) -> int:
        """Retrieve a series; it appears under its name when it is complete. Returns bytes.

        Raises:
            DicomwebError: If it did not come.
            ValueError: If it cannot be stored.
        """
        partial, path = self.folder / _PARTIAL / series.study / series.series, self.path(series)
        try:
            num_bytes = service.retrieve(series, partial)
            path.parent.mkdir(exist_ok=True)
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
        except OSError as error:
            raise ValueError(
                f"{self.folder}: cannot store what was retrieved ({os.strerror(error.errno or 0)})."
            ) from (None)
        return num_bytes


@contextlib.contextmanager
def open_spool(out: Path, *, keep: bool) -> Iterator[Spool]:
    """The spool of a corpus, new or as an interrupted run left it; goes after a run that succeeds unless it is kept.

    Raises:
        ValueError: If another process works on it.
    """
    folder = out.with_name(f"{out.name}.dicomweb")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    # The system gives the lock back when the process dies, however it dies.
    with (folder / _LOCK).open("w") as lock:
        if not try_lock(lock.fileno()):
            raise ValueError(f"{out}: another ingest retrieves into {folder}. Wait for its end.")
        yield Spool(folder)
        if not keep:
            shutil.rmtree(folder)


def mirror(service: Service, listed: Sequence[RemoteSeries], spool: Spool) -> list[ReadError]:
    """Retrieve the series that the spool does not hold, a few at a time; returns one error for each that did not come.

    Raises:
        DicomwebError: If the service stops answering or no longer accepts the credentials; what came is kept.
        ValueError: If the spool cannot be written.
    """
    missing = [series for series in listed if not spool.holds(series)]
    if len(missing) < len(listed):
        logger.info("%d of %d series are there already", len(listed) - len(missing), len(listed))
    errors: list[ReadError] = []
    executor = ThreadPoolExecutor(service.config.series_at_once, thread_name_prefix="dicomweb")
    try:
        progress = _Progress(len(missing))
        for future in as_completed([executor.submit(_fetch, service, series, spool) for series in missing]):
            result = future.result()
            if isinstance(result, ReadError):
                errors.append(result)
            progress.add(0 if isinstance(result, ReadError) else result)
    finally:
        service.stop()
        executor.shutdown(cancel_futures=True)
    if errors:
        logger.warning("%d of %d series could not be retrieved", len(errors), len(listed))
    return errors


def _fetch(service: Service, series: RemoteSeries, spool: Spool) -> int | ReadError:
    """Bytes of a series, or why it did not come although the service is there."""
    try:
        return spool.fetch(service, series)
    except DicomwebError as error:
        if error.kind == "denied":
            raise
        if error.kind == "unreachable":
            service.check_reachable()
        hint = "The same command with --append tries again."
        return ReadError(f"{series.study}/{series.series}", f"The series was not retrieved. {error}.", hint)


class _Progress:
    """Tells how far a retrieval is, now and then and at its end."""

    def __init__(self, num_series: int) -> None:
        self._num_series, self._num_done, self._num_bytes = num_series, 0, 0
        self._started = self._told = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Count a series."""
        self._num_done += 1
        self._num_bytes += num_bytes
        now = time.monotonic()
        if self._num_done < self._num_series and now - self._told < _SECONDS_BETWEEN_LINES:
            return
        self._told = now
        megabytes, seconds = self._num_bytes / 1e6, max(now - self._started, 1e-6)
        logger.info(
            "%d of %d series retrieved, %.0f MB, %.1f MB/s",
            self._num_done, self._num_series, megabytes, megabytes / seconds,
        )  # fmt: skip
