"""The parts of the demo that need no model."""

from pathlib import Path

from omnimri.jobs.demo import collect_real_files


def stamps(folders: list[Path]) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}


def test_real_files_are_collected_once(tmp_path: Path) -> None:
    """A file with a newer time is another corpus to ingest, and the demo could not go on where it stopped."""
    folders = collect_real_files(tmp_path)
    before = stamps(folders)
    assert {path.name for path in before} == {
        "examples_overlay.dcm", "MR_small.dcm", "example4d.nii.gz", "CT_small.dcm", "MR_truncated.dcm", "notes.nii.gz"
    }  # fmt: skip
    assert stamps(collect_real_files(tmp_path)) == before
