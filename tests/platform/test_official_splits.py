"""Official splits of public data sets: as their layouts state them, and without a leak between sets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from omnimri.platform.data.catalogue.entries import catalogue, find_dataset, parse_catalogue
from omnimri.platform.data.catalogue.layout import Layouts, folder_split, held_out_first
from omnimri.platform.data.catalogue.patterns import image_pattern
from omnimri.platform.data.formats.readers import group, probe_files
from omnimri.platform.data.formats.records import ReadLimits
from omnimri.platform.data.formats.sources import open_sources
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.ingest import ingest
from omnimri.platform.data.shards import Shards, load_row
from tests.platform.catalogue_fixtures import FIXTURES, write_fixture
from tests.platform.intake_fakes import oblique_affine, random_image, save_nifti

LIMITS = ReadLimits()

PATHS = {
    "fastmri-knee": {
        "multicoil_train/file1000001.h5": "train", "singlecoil_val/file1000002.h5": "val",
        "multicoil_test/file1000003.h5": "test", "multicoil_challenge/file1000004.h5": "test",
    },
    "cc359-raw": {"Train/e13991s3_P01536.7.h5": "train", "Val/e1_P1.7.h5": "val"},
    "brats-2021": {
        "RSNA_ASNR_MICCAI_BraTS2021_TrainingData/BraTS2021_00001/BraTS2021_00001_t1.nii.gz": "train",
        "RSNA_ASNR_MICCAI_BraTS2021_ValidationData/BraTS2021_00001/BraTS2021_00001_t1.nii.gz": "val",
        "elsewhere/BraTS2021_00001/BraTS2021_00001_t1.nii.gz": None,
    },
    "msd-task04-hippocampus": {
        "Task04_Hippocampus/imagesTr/hippocampus_001.nii.gz": "train",
        "Task04_Hippocampus/imagesTs/hippocampus_002.nii.gz": "test",
    },
    "amos22-mr": {"AMOS22/imagesVa/amos_0507.nii.gz": "val", "AMOS22/imagesTs/amos_0508.nii.gz": "test"},
    "vesselmnist3d": {
        "vesselmnist3d_64.npz#train_images": "train", "vesselmnist3d.npz#val_images": "val",
        "vesselmnist3d.npz#test_images": "test",
    },
    "acdc": {"testing/patient101/patient101_frame01.nii.gz": "test"},
    "mms": {"Training/Unlabeled/A1/A1_sa.nii.gz": "train", "Validation/A2/A2_sa.nii.gz": "val"},
    "mrnet": {"valid/axial/1130.npy": "val", "train/axial/0001.npy": "train"},
    "cirrmri600": {"Cirrhosis_T1_3D/valid_images/7.nii.gz": "val"},
    "dsb2015-cardiac": {"validate/501/study/sax_5/IM-0001-0001.dcm": "val"},
    "wmh-2017": {"training/Singapore/50/pre/FLAIR.nii.gz": None},
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_folders_state_the_split(name: str) -> None:
    entry = find_dataset(name)
    for path, split in PATHS[name].items():
        assert folder_split(entry, f"data/{path}") == split
        patterns = (image_pattern(rule.pattern, tuple(rule.contrasts)) for rule in entry.images)
        assert any(pattern.match(path) for pattern in patterns), f"{path} is no image of {name}"


def splits_of(root: Path, name: str) -> dict[str, str | None]:
    """Raw patient key to official split, without Ray."""
    [source], _ = open_sources([root], LIMITS)
    layouts = Layouts([source], {"": find_dataset(name)}, LIMITS)
    kept, label_maps, _ = layouts.place(source, probe_files(source.container, source.sizes))
    items, _ = group(kept, source, label_maps=label_maps)
    return {item.patient: layouts.official_split(source, item) for item in items}


TABLES: Mapping[str, tuple[Mapping[str, str], str]] = {
    "totalsegmentator-mri": ({"meta.csv": "image_id;age;split\ns0001;61;val\n"}, "val"),
    "odelia": ({"UKA/metadata/split.csv": "UID,Fold,Split\nUKA_1_left,1,train\nUKA_1_left,0,test\n"}, "test"),
    "mama-mia": ({"train_test_splits.csv": "train_split,test_split\nDUKE_002,DUKE_001\n"}, "test"),
    "prostate158": ({"train.csv": "ID,t2\n21,train/021/t2\n", "valid.csv": "ID,t2\n20,train/020/t2\n"}, "val"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_state_the_split(name: str, tmp_path: Path) -> None:
    texts, split = TABLES[name]
    fixture = FIXTURES[name]
    root = write_fixture(replace(fixture, texts={**fixture.texts, **texts}), tmp_path / "set")
    assert set(splits_of(root, name).values()) == {split}


def test_a_volume_that_its_table_does_not_list_has_no_official_split(tmp_path: Path) -> None:
    fixture = FIXTURES["mama-mia"]
    texts = {"train_test_splits.csv": "train_split,test_split\nDUKE_002,DUKE_003\n"}
    root = write_fixture(replace(fixture, texts={**fixture.texts, **texts}), tmp_path / "set")
    assert set(splits_of(root, "mama-mia").values()) == {None}


def test_every_fixture_of_a_set_with_parts_lies_in_one_of_them() -> None:
    for name, entry in catalogue().items():
        if not entry.splits or name.startswith("brats-") or name == "mms":  # their patterns leave the part open
            continue
        paths = (path for path in FIXTURES[name].images if not path.endswith((".npz", ".zip")))
        assert None not in {folder_split(entry, path) for path in paths}, name


def test_an_entry_with_an_unknown_split_is_refused() -> None:
    row = """[[dataset]]
    name = "mine"\ntitle = "Mine"\nfamily = "nrrd"\nanatomy = ["knee"]\ntasks = ["pretraining"]\nlayout = "x"
    licence = "unknown"\naccess = "x"\ncitation = "x"\nevidence = "opened"\nsplits = { train = "training" }
    [[dataset.images]]\npattern = "x"
    """
    with pytest.raises(ValueError, match="mine: split training, expected some of train, val, test"):
        parse_catalogue(row)


def test_what_is_held_out_anywhere_is_held_out() -> None:
    assert held_out_first(["train", "val", "train"]) == "val"
    assert held_out_first(["train", "test", "val"]) == "test"
    assert held_out_first([]) is None


def test_ingest_keeps_official_splits_and_holds_a_person_out_of_every_set(tmp_path: Path, ray_cluster: None) -> None:
    """AMOS and FLARE share images: one patient trains in the first and validates in the second."""
    volumes = {
        "amos/imagesTr/amos_0601.nii.gz": 1, "amos/imagesTr/amos_0602.nii.gz": 2, "amos/imagesTs/amos_0603.nii.gz": 3,
        "flare/PublicValidation/imagesVal/amos_0602_0000.nii.gz": 4,
    }  # fmt: skip
    volumes |= {f"own/subject{number}.nii.gz": 10 + number for number in range(5)}
    for path, seed in volumes.items():
        save_nifti(tmp_path / "in" / path, random_image(seed), oblique_affine())
    for folder, name in (("amos", "amos22-mr"), ("flare", "flare24-task3-mr")):
        (tmp_path / "in" / folder / "dataset.json").write_text(json.dumps({"catalogue": name}))
    out = tmp_path / "shards"
    summary = ingest([tmp_path / "in"], out, IngestConfig(split_by="official"))
    rows = [load_row(ref, ("dataset", "split", "split_origin")) for ref in Shards.open(out).rows]
    found = sorted((row["dataset"], row["split"], row["split_origin"]) for row in rows if row["dataset"] != "unnamed")
    assert found == [
        ("amos22-mr", "test", "official"), ("amos22-mr", "train", "official"), ("amos22-mr", "val", "moved"),
        ("flare24-task3-mr", "val", "official"),
    ]  # fmt: skip
    own = sorted(row["split"] for row in rows if row["dataset"] == "unnamed")
    assert own == ["test", "train", "train", "train", "val"]
    counts = {value: counts["volumes"] for value, counts in summary.tables["split by"].items()}
    assert counts == {"drawn": 5, "official split of the set": 3, "moved: the person is in another split": 1}


def test_without_asking_for_it_patients_are_drawn(tmp_path: Path, ray_cluster: None) -> None:
    for number in range(5):
        path = tmp_path / "in" / "imagesTr" / f"amos_060{number}.nii.gz"
        save_nifti(path, random_image(number), oblique_affine())
    ingest([tmp_path / "in"], tmp_path / "shards", IngestConfig(dataset="amos22-mr"))
    assert sorted(row.split for row in Shards.open(tmp_path / "shards").rows) == [
        "test", "train", "train", "train", "val",
    ]  # fmt: skip
