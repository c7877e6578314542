"""The plan of an ingest: what the headers of all files say, made into one planned item per series.

Runs on the driver but for the probing of headers. Raw identifiers end here: the plan holds pseudonyms and splits.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from omnimri.platform.data import deid
from omnimri.platform.data.catalogue.entries import DatasetEntry, catalogue, find_dataset, overlap_group, suggestion
from omnimri.platform.data.catalogue.layout import CARD_KEY, Layouts, held_out_first
from omnimri.platform.data.formats.readers import ANNOTATIONS_NAME, Probe, WorkItem, group, probe_files
from omnimri.platform.data.formats.records import ReadError, ReadLimits
from omnimri.platform.data.formats.sources import Archive, Folder, Source
from omnimri.platform.data.intake.annotations import Annotation, Sidecars, parse_sidecars
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.former import FormerCorpus
from omnimri.platform.data.intake.tasks import run_tasks
from omnimri.platform.data.intake.writer import PlannedItem

logger = logging.getLogger(__name__)

UNNAMED_DATASET = "unnamed"


@dataclass(frozen=True, kw_only=True)
class DatasetCard:
    """What a data set says of itself."""

    name: str
    licence: str | None
    simulated: bool


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A series with what lies around it says. Holds raw identifiers."""

    item: WorkItem
    annotation: Annotation | None
    card: DatasetCard
    stated_split: str | None
    """Official split, None where there is none."""

    @property
    def patient(self) -> tuple[str, str]:
        """Data set and raw patient key; what the annotation says wins, so that a participant's series stay together."""
        return self.card.name, (self.annotation.participant_id if self.annotation else "") or self.item.patient

    @property
    def person(self) -> tuple[str, str]:
        """The same for one person in all data sets that overlap."""
        dataset, patient = self.patient
        return overlap_group(dataset), patient


def make_plan(
    sources: Sequence[Source], layouts: Layouts, key: bytes, config: IngestConfig, former: FormerCorpus
) -> tuple[list[PlannedItem], list[ReadError]]:
    """Probe every file, group series, and decide pseudonyms and splits. Raw identifiers end here.

    A person of the former corpus keeps the split; what another data set holds out of that person is refused.
    """
    found, errors = _find(sources, layouts, config)
    known = _known_splits(found, key, former)
    errors += [_held_out_error(series, known[series.person]) for series in found if _is_held_out(series, known)]
    found = [series for series in found if not _is_held_out(series, known)]
    persons = [series.person for series in found]
    official = official_splits(persons, [series.stated_split for series in found])
    splits = official | known
    splits |= deid.assign_splits(
        [person for person in persons if person not in splits],
        config.split_fractions,
        seed=config.seed,
        by="rank" if config.split_by == "official" else config.split_by,
        counts=former.split_counts,
    )
    if config.split_by == "official" and not official:
        logger.warning("split_by=official, but no series has a stated split: all patients are drawn")
    planned = [_planned(series, key, splits[series.person], series.person in official) for series in found]
    logger.info("found %d series of %d patients", len(planned), len({series.patient for series in found}))
    return planned, errors


def _find(sources: Sequence[Source], layouts: Layouts, config: IngestConfig) -> tuple[list[_Found], list[ReadError]]:
    """Every series in a fixed order, and what was refused."""
    found: list[_Found] = []
    errors: list[ReadError] = []
    for source, probed in zip(sources, _probe_all(sources, config), strict=True):
        sidecars, refused = parse_sidecars(_contents(source, (ANNOTATIONS_NAME,)), source.prefix)
        cards = _dataset_cards(source)
        kept, label_maps, left_out = layouts.place(source, probed)
        items, failed = group(kept, source, label_maps=sidecars.label_maps() | label_maps)
        errors += [*refused, *left_out, *failed]
        for item in items:
            item = dataclasses.replace(item, matlab_array=config.matlab_array or item.matlab_array)
            annotation, refusal = _annotation(sidecars, item)
            if annotation is None and not refusal:
                annotation, refusal = layouts.annotation(source, item)
            errors += refusal
            entry = layouts.entry_of(source.prefix + item.names[0])
            stated, refusal = _official_split(layouts, source, item, config)
            errors += refusal
            card = _card_of(item, cards, config, entry)
            found.append(_Found(item=item, annotation=annotation, card=card, stated_split=stated))
    return sorted(found, key=lambda series: (series.item.source, series.item.series)), errors


