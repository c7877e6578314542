"""The corpus that new data is appended to: its rows stay, its patients keep their splits, its shards are linked."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omnimri.platform.data import deid
from omnimri.platform.data.catalogue.entries import overlap_group
from omnimri.platform.data.formats.records import ReadError
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.writer import INTAKE_VERSION, PlannedItem
from omnimri.platform.data.shards import MANIFEST_NAME, SHARDS_FOLDER

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FormerCorpus:
    """What a corpus holds before an ingest; nothing at all when the corpus is new."""

    folder: Path | None = None
    requests: tuple[str, ...] = ()
    """What was asked for, one after the other."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Manifest entries."""
    ledger: list[dict[str, str]] = field(default_factory=list)
    """Lines of the reject ledger, with the names of files."""
    key: bytes | None = None
    """That its pseudonyms were made with."""

    @cached_property
    def splits(self) -> dict[str, str]:
        """Pseudonym of a person, and of each patient that the person is in some data set, to the split."""
        return {row[name]: row["split"] for row in self.rows for name in ("person_id", "patient_id")}

    @cached_property
    def split_counts(self) -> dict[str, Counter[str]]:
        """Persons that were drawn into every split, by overlap group of data sets."""
        persons: dict[str, dict[str, str]] = defaultdict(dict)
        for row in self.rows:
            if row["split_origin"] == "drawn":
                persons[overlap_group(row["dataset"])][row["person_id"]] = row["split"]
        return {group: Counter(of_person.values()) for group, of_person in persons.items()}

    @property
    def num_shards(self) -> int:
        """Numbers of shards that are taken."""
        names = (self.folder / SHARDS_FOLDER).glob("shard-*.parquet") if self.folder else ()
        return max((int(path.stem.removeprefix("shard-")) + 1 for path in names), default=0)

    def without_known(self, planned: Sequence[PlannedItem]) -> tuple[list[PlannedItem], list[ReadError]]:
        """The items that are new, and a refusal for every series that is there already but was of other files."""
        items: dict[str, set[str]] = defaultdict(set)
        for row in self.rows:
            items[row["series_id"]].add(row["item_id"])
        new = [plan for plan in planned if plan.series_id not in items]
        changed = [plan for plan in planned if plan.series_id in items and plan.item_id not in items[plan.series_id]]
        if self.folder is not None:
            logger.info("%d of %d series are in the corpus already", len(planned) - len(new), len(planned))
        reason = "The corpus has a series of this name already, made of other files."
        hint = "If it is another series, rename it; to take it as it is now, make the corpus anew with --overwrite."
        return new, [ReadError(plan.item.source, reason, hint) for plan in changed]

    def link_shards(self, folder: Path) -> None:
        """Put the shards into another corpus folder, as links to the same bytes where the file system can."""
        if self.folder is None:
            return
        for shard in sorted((self.folder / SHARDS_FOLDER).glob("*.parquet")):
            target = folder / SHARDS_FOLDER / shard.name
            if not target.exists():
                _link_or_copy(shard, target)


def open_former(out: Path, ledger_path: Path, config: IngestConfig) -> FormerCorpus:
    """The corpus in a folder, for more to be appended.

    Raises:
        ValueError: If it was made under another key, by another version of ingest, or with other settings: its patients
            would not be known again, or its rows would not be of one kind.
    """
    manifest = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))
    if manifest["intake_version"] != INTAKE_VERSION:
        raise ValueError(
            f"--append: {out} was made by {manifest['intake_version']}, this is {INTAKE_VERSION}. Make it anew with "
            "--overwrite."
        )
    asked = kept_settings(config)
    if other := [name for name, value in manifest["settings"].items() if asked.get(name) != value]:
        differing = ", ".join(f"{name}={manifest['settings'][name]} (now {asked.get(name)})" for name in other)
        raise ValueError(f"--append: {out} was made with {differing}. Set the same, or make it anew with --overwrite.")
    key_path = out.with_name(f"{out.name}.key")
    key = deid.load_key(key_path) if deid.has_key(key_path) else b""
    if manifest["key_check"] != key_check(key):
        raise ValueError(
            f"--append: {out} was made under another pseudonym key. Put its key into {deid.KEY_VARIABLE} or "
            f"{key_path}, or patients who are in it would not be known again."
        )
    lines = ledger_path.read_text(encoding="utf-8").splitlines() if ledger_path.is_file() else []
    return FormerCorpus(out, tuple(manifest["requests"]), manifest["rows"], [json.loads(line) for line in lines], key)


def kept_settings(config: IngestConfig) -> dict[str, Any]:
    """The settings that must be the same for all that is in one corpus."""
    return {
        "seed": config.seed,
        "split_by": config.split_by,
        "split_fractions": list(config.split_fractions),
        "describe": config.describe,
        "deface": config.deface,
        "undefaced": config.undefaced,
        "voxels": config.voxel_settings,
    }


def key_check(key: bytes) -> str:
    """A pseudonym by which a key is known again."""
    return deid.pseudonym(key, "key")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        partial = target.with_name(f".{target.name}.partial")
        shutil.copy2(source, partial)
        partial.replace(target)
