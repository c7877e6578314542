"""Which rows training may use: licences as data sets write them, flags of intake; and how the rows were made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from omnimri.models.config import preset
from omnimri.models.preprocess import Preprocess
from omnimri.platform.data.formats.kspace.prewhitening import NOT_PREWHITENED, PREWHITENED
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.deface import DEFACED_FLAG, FACE_FLAG
from omnimri.platform.data.intake.quality import QualityLimits, quality_flags
from omnimri.platform.data.intake.writer import INTAKE_VERSION
from omnimri.platform.data.licences import allows_commercial_use, count_licences, licensed
from omnimri.platform.data.schema import FLAGS
from omnimri.platform.data.shards import MANIFEST_NAME, Shards, flag_kind
from omnimri.platform.overrides import apply_overrides
from omnimri.platform.training.config import DEFAULT_EXCLUDED
from omnimri.platform.training.omnimri_kit import OmniMRIKit
from omnimri.platform.training.recipes import recipe
from omnimri.platform.training.trainer import default_kit
from tests.platform.shards_fakes import write_shards


@pytest.mark.parametrize(
    ("licence", "commercial"),
    [
        ("CC0-1.0", True), ("CC BY 4.0", True), ("CC-BY-SA-4.0", True), ("cc_by_4.0", True), ("MIT", True),
        ("Creative Commons Attribution 3.0 Unported", True), ("PDDL", True), ("BSD-2-Clause", True),
        ("CC BY-NC 4.0", False), ("CC-BY-NC-SA", False), ("Attribution-NonCommercial 4.0", False), ("CC BY-ND", False),
        ("fastMRI data sharing agreement; research use", False), ("in-house", False), ("", False), (None, False),
    ],
)  # fmt: skip
def test_only_known_open_licences_allow_commercial_use(licence: str | None, commercial: bool) -> None:
    assert allows_commercial_use(licence) is commercial


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("licences") / "shards")


def with_licences(folder: Path, *licences: str | None) -> Shards:
    shards = Shards.open(folder)
    rows = [replace(row, licence=licences[n % len(licences)]) for n, row in enumerate(shards.rows)]
    return Shards(rows, shards.manifests)


def test_policies_keep_what_they_name(folder: Path) -> None:
    shards = with_licences(folder, "CC BY 4.0", "CC BY-NC 4.0", None)
    assert licensed(shards, "any") is shards
    assert count_licences(licensed(shards, "commercial-ok")) == {"CC BY 4.0": 4}
    assert count_licences(licensed(shards, "cc by-nc 4.0, CC BY 4.0")) == {"CC BY 4.0": 4, "CC BY-NC 4.0": 4}
    assert licensed(shards, "commercial-ok").digest != shards.digest
    with pytest.raises(ValueError, match=r"--licences MIT leaves no volume; .*'unknown': 4"):
        licensed(shards, "MIT")


def test_training_sees_only_licensed_rows(folder: Path) -> None:
    config = preset("tiny")
    assert len(OmniMRIKit().source_rows("image", [str(folder)], config, "train").rows) == 8
    assert OmniMRIKit(licences="none").licence_counts([str(folder)]) == {"none": 8}
    with pytest.raises(ValueError, match="leaves no volume"):
        OmniMRIKit(licences="commercial-ok").source_rows("image", [str(folder)], config, "train")


# ---- Flags, and how rows were made


def corpus(out: Path, flags: dict[str, list[str]], *, version: str = "intake-4-44136fa3") -> Path:
    """The fake corpus with flags by row, made by one version of intake."""
    manifest_path = write_shards(out) / MANIFEST_NAME
    manifest = json.loads(manifest_path.read_text())
    for row in manifest["rows"]:
        row |= {"flags": flags.get(row["row_id"], []), "preprocessing_version": version}
    manifest_path.write_text(json.dumps(manifest))
    return out


FLAGGED = {
    "row-0-0": ["low SNR", "near copy of 0123456789abcdef"],
    "row-0-1": ["ghosting"],
    "row-1-0": ["near copy of fedcba9876543210"],
}


def test_flagged_volumes_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(corpus(tmp_path / "flagged", FLAGGED))
    config, kit = preset("tiny"), OmniMRIKit(exclude_flags=("near copy",))
    rows = kit.source_rows("image", [folder], config, "train").rows
    assert {row.row_id for row in rows} == {f"row-{p}-{n}" for p in (0, 1) for n in range(4)} - {"row-0-0", "row-1-0"}
    assert kit.excluded_counts([folder]) == {"near copy": 2}
    assert OmniMRIKit().excluded_counts([folder]) == {}
    with caplog.at_level("INFO"):
        assert kit.data_digest([folder]) != OmniMRIKit().data_digest([folder])
    assert "volumes left out by flag: {'near copy': 2}" in caplog.text


def test_an_unknown_flag_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    run = recipe("tiny", "run", [tmp_path], tmp_path)
    assert apply_overrides(run, ['exclude_flags=["low SNR", "near copy"]']).exclude_flags == ("low SNR", "near copy")
    assert apply_overrides(run, ["exclude_flags=[]"]).exclude_flags == ()
    with pytest.raises(ValueError, match=r"Unknown flags 'blank'; known: low SNR, ghosting,"):
        apply_overrides(run, ["exclude_flags=blank"])


def test_flags_that_leave_nothing_are_an_error(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "bad", {f"row-{p}-{n}": ["ghosting"] for p in range(3) for n in range(4)})
    with pytest.raises(ValueError, match=r"flagged ghosting none is left: \{'ghosting': 12\}"):
        Shards.open(folder).without_flags(["ghosting"])


def test_every_flag_of_intake_can_be_named() -> None:
    values = {"snr": 0.1, "ghosting": 9.0, "cjv": 9.0}
    raised = quality_flags((2, 2, 2), values, QualityLimits(), t1_weighted=True)
    assert len(raised) == 4
    faces = {FACE_FLAG, flag_kind(DEFACED_FLAG)}
    assert set(FLAGS) == {*raised, *faces, "near copy", PREWHITENED, NOT_PREWHITENED}
    assert set(DEFAULT_EXCLUDED) <= set(FLAGS)


def test_rows_made_in_two_ways_are_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, compressed = (f"{INTAKE_VERSION}-{IngestConfig(max_coils=n).voxel_digest}" for n in (None, 8))
    assert plain != compressed
    assert IngestConfig(items_per_shard=2, seed=3).voxel_digest == IngestConfig().voxel_digest
    folders = [
        str(corpus(tmp_path / "plain", {}, version=plain)), str(corpus(tmp_path / "coils", {}, version=compressed)),
    ]  # fmt: skip
    config = preset("tiny")
    found = OmniMRIKit().preprocessing(folders, config)
    assert found == {"contract": Preprocess(config.inputs).version, "rows": {plain: 8, compressed: 8}}
    OmniMRIKit().data_digest(folders[:1])
    assert "different ways" not in caplog.text
    OmniMRIKit().data_digest(folders)
    assert f"different ways (preprocessing version: volumes): {{'{plain}': 12, '{compressed}': 12}}" in caplog.text


def test_how_samples_are_drawn_is_set_by_name_and_changes_what_a_stage_computes(tmp_path: Path) -> None:
    run = recipe("tiny", "run", [tmp_path], tmp_path)
    changed = apply_overrides(run, ['view={"question_share": 0.5}'])
    assert default_kit(changed)._view_options(changed.model).question_share == 0.5
    assert changed.stage_settings("instruct") != run.stage_settings("instruct")
    assert changed.stage_settings("vision")["train"] == run.stage_settings("vision")["train"]
    with pytest.raises(ValueError, match=r"unknown fields questions; known: slices_per_sample"):
        default_kit(apply_overrides(run, ['view={"questions": 0.5}']))._view_options(run.model)