def _known_splits(found: Sequence[_Found], key: bytes, former: FormerCorpus) -> dict[tuple[str, str], str]:
    """Splits of the persons who are in the former corpus, as a person or as a patient of the same data set."""
    known: dict[tuple[str, str], str] = {}
    for series in found:
        names = (deid.pseudonym(key, "person", *series.person), deid.pseudonym(key, "patient", *series.patient))
        for name in names:
            if name in former.splits:
                known.setdefault(series.person, former.splits[name])
    return known


def _is_held_out(series: _Found, known: Mapping[tuple[str, str], str]) -> bool:
    """Whether the data set holds a series out of what its person is used for already."""
    split = known.get(series.person)
    return bool(split and series.stated_split) and deid.SPLITS.index(series.stated_split) > deid.SPLITS.index(split)


def _held_out_error(series: _Found, split: str) -> ReadError:
    reason = f"Its data set puts the patient into {series.stated_split}, who is in {split} of the corpus already."
    return ReadError(series.item.source, reason, "Make the corpus anew with --overwrite, of all data sets at once.")


def _planned(series: _Found, key: bytes, split: str, is_official: bool) -> PlannedItem:
    item, annotation, patient = series.item, series.annotation, series.patient
    return PlannedItem(
        item=dataclasses.replace(item, patient="", study="", series="", mark=""),
        dataset=series.card.name,
        licence=series.card.licence,
        simulated=series.card.simulated,
        split=split,
        split_origin=_split_origin(series.stated_split, split if is_official else None),
        patient_id=deid.pseudonym(key, "patient", *patient),
        study_id=deid.pseudonym(key, "study", *patient, item.study),
        series_id=deid.pseudonym(key, "series", *patient, item.kind, item.series),
        person_id=deid.pseudonym(key, "person", *series.person),
        item_id=deid.pseudonym(key, "files", item.mark, item.member),
        annotation=annotation and dataclasses.replace(annotation, participant_id=""),
    )


def _official_split(
    layouts: Layouts, source: Source, item: WorkItem, config: IngestConfig
) -> tuple[str | None, list[ReadError]]:
    if config.split_by != "official":
        return None, []
    try:
        return layouts.official_split(source, item), []
    except ReadError as error:
        return None, [error]


def official_splits(persons: Sequence[tuple[str, str]], stated: Sequence[str | None]) -> dict[tuple[str, str], str]:
    """The split of every person of whom one is stated; what one series holds out is held out in all of a person's.

    Args:
        persons: Group of data sets and raw patient key of every series.
        stated: Official split of every series, None where there is none.
    """
    found: dict[tuple[str, str], str] = {}
    for person, split in zip(persons, stated, strict=True):
        if split is not None:
            found[person] = held_out_first([split, found.get(person, split)]) or split
    return found


def _split_origin(stated: str | None, split: str | None) -> str:
    """How a series came to its split: what its own layout states, and where its person is if any set states that."""
    if split is None:
        return "drawn"
    return "official" if stated in (None, split) else "moved"


def _annotation(sidecars: Sidecars, item: WorkItem) -> tuple[Annotation | None, list[ReadError]]:
    try:
        return sidecars.find(item.names), []
    except ValueError as error:
        return None, [ReadError(item.source, f"Its annotation is not valid: {error}.", "The volume was kept.")]


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


def catalogued_roots(sources: Sequence[Source], config: IngestConfig) -> dict[str, DatasetEntry]:
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
    for batch in run_tasks(
        _ProbeTask(config.limits), [batch for batch in batches if batch], cpus_per_task=config.cpus_per_task
    ):
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
