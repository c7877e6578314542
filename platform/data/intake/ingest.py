"""From files to Parquet shards: plan on headers, read and write in a streaming Ray Data map, publish at the end.

Two executions of Ray Data run one after the other. The first looks at the header of every file; from what it finds, the
driver makes one work item per series and gives each patient a pseudonym and a split. The second reads a few items per
task and writes their volumes straight into one shard, so that voxels never cross the object store. What cannot be read
becomes a line of the reject ledger.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnimri.platform.data import deid
from omnimri.platform.data.catalogue.layout import Layouts
from omnimri.platform.data.formats.records import ReadError
from omnimri.platform.data.formats.sources import Archive, Source, open_sources
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.deface import deidentification
from omnimri.platform.data.intake.draft import Draft, open_draft
from omnimri.platform.data.intake.former import FormerCorpus, kept_settings, key_check, open_former
from omnimri.platform.data.intake.plan import catalogued_roots, make_plan
from omnimri.platform.data.intake.publish import is_corpus, put_in_place, requests_of, restore, turn
from omnimri.platform.data.intake.quality import near_copies
from omnimri.platform.data.intake.report import write_report
from omnimri.platform.data.intake.summary import REJECTS_NAME, SUMMARY_NAME, summarise
from omnimri.platform.data.intake.tasks import run_tasks
from omnimri.platform.data.intake.writer import INTAKE_VERSION, PlannedItem, ShardReport, write_shard
from omnimri.platform.data.schema import SCHEMA_VERSION
from omnimri.platform.data.shards import MANIFEST_NAME, content_digest

logger = logging.getLogger(__name__)

INCOMPLETE = ":incomplete"
"""After a request in the manifest: something that was asked for has not come."""


@dataclass(frozen=True, kw_only=True)
class IngestSummary:
    """What an ingest left behind."""

    out: Path
    num_volumes: int
    """Of the whole corpus."""
    num_added: int
    """By this ingest; none where the same was asked for before."""
    num_rejected: int
    """Lines of the reject ledger."""
    digest: str
    tables: dict[str, Any]
    """Counts as `summary.json` holds them."""
    reused: bool = False
    """The folder held the result of the same request already; nothing was read."""

    @property
    def rejects_path(self) -> Path:
        """The reject ledger with the names of the files; it lies beside the corpus, since names may name patients."""
        return self.out.with_name(f"{self.out.name}.{REJECTS_NAME}")


def ingest(
    sources: Sequence[Path],
    out: Path,
    config: IngestConfig,
    *,
    request: str | None = None,
    refused: Sequence[ReadError] = (),
    complete: bool = True,
) -> IngestSummary:
    """Read sources into a corpus folder that appears as a whole or not at all.

    What an ingest that was killed had finished is kept beside `out`; the same request again goes on from there.

    The pseudonym key is taken from the environment variable OMNIMRI_DEID_KEY, else from the file `<out>.key`, which is
    made beside (not inside) the corpus when it is not there. The reject ledger `<out>.rejects.jsonl` lies there too,
    for it holds names of files; the corpus has a copy with pseudonyms instead. On a cluster, sources and `out` lie on
    a file system that every node sees.

    Args:
        sources: Folders, zips or files.
        out: Folder to make. The same request again finds its result and returns it.
        config: How.
        request: Names what was asked for where the files themselves do not, since they are copies that will go.
        refused: What failed before there were files; joins the ledger.
        complete: Whether all files are there that were asked for. If not, the same request can be appended again.

    Raises:
        FileNotFoundError: If a source does not exist.
        ValueError: If `out` is in the way, a source is named twice, or no volume could be read.
    """
    out = out.absolute()
    restore(out)
    opened, errors = open_sources(sources, config.limits)
    layouts = Layouts(opened, catalogued_roots(opened, config), config.limits)
    files = _fingerprint(opened, config, layouts)
    request = request or files
    if (done := existing(out, request, config)) is not None:
        return done
    ledger_path = out.with_name(f"{out.name}.{REJECTS_NAME}")
    former = open_former(out, ledger_path, config) if config.append and is_corpus(out) else FormerCorpus()
    key = former.key or deid.load_key(_key_path(out))
    planned, unplanned = make_plan(opened, layouts, key, config, former)
    planned, changed = former.without_known(planned)
    requests = [*former.requests, request if complete else f"{request}{INCOMPLETE}"]
    with open_draft(out, deid.pseudonym(key, "draft", *former.requests, files), first_shard=former.num_shards) as draft:
        rows, rejects = _read_and_write(planned, draft, config)
        rows, duplicates = _without_duplicates([*former.rows, *rows])
        rows, leaks = _without_near_copies(rows, config.quality.max_copy_distance, len(former.rows))
        refusals = [*refused, *errors, *unplanned, *changed]
        rejects += [*(error.as_row() for error in refusals), *duplicates, *leaks]
        ledger = _ledger(former, rejects, rows)
        if not rows:
            _write_lines(ledger_path, ledger, mode=0o600)
            shutil.rmtree(draft.folder)
            raise ValueError(f"No volume could be read: 0 ingested, {len(ledger)} rejected; reasons in {ledger_path}")
        former.link_shards(draft.folder)
        tables = _write_documents(draft.folder, rows, ledger, requests, key, config)
        draft.clear()
        with turn(out, former.requests if former.folder else None):
            _write_lines(ledger_path, ledger, mode=0o600)
            put_in_place(draft.folder, out)
    return _summary(out, tables, num_added=len(rows) - len(former.rows), reused=False)


def _key_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.key")


def _ledger(former: FormerCorpus, rejects: list[dict[str, str]], rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Lines in a fixed order, each once, without the former lines of what could be read by now."""
    read = {row.get("source") for row in rows}
    former_lines = [line for line in former.ledger if line["source"] not in read]
    lines = {(line["source"], line["reason"]): line for line in [*former_lines, *rejects]}
    return [lines[said] for said in sorted(lines)]


