"""The one command finds its jobs, and fails in one clear line."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import omnimri
from omnimri.jobs.command import run_job
from omnimri.jobs.main import JOBS, main, overview
from omnimri.platform.errors import OmniMRIError

ROOT = Path(__file__).parents[2]


def test_overview_has_one_line_for_each_job_that_exists() -> None:
    text = overview()
    for name in JOBS:
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{name} "))
        assert len(line.split(None, 1)[1]) > 15, f"jobs/{name}.py needs a first line that says what it does"
    commands = {path.stem for path in (ROOT / "jobs").glob("*.py") if "def main(" in path.read_text()} - {"main"}
    assert commands == set(JOBS)


def test_overview_is_quick_because_no_job_is_imported() -> None:
    code = "import sys, omnimri.jobs.main as m; m.main([]); print('ray' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize("name", JOBS)
def test_every_job_has_a_manual(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"omnimri.jobs.{name}").main(["--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: omnimri {name}")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"omnimri {omnimri.__version__}\n"


def test_unknown_job_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 1
    assert capsys.readouterr().err == f"omnimri: error: unknown job 'trian'; known: {', '.join(JOBS)}\n"


@pytest.mark.parametrize(
    "error", [ValueError("expected 3 axes,\n found 2"), OmniMRIError("expected 3 axes,\n found 2")]
)
def test_an_error_of_the_user_is_one_line_on_stderr(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> None:
        raise error

    assert run_job("ingest", action) == 1
    assert capsys.readouterr().err == "omnimri ingest: error: expected 3 axes, found 2\n"


def test_an_error_of_ours_keeps_its_traceback() -> None:
    def action() -> None:
        raise KeyError("patient")

    with pytest.raises(KeyError):
        run_job("ingest", action)


def test_exit_status_of_the_job_is_handed_on() -> None:
    assert run_job("ingest", lambda: 3) == 3
    assert run_job("ingest", lambda: None) == 0
