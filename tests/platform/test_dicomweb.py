"""What a DICOMweb service holds is found and retrieved whole, whatever the service and the network do."""

from __future__ import annotations

import datetime
import ipaddress
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydicom.uid import generate_uid

from omnimri.platform.data.formats.dicom.web import (
    PASSWORD_VARIABLE,
    TOKEN_VARIABLE,
    USER_VARIABLE,
    DicomwebConfig,
    DicomwebError,
    RemoteSeries,
    Service,
    quiet_http,
)
from omnimri.platform.data.formats.dicom.web_query import parse_query
from omnimri.platform.data.intake.mirror import Spool, mirror, open_spool
from tests.platform.dicomweb_server import Archive, serve
from tests.platform.intake_fakes import dicom_slices, oblique_affine, random_image, rescalable, save_dicom

NUM_SERIES, NUM_SLICES = 5, 4
QUICK = DicomwebConfig(page_size=2, backoff_s=0.01, timeout_s=5.0, series_at_once=2)
EVERYTHING = parse_query([])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five series of as many patients, a day each."""
    for number in range(NUM_SERIES):
        image = rescalable(random_image(number, (NUM_SLICES, 8, 6)))
        slices = dicom_slices(
            image, oblique_affine(), seed=number, PatientID=f"H{number}", StudyDate=f"2024010{number + 1}",
            SeriesDescription="t1_mprage" if number % 2 else "t2_tse",
        )  # fmt: skip
        save_dicom(slices, tmp_path / "archive" / f"{number}")
    return tmp_path / "archive"


@pytest.fixture
def archive(folder: Path) -> Iterator[Archive]:
    with serve(Archive(folder)) as archive:
        yield archive


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    with open_spool(tmp_path / "out", keep=True) as spool:
        yield spool


def find(archive: Archive, *query: str, config: DicomwebConfig = QUICK) -> list[RemoteSeries]:
    with Service(archive.url, config) as service:
        return service.find_series(parse_query(query))[0]


def retrieve(archive: Archive, spool: Spool, config: DicomwebConfig = QUICK) -> list[tuple[str, str]]:
    """Mirror everything; sources and reasons of what did not come."""
    with Service(archive.url, config) as service:
        listed, _ = service.find_series(EVERYTHING)
        return [(error.source, error.reason) for error in mirror(service, listed, spool)]


def contents(folder: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in folder.rglob("*.dcm"))


@pytest.mark.parametrize(
    "behaviour",
    [
        {}, {"max_results": 1}, {"max_results": 3}, {"states_counts": False}, {"ignores_offset": True},
        {"cuts_at_limit_first": True},
    ],
)  # fmt: skip
@pytest.mark.parametrize("page_size", [1, 2, 5, 100])
def test_all_pages_are_read(archive: Archive, behaviour: dict, page_size: int) -> None:
    for name, value in behaviour.items():
        setattr(archive, name, value)
    found = find(archive, config=DicomwebConfig(page_size=page_size))
    assert sorted((series.series, series.num_instances) for series in found) == [
        (uid, NUM_SLICES) for uid in sorted(archive.files)
    ]


@pytest.mark.parametrize(
    ("query", "num_found"),
    [
        (["PatientID=H3"], 1), (["PatientID=H?"], 5), (["PatientID=nobody"], 0), (["00100020=H3"], 1),
        (["StudyDate=20240102-20240104"], 3), (["StudyDate=20240104-"], 2), (["StudyDate=-20240101"], 1),
        (["Modality=CT"], 0), (["Modality=MR,SEG"], 5),
    ],
)  # fmt: skip
def test_only_what_matches_is_found_although_the_service_ignores_filters(
    archive: Archive, query: list[str], num_found: int
) -> None:
    # DICOMfileClient takes no ranges of dates and no ModalitiesInStudy, and says so only in a log.
    logging.getLogger("dicomweb_client").setLevel(logging.CRITICAL)
    assert len(find(archive, *query)) == num_found


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (["PatientID"], r"--query PatientID: expected ATTRIBUTE=VALUE"),
        (["PatientId=Zwirnlein"], r"--query PatientId: no DICOM keyword .* Did you mean PatientID\?"),
        (["PatientID=Zwirnlein", "PatientID=b"], r"--query PatientID: given twice"),
    ],
)
def test_a_query_that_cannot_be_meant_is_refused(query: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_query(query)
    assert "Zwirnlein" not in str(caught.value)


def test_instances_arrive_as_the_archive_holds_them(archive: Archive, spool: Spool) -> None:
    assert retrieve(archive, spool) == []
    assert contents(spool.folder) == contents(archive.folder)
    assert spool.folder.stat().st_mode & 0o777 == 0o700
    assert sorted(archive.retrieved) == sorted(archive.files)


def test_a_single_instance_may_come_without_a_message_around_it(archive: Archive, spool: Spool) -> None:
    archive.unwrapped = {min(archive.files)}
    for path in list(archive.files[min(archive.files)].values())[1:]:
        path.unlink()
    archive.load()
    assert retrieve(archive, spool) == []
    assert contents(spool.folder) == contents(archive.folder)


def test_a_spool_that_cannot_be_written_is_an_error_and_no_series_is_blamed(archive: Archive, spool: Spool) -> None:
    (spool.folder / ".partial").write_text("a file where a folder must be")
    with pytest.raises(ValueError, match=r"out\.dicomweb: cannot store what was retrieved \(.*\)") as caught:
        retrieve(archive, spool)
    assert not [uid for uid in archive.files if uid in str(caught.value)]


@pytest.mark.parametrize("statuses", [[503], [429, 429], [500, 502, 504, 408]])
def test_a_service_that_is_busy_is_asked_again(archive: Archive, spool: Spool, statuses: list[int]) -> None:
    series = min(archive.files)
    archive.statuses[series], archive.statuses["search"] = list(statuses), list(statuses)
    assert retrieve(archive, spool) == []
    assert contents(spool.folder) == contents(archive.folder)
    assert archive.retrieved.count(series) == 1 + len(statuses)


def test_a_service_says_how_long_it_wants_to_be_left_alone(archive: Archive, spool: Spool) -> None:
    archive.statuses[min(archive.files)], archive.retry_after = [503], "1"
    started = time.monotonic()
    assert retrieve(archive, spool) == []
    assert time.monotonic() - started > 1.0
    archive.statuses[min(archive.files)], archive.retry_after = [503], "3600"
    for path in sorted(spool.folder.glob("[0-9]*/*/*")):
        path.unlink()
    started = time.monotonic()
    assert retrieve(archive, spool, DicomwebConfig(max_wait_s=0.1)) == []
    assert time.monotonic() - started < 60


def test_an_answer_that_is_cut_off_is_asked_for_again(archive: Archive, spool: Spool) -> None:
    archive.cut[min(archive.files)] = 2
    assert retrieve(archive, spool) == []
    assert contents(spool.folder) == contents(archive.folder)
    assert len(archive.retrieved) == NUM_SERIES + 2


@pytest.mark.parametrize(("status", "num_requests"), [(500, 5), (404, 1), (403, 1)])
def test_a_series_that_always_fails_is_one_line_and_the_others_arrive(
    archive: Archive, spool: Spool, status: int, num_requests: int
) -> None:
    bad = max(archive.files)
    archive.statuses[bad] = [-status]
    [(source, reason)] = retrieve(archive, spool)
    assert source.endswith(f"/{bad}")
    assert reason == f"The series was not retrieved. The service answers with HTTP status {status}."
    assert archive.retrieved.count(bad) == num_requests
    assert len(contents(spool.folder)) == (NUM_SERIES - 1) * NUM_SLICES


def test_a_series_that_comes_incomplete_is_refused(archive: Archive, spool: Spool) -> None:
    bad = min(archive.files)
    archive.files[bad].popitem()
    [(_, reason)] = retrieve(archive, spool)
    assert reason == f"The series was not retrieved. {NUM_SLICES - 1} of {NUM_SLICES} instances came."
    assert not list(spool.folder.glob(f"*/{bad}"))


def test_only_what_is_missing_or_has_changed_is_retrieved_again(archive: Archive, spool: Spool) -> None:
    assert retrieve(archive, spool) == []
    archive.retrieved.clear()
    assert retrieve(archive, spool) == []
    assert archive.retrieved == []
    grown, shrunk, gone = sorted(archive.files)[:3]
    first, *_ = archive.files[grown].values()
    header = pydicom.dcmread(first)
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["new"])
    header.save_as(first.with_name("new.dcm"), enforce_file_format=True)
    next(iter(archive.files[shrunk].values())).unlink()
    archive.load()
    [lost] = spool.folder.glob(f"*/{gone}")
    for path in lost.iterdir():
        path.unlink()
    assert retrieve(archive, spool) == []
    assert sorted(archive.retrieved) == sorted([grown, shrunk, gone])
    assert contents(spool.folder) == contents(archive.folder)


def test_no_more_series_at_once_than_configured(archive: Archive, spool: Spool) -> None:
    """One answer at a time: whoever does not wait for a free place is at the gate before the last one is through."""
    archive.gate = threading.Semaphore(0)
    limit = QUICK.series_at_once

    def let_through_one_by_one() -> None:
        deadline = time.monotonic() + 30
        for number in range(NUM_SERIES):
            while len(archive.retrieved) < min(limit + number, NUM_SERIES) and time.monotonic() < deadline:
                time.sleep(0.01)
            archive.gate.release()

    opener = threading.Thread(target=let_through_one_by_one)
    opener.start()
    assert retrieve(archive, spool) == []
    opener.join()
    assert archive.most_busy == limit < NUM_SERIES


def test_credentials_that_expire_stop_the_retrieval_and_what_came_is_kept(
    archive: Archive, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_at_a_time = DicomwebConfig(series_at_once=1, backoff_s=0.01)
    monkeypatch.setenv(TOKEN_VARIABLE, "token-of-the-tests")
    archive.token = "token-of-the-tests"
    archive.statuses[sorted(archive.files)[2]] = [401]
    with pytest.raises(DicomwebError, match=rf"does not accept the credentials.*401.*{TOKEN_VARIABLE}"):
        retrieve(archive, spool, one_at_a_time)
    num_kept = len(list(spool.folder.glob("[0-9]*/*")))
    assert 0 < num_kept < NUM_SERIES
    archive.retrieved.clear()
    assert retrieve(archive, spool, one_at_a_time) == []
    assert len(archive.retrieved) == NUM_SERIES - num_kept
    assert archive.authorizations == {"Bearer token-of-the-tests"}


def test_a_service_that_goes_away_stops_the_retrieval(folder: Path, spool: Spool) -> None:
    quick = DicomwebConfig(attempts=2, backoff_s=0.01)
    with serve(Archive(folder)) as archive, Service(archive.url, quick) as service:
        listed, _ = service.find_series(EVERYTHING)
    with Service(archive.url, quick) as service, pytest.raises(DicomwebError, match="connection to the service failed"):
        mirror(service, listed, spool)


def test_the_token_wins_over_netrc_and_user_and_password_are_basic(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv(TOKEN_VARIABLE, "token-of-the-tests")
    find(archive)
    assert archive.authorizations == {"Bearer token-of-the-tests"}
    archive.authorizations.clear()
    monkeypatch.delenv(TOKEN_VARIABLE)
    monkeypatch.setenv(USER_VARIABLE, "Aladdin")
    with pytest.raises(ValueError, match=f"Only one of {USER_VARIABLE} and {PASSWORD_VARIABLE}"):
        find(archive)
    monkeypatch.setenv(PASSWORD_VARIABLE, "open sesame")
    find(archive)
    assert archive.authorizations == {"Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="}  # RFC 7617, section 2


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://jane:hunter2@pacs.example/dicom-web", "must not hold credentials.*OMNIMRI_DICOMWEB_TOKEN"),
        ("https://pacs.example/dicom-web?PatientID=hunter2", "without a query"),
        ("https://pacs.example:hunter2/dicom-web", "not a valid URL"),
        ("https:///hunter2", "must be like https://"),
    ],
)
def test_an_address_with_more_than_a_place_is_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Service(url, QUICK)
    assert "hunter2" not in str(caught.value)


def test_nothing_of_query_and_uids_is_logged_or_raised(
    archive: Archive, spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with quiet_http():
        archive.statuses[min(archive.files)], archive.cut[max(archive.files)] = [503], 1
        find(archive, "PatientID=H3")
        retrieve(archive, spool)
        archive.statuses["search"] = [-400]
        with pytest.raises(DicomwebError, match="HTTP status 400") as caught:
            find(archive, "PatientID=H3")
    of_client = [record.getMessage() for record in caplog.records if "file" not in record.name]
    assert of_client
    texts = " ".join([*of_client, repr(caught.value), repr(caught.value.__cause__)])
    assert not [word for word in ("H3", "PatientID", *archive.files) if word in texts]


def test_uids_that_are_paths_are_not_followed(archive: Archive, spool: Spool) -> None:
    for uid in ("../../escaped", "..", "1.2/3", "1" * 65, "", "1.2\n"):
        archive.extra_series.append({
            "0020000E": {"vr": "UI", "Value": [uid]}, "00080060": {"vr": "CS", "Value": ["MR"]},
            "00201209": {"vr": "IS", "Value": [1]},
        })  # fmt: skip
    with Service(archive.url, DicomwebConfig()) as service:
        listed, num_invalid = service.find_series(EVERYTHING)
    assert {series.series for series in listed} == set(archive.files)
    assert num_invalid == 6 * NUM_SERIES


def test_an_answer_that_is_a_page_for_people_is_an_error(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.platform.dicomweb_server.json.dumps", lambda _: "<html>Log in, Zwirnlein</html>")
    with pytest.raises(DicomwebError, match=r"not JSON: is the address its root\?"):
        find(archive)


def test_tls_with_a_private_authority(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = self_signed(tmp_path)
    with serve(Archive(folder), (certificate, key)) as archive:
        with pytest.raises(DicomwebError, match="not trusted: set REQUESTS_CA_BUNDLE"):
            find(archive)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert len(find(archive)) == NUM_SERIES
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "absent.pem"))
    with pytest.raises(ValueError, match=r"REQUESTS_CA_BUNDLE names .*absent.pem, which does not exist"):
        find(archive)


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Certificate of 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "archive of the tests")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1)).add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths
