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
import pickle
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import ray.data

from omnimri.platform.cluster import quiet_ray_data
from omnimri.platform.data import deid
from omnimri.platform.data.catalogue.entries import DatasetEntry, catalogue, find_dataset, overlap_group, suggestion
from omnimri.platform.data.catalogue.layout import CARD_KEY, Layouts
from omnimri.platform.data.formats.readers import ANNOTATIONS_NAME, Probe, WorkItem, group, probe_files
from omnimri.platform.data.formats.records import ReadError, ReadLimits
from omnimri.platform.data.formats.sources import Archive, Folder, Source, open_sources
from omnimri.platform.data.intake.annotations import Annotation, Sidecars, parse_sidecars
from omnimri.platform.data.intake.draft import Draft, open_draft
from omnimri.platform.data.intake.quality import QualityLimits, near_copies
from omnimri.platform.data.intake.report import write_report
from omnimri.platform.data.intake.summary import summarise
from omnimri.platform.data.intake.writer import INTAKE_VERSION, PlannedItem, ShardReport, write_shard
from omnimri.platform.data.schema import SCHEMA_VERSION
from omnimri.platform.data.shards import MANIFEST_NAME, content_digest

logger = logging.getLogger(__name__)

REJECTS_NAME = "rejects.jsonl"
SUMMARY_NAME = "summary.json"
_DRIVER_ONLY = ("source", "voxels", "fingerprint")
UNNAMED_DATASET = "unnamed"


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """How a corpus is made from files."""

    dataset: str | None = None
    """Name of the data set; None takes it from dataset.json or dataset_description.json of the source. A name of the
    catalogue also reads the sources in the layout that the catalogue describes."""
    licence: str | None = None
    """Licence of the data set; None takes it from the same file."""
    seed: int = 0
    """Another seed splits the patients differently."""
    split_fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Shares of patients in train, val and test."""
    split_by: Literal["rank", "hash"] = "rank"
    """`rank`: exactly these shares of this corpus. `hash`: a patient keeps its split when the data set grows."""
    items_per_shard: int = 12
    """Series that one task reads into one Parquet file."""
    bytes_per_shard: int = 256 * 2**20
    """Bytes of source files after which a shard is full, whatever the number of series."""
    files_per_probe: int = 512
    """Headers that one task reads."""
    cpus_per_task: float = 1.0
    """Logical CPUs that Ray reserves for one task."""
    compression_level: int = 1
    """Of zstd. Noise does not compress: level 1 is as small as 9 within a few percent."""
    overwrite: bool = False
    """Replace a corpus that is in the way."""
    limits: ReadLimits = field(default_factory=ReadLimits)
    max_coils: int | None = None
    """Compress k-space of more coils to so many virtual ones; None keeps the coils as they are."""
    quality: QualityLimits = field(default_factory=QualityLimits)
    """Beyond what a volume is flagged; it is kept."""

    def __post_init__(self) -> None:
        if abs(sum(self.split_fractions) - 1) > 1e-6 or min(self.split_fractions) < 0:
            raise ValueError(f"split_fractions must be three shares that add up to 1, found {self.split_fractions}.")
        if min(self.items_per_shard, self.bytes_per_shard, self.files_per_probe) < 1:
            raise ValueError("items_per_shard, bytes_per_shard and files_per_probe must be 1 or more.")
        if self.max_coils is not None and self.max_coils < 1:
            raise ValueError(f"max_coils must be 1 or more, or none, found {self.max_coils}.")


@dataclass(frozen=True, kw_only=True)
class IngestSummary:
    """What an ingest left behind."""

    out: Path
    num_volumes: int
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


def ingest(sources: Sequence[Path], out: Path, config: IngestConfig) -> IngestSummary:
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

    Raises:
        FileNotFoundError: If a source does not exist.
        ValueError: If `out` is in the way, a source is named twice, or no volume could be read.
    """
    out = out.absolute()
    opened, errors = open_sources(sources, config.limits)
    layouts = Layouts(opened, _catalogued_roots(opened, config), config.limits)
    request = _fingerprint(opened, config, layouts)
    if (done := _existing(out, request, config.overwrite)) is not None:
        return done
    key = deid.load_key(out.with_name(f"{out.name}.key"))
    planned, plan_errors = _plan(opened, layouts, key, config)
    with open_draft(out, deid.pseudonym(key, "draft", request)) as draft:
        rows, rejects = _read_and_write(planned, draft, config)
        rows, duplicates = _without_duplicates(rows)
        rows, leaks = _without_near_copies(rows, config.quality.max_copy_distance)
        ledger = [*(error.as_row() for error in [*errors, *plan_errors]), *rejects, *duplicates, *leaks]
        ledger.sort(key=lambda line: tuple(line.values()))
        ledger_path = out.with_name(f"{out.name}.{REJECTS_NAME}")
        _write_lines(ledger_path, ledger, mode=0o600)
        if not rows:
            shutil.rmtree(draft.folder)
            raise ValueError(f"No volume could be read: 0 ingested, {len(ledger)} rejected; reasons in {ledger_path}")
        nameless = [
            {"source": deid.pseudonym(key, "file", line["source"]), "reason": line["reason"]} for line in ledger
        ]
        tables = _write_documents(draft.folder, rows, nameless, request)
        draft.clear()
        _publish(draft.folder, out)
    return _summary(out, tables, reused=False)