def _fingerprint(sources: Sequence[Source], config: IngestConfig, layouts: Layouts) -> str:
    """SHA-256 of what was asked for: files with their sizes and times, and the settings that change the result."""
    settings = result_settings(config)
    settings["layouts"] = [repr(entry) for entry in layouts.entries]
    digest = hashlib.sha256(json.dumps([SCHEMA_VERSION, INTAKE_VERSION, settings], sort_keys=True).encode())
    for source in sources:
        root = source.container.path
        for name, size in source.sizes.items():
            path = root if isinstance(source.container, Archive) else root / name
            digest.update(f"{source.prefix}{name}\0{size}\0{path.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()


def result_settings(config: IngestConfig) -> dict[str, Any]:
    """The settings that change the result."""
    settings = dataclasses.asdict(config)
    return {name: value for name, value in settings.items() if name not in ("overwrite", "append", "dicomweb")}


def existing(out: Path, request: str, config: IngestConfig) -> IngestSummary | None:
    """The finished result of the same request, or None where the way is free.

    Raises:
        ValueError: If something else is in the way.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not is_corpus(out):
        raise ValueError(f"--out {out} holds files that are no corpus. Name another folder.")
    if config.overwrite:
        return None
    requests = requests_of(out)
    if config.append and request not in requests:
        return None
    if not config.append and [asked.removesuffix(INCOMPLETE) for asked in requests] != [request]:
        raise ValueError(
            f"--out {out} holds another corpus. Name another folder, add to it with --append, or replace it with "
            "--overwrite."
        )
    return _summary(out, json.loads((out / SUMMARY_NAME).read_text(encoding="utf-8")), num_added=0, reused=True)


def _read_and_write(
    planned: Sequence[PlannedItem], draft: Draft, config: IngestConfig
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Manifest entries and ledger lines, in the order of the plan; shards that the draft holds are not read again."""
    shards = {draft.shard(number): chunk for number, chunk in enumerate(_chunks(planned, config))}
    reports = {path: report for path in shards if (report := draft.report(path)) is not None}
    if reports:
        logger.info("%d of %d shards stand from an ingest that was interrupted", len(reports), len(shards))
    missing = [(path, chunk) for path, chunk in shards.items() if path not in reports]
    started, num_series = time.monotonic(), 0
    for done, (path, report) in enumerate(
        run_tasks(_ShardTask(draft, config), missing, cpus_per_task=config.cpus_per_task), start=1
    ):
        reports[path] = report
        num_series += len(shards[path])
        rate = num_series / (time.monotonic() - started)
        left = sum(len(chunk) for path, chunk in missing if path not in reports) / rate
        logger.info("%d of %d shards written, %.1f series/s, %.0f s left", done, len(missing), rate, left)
    ordered = [reports[path] for path in shards]
    rows = [row for report in ordered for row in report.rows]
    return rows, [line for report in ordered for line in report.rejects]


@dataclass(frozen=True)
class _ShardTask:
    draft: Draft
    config: IngestConfig

    def __call__(self, task: tuple[Path, list[PlannedItem]]) -> tuple[Path, ShardReport]:
        path, planned = task
        report = write_shard(planned, path, self.config)
        self.draft.finish(path, report)
        return path, report


def _chunks(planned: Sequence[PlannedItem], config: IngestConfig) -> Iterator[list[PlannedItem]]:
    """Consecutive items until a shard is full by number or by bytes."""
    chunk: list[PlannedItem] = []
    num_bytes = 0
    for plan in planned:
        is_full = len(chunk) >= config.items_per_shard or num_bytes + plan.item.num_bytes > config.bytes_per_shard
        if chunk and is_full:
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append(plan)
        num_bytes += plan.item.num_bytes
    if chunk:
        yield chunk


def _without_duplicates(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows without copies of a volume that came before; a copy in another split would leak.

    The shard still holds the copy, but no manifest names it.
    """
    first: dict[str, str] = {}
    kept, rejects = [], []
    for row in rows:
        if row["voxels"] in first:
            hint = f"Nothing to do: {first[row['voxels']]} is kept."
            rejects.append(ReadError(row["source"], "The same voxels as another volume.", hint).as_row())
            continue
        first[row["voxels"]] = _named(row)
        kept.append(row)
    return kept, rejects


def _named(row: dict[str, Any]) -> str:
    """How a hint calls a row: by its file, or by its id where it was there before."""
    return row.get("source") or f"row {row['row_id']}"


def _without_near_copies(
    rows: list[dict[str, Any]], max_distance: int, num_former: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows without volumes that all but equal one of another patient in another split, which would leak.

    One person under two names, or a copy that was edited. In the same split it is only flagged. The first `num_former`
    rows stay as they are.
    """
    leaks: dict[int, dict[str, str]] = {}
    for first, second in near_copies([row["fingerprint"] for row in rows], max_distance):
        one, other = rows[first], rows[second]
        known = second < num_former or first in leaks or second in leaks
        if known or one["patient_id"] == other["patient_id"]:
            continue
        if one["split"] == other["split"]:
            other["flags"] = [*other["flags"], f"near copy of {one['row_id']}"]
            continue
        reason = "All but the same as a volume of another patient in another split."
        hint = f"Nothing to do: {_named(one)} is kept; with quality.max_copy_distance=0 only equal ones are left out."
        leaks[second] = ReadError(other["source"], reason, hint).as_row()
    return [row for index, row in enumerate(rows) if index not in leaks], list(leaks.values())


def _write_documents(
    folder: Path,
    rows: list[dict[str, Any]],
    ledger: list[dict[str, str]],
    requests: list[str],
    key: bytes,
    config: IngestConfig,
) -> dict[str, Any]:
    """Ledger without names, summary, report and, last, the manifest; returns the summary."""
    entries = [{name: value for name, value in row.items() if name != "source"} for row in rows]
    ledger = [{"source": deid.pseudonym(key, "file", line["source"]), "reason": line["reason"]} for line in ledger]
    digest = content_digest((entry["digest"], entry["split"]) for entry in entries)
    datasets = sorted({entry["dataset"] for entry in entries})
    tables = {"digest": digest, **summarise(entries, ledger)}
    _write_lines(folder / REJECTS_NAME, ledger)
    _write_json(folder / SUMMARY_NAME, tables)
    write_report(folder, tables, entries)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "intake_version": INTAKE_VERSION,
        "digest": digest,
        "dataset": "+".join(datasets),
        "requests": requests,
        "settings": kept_settings(config),
        "key_check": key_check(key),
        "deidentification": deidentification(entries, faces_removed=config.deface),
        "rows": entries,
    }
    _write_json(folder / MANIFEST_NAME, manifest)
    return tables


def _summary(out: Path, tables: dict[str, Any], *, num_added: int, reused: bool) -> IngestSummary:
    return IngestSummary(
        out=out,
        num_volumes=tables["total"]["volumes"],
        num_added=num_added,
        num_rejected=sum(tables["rejected"].values()),
        digest=tables["digest"],
        tables=tables,
        reused=reused,
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_lines(path: Path, lines: Sequence[dict[str, str]], *, mode: int = 0o666) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(path, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
