"""A DICOMweb service: series are found by QIDO-RS and retrieved by WADO-RS (DICOM PS3.18, sections 10.6 and 10.4).

Addresses, queries and answers name patients, and so do the messages of HTTP libraries. None of it is quoted here: an
error carries the status or the kind of failure alone.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import requests
from dicomweb_client.web import DICOMwebClient, _Transaction
from requests.auth import AuthBase, HTTPBasicAuth
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from omnimri.platform.data.formats.dicom.web_query import SeriesQuery, first_value, matches
from omnimri.platform.errors import OmniMRIError

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "OMNIMRI_DICOMWEB_TOKEN"
USER_VARIABLE = "OMNIMRI_DICOMWEB_USER"
PASSWORD_VARIABLE = "OMNIMRI_DICOMWEB_PASSWORD"

_STUDY, _SERIES, _INSTANCE, _MODALITY, _NUM_INSTANCES = "0020000D", "0020000E", "00080018", "00080060", "00201209"
_ANY_SYNTAX = 'multipart/related; type="application/dicom"; transfer-syntax=*'
_WILDCARDS = "*?"
_UID = re.compile(r"(?=.{1,64}$)[0-9]+(\.[0-9]+)*")
_LOOPBACK = ("localhost", "127.0.0.1")

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class DicomwebConfig:
    """How a service is asked."""

    page_size: int = 100
    """Studies, series or instances that one search asks for."""
    series_at_once: int = 4
    """Series that are retrieved at the same time; each holds one instance in memory."""
    attempts: int = 5
    """How often a request is made that meets status 408, 429 or 5xx, or a connection that fails."""
    backoff_s: float = 1.0
    """Before the second attempt; doubles with each. The service may ask for more by Retry-After."""
    max_wait_s: float = 120.0
    """Longest wait between two attempts."""
    timeout_s: float = 60.0
    """To connect, and without a byte from the service."""
    keep_spool: bool = False
    """Keep the retrieved files beside the corpus, so that the same query later retrieves only what is new; another
    query begins anew."""

    def __post_init__(self) -> None:
        if min(self.page_size, self.series_at_once, self.attempts) < 1:
            raise ValueError("page_size, series_at_once and attempts must be 1 or more.")
        if min(self.backoff_s, self.max_wait_s) < 0 or self.timeout_s <= 0:
            raise ValueError("backoff_s and max_wait_s must not be negative, timeout_s must be positive.")


class DicomwebError(OmniMRIError):
    """A service did not give what was asked for; the text quotes nothing that names a patient."""

    def __init__(
        self, reason: str, kind: Literal["refused", "denied", "busy", "unreachable"] = "refused", wait_s: float = 0.0
    ) -> None:
        super().__init__(reason, kind, wait_s)
        self.reason = reason
        self.kind = kind
        """`denied`: no request would succeed. `busy` and `unreachable`: worth another attempt."""
        self.wait_s = wait_s
        """How long the service asks to be left alone."""

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, order=True)
class RemoteSeries:
    """A series as a search found it. The UIDs have been checked and can be names of folders."""

    study: str
    series: str
    num_instances: int


def is_service(source: str) -> bool:
    """Whether a source is the address of a service and not a path."""
    return source.lower().startswith(("http://", "https://"))


class Service:
    """One DICOMweb service; may be used by several threads, each request by one.

    The credentials are the bearer token in OMNIMRI_DICOMWEB_TOKEN, or OMNIMRI_DICOMWEB_USER with
    OMNIMRI_DICOMWEB_PASSWORD; proxies and certificates are those of `requests` (HTTPS_PROXY, REQUESTS_CA_BUNDLE).

    Args:
        url: Address of the service, below which `/studies` lies.
        config: How it is asked.

    Raises:
        ValueError: If the address holds credentials or a query, credentials are incomplete, or certificates missing.
    """

    def __init__(self, url: str, config: DicomwebConfig) -> None:
        self.config = config
        _check_certificates()
        self._auth = _credentials()
        self._url = _checked_url(url, has_secret=self._auth is not None)
        self._idle: list[_Client] = []
        self._stopped = threading.Event()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for client in self._idle:
            client.close()

    def stop(self) -> None:
        """Let the threads that are at work give up soon."""
        self._stopped.set()

    def find_series(self, query: SeriesQuery) -> tuple[list[RemoteSeries], int]:
        """Search for studies and then for the series of each, page by page.

        A service may ignore an attribute that it does not support, so what is found is compared with the query.

        Returns:
            Series in a fixed order, and how many studies and series were left out because they have no valid UID.

        Raises:
            DicomwebError: If a search fails.
        """
        found: set[RemoteSeries] = set()
        num_invalid = num_others = 0
        for result in self._pages("search_for_studies", _STUDY, **_arguments(query.study_filters)):
            study = str(first_value(result, _STUDY))
            if not matches(result, query.study_filters):
                num_others += 1
                continue
            if not _UID.fullmatch(study):
                num_invalid += 1
                continue
            for series in self._pages(
                "search_for_series", _SERIES, study_instance_uid=study,
                **_arguments(query.series_filters, "NumberOfSeriesRelatedInstances"),
            ):  # fmt: skip
                uid = str(first_value(series, _SERIES))
                if first_value(series, _MODALITY) not in (*query.modalities, None):
                    continue
                if not matches(series, query.series_filters):
                    num_others += 1
                    continue
                if _UID.fullmatch(uid):
                    found.add(RemoteSeries(study, uid, self._num_instances(series, study, uid)))
                else:
                    num_invalid += 1
        if num_others:
            logger.warning("%d results of the service do not match the query and were left out", num_others)
        return sorted(found), num_invalid

    def _num_instances(self, series: Mapping[str, Any], study: str, uid: str) -> int:
        """As the search for series says, else counted."""
        stated = first_value(series, _NUM_INSTANCES)
        if stated is not None and str(stated).isdecimal():
            return int(stated)
        instances = self._pages(
            "search_for_instances", _INSTANCE, study_instance_uid=study, series_instance_uid=uid
        )  # fmt: skip
        return sum(1 for _ in instances)

    def check_reachable(self) -> None:
        """Make one small request.

        Raises:
            DicomwebError: If it fails.
        """
        self._attempt(lambda client: client.search_for_studies(limit=1))

    def retrieve(self, series: RemoteSeries, folder: Path) -> int:
        """Write the instances of a series, as the archive holds them, to files of a new folder.

        Args:
            series: As it was found.
            folder: Is emptied before every attempt.

        Returns:
            Bytes written.

        Raises:
            DicomwebError: If not all instances came, whatever the reason.
        """

        def write(client: _Client) -> int:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            count = num_bytes = 0
            for content in client.iter_instances(series):
                (folder / f"{count:06d}.dcm").write_bytes(content)
                count, num_bytes = count + 1, num_bytes + len(content)
                if self._stopped.is_set():
                    break
            if count < series.num_instances:
                raise DicomwebError(f"{count} of {series.num_instances} instances came", "busy")
            return num_bytes

        return self._attempt(write)

    def _pages(self, search: str, uid: str, **arguments: Any) -> Iterator[Mapping[str, Any]]:
        """Every result of a search once, whatever page the service is willing to give.

        A full page and nothing after it may be the end, or a service that takes no offset (Orthanc 1.10 with
        ModalitiesInStudy cuts the results at the limit first); then larger and larger first pages are asked for.
        """
        seen: set[str] = set()
        limit, offset, was_full, takes_offset = self.config.page_size, 0, False, True
        while True:
            page = self._page(search, limit=limit, offset=offset, **arguments)
            fresh = {
                str(first_value(result, uid)): result for result in page if str(first_value(result, uid)) not in seen
            }
            seen |= fresh.keys()
            yield from fresh.values()
            if fresh and takes_offset:
                offset, was_full = offset + len(page), len(page) >= limit
            elif fresh:
                limit *= 2
            elif takes_offset and was_full:
                takes_offset, limit, offset = False, 2 * len(seen), 0
            else:
                return

    def _page(self, search: str, **arguments: Any) -> list[dict[str, Any]]:
        page = self._attempt(lambda client: getattr(client, search)(**arguments))
        if not isinstance(page, list) or not all(isinstance(result, dict) for result in page):
            raise DicomwebError("The service answers a search with something that is not DICOM JSON")
        return page

    def _attempt(self, action: Callable[[_Client], Result]) -> Result:
        """The result of an action on a connection; what may pass is tried again after a while.

        Raises:
            DicomwebError: If the last attempt failed, or another one would be of no use.
        """
        for attempt in itertools.count(1):
            try:
                with self._client() as client:
                    return action(client)
            except DicomwebError as error:
                failure = error
            except requests.RequestException as error:
                failure = _failure(error)
            if failure.kind not in ("busy", "unreachable") or attempt == self.config.attempts:
                break
            backoff_s = self.config.backoff_s * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)
            if self._stopped.wait(min(max(backoff_s, failure.wait_s), self.config.max_wait_s)):
                break
        raise failure from None

    @contextlib.contextmanager
    def _client(self) -> Iterator[_Client]:
        """A connection that nobody else uses: sessions of `requests` are not made for threads."""
        try:
            client = self._idle.pop()
        except IndexError:
            client = _Client(self._url, self._auth, self.config.timeout_s)
        try:
            yield client
        finally:
            self._idle.append(client)


class _Client(DICOMwebClient):
    """The client of the library, without its own retries, and with instances as bytes.

    `iter_series` parses every instance, ends with the first that is broken, and would have us encode them again.
    """

    def __init__(self, url: str, auth: AuthBase | None, timeout_s: float) -> None:
        session = requests.Session()
        session.auth = auth
        super().__init__(url, session=session, timeout=timeout_s, permissive_uid=True)
        self.set_http_retry_params(retry=False)

    def close(self) -> None:
        self._session.close()

    def _http_get(
        self,
        url: str,
        params: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        stream: bool = False,
    ) -> requests.Response:
        """The library writes wildcards as %2A, where Orthanc 1.10 does not see them; they may stand as they are."""
        query = f"?{urlencode(params, doseq=True, safe=_WILDCARDS, quote_via=quote)}" if params else ""
        return super()._http_get(url + query, headers=headers, stream=stream)

    def iter_instances(self, series: RemoteSeries) -> Iterator[bytes]:
        """The DICOM files of a series as they arrive.

        Raises:
            DicomwebError: If the answer is nothing that holds DICOM files, or is cut off.
        """
        url = self._get_series_url(_Transaction.RETRIEVE, series.study, series.series)
        with self._http_get(url, headers={"Accept": _ANY_SYNTAX}, stream=True) as response:
            media_type = response.headers.get("Content-Type", "").lower()
            if media_type.startswith("application/dicom") and "json" not in media_type:
                yield response.content  # against the standard, but some services send a single instance so
                return
            if not media_type.startswith("multipart/related"):
                raise DicomwebError("The service answers a retrieval with something that is not DICOM")
            try:
                yield from self._decode_multipart_message(response, stream=True)
            except requests.RequestException:
                raise
            except ValueError:
                raise DicomwebError("The answer is cut off", "busy") from None


class _BearerToken(AuthBase):
    """Sends a token; as `auth`, not as a header, it wins over ~/.netrc and stays behind at a redirect."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _credentials() -> AuthBase | None:
    token, user, password = (
        os.environ.get(name, "").strip() for name in (TOKEN_VARIABLE, USER_VARIABLE, PASSWORD_VARIABLE)
    )
    if token and (user or password):
        raise ValueError(f"{TOKEN_VARIABLE} and {USER_VARIABLE} are both set. Set one of them.")
    if bool(user) != bool(password):
        raise ValueError(f"Only one of {USER_VARIABLE} and {PASSWORD_VARIABLE} is set. Set both.")
    if not (token or user).isascii() or any(character.isspace() for character in token):
        raise ValueError(f"{TOKEN_VARIABLE} or {USER_VARIABLE} holds characters that no HTTP header can hold.")
    return _BearerToken(token) if token else HTTPBasicAuth(user, password) if user else None


