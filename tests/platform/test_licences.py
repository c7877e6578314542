"""Which licences a policy admits, as data sets write them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from omnimri.models.config import preset
from omnimri.platform.data.licences import allows_commercial_use, count_licences, licensed
from omnimri.platform.data.shards import Shards
from omnimri.platform.training.omnimri_kit import OmniMRIKit
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
