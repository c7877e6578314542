"""Ingest from a DICOMweb service gives what ingest of the same files gives, and retrieves nothing twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import requests

from omnimri.jobs import ingest as job
from omnimri.platform.data.deid import KEY_VARIABLE
from omnimri.platform.data.formats.dicom.web import TOKEN_VARIABLE, DicomwebConfig
from omnimri.platform.data.formats.dicom.web_query import parse_query
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.ingest import ingest
from omnimri.platform.data.intake.mirror import ingest_dicomweb
from omnimri.platform.data.shards import Shards
from tests.conftest import ROOT
from tests.platform.dicomweb_server import Archive, serve
from tests.platform.intake_fakes import dicom_slices, oblique_affine, random_image, rescalable, save_dicom
from tests.platform.label_fakes import PATIENT, save_seg
from tests.platform.test_ingest_privacy import SECRETS, everything_written, planted_series

NUM_SERIES, NUM_SLICES = 6, 5
CONFIG = IngestConfig(items_per_shard=2, dicomweb=DicomwebConfig(backoff_s=0.01, series_at_once=2, page_size=2))
EVERYTHING = parse_query([])
KEY = "key of the tests of DICOMweb"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six MR series of three patients, and a CT series."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    for number in range(NUM_SERIES + 1):
        image = rescalable(random_image(number, (NUM_SLICES, 16, 12)))
        header = {"Modality": "CT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"} if number == NUM_SERIES else {}
        slices = dicom_slices(
            image, oblique_affine(), seed=number, PatientID=f"H{number % 3}", StudyDate="20240101", StudyTime="120000",
            StudyID=str(number), AccessionNumber=str(number), SeriesNumber=number + 1, **header,
        )  # fmt: skip
        save_dicom(slices, tmp_path / "archive" / f"{number}")
    return tmp_path / "archive"


@pytest.fixture
def archive(folder: Path) -> Iterator[Archive]:
    with serve(Archive(folder)) as archive:
        yield archive


def rows(out: Path) -> list[tuple[str, ...]]:
    return sorted(
        (row.row_id, row.split, row.patient_id, row.study_id, row.series_id) for row in Shards.open(out).rows
    )  # fmt: skip


def ledger(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in out.with_name(f"{out.name}.rejects.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("ray_cluster")
def test_rows_equal_those_of_the_same_files_in_a_folder(archive: Archive, tmp_path: Path) -> None:
    from_files, out = tmp_path / "from_files", tmp_path / "out"
    ingest([archive.folder], from_files, CONFIG)
    summary = ingest_dicomweb(archive.url, out, EVERYTHING, CONFIG)
    assert rows(out) == rows(from_files)
    assert summary.num_volumes == NUM_SERIES
    assert (len(ledger(from_files)), ledger(out)) == (1, [])  # the CT series was not even asked for
    assert not list(tmp_path.glob("out.dicomweb*"))

    archive.retrieved.clear()
    assert ingest_dicomweb(archive.url, out, EVERYTHING, CONFIG).reused
    with pytest.raises(ValueError, match="holds another corpus"):
        ingest_dicomweb(archive.url, out, parse_query(["PatientID=H1"]), CONFIG)
    assert archive.retrieved == []

    config = IngestConfig(overwrite=True, dicomweb=DicomwebConfig(keep_spool=True))
    ingest_dicomweb(archive.url, out, parse_query(["PatientID=H1"]), config)
    assert {row.patient_id for row in Shards.open(out).rows} < {row[2] for row in rows(from_files)}
    assert len(archive.retrieved) == len(rows(out)) == 2
    ingest_dicomweb(archive.url, out, EVERYTHING, config)
    assert sorted(archive.retrieved) == sorted(uid for uid in archive.files if uid in mr_series(archive))


@pytest.mark.usefixtures("ray_cluster")
def test_segmentations_come_along_when_they_are_asked_for(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder)
    image = rescalable(random_image(1, (NUM_SLICES, 16, 12)))
    slices = dicom_slices(image, oblique_affine(), **PATIENT)
    save_dicom(slices, folder / "mr")
    save_seg(folder / "seg.dcm", slices, (image > np.median(image))[..., None].astype(np.uint8), ["liver"])
    ingest([folder], tmp_path / "from_files", CONFIG)
    with serve(Archive(folder)) as archive:
        ingest_dicomweb(archive.url, tmp_path / "out", parse_query(["Modality=MR,SEG"]), CONFIG)
    assert len(Shards.open(tmp_path / "out").select(has_labels=True)) == 1
    assert rows(tmp_path / "out") == rows(tmp_path / "from_files")


def mr_series(archive: Archive) -> set[str]:
    return {uid for uid, files in archive.files.items() if next(iter(files.values())).parent.name != str(NUM_SERIES)}


KILLED = """
import signal
import sys
from pathlib import Path
from omnimri.platform.data.formats.dicom.web import DicomwebConfig
from omnimri.platform.data.formats.dicom.web_query import parse_query
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.mirror import ingest_dicomweb
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
config = IngestConfig(dicomweb=DicomwebConfig(series_at_once=2))
ingest_dicomweb(sys.argv[1], Path(sys.argv[2]), parse_query([]), config)
"""


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_after_a_kill_only_what_is_missing_is_asked_for(archive: Archive, tmp_path: Path, how: signal.Signals) -> None:
    archive.gate = threading.Semaphore(3)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, archive.url, str(out)], env=environment, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while len(finished(out)) < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(how)
        if how == signal.SIGINT:  # the two series on their way may end
            archive.gate.release(2)
        process.wait(timeout=60)
    before = finished(out)
    assert 3 <= len(before) <= (3 if how == signal.SIGKILL else 5)
    archive.gate.release(1000)
    archive.retrieved.clear()
    ingest_dicomweb(archive.url, out, EVERYTHING, CONFIG)
    assert sorted(archive.retrieved) == sorted(mr_series(archive) - before)
    ingest([archive.folder], tmp_path / "from_files", CONFIG)
    assert rows(out) == rows(tmp_path / "from_files")


def finished(out: Path) -> set[str]:
    return {path.name for path in out.with_name(f"{out.name}.dicomweb").glob("[0-9]*/*")}


@pytest.mark.usefixtures("ray_cluster")
def test_what_fails_or_is_broken_is_a_line_of_the_ledger(archive: Archive, tmp_path: Path) -> None:
    failing, broken = sorted(mr_series(archive))[:2]
    archive.statuses[failing] = [-500]
    archive.corrupt = set(archive.files[broken])
    out = tmp_path / "out"
    summary = ingest_dicomweb(archive.url, out, EVERYTHING, CONFIG)
    assert (summary.num_volumes, summary.num_rejected) == (NUM_SERIES - 2, 2)
    lines = {line["source"].split("/")[1]: line for line in ledger(out)}
    assert set(lines) == {failing, broken}
    assert lines[failing]["reason"] == "The series was not retrieved. The service answers with HTTP status 500."
    assert lines[failing]["hint"] == "The same command with --append tries again."
    assert f"and {NUM_SLICES - 1} more" in lines[broken]["source"]
    assert not [word for word in ("H0", "H1", "H2", "Doe") if word in json.dumps(list(lines.values()))]
    assert not [uid for uid in archive.files if uid in everything_written(out)]


@pytest.mark.usefixtures("ray_cluster")
def test_what_failed_comes_with_append_when_the_service_is_well_again(archive: Archive, tmp_path: Path) -> None:
    failing = min(mr_series(archive))
    archive.statuses[failing] = [-500]
    assert ingest_dicomweb(archive.url, tmp_path / "out", EVERYTHING, CONFIG).num_volumes == NUM_SERIES - 1
    archive.statuses[failing] = []
    again = replace(CONFIG, append=True)
    summary = ingest_dicomweb(archive.url, tmp_path / "out", EVERYTHING, again)
    assert (summary.num_volumes, summary.num_added, summary.num_rejected) == (NUM_SERIES, 1, 0)
    archive.retrieved.clear()
    assert ingest_dicomweb(archive.url, tmp_path / "out", EVERYTHING, again).reused
    assert archive.retrieved == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_service_of_which_nothing_comes_is_an_error_and_nothing_is_published(
    archive: Archive, tmp_path: Path
) -> None:
    for uid in mr_series(archive):
        archive.statuses[uid] = [-404]
    with pytest.raises(ValueError, match=rf"0 ingested, {NUM_SERIES} rejected"):
        ingest_dicomweb(archive.url, tmp_path / "out", EVERYTHING, CONFIG)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="has no series that match"):
        ingest_dicomweb(archive.url, tmp_path / "out", parse_query(["PatientID=nobody"]), CONFIG)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["URL", "FOLDER"], "A DICOMweb service is ingested alone."),
        (["FOLDER", "--query", "PatientID=H1"], "--query is for a DICOMweb service."),
        (["URL", "--query", "PatientId=H1"], "Did you mean PatientID?"),
        (["URL", "--set", "dicomweb.series_at_once=0"], "series_at_once and attempts must be 1 or more"),
    ],
)
def test_the_job_refuses_what_cannot_be_meant(
    folder: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"URL": "https://pacs.example/dicom-web", "FOLDER": str(folder)}
    assert job.main([*(named.get(word, word) for word in arguments), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_token_and_identifiers_appear_in_nothing_that_is_left(tmp_path: Path) -> None:
    slices = planted_series(rescalable(random_image(1, (5, 32, 24))), seed=1)
    for dataset in slices:
        dataset.StudyTime, dataset.StudyID = "120000", "QZ-4711-88"
    save_dicom(slices, tmp_path / "archive")
    out, ray_folder = tmp_path / "corpus" / "shards", Path("/tmp") / f"omnimri-dicomweb-{os.getpid()}"
    ray_folder.mkdir()
    token = "token-of-the-tests-8f3a"
    environment = {**os.environ, "RAY_TMPDIR": str(ray_folder), "PYTHONPATH": str(ROOT), TOKEN_VARIABLE: token}
    environment.pop("RAY_ADDRESS", None)
    with serve(Archive(tmp_path / "archive", token=token)) as archive:
        archive.statuses["search"] = [503]
        command = [
            sys.executable,
            "-m",
            "omnimri.jobs.ingest",
            archive.url,
            "--query",
            "Modality=MR",
            "--out",
            str(out),
        ]
        command += ["--set", "dicomweb.backoff_s=0.01"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1 volumes ingested; 0 rejected" in done.stdout
    assert archive.authorizations == {f"Bearer {token}"}
    logs = everything_written(ray_folder / "session_latest" / "logs")
    seen = {"stdout": done.stdout, "stderr": done.stderr, "corpus": everything_written(out.parent), "logs of Ray": logs}
    planted = (token, *SECRETS, *archive.files, slices[0].StudyInstanceUID)
    assert [(place, s) for place, text in seen.items() for s in planted if s.lower() in text.lower()] == []
    shutil.rmtree(ray_folder)


@pytest.fixture
def orthanc(folder: Path, tmp_path: Path) -> Iterator[str]:
    """Address of Orthanc with its DICOMweb plugin, with the files of the folder."""
    plugin = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
    program = shutil.which("Orthanc")
    if program is None or not plugin.is_file():
        pytest.skip("Orthanc with its DICOMweb plugin is not installed (Debian: orthanc, orthanc-dicomweb)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    configuration = {
        "StorageDirectory": str(tmp_path / "orthanc"), "IndexDirectory": str(tmp_path / "orthanc"),
        "HttpPort": port, "RemoteAccessAllowed": False, "AuthenticationEnabled": True,
        "RegisteredUsers": {"reader": "of the tests"}, "DicomServerEnabled": False, "Plugins": [str(plugin)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }  # fmt: skip
    (tmp_path / "orthanc.json").write_text(json.dumps(configuration))
    command = [program, str(tmp_path / "orthanc.json")]
    with (tmp_path / "orthanc.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        url = f"http://127.0.0.1:{port}"
        try:
            with requests.Session() as session:
                session.auth = ("reader", "of the tests")
                _wait_for(session, f"{url}/system", server)
                for path in sorted(folder.rglob("*.dcm")):
                    session.post(f"{url}/instances", data=path.read_bytes(), timeout=30).raise_for_status()
            yield f"{url}/dicom-web/"
        finally:
            server.terminate()


def _wait_for(session: requests.Session, url: str, server: subprocess.Popen) -> None:
    for _ in range(300):
        assert server.poll() is None, "Orthanc ended"
        try:
            if session.get(url, timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.1)
    raise AssertionError("Orthanc does not answer.")


@pytest.mark.usefixtures("ray_cluster")
def test_orthanc(orthanc: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIMRI_DICOMWEB_USER", "reader")
    monkeypatch.setenv("OMNIMRI_DICOMWEB_PASSWORD", "of the tests")
    ingest([folder], tmp_path / "from_files", CONFIG)
    ingest_dicomweb(orthanc, tmp_path / "out", EVERYTHING, CONFIG)
    assert rows(tmp_path / "out") == rows(tmp_path / "from_files")
    query = parse_query(["PatientID=H1", "StudyDate=20231231-20240102", "SeriesDescription=t1*"])
    assert ingest_dicomweb(orthanc, tmp_path / "one", query, CONFIG).num_volumes == NUM_SERIES // 3
    with pytest.raises(ValueError, match="no series that match"):
        ingest_dicomweb(orthanc, tmp_path / "none", parse_query(["SeriesDescription=t2*"]), CONFIG)
