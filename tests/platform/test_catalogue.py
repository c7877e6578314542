"""Every catalogued data set, read from a tiny copy in its own layout; and what the table promises as a whole."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnimri.jobs import datasets as job
from omnimri.platform.data.catalogue import entries as catalogue_module
from omnimri.platform.data.catalogue.entries import (
    ANATOMIES,
    FAMILIES,
    TASKS,
    UNKNOWN,
    DatasetEntry,
    catalogue,
    find_dataset,
    overlap_group,
    parse_catalogue,
)
from omnimri.platform.data.catalogue.layout import Layouts
from omnimri.platform.data.catalogue.patterns import Pattern
from omnimri.platform.data.formats.readers import group, probe_files, read_item
from omnimri.platform.data.formats.records import ReadError, ReadLimits
from omnimri.platform.data.formats.sources import open_sources
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.ingest import ingest
from omnimri.platform.data.intake.writer import PlannedItem, make_row
from omnimri.platform.data.schema import FACTS, unpack_array
from omnimri.platform.data.shards import Shards, load_row
from tests.platform.catalogue_fixtures import FIXTURES, Fixture, write_fixture
from tests.platform.catalogue_writers import SHAPE
from tests.platform.intake_fakes import oblique_affine, random_image, save_nifti

LIMITS = ReadLimits()


def read_as(root: Path, entry: DatasetEntry) -> tuple[list[dict[str, Any]], list[ReadError], set[str]]:
    """Rows, ledger lines and raw patient keys of a folder in the layout of an entry, without Ray."""
    sources, errors = open_sources([root], LIMITS)
    layouts = Layouts(sources, {"": entry}, LIMITS)
    rows, patients = [], set()
    for source in sources:
        kept, label_maps, left_out = layouts.place(source, probe_files(source.container, source.sizes))
        items, refused = group(kept, source, label_maps=label_maps)
        errors += [*left_out, *refused]
        for item in items:
            annotation, failed = layouts.annotation(source, item)
            records, unreadable = read_item(item, LIMITS)
            errors += [*failed, *unreadable]
            patients.add(item.patient)
            plan = PlannedItem(
                item=item, dataset=entry.name, licence=entry.stated_licence, simulated=False, split="train",
                patient_id="p", study_id="s", series_id="r", person_id="o", item_id="i", annotation=annotation,
            )  # fmt: skip
            for record in records:
                row = make_row(record, plan, IngestConfig())
                rows.append({**row.values, "source": record.source})
                errors += row.misfits
    return rows, errors, patients


@pytest.mark.parametrize("name", catalogue())
def test_a_data_set_is_read_in_its_own_layout(name: str, tmp_path: Path) -> None:
    entry, fixture = find_dataset(name), FIXTURES[name]
    rows, errors, patients = read_as(write_fixture(fixture, tmp_path), entry)
    assert len(rows) == (fixture.num_volumes or len(fixture.images)), errors
    assert sum(_num_files(error) for error in errors) == fixture.left_out, errors
    assert Counter(row["contrast"] for row in rows) == _contrasts(fixture, len(rows))
    assert patients == set(fixture.patients)
    _check_annotation(rows, entry, fixture)
    assert _unread(rows, entry) == set(entry.unread)
    for row in rows:
        assert {key: row[key] for key in fixture.facts} == dict(fixture.facts)


def _num_files(error: ReadError) -> int:
    """One line of the ledger may stand for several files of one folder."""
    return 1 + int(error.source.rpartition(" and ")[2].split()[0]) if error.source.endswith(" more") else 1


def _contrasts(fixture: Fixture, num_rows: int) -> Counter[str | None]:
    if len(fixture.images) == 1 and num_rows > 1:
        contrasts = str(next(iter(fixture.images.values()))).split("+")
        values = contrasts if len(contrasts) == num_rows else contrasts * num_rows
        return Counter(None if value == "None" else value for value in values)
    return Counter(fixture.images.values())


def _unread(rows: list[dict[str, Any]], entry: DatasetEntry) -> set[str]:
    """Tasks that the row of the table promises and no volume has targets for."""
    columns = {
        "segmentation": "label_map", "detection": "boxes", "diagnosis": "classes", "report": "report",
        "reconstruction": "kspace",
    }  # fmt: skip
    read = {task for task, column in columns.items() if any(row[column] is not None for row in rows)}
    # Segmentation objects of DICOM are found by their own headers, whatever the layout.
    return set(entry.tasks) - read - {"pretraining"} - ({"segmentation"} if entry.family == "dicom-tcia" else set())


def _check_annotation(rows: list[dict[str, Any]], entry: DatasetEntry, fixture: Fixture) -> None:
    labelled = [row for row in rows if row["label_map"]]
    present = ((row, set(np.unique(unpack_array(row["label_map"])))) for row in labelled)
    assert {name for row, values in present for value, name in row["label_names"] if value in values} == fixture.names
    assert bool(labelled) == bool(fixture.labels or fixture.unnamed_labels or fixture.names)
    for row in labelled:
        assert unpack_array(row["label_map"]).any()
    classes = {name for row in rows for name in row["classes"] or ()}
    assert classes == set(fixture.classes or ())
    assert any(row["classes"] is not None for row in rows) == (fixture.classes is not None)
    boxes = [tuple(box["box_voxel"]) for row in rows for box in row["boxes"] or ()]
    assert boxes == list(fixture.boxes or ())
    assert {row["report"] for row in rows} == {fixture.report}
    assert {row["licence"] for row in rows} == {entry.stated_licence}


def test_label_maps_keep_the_values_of_their_file(tmp_path: Path) -> None:
    rows, _, _ = read_as(write_fixture(FIXTURES["brats-2021"], tmp_path), find_dataset("brats-2021"))
    for row in rows:
        assert dict(row["label_names"])[4] == "tumour label 4"
        assert sorted(np.unique(unpack_array(row["label_map"]))) == [0, 1, 2, 4]


def test_masks_of_single_structures_become_one_label_map(tmp_path: Path) -> None:
    [row], _, _ = read_as(
        write_fixture(FIXTURES["totalsegmentator-mri"], tmp_path), find_dataset("totalsegmentator-mri")
    )
    labels, names = unpack_array(row["label_map"]), dict(row["label_names"])
    # The fixture writes kidney and spleen in turn along x.
    assert names[labels[1, 0, 1]] == "kidney left"
    assert names[labels[1, 0, 0]] == "spleen"
    assert not labels[0].any()


def test_only_the_labelled_frames_of_a_cine_carry_labels(tmp_path: Path) -> None:
    rows, _, _ = read_as(write_fixture(FIXTURES["mms"], tmp_path), find_dataset("mms"))
    assert [row["label_map"] is not None for row in rows] == [True, False, True]


def test_classes_belong_to_their_sample(tmp_path: Path) -> None:
    rows, _, _ = read_as(write_fixture(FIXTURES["vesselmnist3d"], tmp_path), find_dataset("vesselmnist3d"))
    assert [row["classes"] for row in rows] == [["vessel"], ["aneurysm"], ["vessel"]]


@pytest.mark.parametrize(
    ("name", "table", "cell", "wrong"),
    [
        ("fastmri-plus-knee", "Annotations/knee.csv", ",10,20,", ",Smith,20,"),
        ("mms", "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv", ",0,2,", ",Smith,2,"),
    ],
)
def test_a_broken_table_costs_the_annotation_and_is_not_quoted(
    name: str, table: str, cell: str, wrong: str, tmp_path: Path
) -> None:
    root = write_fixture(FIXTURES[name], tmp_path)
    (root / table).write_text((root / table).read_text().replace(cell, wrong))
    rows, [error], _ = read_as(root, find_dataset(name))
    assert rows
    assert "a column holds no whole number" in error.reason
    assert "Smith" not in str(error)


def test_volumes_without_a_row_in_the_table_are_not_annotated(tmp_path: Path) -> None:
    root = write_fixture(FIXTURES["mrnet"], tmp_path)
    np.save(root / "train" / "axial" / "0009.npy", random_image(9, SHAPE))
    rows, _, _ = read_as(root, find_dataset("mrnet"))
    assert [row["classes"] for row in rows if "0009" in row["source"]] == [None]


def test_files_outside_the_layout_are_refused_with_what_to_do(tmp_path: Path) -> None:
    root = write_fixture(FIXTURES["epvs-2024"], tmp_path)
    save_nifti(root / "derived" / "average.nii.gz", random_image(1, SHAPE), oblique_affine())
    _, [error], _ = read_as(root, find_dataset("epvs-2024"))
    assert str(error) == (
        "derived/average.nii.gz: Not in the layout of epvs-2024. Compare `omnimri datasets epvs-2024`, or ingest it "
        "under another name."
    )


# ---- Patterns


@pytest.mark.parametrize(
    ("template", "path", "fields"),
    [
        ("{patient}/{patient}_{contrast}.nii.gz", "a/b/s1/s1_T1.nii.gz", {"patient": "s1", "contrast": "T1"}),
        ("{patient}/{patient}_{contrast}.nii.gz", "s1/s2_T1.nii.gz", None),
        (r"{patient:\d+}.mha", "x/17.mha", {"patient": "17"}),
        (r"{patient:\d+}.mha", "x/a17.mha", None),
        ("In/**/{_}.dcm", "In/a/b/1.dcm", {}),
        ("In/**/{_}.dcm", "In/1.dcm", {}),
        ("a+b.nii", "aab.nii", None),
    ],
)
def test_patterns(template: str, path: str, fields: dict[str, str] | None) -> None:
    assert Pattern(template).match(path) == fields


def test_the_longest_word_of_a_contrast_counts() -> None:
    pattern = Pattern("{_}_{contrast}.mha", {"contrast": ("t2", "t2_SPACE")})
    assert pattern.match("1_t2_SPACE.mha") == {"contrast": "t2_SPACE"}


# ---- The table


def test_the_catalogue_covers_anatomies_and_label_types() -> None:
    entries = catalogue().values()
    assert len(entries) >= 60
    needed = {"brain", "breast", "knee", "prostate", "heart", "spine", "abdomen"}
    assert needed <= {anatomy for entry in entries for anatomy in entry.anatomy}
    assert set(TASKS) == {task for entry in entries for task in entry.tasks}
    assert set(FAMILIES) == {entry.family for entry in entries}
    assert set(FIXTURES) == set(catalogue())


def test_every_row_states_where_it_comes_from() -> None:
    for entry in catalogue().values():
        assert entry.citation and entry.access and entry.layout, entry.name
        if entry.evidence == "recall" or "recall" in entry.access:
            assert entry.licence == UNKNOWN, f"{entry.name} asserts a remembered licence"


def test_overlaps_name_entries_from_both_sides() -> None:
    for entry in catalogue().values():
        assert entry.name not in entry.overlaps
        for other in entry.overlaps:
            # Free text for sets that are not in the catalogue; it does not look like a name.
            if other in catalogue():
                assert entry.name in catalogue()[other].overlaps, f"{other} does not name {entry.name}"
            else:
                assert other != other.lower(), f"{entry.name} overlaps {other!r}, which is not in the catalogue"


def test_every_stated_fact_is_one_that_rows_hold() -> None:
    for entry in catalogue().values():
        stated = [entry.facts, *(rule.facts for rule in entry.images), *(table.facts for table in entry.tables)]
        assert {name for facts in stated for name in facts} <= set(FACTS), entry.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "zip-of-jpeg"}, "mine: 'zip-of-jpeg' is none of"),
        ({"evidence": "hearsay"}, "mine: 'hearsay' is none of"),
        ({"anatomy": ["elbow"]}, "mine: elbow, expected some of"),
        ({"images": []}, "no file would be read"),
        ({"license": "MIT"}, "mine: unknown license; known: "),
        ({"images": [{"patern": "x"}]}, r"mine: \[\[dataset.images\]\]: unknown patern"),
    ],
)
def test_a_row_that_is_wrong_says_how(change: dict[str, Any], message: str) -> None:
    row = {
        "name": "mine", "title": "Mine", "family": "nrrd", "anatomy": ["knee"], "tasks": ["segmentation"],
        "layout": "x", "licence": "unknown", "access": "here", "citation": "me", "evidence": "opened",
        "images": [{"pattern": "x"}],
    } | change  # fmt: skip
    images = "".join(f"[[dataset.images]]\n{_toml(image)}" for image in row.pop("images"))
    with pytest.raises(ValueError, match=message):
        parse_catalogue(f"[[dataset]]\n{_toml(row)}{images}")


def test_the_example_of_the_manual_is_a_row() -> None:
    [row] = re.findall(r"::\n\n(.*?)\n\nEvery field", str(catalogue_module.__doc__), flags=re.DOTALL)
    entry = parse_catalogue(textwrap.dedent(row))["my-set"]
    assert entry.images[0].label_names == {"1": "femoral cartilage", "2": "tibial cartilage"}
    assert Pattern(entry.images[0].pattern).match("7/T1.nii.gz") == {"patient": "7", "contrast": "T1"}


def _toml(values: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def test_an_unknown_name_is_answered_with_the_closest() -> None:
    with pytest.raises(ValueError, match=r"no data set 'brats-2012'\. Did you mean .*brats-2021"):
        find_dataset("brats-2012")


# ---- The command


def test_listing_has_one_line_per_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(catalogue()) + 2
    assert lines[0].split() == ["name", "anatomy", "tasks", "licence", "access", "evidence"]
    assert job.main(["--task", "detection", "--anatomy", "knee"]) == 0
    assert "fastmri-plus-knee" in capsys.readouterr().out


def test_description_has_layout_labels_citation_and_overlaps(capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["wmh-2017"]) == 0
    text = capsys.readouterr().out
    for part in (
        "{site}/{number}/wmh.nii.gz: 1 white matter hyperintensity",
        "licence   unknown",
        "overlaps",
        "citation",
    ):
        assert part in text
    for name in catalogue():
        assert job.main([name]) == 0


def test_json_is_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == set(catalogue())
    assert job.main(["spider", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described == json.loads(json.dumps(dataclasses.asdict(find_dataset("spider"))))
    assert job.main(["spidre"]) == 1
    assert "Did you mean spider?" in capsys.readouterr().err


# ---- Through ingest


def test_ingest_by_name(tmp_path: Path, ray_cluster: None) -> None:
    write_fixture(FIXTURES["wmh-2017"], tmp_path / "wmh")
    summary = ingest([tmp_path / "wmh"], tmp_path / "out", IngestConfig(dataset="wmh-2017"))
    rows = [load_row(ref) for ref in Shards.open(tmp_path / "out").rows]
    assert (summary.num_volumes, len(rows)) == (2, 2)
    assert {row["contrast"] for row in rows} == {"FLAIR", "T1w"}
    assert {row["dataset"] for row in rows} == {"wmh-2017"}
    assert len({row["patient_id"] for row in rows}) == 1
    ledger = (tmp_path / "out" / "rejects.jsonl").read_text()
    assert "pre holds the same scans, aligned." in ledger


def test_ingest_of_a_zip_by_name(tmp_path: Path, ray_cluster: None) -> None:
    root = write_fixture(FIXTURES["promise12"], tmp_path / "promise12")
    shutil.make_archive(str(tmp_path / "files"), "zip", root)
    ingest([tmp_path / "files.zip"], tmp_path / "out", IngestConfig(dataset="promise12"))
    [row] = [load_row(ref) for ref in Shards.open(tmp_path / "out").rows]
    assert (row["contrast"], row["body_part"], row["licence"]) == ("T2w", "prostate", None)
    assert dict(row["label_names"]) == {1: "prostate"}


def test_a_name_that_looks_like_one_of_the_catalogue_is_pointed_out(
    tmp_path: Path, ray_cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    save_nifti(tmp_path / "a.nii", random_image(2), oblique_affine())
    ingest([tmp_path / "a.nii"], tmp_path / "out", IngestConfig(dataset="brats-2012"))
    assert "not in the catalogue" in caplog.text
    assert "Did you mean" in caplog.text


@pytest.mark.slow
def test_a_folder_of_every_data_set_becomes_right_rows(tmp_path: Path, ray_cluster: None) -> None:
    for name, fixture in FIXTURES.items():
        root = write_fixture(fixture, tmp_path / "all" / name / "files").parent
        (root / "dataset.json").write_text(json.dumps({"catalogue": name}))
    summary = ingest([tmp_path / "all"], tmp_path / "out", IngestConfig())
    expected = {name: fixture.num_volumes or len(fixture.images) for name, fixture in FIXTURES.items()}
    shards = Shards.open(tmp_path / "out")
    assert Counter(row.dataset for row in shards.rows) == expected
    assert summary.num_volumes == sum(expected.values())
    for name, fixture in FIXTURES.items():
        refs = shards.select(dataset=name).rows
        assert Counter(ref.contrast for ref in refs) == _contrasts(fixture, len(refs)), name
        assert {ref.licence for ref in refs} <= {find_dataset(name).stated_licence, None}, name
        assert any(ref.has_labels for ref in refs) == bool(fixture.labels or fixture.unnamed_labels or fixture.names)
        assert any(ref.has_classes for ref in refs) == (fixture.classes is not None), name
        assert set(ANATOMIES) >= set(find_dataset(name).anatomy)


def test_a_card_with_an_unknown_layout_is_an_error(tmp_path: Path, ray_cluster: None) -> None:
    save_nifti(tmp_path / "in" / "a.nii", random_image(1), oblique_affine())
    (tmp_path / "in" / "dataset.json").write_text('{"catalogue": "brats-2012"}')
    with pytest.raises(ValueError, match="no data set 'brats-2012'"):
        ingest([tmp_path / "in"], tmp_path / "out", IngestConfig())


def test_sets_that_share_images_split_their_patients_together() -> None:
    assert overlap_group("upenn-gbm") == overlap_group("brats-2021") == overlap_group("upenn-gbm-dicom")
    assert overlap_group("prostatex") == overlap_group("pi-cai") != overlap_group("brats-2021")
    assert overlap_group("clinic-a") == "clinic-a"
