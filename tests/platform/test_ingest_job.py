"""From files to shards: rows, splits, ledger, summary, and what happens when it is done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydicom.data import get_testdata_file
from scipy.ndimage import gaussian_filter

from omnimri.jobs import ingest as job
from omnimri.models.geometry import to_canonical
from omnimri.platform.corpus.corpus import CorpusConfig, write_corpus
from omnimri.platform.data.deid import KEY_VARIABLE
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.ingest import ingest
from omnimri.platform.data.intake.report import cross_table
from omnimri.platform.data.schema import SCHEMA
from omnimri.platform.data.shards import Shards, load_row, row_to_scan
from omnimri.platform.tracking import connect, experiment_id
from tests.platform.intake_fakes import (
    coil_kspace,
    dicom_slices,
    ismrmrd_header,
    oblique_affine,
    random_image,
    rescalable,
    save_dicom,
    save_fastmri,
    save_ismrmrd,
    save_nifti,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("ray_cluster")

SHAPE = (5, 8, 6)


def _patient(root: Path, number: int) -> None:
    """Four series of one participant, each in a format of its own, with annotations for the first."""
    name = f"sub-{number:04d}"
    folder, affine = root / name, oblique_affine(angle=0.1 + 0.05 * number)
    images = [rescalable(random_image(10 * number + k, SHAPE)) for k in range(4)]
    save_dicom(dicom_slices(images[0], affine, seed=number, PatientID=f"H{number}"), folder / "dicom" / "T1w")
    save_nifti(folder / "anat" / f"{name}_FLAIR.nii.gz", images[1], affine)
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0)[::-1])
    save_fastmri(
        folder / "raw" / f"{name}_T2w.h5", coil_kspace(images[2]), ismrmrd_header(SHAPE, spacing),
        affine_ras=affine, acquisition="AXT2", patient_id=f"fast{number}",
    )  # fmt: skip
    save_ismrmrd(folder / "raw" / f"{name}_PD.mrd.h5", coil_kspace(images[3]), affine, seed=number)
    save_nifti(folder / "labels" / f"{name}_T1w_dseg.nii.gz", images[0] % 4, affine)
    entries: dict[str, Any] = {
        "dicom/T1w": {
            "label_map": f"labels/{name}_T1w_dseg.nii.gz",
            "label_names": {"1": "cerebrospinal fluid", "2": "grey matter", "3": "something new"},
            "boxes": [{"label": "old infarct", "side": "left", "box_voxel": [1, 2, 0, 3, 5, 4]}],
            "classes": ["old infarct"],
            "report": "An old infarct on the left.",
            "description": {"diagnostic_impression": {"suggestive_of": "old infarct"}},
            "description_origin": {"diagnostic_impression.suggestive_of": "label"},
        },
        f"anat/{name}_FLAIR.nii.gz": {"boxes": [], "classes": ["normal"]},
        f"raw/{name}_T2w.h5": {},
        f"raw/{name}_PD.mrd.h5": {"boxes": [{"label": "x", "box_voxel": [0, 0, 0, 99, 1, 1]}]},
    }
    document = {"patient": {"participant_id": name, "sex": "F", "age_years": 40 + number}, "series": entries}
    (folder / "annotations.json").write_text(json.dumps(document))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("intake") / "corpus"
    for number in range(5):
        _patient(root, number)
    (root / "dataset.json").write_text('{"name": "fakes", "licence": "CC0-1.0", "simulated": true}')
    (root / "brain.nii.gz").write_text("not a brain")
    shutil.copy(get_testdata_file("CT_small.dcm"), root)
    shutil.copy(get_testdata_file("MR_truncated.dcm"), root)
    (root / "broken.zip").write_bytes(b"PK")
    return root


@pytest.fixture(scope="module")
def shards(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    out = tmp_path_factory.mktemp("ingested") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, "first key of the tests")
        ingest([corpus], out, IngestConfig(items_per_shard=3))
    return Shards.open(out)


def _out(shards: Shards) -> Path:
    return Path(shards.rows[0].path).parents[1]


def test_every_volume_becomes_a_row(shards: Shards) -> None:
    assert len(shards) == 20
    for source_format in ("dicom", "nifti", "fastmri", "ismrmrd"):
        assert len(shards.select(source_format=source_format)) == 5
    assert {(row.dataset, row.licence, row.simulated) for row in shards.rows} == {("fakes", "CC0-1.0", True)}
    assert len(shards.select(has_kspace=True, fully_sampled=True)) == 10
    assert {row.contrast for row in shards.select(source_format="fastmri").rows} == {"T2w"}
    assert len({row.row_id for row in shards.rows}) == 20


def test_all_series_of_a_participant_are_in_one_split(shards: Shards) -> None:
    by_patient: dict[str, set[str]] = {}
    for row in shards.rows:
        by_patient.setdefault(row.patient_id, set()).add(row.split)
    assert len(by_patient) == 5
    assert sorted(next(iter(splits)) for splits in by_patient.values() if len(splits) == 1) == (
        ["test", "train", "train", "train", "val"]
    )  # fmt: skip


def test_voxels_labels_and_text_survive(shards: Shards) -> None:
    expected = rescalable(random_image(0, SHAPE))
    rows = [load_row(ref) for ref in shards.select(source_format="dicom").rows]
    [row] = [row for row in rows if np.array_equal(row["image"], expected)]
    assert set(row) == set(SCHEMA.names)
    np.testing.assert_array_equal(row["label_map"], expected.astype(int) % 4)
    assert row["label_map"].dtype == np.uint8
    assert row["label_names"] == {1: "cerebrospinal fluid", 2: "grey matter", 3: "something new"}
    assert row["boxes"] == [{"label": "old infarct", "side": "left", "box_voxel": [1, 2, 0, 3, 5, 4]}]
    assert (row["classes"], row["report"]) == (["old infarct"], "An old infarct on the left.")
    assert json.loads(row["description"])["diagnostic_impression"]["suggestive_of"] == "old infarct"
    assert (row["sex"], row["age_years"]) == ("F", 40.0)
    np.testing.assert_allclose(row_to_scan(row).affine, oblique_affine(angle=0.1), atol=1e-5)


def test_kspace_rows_hold_what_the_image_was_made_from(shards: Shards) -> None:
    for ref in shards.select(source_format="fastmri").rows:
        scan = row_to_scan(load_row(ref, ["image", "affine", "kspace", "mask"]))
        assert scan.kspace.shape == (5, 3, 8, 6)
        assert scan.mask is None
        images = [rescalable(random_image(10 * number + 2, SHAPE)) for number in range(5)]
        assert any(np.allclose(scan.image, image, rtol=1e-3) for image in images)


def test_ledger_names_reason_and_remedy_of_everything_that_was_not_read(shards: Shards) -> None:
    lines = [json.loads(line) for line in _out(shards).with_name("shards.rejects.jsonl").read_text().splitlines()]
    reasons = {line["source"]: line["reason"] for line in lines}
    assert reasons["CT_small.dcm"] == "Modality CT, expected MR."
    assert "truncated" in reasons["MR_truncated.dcm"]
    assert "no NIfTI header" in reasons["brain.nii.gz"]
    assert reasons["broken.zip"] == "Not a readable zip."
    assert all(line["hint"] for line in lines)
    outside = [line for line in lines if "outside the volume" in line["reason"]]
    assert len(outside) == 5
    assert len(lines) == 9


def test_nothing_identifying_is_on_disk(shards: Shards) -> None:
    for path in _out(shards).rglob("*.json*"):
        text = path.read_text()
        assert "Doe" not in text
        assert "P-001" not in text
    columns = [name for name in SCHEMA.names if name not in ("image", "kspace", "mask", "label_map")]
    for ref in shards.rows:
        text = json.dumps(load_row(ref, columns), default=str)
        assert not any(word in text for word in ("Doe", "P-001", "sub-0", "fast0", "H0"))
    raw = b"".join(path.read_bytes() for path in (_out(shards) / "shards").iterdir())
    assert b"Doe" not in raw


def test_each_row_is_a_row_group_and_plain_parquet(shards: Shards) -> None:
    for path in {row.path for row in shards.rows}:
        metadata = pq.read_metadata(path)
        assert all(metadata.row_group(n).num_rows == 1 for n in range(metadata.num_row_groups))
        assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert pq.read_schema(shards.rows[0].path).equals(SCHEMA)


def test_summary_counts_what_there_is(shards: Shards) -> None:
    tables = json.loads((_out(shards) / "summary.json").read_text())
    assert tables["total"] == {"patients": 5, "scans": 20, "volumes": 20, "slices": 100}
    assert tables["source format"]["ismrmrd"]["volumes"] == 5
    assert tables["annotation"]["k-space"]["volumes"] == 10
    assert tables["annotation"]["boxes"]["volumes"] == 10
    assert sum(tables["rejected"].values()) == 9
    assert tables["digest"] == shards.digest


def test_report_shows_what_the_summary_counts(shards: Shards) -> None:
    page = (_out(shards) / "report.html").read_text()
    assert all(word in page for word in (shards.digest, "fakes", "CC0-1.0", "Modality CT, expected MR.", "Vendor and"))
    rows = [{"vendor": v, "field_strength_t": f} for v, f in (("GE", 1.5), ("GE", 3.0), ("GE", 3.0), (None, None))]
    table = cross_table(rows)
    assert table == {"columns": ["1.5 T", "3 T", "unknown"], "lines": [("GE", [1, 2, 0]), ("unknown", [0, 0, 1])]}


def test_digest_and_split_do_not_depend_on_key_layout_or_place(
    corpus: Path, shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "second key of the tests")
    copy = shutil.copytree(corpus, tmp_path / "elsewhere")
    ingest([copy], tmp_path / "shards", IngestConfig(items_per_shard=20))
    again = Shards.open(tmp_path / "shards")
    assert again.digest == shards.digest
    assert {row.row_id: row.split for row in again.rows} == {row.row_id: row.split for row in shards.rows}
    assert {row.patient_id for row in again.rows}.isdisjoint(row.patient_id for row in shards.rows)


def test_the_same_request_finds_its_result_and_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    path, out = save_nifti(tmp_path / "a.nii", random_image(1), np.eye(4)), tmp_path / "out"
    first = ingest([path], out, IngestConfig())
    written = (out / "manifest.json").stat().st_mtime_ns
    assert not first.reused
    assert ingest([path], out, IngestConfig()).reused
    assert (out / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"holds another corpus.*--overwrite"):
        ingest([path], out, IngestConfig(seed=1))
    assert not ingest([path], out, IngestConfig(seed=1, overwrite=True)).reused
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii", "out", "out.key", "out.rejects.jsonl"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii", random_image(2), np.eye(4))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds files that are no corpus"):
        ingest([path], tmp_path / "home", IngestConfig(overwrite=True))
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_a_volume_that_comes_twice_is_kept_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_nifti(tmp_path / "in" / f"sub-{name}_T1w.nii", random_image(3), np.eye(4))
    summary = ingest([tmp_path / "in"], tmp_path / "out", IngestConfig())
    assert (summary.num_volumes, summary.num_rejected) == (1, 1)
    assert "sub-a_T1w.nii is kept" in (tmp_path / "out.rejects.jsonl").read_text()


def test_a_near_copy_under_another_name_stays_out_of_other_splits(tmp_path: Path) -> None:
    """Twelve patients, and each again under another name, with other noise and another scale."""
    rng = np.random.default_rng(5)
    for number in range(12):
        smooth = gaussian_filter(rng.normal(size=(12, 48, 40)), 3)
        image = (1000 * (smooth - smooth.min()) / np.ptp(smooth) + 10).astype(np.float32)
        save_nifti(tmp_path / "in" / f"sub-a{number}_T1w.nii", image, np.eye(4))
        again = (2 * image + rng.normal(size=image.shape)).astype(np.float32)
        save_nifti(tmp_path / "in" / f"sub-b{number}_T1w.nii", again, np.eye(4))
    summary = ingest([tmp_path / "in"], tmp_path / "out", IngestConfig())
    lines = [json.loads(line) for line in summary.rejects_path.read_text().splitlines()]
    assert {line["reason"] for line in lines} == {"All but the same as a volume of another patient in another split."}
    flags = [flag for row in Shards.open(tmp_path / "out").rows for flag in row.flags]
    assert len(lines) + sum(flag.startswith("near copy of ") for flag in flags) == 12
    assert len(lines) > 0


def test_job_prints_a_table_and_says_last_how_many_were_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [get_testdata_file(name) for name in ("MR_small.dcm", "examples_overlay.dcm", "CT_small.dcm")]
    assert job.main([*sources, "--out", str(tmp_path / "out"), "--dataset", "real", "--licence", "MIT"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["total", "2", "2", "2", "2"]
    assert lines[-1] == f"{tmp_path}/out: 2 volumes ingested; 1 rejected, reasons in {tmp_path}/out.rejects.jsonl"
    assert {row.dataset for row in Shards.open(tmp_path / "out").rows} == {"real"}


def test_the_report_becomes_the_card_of_the_data_in_mlflow(tmp_path: Path) -> None:
    sources = [get_testdata_file(name) for name in ("MR_small.dcm", "examples_overlay.dcm", "CT_small.dcm")]
    out, uri = tmp_path / "out", f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert job.main([*sources, "--out", str(out), "--dataset", "real", "--tracking-uri", uri]) == 0
    client = connect(uri)
    [run] = client.search_runs([experiment_id(uri)])
    [entry] = run.inputs.dataset_inputs
    assert entry.dataset.name == "real"
    assert Shards.open(out).digest.startswith(entry.dataset.digest)
    assert (run.data.metrics["volumes"], run.data.metrics["rejected"]) == (2, 1)
    names = [file.path for file in client.list_artifacts(run.info.run_id, "corpus")]
    assert names == ["corpus/rejects.jsonl", "corpus/report.html", "corpus/summary.json"]
    kept = client.download_artifacts(run.info.run_id, "corpus", str(tmp_path))
    assert not any("CT_small" in path.read_text() for path in Path(kept).iterdir())


def test_job_fails_when_nothing_could_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "brain.nii.gz").write_text("not a brain")
    assert job.main([str(tmp_path / "brain.nii.gz"), "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("omnimri ingest: error: No volume could be read: 0 ingested, 1 rejected")
    assert not (tmp_path / "out").exists()
    assert "no NIfTI header" in (tmp_path / "out.rejects.jsonl").read_text()


def test_many_coils_become_few_on_request(tmp_path: Path) -> None:
    kspace = coil_kspace(rescalable(random_image(6, SHAPE)), num_coils=9)
    save_fastmri(tmp_path / "a.h5", kspace, ismrmrd_header(SHAPE, (4.0, 1.0, 1.0)))
    ingest([tmp_path / "a.h5"], tmp_path / "out", IngestConfig(max_coils=4))
    [ref] = Shards.open(tmp_path / "out").rows
    row = load_row(ref, ["image", "kspace"])
    assert row["kspace"].shape == (5, 4, 8, 6)
    np.testing.assert_allclose(np.linalg.norm(row["kspace"]), np.linalg.norm(kspace), rtol=1e-4)
    with pytest.raises(ValueError, match="max_coils must be 1 or more"):
        IngestConfig(max_coils=0)


def test_config_refuses_shares_that_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="add up to 1"):
        IngestConfig(split_fractions=(0.5, 0.1, 0.1))


@pytest.mark.slow
def test_the_built_in_corpus_comes_through_whole_in_every_format(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", CorpusConfig(num_patients=1, seed=3))
    summary = ingest([tmp_path / "corpus"], tmp_path / "out", IngestConfig())
    assert (summary.num_volumes, summary.num_rejected) == (4, 0)
    rows = [load_row(ref) for ref in Shards.open(tmp_path / "out").rows]
    assert {row["source_format"] for row in rows} == {"dicom", "nifti", "fastmri", "ismrmrd"}
    assert {row["contrast"] for row in rows} == {"T1w", "T2w", "FLAIR", "PD"}
    assert all(row["simulated"] and row["report"] and row["classes"] for row in rows)
    # One patient on one grid, stored with rows turned in some formats: a half voxel or a wrong side would show.
    labels = [to_canonical(row["label_map"], np.reshape(row["affine"], (4, 4))) for row in rows]
    for canonical in labels[1:]:
        np.testing.assert_allclose(canonical.affine, labels[0].affine, atol=2e-3)
        np.testing.assert_array_equal(canonical.array, labels[0].array)
    for row in rows:
        head = row["image"] > 0.05 * row["image"].max()
        assert (head & (row["label_map"] > 0)).sum() > 0.9 * (row["label_map"] > 0).sum()
