"""Reading shards: columns, selection, several corpora, threads, and no files left open."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from omnimri.models.scan import Scan
from omnimri.platform.data.formats.readers import WorkItem, read_path
from omnimri.platform.data.intake.annotations import Annotation
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.writer import PlannedItem, write_shard
from omnimri.platform.data.schema import SCHEMA, SCHEMA_VERSION, pack_image, unpack_array
from omnimri.platform.data.shards import Shards, content_digest, load_row, row_to_scan
from tests.platform.intake_fakes import (
    coil_kspace,
    dicom_slices,
    random_image,
    rescalable,
    save_dicom,
    save_fastmri,
    save_nifti,
)
from tests.platform.shards_fakes import write_shards

SHAPE = (4, 6, 5)


def _corpus(folder: Path, seeds: range, split: str = "train") -> Path:
    """A corpus of one NIfTI volume for each seed and one raw data file, written without Ray."""
    (folder / "shards").mkdir(parents=True)
    planned = []
    for seed in seeds:
        save_nifti(folder / "in" / f"{seed}.nii", random_image(seed, SHAPE), np.eye(4))
        planned.append(_planned(folder / "in", f"{seed}.nii", "nifti", split))
    save_fastmri(folder / "in" / "raw.h5", coil_kspace(random_image(seeds[0] + 1000, SHAPE)))
    planned.append(_planned(folder / "in", "raw.h5", "fastmri", split))
    report = write_shard(planned, folder / "shards" / "shard-00000.parquet", IngestConfig())
    assert report.rejects == []
    (folder / "manifest.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION, "rows": report.rows}))
    return folder


def _planned(folder: Path, name: str, kind: str, split: str) -> PlannedItem:
    item = WorkItem(kind=kind, container=str(folder), names=(name,), source=name, num_bytes=0)
    return PlannedItem(
        item=item, dataset="set", licence=None, simulated=False, split=split,
        patient_id="p", study_id="s", series_id=name, person_id="o", item_id=name,
        annotation=Annotation(classes=[]),
    )  # fmt: skip


def test_a_row_read_back_is_the_volume_that_was_written(tmp_path: Path) -> None:
    shards = Shards.open(_corpus(tmp_path / "a", range(3)))
    assert [row.row_group for row in shards.rows] == [0, 1, 2, 3]
    [record], _ = read_path(tmp_path / "a" / "in" / "1.nii")
    scan = row_to_scan(load_row(shards.rows[1]))
    assert isinstance(scan, Scan)
    np.testing.assert_array_equal(scan.image, record.scan.image)
    np.testing.assert_array_equal(scan.affine, record.scan.affine)
    assert scan.facts == record.scan.facts
    assert scan.kspace is None


def test_only_the_columns_asked_for_are_read(tmp_path: Path) -> None:
    shards = Shards.open(_corpus(tmp_path / "a", range(1)))
    row = load_row(shards.select(has_kspace=True).rows[0], ["kspace", "contrast", "classes", "boxes"])
    assert list(row) == ["kspace", "contrast", "classes", "boxes"]
    assert row["kspace"].dtype == np.complex64
    assert not row["kspace"].flags.writeable
    assert (row["classes"], row["boxes"]) == ([], None)
    with pytest.raises(ValueError, match=r"no column speed; known: row_id"):
        load_row(shards.rows[0], ["speed"])


def test_selection_by_value_and_by_several_values(tmp_path: Path) -> None:
    parts = {"train": range(2), "test": range(2, 4), "val": range(4, 5)}
    shards = Shards.open([_corpus(tmp_path / split, seeds, split) for split, seeds in parts.items()])
    assert len(shards) == 8
    assert len(shards.select(split="test")) == 3
    assert len(shards.select(split=("test", "val"), has_kspace=True)) == 2
    with pytest.raises(ValueError, match=r"no field colour; known: row_id"):
        shards.select(colour="red")


def test_digest_names_the_content_and_not_the_order(tmp_path: Path) -> None:
    a, b = _corpus(tmp_path / "a", range(2)), _corpus(tmp_path / "b", range(2, 4))
    assert Shards.open([a, b]).digest == Shards.open([b, a]).digest
    assert Shards.open(a).digest != Shards.open(b).digest
    moved = _corpus(tmp_path / "c", range(2), split="test")
    assert Shards.open(moved).digest != Shards.open(a).digest


def test_many_threads_read_and_leave_no_file_open(tmp_path: Path) -> None:
    shards = Shards.open(_corpus(tmp_path / "a", range(4)))
    expected = [load_row(ref)["image"].copy() for ref in shards.rows]
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda n: load_row(shards.rows[n % 5], ["image"])["image"], range(100)))
    for number, image in enumerate(images):
        np.testing.assert_array_equal(image, expected[number % 5])
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_what_is_no_corpus_or_of_another_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        Shards.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 0, "rows": []}')
    with pytest.raises(ValueError, match=f"row schema 0, this program reads 2 and {SCHEMA_VERSION}"):
        Shards.open(tmp_path)


def test_corpus_of_schema_version_2_is_read_without_its_missing_column(tmp_path: Path) -> None:
    folder = _corpus(tmp_path / "a", range(2))
    shard, manifest = folder / "shards" / "shard-00000.parquet", folder / "manifest.json"
    today = Shards.open(folder)
    table = pq.read_table(shard).drop_columns("measurements")
    pq.write_table(table, shard, row_group_size=1)
    document = json.loads(manifest.read_text()) | {"schema_version": 2}
    for entry in document["rows"]:
        del entry["has_measurements"]
    manifest.write_text(json.dumps(document))
    shards = Shards.open(folder)
    assert [row.has_measurements for row in shards.rows] == [False] * 3
    row = load_row(shards.rows[1])
    assert list(row) == SCHEMA.names
    assert row["measurements"] is None
    assert load_row(shards.rows[1], ["measurements"]) == {"measurements": None}
    np.testing.assert_array_equal(row["image"], read_path(folder / "in" / "1.nii")[0][0].scan.image)
    # The name of the data stays what it was when version 2 was written.
    assert shards.digest == content_digest(((row.digest, row.split) for row in shards.rows), 2)
    assert shards.digest != today.digest


def test_rows_hold_every_column_of_the_schema(tmp_path: Path) -> None:
    shards = Shards.open(_corpus(tmp_path / "a", range(1)))
    assert list(load_row(shards.rows[0])) == SCHEMA.names


def test_patients_of_a_held_out_kind_are_left_out_whole(tmp_path: Path) -> None:
    shards = Shards.open(write_shards(tmp_path / "shards"))
    rows = [replace(row, vendor="Philips" if n == 5 else "GE") for n, row in enumerate(shards.rows)]
    left = Shards(rows, shards.manifests).without_patients(vendor="Philips")
    assert {row.patient_id for row in left.rows} == {"patient-0", "patient-2"}
    assert len(left) == 8
    with pytest.raises(ValueError, match="names no row"):
        left.without_patients(vendor="Philips")


def test_a_volume_that_cannot_be_made_a_row_costs_one_line(tmp_path: Path) -> None:
    """A rescale that is no number gives an image that is none; its neighbours arrive."""
    planned = []
    for seed in range(3):
        save_nifti(tmp_path / f"{seed}.nii", random_image(seed, SHAPE), np.eye(4))
        planned.append(_planned(tmp_path, f"{seed}.nii", "nifti", "train"))
    [broken] = dicom_slices(rescalable(random_image(3, (1, 6, 5))), np.eye(4))
    broken.RescaleSlope = float("nan")
    save_dicom([broken], tmp_path)
    [name] = [path.name for path in tmp_path.glob("*.dcm")]
    planned.insert(1, _planned(tmp_path, name, "dicom", "train"))
    report = write_shard(planned, tmp_path / "shard.parquet", IngestConfig())
    assert [row["source"] for row in report.rows] == ["0.nii", "1.nii", "2.nii"]
    [line] = report.rejects
    assert (line["source"], line["reason"]) == (name, "The volume cannot be made a row (ValueError).")


@pytest.mark.parametrize(
    ("image", "kept"),
    [
        (np.arange(24).reshape(2, 3, 4), "<u2"),
        (np.arange(24).reshape(2, 3, 4) - 12, "<i2"),
        (np.arange(24).reshape(2, 3, 4) * 3000, "<f4"),  # up to 69,000
        (np.arange(24).reshape(2, 3, 4) / 2, "<f4"),
        (np.full((2, 3, 4), np.nan), "<f4"),
        (np.full((2, 3, 4), -40000.0), "<f4"),
    ],
)
def test_an_image_takes_16_bits_only_where_that_loses_nothing(image: np.ndarray, kept: str) -> None:
    packed = pack_image(image.astype(np.float32))
    assert packed["dtype"] == kept
    np.testing.assert_array_equal(unpack_array(packed).astype(np.float32), image.astype(np.float32))
