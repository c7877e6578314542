"""A DICOMweb service on the loopback interface over a folder of DICOM files, which can be told to misbehave.

Searches are answered by `dicomweb_client.DICOMfileClient`, retrievals with the bytes of the files, so that both ends of
a test are not of one hand.
"""

from __future__ import annotations

import contextlib
import json
import re
import ssl
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pydicom
from dicomweb_client import DICOMfileClient

_BOUNDARY = "boundary-of-the-tests"
_SEARCHES = {
    r"/studies": "search_for_studies",
    r"/studies/(?P<study_instance_uid>[^/]+)/series": "search_for_series",
    r"/studies/(?P<study_instance_uid>[^/]+)/series/(?P<series_instance_uid>[^/]+)/instances": "search_for_instances",
}
_RETRIEVAL = re.compile(r"/studies/[^/]+/series/([^/]+)")


@dataclass
class Archive:
    """What the service holds, how it behaves, and what it was asked."""

    folder: Path
    token: str | None = None
    """Without it in a request the answer is 401."""
    max_results: int = 1000
    """Of one page, whatever the client asks for."""
    ignores_offset: bool = False
    cuts_at_limit_first: bool = False
    """As Orthanc 1.10 does with some attributes: the offset counts from the start of the first page."""
    states_counts: bool = True
    """Whether the number of instances is among the answers to a search for series."""
    statuses: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Series UID, or `search`, to the statuses of the next answers; the last one stays if it is negative."""
    retry_after: str | None = None
    corrupt: set[str] = field(default_factory=set)
    """Instance UIDs whose bytes are not DICOM."""
    cut: dict[str, int] = field(default_factory=dict)
    """Series UID to how many answers are cut off in the middle."""
    unwrapped: set[str] = field(default_factory=set)
    """Series UIDs whose only instance is sent without a multipart message around it, against the standard."""
    extra_series: list[dict[str, Any]] = field(default_factory=list)
    """Put into every answer to a search for series."""
    gate: threading.Semaphore | None = None
    """One permit for each series that is answered."""
    url: str = ""
    searches: list[str] = field(default_factory=list)
    retrieved: list[str] = field(default_factory=list)
    """Series UIDs in the order of the requests."""
    authorizations: set[str | None] = field(default_factory=set)
    num_busy: int = 0
    most_busy: int = 0
    """Retrievals at the same time."""

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.backend = ThreadPoolExecutor(1)  # the connection of SQLite belongs to one thread
        self.files: dict[str, dict[str, Path]] = {}
        self.load()

    def load(self) -> None:
        """Look at the folder again."""
        self.files = defaultdict(dict)
        for path in sorted(path for path in self.folder.rglob("*.dcm") if path.is_file()):
            header = pydicom.dcmread(path, stop_before_pixels=True)
            self.files[header.SeriesInstanceUID][header.SOPInstanceUID] = path
        url = f"file://{self.folder}"
        self.client = self.backend.submit(DICOMfileClient, url, in_memory=True).result()

    def next_status(self, name: str) -> int:
        with self.lock:
            statuses = self.statuses[name]
            if not statuses:
                return 200
            return -statuses[0] if statuses[0] < 0 else statuses.pop(0)

    def search(self, method: str, scope: dict[str, str], parameters: dict[str, str]) -> list[dict[str, Any]]:
        limit = min(int(parameters.pop("limit", 1000)), self.max_results)
        offset = 0 if self.ignores_offset else int(parameters.pop("offset", 0))
        parameters.pop("offset", None)
        parameters.pop("includefield", None)
        function = getattr(self.client, method)
        found = self.backend.submit(function, **scope, search_filters=parameters).result()
        if method == "search_for_series":
            found = found + self.extra_series
            if not self.states_counts:
                found = [{tag: value for tag, value in one.items() if tag != "00201209"} for one in found]
        return found[:limit][offset:] if self.cuts_at_limit_first else found[offset : offset + limit]


def _handler(archive: Archive) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 2**16  # head and body in one packet

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            path = parts.path.removeprefix("/dicom-web")
            archive.authorizations.add(self.headers.get("Authorization"))
            if archive.token is not None and self.headers.get("Authorization") != f"Bearer {archive.token}":
                return self.answer(401, b"no", "text/plain")
            if match := _RETRIEVAL.fullmatch(path):
                return self.retrieve(match[1])
            for pattern, method in _SEARCHES.items():
                if match := re.fullmatch(pattern, path):
                    archive.searches.append(self.path)
                    if (status := archive.next_status("search")) != 200:
                        return self.answer(status, b"busy", "text/plain")
                    found = archive.search(method, match.groupdict(), dict(parse_qsl(parts.query)))
                    return self.answer(200, json.dumps(found).encode(), "application/dicom+json")
            return self.answer(404, b"nothing", "text/plain")

        def retrieve(self, series: str) -> None:
            with archive.lock:
                archive.retrieved.append(series)
                archive.num_busy += 1
                archive.most_busy = max(archive.most_busy, archive.num_busy)
            try:
                if archive.gate is not None:
                    archive.gate.acquire()
                status = archive.next_status(series)
                if status != 200:
                    return self.answer(status, f"no {series}".encode(), "text/plain")
                if series not in archive.files:
                    return self.answer(404, f"no {series}".encode(), "text/plain")
                if series in archive.unwrapped:
                    [path] = archive.files[series].values()
                    return self.answer(200, path.read_bytes(), "application/dicom")
                content_type = f'multipart/related; type="application/dicom"; boundary={_BOUNDARY}'
                body = b"".join(self.parts(series)) + f"\r\n--{_BOUNDARY}--\r\n".encode()
                is_cut = archive.cut.get(series, 0) > 0
                if is_cut:
                    archive.cut[series] -= 1
                return self.answer(200, body, content_type, cut=is_cut)
            finally:
                with archive.lock:
                    archive.num_busy -= 1

        def parts(self, series: str) -> Iterator[bytes]:
            for uid, path in archive.files[series].items():
                yield f"\r\n--{_BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
                yield b"no DICOM " * 100 if uid in archive.corrupt else path.read_bytes()

        def answer(self, status: int, body: bytes, content_type: str, *, cut: bool = False) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            if status != 200 and archive.retry_after is not None:
                self.send_header("Retry-After", archive.retry_after)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client may have been killed
                self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut

    return Handler


@contextlib.contextmanager
def serve(archive: Archive, certificate: tuple[Path, Path] | None = None) -> Iterator[Archive]:
    """Run the service as long as the block; with a certificate and its key, under TLS."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(archive)) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        scheme = "https" if certificate else "http"
        archive.url = f"{scheme}://127.0.0.1:{server.server_address[1]}/dicom-web"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield archive
        finally:
            if archive.gate is not None:
                archive.gate.release(10_000)
            server.shutdown()
            thread.join()
            archive.backend.shutdown()