def _fingerprint(sources: Sequence[Source], config: IngestConfig, layouts: Layouts) -> str:
    """SHA-256 of what was asked for: files with their sizes and times, and the settings that change the result."""
    settings = dataclasses.asdict(config)
    del settings["overwrite"]
    settings["layouts"] = [repr(entry) for entry in layouts.entries]
    digest = hashlib.sha256(json.dumps([SCHEMA_VERSION, INTAKE_VERSION, settings], sort_keys=True).encode())
    for source in sources:
        root = source.container.path
        for name, size in source.sizes.items():
            path = root if isinstance(source.container, Archive) else root / name
            digest.update(f"{source.prefix}{name}\0{size}\0{path.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _existing(out: Path, request: str, overwrite: bool) -> IngestSummary | None:
    """The finished result of the same request, or None where the way is free.

    Raises:
        ValueError: If something else is in the way.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    manifest_path = out / MANIFEST_NAME
    if not manifest_path.is_file():
        raise ValueError(f"--out {out} holds files that are no corpus. Name another folder.")
    if overwrite:
        return None
    if json.loads(manifest_path.read_text(encoding="utf-8")).get("request") != request:
        raise ValueError(f"--out {out} holds another corpus. Name another folder, or replace it with --overwrite.")
    return _summary(out, json.loads((out / SUMMARY_NAME).read_text(encoding="utf-8")), reused=True)


def _plan(
    sources: Sequence[Source], layouts: Layouts, key: bytes, config: IngestConfig
) -> tuple[list[PlannedItem], list[ReadError]]:
    """Probe every file, group series, and decide pseudonyms and splits. Raw identifiers end here."""
    probes = _probe_all(sources, config)
    found: list[tuple[WorkItem, Annotation | None, DatasetCard]] = []
    errors: list[ReadError] = []
    for source, probed in zip(sources, probes, strict=True):
        sidecars, refused = parse_sidecars(_contents(source, (ANNOTATIONS_NAME,)), source.prefix)
        cards = _dataset_cards(source)
        kept, label_maps, left_out = layouts.place(source, probed)
        items, failed = group(kept, source, label_maps=sidecars.label_maps() | label_maps)
        errors += [*refused, *left_out, *failed]
        for item in items:
            annotation, refusal = _annotation(sidecars, item)
            if annotation is None and not refusal:
                annotation, refusal = layouts.annotation(source, item)
            errors += refusal
            entry = layouts.entry_of(source.prefix + item.names[0])
            found.append((item, annotation, _card_of(item, cards, config, entry)))
    found.sort(key=lambda entry: (entry[0].source, entry[0].series))
    patients = [(card.name, _patient(item, annotation)) for item, annotation, card in found]
    persons = [(overlap_group(dataset), patient) for dataset, patient in patients]
    splits = deid.assign_splits(persons, config.split_fractions, seed=config.seed, by=config.split_by)
    planned = [
        PlannedItem(
            item=dataclasses.replace(item, patient="", study="", series=""),
            dataset=card.name,
            licence=card.licence,
            simulated=card.simulated,
            split=splits[person],
            patient_id=deid.pseudonym(key, "patient", *patient),
            study_id=deid.pseudonym(key, "study", *patient, item.study),
            series_id=deid.pseudonym(key, "series", *patient, item.kind, item.series),
            annotation=annotation and dataclasses.replace(annotation, participant_id=""),
        )
        for (item, annotation, card), patient, person in zip(found, patients, persons, strict=True)
    ]
    logger.info("found %d series of %d patients", len(planned), len(set(patients)))
    return planned, errors


def _patient(item: WorkItem, annotation: Annotation | None) -> str:
    """The raw patient key: what the annotation says wins, so that all series of a participant stay together."""
    return (annotation.participant_id if annotation else "") or item.patient


def _annotation(sidecars: Sidecars, item: WorkItem) -> tuple[Annotation | None, list[ReadError]]:
    try:
        return sidecars.find(item.names), []
    except ValueError as error:
        return None, [ReadError(item.source, f"Its annotation is not valid: {error}.", "The volume was kept.")]


@dataclass(frozen=True, kw_only=True)
class DatasetCard:
    """What a data set says of itself."""

    name: str
    licence: str | None
    simulated: bool


def _dataset_cards(source: Source) -> dict[str, DatasetCard]:
    """Folder to the card that lies in it: our dataset.json, or dataset_description.json of BIDS."""
    cards = {}
    contents = _contents(source, ("dataset_description.json", "dataset.json"))
    for name in sorted(contents, reverse=True):  # dataset.json comes last and wins
        try:
            content = json.loads(contents[name])
        except ValueError:
            continue
        if isinstance(content, dict):
            cards[str(PurePosixPath(name).parent)] = DatasetCard(
                name=str(content.get("name") or content.get("Name") or UNNAMED_DATASET),
                licence=content.get("licence") or content.get("license") or content.get("License"),
                simulated=content.get("simulated") is True,
            )
    return cards


def _catalogued_roots(sources: Sequence[Source], config: IngestConfig) -> dict[str, DatasetEntry]:
    """Folder to the catalogued layout of what lies below it: named by the configuration, or by a dataset.json.

    Raises:
        ValueError: If a dataset.json names a layout that is not in the catalogue.
    """
    if config.dataset is not None and config.dataset in catalogue():
        return {"": catalogue()[config.dataset]}
    if config.dataset is not None and (close := suggestion(config.dataset)):
        logger.warning("%s is not in the catalogue, so no layout is assumed.%s", config.dataset, close)
    roots = {}
    for source in sources:
        for name, content in _contents(source, ("dataset.json",)).items():
            layout = _json_object(content).get(CARD_KEY)
            if isinstance(layout, str):
                roots[(source.prefix + name).rpartition("/")[0]] = find_dataset(layout)
    return roots


def _json_object(content: bytes) -> dict[str, Any]:
    """A JSON object; empty where the content is none."""
    try:
        document = json.loads(content)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _card_of(
    item: WorkItem, cards: dict[str, DatasetCard], config: IngestConfig, entry: DatasetEntry | None = None
) -> DatasetCard:
    """The nearest card at or above a series, with what the catalogue or the configuration says instead."""
    near = [cards[str(folder)] for folder in PurePosixPath(item.names[0]).parents if str(folder) in cards]
    card = near[0] if near else DatasetCard(name=UNNAMED_DATASET, licence=None, simulated=False)
    if entry is not None:
        card = dataclasses.replace(card, name=entry.name, licence=entry.stated_licence or card.licence)
    return dataclasses.replace(card, name=config.dataset or card.name, licence=config.licence or card.licence)


def _contents(source: Source, names: Sequence[str]) -> dict[str, bytes]:
    """Content of every file of the source that has one of these names."""
    wanted = [name for name in source.sizes if PurePosixPath(name).name in names]
    if source.named_alone:
        wanted = [name for name in names if source.container.holds(name)]
    contents = {}
    for name in wanted:
        with source.container.open(name) as stream:
            contents[name] = stream.read()
    return contents


def _probe_all(sources: Sequence[Source], config: IngestConfig) -> list[list[Probe]]:
    """Headers of all files, one list per source; a task takes a batch of files, of several sources if they are few."""
    batches: list[list[_ProbePart]] = [[]]
    room = config.files_per_probe
    for index, source in enumerate(sources):
        names = list(source.sizes.items())
        while names:
            part, names = names[:room], names[room:]
            batches[-1].append(
                _ProbePart(index, str(source.container.path), isinstance(source.container, Archive), part)
            )
            room -= len(part)
            if room == 0:
                batches.append([])
                room = config.files_per_probe
    probes: list[list[Probe]] = [[] for _ in sources]
    for batch in _run(_ProbeTask(config.limits), [batch for batch in batches if batch], config):
        for index, probed in batch:
            probes[index] += probed
    return probes


@dataclass(frozen=True)
class _ProbePart:
    """Some files of one source."""

    source: int
    path: str
    is_archive: bool
    sizes: list[tuple[str, int]]


@dataclass(frozen=True)
class _ProbeTask:
    limits: ReadLimits

    def __call__(self, parts: list[_ProbePart]) -> list[tuple[int, list[Probe]]]:
        return [(part.source, probe_files(self._container(part), dict(part.sizes))) for part in parts]

    def _container(self, part: _ProbePart) -> Folder | Archive:
        return Archive(Path(part.path), self.limits) if part.is_archive else Folder(Path(part.path))


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
    for done, (path, report) in enumerate(_run(_ShardTask(draft, config), missing, config), start=1):
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
        report = write_shard(
            planned,
            path,
            self.config.limits,
            compression_level=self.config.compression_level,
            quality=self.config.quality,
            max_coils=self.config.max_coils,
        )
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


def _run(function: Callable[[Any], Any], tasks: Sequence[Any], config: IngestConfig) -> Iterator[Any]:
    """Results of a function over tasks through Ray Data, one block per task, as they are ready.

    Tasks and results are our own small objects; they travel as bytes because Arrow has no type for them.
    """
    if not tasks:
        return
    rows = [{"task": pickle.dumps(task)} for task in tasks]
    with quiet_ray_data():
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        for row in dataset.map(_Pickled(function), num_cpus=config.cpus_per_task).iter_rows():
            yield pickle.loads(row["result"])


@dataclass(frozen=True)
class _Pickled:
    function: Callable[[Any], Any]

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        return {"result": pickle.dumps(self.function(pickle.loads(row["task"])))}


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
        first[row["voxels"]] = row["source"]
        kept.append(row)
    return kept, rejects


def _without_near_copies(
    rows: list[dict[str, Any]], max_distance: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows without volumes that all but equal one of another patient in another split, which would leak.

    One person under two names, or a copy that was edited. In the same split it is only flagged.
    """
    leaks: dict[int, dict[str, str]] = {}
    for first, second in near_copies([row["fingerprint"] for row in rows], max_distance):
        one, other = rows[first], rows[second]
        if first in leaks or second in leaks or one["patient_id"] == other["patient_id"]:
            continue
        if one["split"] == other["split"]:
            other["flags"] = [*other["flags"], f"near copy of {one['row_id']}"]
            continue
        reason = "All but the same as a volume of another patient in another split."
        hint = f"Nothing to do: {one['source']} is kept; with quality.max_copy_distance=0 only equal ones are left out."
        leaks[second] = ReadError(other["source"], reason, hint).as_row()
    return [row for index, row in enumerate(rows) if index not in leaks], list(leaks.values())


def _write_documents(folder: Path, rows: list[dict[str, Any]], ledger: list[dict[str, str]], request: str) -> dict:
    """Ledger, summary, report and, last, the manifest; returns the summary."""
    entries = [{k: v for k, v in row.items() if k not in _DRIVER_ONLY} for row in rows]
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
        "request": request,
        "deidentification": deid.METHOD,
        "rows": entries,
    }
    _write_json(folder / MANIFEST_NAME, manifest)
    return tables


def _summary(out: Path, tables: dict[str, Any], *, reused: bool) -> IngestSummary:
    return IngestSummary(
        out=out,
        num_volumes=tables["total"]["volumes"],
        num_rejected=sum(tables["rejected"].values()),
        digest=tables["digest"],
        tables=tables,
        reused=reused,
    )


def _publish(partial: Path, out: Path) -> None:
    """Put the finished folder in its place; a corpus that is replaced goes only when the new one stands."""
    former = out.with_name(f"{out.name}.replaced-{secrets.token_hex(4)}")
    if out.exists():
        out.rename(former)
    partial.rename(out)
    shutil.rmtree(former, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_lines(path: Path, lines: Sequence[dict[str, str]], *, mode: int = 0o666) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(path, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
