"""Ingest that is killed goes on where it stopped, and ends as if it had never been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.draft import open_draft
from omnimri.platform.data.intake.ingest import ingest
from omnimri.platform.data.shards import Shards
from tests.conftest import ROOT
from tests.platform.intake_fakes import oblique_affine, random_image, rescalable, save_nifti

NUM_PATIENTS = 24
KEY = "key of the recovery tests"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery") / "in"
    for number in range(NUM_PATIENTS):
        image = rescalable(random_image(number, (24, 96, 80)))
        save_nifti(folder / f"sub-{number:02d}_T1w.nii.gz", image, oblique_affine())
    (folder / "broken.nii.gz").write_text("no image")
    return folder


def start(files: Path, out: Path) -> subprocess.Popen:
    """The job in a process of its own, with a Ray of its own, one series to a shard."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMNIMRI_DEID_KEY": KEY}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "omnimri.jobs.ingest", str(files), "--out", str(out), "--set", "items_per_shard=1"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def follow(job: subprocess.Popen, num_written: int) -> list[psutil.Process]:
    """Read the log until so many shards are written and workers are at work on others; returns these workers."""
    assert job.stderr is not None
    written = 0
    for line in job.stderr:
        written += "shards written" in line
        busy = [process for process in psutil.Process(job.pid).children(recursive=True) if "Map" in _title(process)]
        if written >= num_written and busy:
            return busy
    raise AssertionError("The job ended before it could be killed.")


def num_finished(out: Path) -> int:
    return len(list(out.parent.glob(f"{out.name}.partial-*/reports/*.json")))


def rows(out: Path) -> list[tuple[str, str, str]]:
    return sorted((row.row_id, row.split, row.patient_id) for row in Shards.open(out).rows)


@pytest.mark.slow
def test_killed_workers_and_drivers_lose_and_double_nothing(files: Path, tmp_path: Path) -> None:
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    with start(files, undisturbed) as job:
        assert job.wait(timeout=300) == 0
    for kills_worker in (False, True):
        with start(files, out) as job:
            workers = follow(job, 2)
            if kills_worker:
                workers[0].send_signal(signal.SIGKILL)
                follow(job, 4)
            job.send_signal(signal.SIGKILL)
        assert not out.exists()
    assert 2 + 2 + 4 <= num_finished(out) < NUM_PATIENTS
    with start(files, out) as job:
        _, log = job.communicate(timeout=300)
    assert job.returncode == 0, log
    assert f"of {NUM_PATIENTS} shards stand from an ingest that was interrupted" in log
    assert rows(out) == rows(undisturbed)
    assert (out.parent / "out.rejects.jsonl").read_text() == (out.parent / "undisturbed.rejects.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out", "out.rejects.jsonl", "undisturbed", "undisturbed.rejects.jsonl"
    ]  # fmt: skip


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.usefixtures("ray_cluster")
def test_two_ingests_of_the_same_files_do_not_meet(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMNIMRI_DEID_KEY", KEY)
    taken = []
    original = open_draft

    def remember(out: Path, request: str, **options: int):
        taken.append(request)
        return original(out, request, **options)

    monkeypatch.setattr("omnimri.platform.data.intake.ingest.open_draft", remember)
    source = next(files.glob("sub-00*"))
    ingest([source], tmp_path / "first", IngestConfig())
    with original(tmp_path / "second", taken[0]), pytest.raises(ValueError, match=r"another ingest .* is at work"):
        ingest([source], tmp_path / "second", IngestConfig())


def test_a_draft_of_another_request_is_removed_when_nobody_works_on_it(tmp_path: Path) -> None:
    with open_draft(tmp_path / "out", "first" * 4) as first, open_draft(tmp_path / "out", "other" * 4):
        assert first.folder.exists()
    with open_draft(tmp_path / "out", "third" * 4) as third:
        assert [path.name for path in tmp_path.iterdir()] == [third.folder.name]
