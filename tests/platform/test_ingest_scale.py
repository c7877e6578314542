"""Many series of mixed kinds, some broken: every good one arrives, every bad one is in the ledger with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.ingest import ingest
from omnimri.platform.data.shards import Shards
from tests.platform.mixed_files import BROKEN, write_mixed


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_every_good_series_arrives_and_every_broken_one_is_explained(tmp_path: Path) -> None:
    num_series = 8 * len(BROKEN)
    expected = write_mixed(tmp_path / "in", num_series, broken_share=1 / 4)
    assert len(expected) == 2 * len(BROKEN)
    summary = ingest([tmp_path / "in"], tmp_path / "out", IngestConfig())
    assert summary.num_volumes == len(Shards.open(tmp_path / "out")) == num_series - len(expected)
    reasons = [json.loads(line)["reason"] for line in summary.rejects_path.read_text().splitlines()]
    unexplained = list(reasons)
    for words in sorted(expected, key=len, reverse=True):
        found = next((reason for reason in unexplained if words in reason), None)
        assert found is not None, f"No line of the ledger says {words!r}; it says {sorted(set(reasons))}."
        unexplained.remove(found)
    assert unexplained == []
