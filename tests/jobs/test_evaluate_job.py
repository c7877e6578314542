"""The evaluate job: what its user can mend is one line, before anything is started."""

from pathlib import Path

import pytest

from omnimri.jobs import evaluate
from tests.platform.evaluation_fakes import phantom_row, write_phantoms


def test_data_that_was_never_ingested_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert evaluate.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("omnimri evaluate: error: ")
    assert "omnimri ingest" in line
    assert not (tmp_path / "out").exists()


def test_a_model_folder_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_phantoms(tmp_path / "data", [phantom_row(0, split="test", patient=0)])
    arguments = ["--model", str(tmp_path / "none"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert evaluate.main(arguments) == 1
    assert "expected a checkpoint folder" in capsys.readouterr().err


def test_an_unknown_setting_is_refused_with_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path), "--set", "steps=3"]
    assert evaluate.main(arguments) == 1
    assert "reconstruct_steps" in capsys.readouterr().err
