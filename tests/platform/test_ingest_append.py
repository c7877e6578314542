"""Appending to a corpus: nothing is read twice, nobody changes sides, and what was there stays as it is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from omnimri.platform.data.deid import KEY_VARIABLE, assign_splits
from omnimri.platform.data.intake import ingest as module
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.ingest import ingest
from omnimri.platform.data.shards import Shards, load_row
from tests.platform.intake_fakes import oblique_affine, random_image, save_nifti

pytestmark = pytest.mark.usefixtures("ray_cluster")

SHAPE = (4, 20, 16)


def write(folder: Path, patients: range, name: str = "T1w") -> Path:
    for number in patients:
        seed = number + 1000 * (name != "T1w")
        save_nifti(folder / f"sub-{number:03d}" / f"sub-{number:03d}_{name}.nii", random_image(seed, SHAPE),
                   oblique_affine())  # fmt: skip
    return folder


def splits(out: Path) -> dict[str, str]:
    return {row.row_id: row.split for row in Shards.open(out).rows}


@pytest.mark.parametrize("by", ["hash", "rank"])
def test_appended_or_at_once_gives_the_same_rows(tmp_path: Path, by: str) -> None:
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    files = write(tmp_path / "in", range(6))
    config = IngestConfig(split_by=by, items_per_shard=4)
    ingest([files], grown, config)
    before = splits(grown)
    write(files, range(6, 20))
    added = ingest([files], grown, IngestConfig(split_by=by, items_per_shard=4, append=True))
    ingest([files], whole, config)
    assert added.num_volumes == 20
    assert splits(grown).keys() == splits(whole).keys()
    assert before.items() <= splits(grown).items()
    shares = [sorted(splits(out).values()) for out in (grown, whole)]
    assert shares[0] == shares[1]
    if by == "hash":
        assert Shards.open(grown).digest == Shards.open(whole).digest
    for row in Shards.open(grown).rows:
        assert load_row(row, ["row_id"])["row_id"] == row.row_id


def test_what_is_there_is_neither_read_nor_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, out = write(tmp_path / "in", range(5)), tmp_path / "out"
    ingest([files], out, IngestConfig())
    [shard] = (out / "shards").iterdir()
    inode = shard.stat().st_ino
    write(files, range(5, 7))
    read: list[int] = []
    real = module._read_and_write
    monkeypatch.setattr(module, "_read_and_write", lambda plan, *rest: read.append(len(plan)) or real(plan, *rest))
    ingest([files], out, IngestConfig(append=True))
    assert read == [2]
    assert shard.stat().st_ino == inode
    assert ingest([files], out, IngestConfig(append=True)).reused
    assert read == [2]


def test_a_patient_who_comes_again_keeps_the_split(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ingest([write(tmp_path / "first", range(9))], out, IngestConfig(dataset="clinic"))
    ingest([write(tmp_path / "second", range(12), "T2w")], out, IngestConfig(dataset="clinic", append=True))
    by_patient: dict[str, set[str]] = {}
    for row in Shards.open(out).rows:
        by_patient.setdefault(row.patient_id, set()).add(row.split)
    assert len(by_patient) == 12
    assert all(len(found) == 1 for found in by_patient.values())


def test_patients_who_come_one_by_one_fill_every_split() -> None:
    splits: dict[tuple[str, str], str] = {}
    for number in range(40):
        counts = {"clinic": Counter(splits.values())}
        splits |= assign_splits([("clinic", str(number))], (0.7, 0.1, 0.2), seed=0, by="rank", counts=counts)
    assert Counter(splits.values()) == {"train": 28, "val": 4, "test": 8}


def test_copies_of_what_is_there_stay_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ingest([write(tmp_path / "first", range(4))], out, IngestConfig())
    before = Shards.open(out).digest
    save_nifti(tmp_path / "second" / "sub-x_T1w.nii", random_image(2, SHAPE), oblique_affine())
    summary = ingest([tmp_path / "second"], out, IngestConfig(append=True))
    assert (summary.num_volumes, summary.num_rejected) == (4, 1)
    assert "The same voxels as another volume" in summary.rejects_path.read_text()
    assert Shards.open(out).digest == before


def test_a_series_of_other_files_than_before_is_refused_by_name(tmp_path: Path) -> None:
    files, out = write(tmp_path / "in", range(3)), tmp_path / "out"
    ingest([files], out, IngestConfig())
    save_nifti(files / "sub-001" / "sub-001_T1w.nii", random_image(77, (5, 20, 16)), oblique_affine())
    summary = ingest([files], out, IngestConfig(append=True))
    [line] = map(json.loads, summary.rejects_path.read_text().splitlines())
    assert line["source"] == "sub-001/sub-001_T1w.nii"
    assert "made of other files" in line["reason"]
    assert "--overwrite" in line["hint"]


def test_a_file_that_was_repaired_leaves_the_ledger(tmp_path: Path) -> None:
    files, out = write(tmp_path / "in", range(3)), tmp_path / "out"
    broken = files / "sub-009" / "sub-009_T1w.nii"
    broken.parent.mkdir()
    broken.write_bytes(b"not yet")
    assert ingest([files], out, IngestConfig()).num_rejected == 1
    save_nifti(broken, random_image(9, SHAPE), oblique_affine())
    summary = ingest([files], out, IngestConfig(append=True))
    assert (summary.num_volumes, summary.num_rejected) == (4, 0)


def test_an_append_that_fails_leaves_the_corpus_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, out = write(tmp_path / "in", range(3)), tmp_path / "out"
    ingest([files], out, IngestConfig())
    before = splits(out)
    write(files, range(3, 6))
    with monkeypatch.context() as patch:
        patch.setattr(module, "put_in_place", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OSError, match="full"):
            ingest([files], out, IngestConfig(append=True))
    assert splits(out) == before
    assert ingest([files], out, IngestConfig(append=True)).num_volumes == 6
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "out", "out.key", "out.rejects.jsonl"]


def test_another_key_is_refused_and_none_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, out = write(tmp_path / "in", range(3)), tmp_path / "out"
    ingest([files], out, IngestConfig())
    write(files, range(3, 4))
    with monkeypatch.context() as patch:
        patch.setenv(KEY_VARIABLE, "another key of some length")
        with pytest.raises(ValueError, match="another pseudonym key"):
            ingest([files], out, IngestConfig(append=True))
    (tmp_path / "out.key").unlink()
    with pytest.raises(ValueError, match="another pseudonym key"):
        ingest([files], out, IngestConfig(append=True))
    assert not (tmp_path / "out.key").exists()


def test_other_settings_of_splits_or_voxels_are_refused(tmp_path: Path) -> None:
    files, out = write(tmp_path / "in", range(3)), tmp_path / "out"
    ingest([files], out, IngestConfig())
    write(files, range(3, 4))
    with pytest.raises(ValueError, match=r"made with split_by=rank \(now hash\)"):
        ingest([files], out, IngestConfig(append=True, split_by="hash"))
    with pytest.raises(ValueError, match="max_coils"):
        ingest([files], out, IngestConfig(append=True, max_coils=4))


def test_another_file_of_the_same_name_and_size_is_never_dropped_in_silence(tmp_path: Path) -> None:
    """`scan.nii` of Monday and `scan.nii` of Tuesday: one matrix, another head."""
    out = tmp_path / "out"
    for day in range(2):
        save_nifti(tmp_path / f"day{day}" / "scan.nii", random_image(day, SHAPE), oblique_affine())
    ingest([tmp_path / "day0"], out, IngestConfig())
    summary = ingest([tmp_path / "day1"], out, IngestConfig(append=True))
    assert (summary.num_added, summary.num_rejected) == (0, 1)
    assert "made of other files" in summary.rejects_path.read_text()


def test_of_two_appends_at_once_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one to finish finds that the corpus is no longer the one that it began with."""
    files, out = write(tmp_path / "in", range(3)), tmp_path / "out"
    january, february = write(tmp_path / "january", range(10, 13)), write(tmp_path / "february", range(20, 23))
    for month in (january, february):
        (month / f"sub-{month.name}_T1w.nii").write_bytes(b"broken")
    ingest([files], out, IngestConfig())
    real = module._read_and_write

    def meanwhile(*arguments: object) -> object:
        monkeypatch.setattr(module, "_read_and_write", real)
        ingest([february], out, IngestConfig(append=True))
        return real(*arguments)

    monkeypatch.setattr(module, "_read_and_write", meanwhile)
    with pytest.raises(ValueError, match="Run the same command again"):
        ingest([january], out, IngestConfig(append=True))
    summary = ingest([january], out, IngestConfig(append=True))
    assert (summary.num_volumes, summary.num_rejected) == (9, 2)
    ledger = [json.loads(line)["source"] for line in summary.rejects_path.read_text().splitlines()]
    assert ledger == ["sub-february_T1w.nii", "sub-january_T1w.nii"]


def test_a_corpus_that_a_kill_caught_between_two_places_is_taken_back(tmp_path: Path) -> None:
    files, out = write(tmp_path / "in", range(3)), tmp_path / "out"
    ingest([files], out, IngestConfig())
    before = splits(out)
    out.rename(tmp_path / "out.replaced-0badcafe")
    write(files, range(3, 5))
    ingest([files], out, IngestConfig(append=True))
    assert before.items() <= splits(out).items()
    assert len(splits(out)) == 5


def test_append_to_nothing_makes_the_corpus(tmp_path: Path) -> None:
    files = write(tmp_path / "in", range(2))
    assert ingest([files], tmp_path / "out", IngestConfig(append=True)).num_volumes == 2