def _check_certificates() -> None:
    """Raise ValueError where the file of certificates that the environment names is not there."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if (path := os.environ.get(name)) and not Path(path).exists():
            raise ValueError(f"{name} names {path}, which does not exist. Name a file of PEM certificates.")


def _checked_url(url: str, *, has_secret: bool) -> str:
    """The address without a slash at its end.

    Raises:
        ValueError: If it holds credentials, which would be seen by all users of the machine, or a query.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        raise ValueError("The address of the DICOMweb service is not a valid URL.") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"The address of a DICOMweb service must not hold credentials. Set {TOKEN_VARIABLE}, or {USER_VARIABLE} "
            f"and {PASSWORD_VARIABLE}, in the environment."
        )
    if not host or parts.query or parts.fragment:
        raise ValueError(
            "The address of a DICOMweb service must be like https://pacs.example/dicom-web, without a query: filters "
            "are given by --query."
        )
    if has_secret and parts.scheme.lower() == "http" and host not in _LOOPBACK:
        logger.warning("the DICOMweb service is asked without TLS: credentials and images can be read on the way")
    return url.rstrip("/")


def _failure(error: requests.RequestException) -> DicomwebError:
    """What went wrong, in words that quote neither address nor answer."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return _status_failure(error.response)
    if isinstance(error, requests.exceptions.SSLError):
        reason = "The certificate of the service is not trusted: set REQUESTS_CA_BUNDLE to that of its authority"
        return DicomwebError(reason, "denied")
    if isinstance(error, requests.exceptions.JSONDecodeError):
        return DicomwebError("The service answers a search with something that is not JSON: is the address its root?")
    if isinstance(error, (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)):
        return DicomwebError(f"The connection to the service failed ({type(error).__name__})", "unreachable")
    return DicomwebError(f"The request to the service failed ({type(error).__name__})")


def _status_failure(response: requests.Response) -> DicomwebError:
    status = response.status_code
    if status == requests.codes.unauthorized:
        given = f"{TOKEN_VARIABLE}, or {USER_VARIABLE} and {PASSWORD_VARIABLE}"
        return DicomwebError(f"The service does not accept the credentials (HTTP status 401): set {given}", "denied")
    if status in (408, 429) or status >= 500:
        return DicomwebError(f"The service answers with HTTP status {status}", "busy", _retry_after_s(response))
    return DicomwebError(f"The service answers with HTTP status {status}")


def _retry_after_s(response: requests.Response) -> float:
    try:
        return float(Retry().parse_retry_after(response.headers.get("Retry-After", "0")))
    except InvalidHeader:
        return 0.0


def _arguments(filters: Mapping[str, str], *fields: str) -> dict[str, Any]:
    """Of a search; the attributes that must match are asked for too."""
    return {"search_filters": dict(filters), "fields": [*filters, *fields]}


@contextlib.contextmanager
def quiet_http() -> Iterator[None]:
    """Silence the HTTP libraries: what they log quotes addresses and headers."""
    loggers = [logging.getLogger(name) for name in ("dicomweb_client", "urllib3", "requests")]
    former = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for one, level in zip(loggers, former, strict=True):
            one.setLevel(level)
