"""What the layout of a catalogued data set says of the files that are found: keys, contrasts, labels, tables.

`Layouts` stands between the probes of `readers` and the plan of `ingest`: it gives every volume the patient, study and
contrast that its path names, and the `Annotation` that annotations.json would give it. Files that no pattern knows are
refused with a reason, not guessed.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from omnimri.platform.data.catalogue import tables
from omnimri.platform.data.catalogue.entries import FAMILIES, DatasetEntry, ImageRule, TableRule
from omnimri.platform.data.catalogue.patterns import FIELD, Pattern, filled, image_pattern, pattern_of
from omnimri.platform.data.deid import SPLITS
from omnimri.platform.data.formats import facts as fact
from omnimri.platform.data.formats import volumes
from omnimri.platform.data.formats.facts import Facts
from omnimri.platform.data.formats.readers import VOLUME_KINDS, Probe, WorkItem
from omnimri.platform.data.formats.records import ReadError, ReadLimits
from omnimri.platform.data.formats.sequences import contrast_of
from omnimri.platform.data.formats.sources import Source
from omnimri.platform.data.intake.annotations import Annotation

CARD_KEY = "catalogue"
"""Entry of a dataset.json that names the catalogued layout of everything below its folder."""

_FACTS: dict[str, Callable[[Any], str | float | int | None]] = {
    "sex": fact.sex, "age_years": fact.age_years, "vendor": fact.vendor, "model_name": fact.model_name,
    "field_strength_t": fact.field_strength_t, "tr_ms": fact.number, "te_ms": fact.number, "ti_ms": fact.number,
    "flip_angle_deg": fact.number, "quantity": str, "quantity_unit": fact.quantity_unit, "plane": str,
    "body_part": str, "contrast": lambda word: word or None,
}  # fmt: skip
"""Facts that a layout may state, and who brings them to our words."""


@dataclass(frozen=True)
class Placed:
    """One volume of a layout."""

    entry: DatasetEntry
    rule: ImageRule
    fields: dict[str, str]
    folder: str
    """Where the pattern begins in the container, with a slash at its end; empty at the top."""


class Layouts:
    """The catalogued layouts of some sources.

    Args:
        sources: Everything that is read.
        roots: Folder, with the prefix of its source and without a slash at the end, to the entry that describes what
            lies below it; an empty folder is everything.
        limits: Bounds on what is read of arrays with labels.
    """

    def __init__(self, sources: Sequence[Source], roots: Mapping[str, DatasetEntry], limits: ReadLimits) -> None:
        self._sources = sources
        self._roots = roots
        self._limits = limits
        self._placed: dict[str, dict[str, Placed]] = defaultdict(dict)
        self._tables: dict[tuple[str, tuple[str | int, ...]], Mapping[tuple[str | None, ...], list[tables.Row]]] = {}

    @property
    def entries(self) -> list[DatasetEntry]:
        """In use, by root."""
        return [self._roots[root] for root in sorted(self._roots)]

    def entry_of(self, path: str) -> DatasetEntry | None:
        """The entry whose root lies nearest above a path (with its source's prefix)."""
        if not self._roots:
            return None
        parents = [str(parent) for parent in PurePosixPath(path).parents]
        return next((self._roots[p] for p in [*parents, ""] if p in self._roots), None)

    def place(self, source: Source, probes: Sequence[Probe]) -> tuple[list[Probe], frozenset[str], list[ReadError]]:
        """Give volumes the keys that their layout names.

        Returns:
            The probes with what no layout knows taken out; the label maps among their files; and a ledger line for
            every reason to leave files out.
        """
        if not self._roots:
            return list(probes), frozenset(), []
        known = [self._placed_probe(source, probe) for probe in probes]
        labels, placed = frozenset(self._label_files(source)), self._placed[source.prefix]
        kept: list[Probe] = []
        left_out: dict[tuple[str, str], list[str]] = defaultdict(list)
        for probe in known:
            entry = self.entry_of(source.prefix + probe.name)
            if entry is None or probe.name in labels or _key(probe.name, probe.member) in placed:
                kept.append(probe)
            elif reason := self._why_left_out(probe, entry, source):
                left_out[reason].append(probe.name)
            else:
                kept.append(probe)
        errors = [
            ReadError(f"{source.prefix}{names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""), *reason)
            for reason, names in left_out.items()
        ]
        return kept, labels, errors

    def _placed_probe(self, source: Source, probe: Probe) -> Probe:
        """The probe with the keys of its layout, which is remembered."""
        entry = self.entry_of(source.prefix + probe.name)
        if entry is None or probe.kind not in (*FAMILIES[entry.family].formats, "label"):
            return probe
        path = source.prefix + _key(probe.name, probe.member)
        for rule in entry.images:
            fields = image_pattern(rule.pattern, tuple(rule.contrasts)).match(path)
            if fields is not None:
                folder = _folder_of(probe.name, rule.pattern)
                self._placed[source.prefix][_key(probe.name, probe.member)] = Placed(entry, rule, fields, folder)
                return _with_keys(probe, fields, rule)
        return probe

    def _why_left_out(self, probe: Probe, entry: DatasetEntry, source: Source) -> tuple[str, str] | None:
        """Reason and hint for a file that is no volume of the layout; None for what the readers judge themselves."""
        for ignored in entry.ignored:
            if pattern_of(ignored.pattern).match(source.prefix + probe.name) is not None:
                return ignored.reason, f"Nothing to do; `omnimri datasets {entry.name}` shows the layout."
        if probe.kind not in (*VOLUME_KINDS, "label"):
            return None
        reason = f"Not in the layout of {entry.name}."
        if probe.kind not in (*FAMILIES[entry.family].formats, "label"):
            reason = f"A {probe.kind} file, expected {' or '.join(FAMILIES[entry.family].formats)} in {entry.name}."
        return reason, f"Compare `omnimri datasets {entry.name}`, or ingest it under another name."

    def _label_files(self, source: Source) -> Iterator[str]:
        """Every file of the source that is a label map of a volume placed in it."""
        for key, placed in self._placed[source.prefix].items():
            names = [self._label_map(placed, source, key), *self._structures(placed, source)]
            for name in filter(None, names):
                yield name
                yield from volumes.detached(source.container, name)

    def annotation(self, source: Source, item: WorkItem) -> tuple[Annotation | None, list[ReadError]]:
        """What the layout says of one series; None outside of every layout."""
        placed = self._placed[source.prefix].get(_key(item.names[0], item.member))
        if placed is None:
            return None, []
        placed = replace(placed, fields={"patient": item.patient, **placed.fields})
        try:
            return self._annotation(placed, source, item), []
        except ReadError as error:
            return None, [error]
        except ValueError as error:
            reason = f"What {placed.entry.name} says of it cannot be read: {error}"
            return None, [ReadError(item.source, reason, "The volume was kept.")]

    def _annotation(self, placed: Placed, source: Source, item: WorkItem) -> Annotation:
        rule, rows = placed.rule, self._rows_of(placed)
        card = self._card(placed, source)
        names = {int(value): name for value, name in (rule.label_names or card.label_names).items()}
        classes = [*_field_classes(placed), *(c for table, found in rows for c in _classes(table, found))]
        has_classes = bool(rule.classes) or any(table.classes and found for table, found in rows)
        boxed = next(((table, found) for table, found in rows if table.boxes and found), None)
        return Annotation(
            facts={**_facts(placed.entry.facts), **_table_facts(rows)},
            layout_facts=_layout_facts(placed, card),
            label_map=self._label_map(placed, source, item.names[0]) or "",
            label_names=names,
            structures=self._structures(placed, source),
            foreground=rule.foreground,
            label_volumes=_label_frames(rows),
            boxes=_boxes(*boxed) if boxed else None,
            boxes_flipped=bool(boxed and boxed[0].boxes.get("flip_y")),
            box_grid=tuple(boxed[0].boxes["grid"]) if boxed and "grid" in boxed[0].boxes else None,
            classes=list(dict.fromkeys(classes)) if has_classes else None,
            report=_report(rows),
            volumes={**_channels(placed, card), **self._sample_classes(placed, source, item)},
        )

    def official_split(self, source: Source, item: WorkItem) -> str | None:
        """The split that the layout states of one series; None where it states none.

        Raises:
            ReadError: If a table that may state it cannot be read.
        """
        placed = self._placed[source.prefix].get(_key(item.names[0], item.member))
        if placed is None:
            return None
        placed = replace(placed, fields={"patient": item.patient, **placed.fields})
        try:
            stated = [split for table, rows in self._rows_of(placed) for split in _table_splits(table, rows)]
        except ValueError as error:
            reason = f"The official split of {placed.entry.name} cannot be read: {error}"
            raise ReadError(item.source, reason, "Its patient was split as those without one are.") from error
        root = source.container.path.name.removesuffix(".zip")
        path = f"{root}/{source.prefix}{_key(item.names[0], item.member)}"
        return held_out_first(stated) or folder_split(placed.entry, path)

    # ---- Label maps

    def _label_map(self, placed: Placed, source: Source, name: str) -> str | None:
        """The first label map of the rule that is there; an array of the archive itself is written `file#array`."""
        if placed.rule.label_member:
            return f"{name}#{filled(placed.rule.label_member, placed.fields)}"
        for template in placed.rule.label_map:
            path = filled(template, placed.fields)
            if path is not None and (found := self._first(path, placed.folder, source)):
                return found
        return None

    def _first(self, path: str, folder: str, source: Source) -> str | None:
        """A file of the source by its path below a folder; `**/` in it stands for any folders."""
        if "**/" not in path:
            return folder + path if source.container.holds(folder + path) else None
        pattern = Pattern(path)
        same_name = (name.removeprefix(source.prefix) for name in self._by_name.get(path.rpartition("/")[2], []))
        return next((name for name in same_name if name in source.sizes and pattern.match(name) is not None), None)

    def _structures(self, placed: Placed, source: Source) -> dict[str, str]:
        """Mask file to the structure that it holds, sorted by file."""
        if not placed.rule.structures:
            return {}
        fields = {name: re.escape(value) for name, value in placed.fields.items()}
        template = FIELD.sub(
            lambda field: f"{{{field[1]}:{fields[field[1]]}}}" if field[1] in fields else field[0],
            placed.rule.structures,
        )
        pattern, folder = Pattern(template), placed.folder + _fixed_folder(placed.rule.structures, placed.fields)
        names = self._folders[source.prefix].get(folder.rstrip("/"), [])
        matches = ((name, pattern.match(name)) for name in names)
        words = {name: match["structure"] for name, match in matches if match}
        meanings = placed.rule.values.get("structure", {})
        return {name: meanings.get(word) or word.replace("_", " ") for name, word in words.items()}

    @cached_property
    def _folders(self) -> dict[str, dict[str, list[str]]]:
        """Prefix of a source, folder, and the files in it."""
        found: dict[str, dict[str, list[str]]] = {}
        for source in self._sources:
            folders = found.setdefault(source.prefix, defaultdict(list))
            for name in source.sizes:
                folders[name.rpartition("/")[0]].append(name)
        return found

    def _sample_classes(self, placed: Placed, source: Source, item: WorkItem) -> dict[int, dict[str, Any]]:
        """The class of each sample of an archive."""
        member = filled(placed.rule.class_member, placed.fields)
        if not member:
            return {}
        with source.container.local(item.names) as paths:
            values = volumes.load_array(paths[item.names[0]], member, item.source, self._limits).ravel()
        names = placed.rule.values.get("class", {})
        if unknown := sorted({str(int(value)) for value in values} - set(names)):
            raise ValueError(f"class {unknown[0]} has no name; known: {', '.join(names)}.")
        return {sample: {"classes": [names[str(int(value))]]} for sample, value in enumerate(values)}

    # ---- Tables

    def _rows_of(self, placed: Placed) -> list[tuple[TableRule, list[tables.Row]]]:
        """The rows of every table that speak of one volume; tables that are not there are left out."""
        found = []
        for table in placed.entry.tables:
            path = filled(table.path, placed.fields)
            key = tuple(map(tables.bare, (placed.fields.get(name) for name in table.join)))
            if path is None or None in key or (name := self._find(path, placed)) is None:
                continue
            found.append((table, self._indexed(name, table).get(key, [])))
        return found

    def _find(self, path: str, placed: Placed) -> str | None:
        """The full name of a table: in the volume's own folders first, then anywhere in the sources."""
        ending = f"/{path}"
        candidates = [name for name in self._by_name.get(path.rpartition("/")[2], []) if f"/{name}".endswith(ending)]
        same_set = [name for name in candidates if self.entry_of(name) is placed.entry]
        near = [name for name in same_set if name.endswith(f"{placed.folder}{path}")]
        return next(iter(near or same_set), None)

    @cached_property
    def _by_name(self) -> Mapping[str, list[str]]:
        """File name to full names of the files that have it."""
        found: dict[str, list[str]] = defaultdict(list)
        for source in self._sources:
            for name in source.sizes:
                found[name.rpartition("/")[2]].append(source.prefix + name)
        return found

    def _indexed(self, name: str, table: TableRule) -> Mapping[tuple[str | None, ...], list[tables.Row]]:
        columns = tuple(table.join.values())
        if (name, columns) not in self._tables:
            rows = tables.parse_table(self._read(name), name, table.header)
            self._tables[name, columns] = tables.index(rows, columns)
        return self._tables[name, columns]

    def _read(self, name: str) -> bytes:
        source = max((s for s in self._sources if self._has(s, name)), key=lambda s: len(s.prefix))
        with source.container.open(name.removeprefix(source.prefix)) as stream:
            return stream.read(tables.MAX_TABLE_BYTES + 1)

    def _has(self, source: Source, name: str) -> bool:
        return name.startswith(source.prefix) and name.removeprefix(source.prefix) in source.sizes

    def _card(self, placed: Placed, source: Source) -> Card:
        path = filled(placed.rule.card, placed.fields)
        if not placed.rule.card or path is None or not source.container.holds(placed.folder + path):
            return Card({}, ())
        with source.container.open(placed.folder + path) as stream:
            return parse_card(stream.read(tables.MAX_TABLE_BYTES))


@dataclass(frozen=True)
class Card:
    """What the dataset.json of nnU-Net and the Decathlon says."""

    label_names: dict[str, str]
    channels: tuple[str, ...]


def parse_card(content: bytes) -> Card:
    """Parse a dataset.json, of the Decathlon or of nnU-Net.

    Raises:
        ValueError: If it is no JSON object.
    """
    document = json.loads(content)
    if not isinstance(document, dict):
        raise ValueError("dataset.json holds no object.")
    labels = document.get("labels") or {}
    names = {}
    for key, value in labels.items() if isinstance(labels, dict) else ():
        number, name = (key, value) if str(key).isdigit() else (value, key)
        if str(number).isdigit() and int(number):
            names[str(number)] = str(name)
    channels = document.get("channel_names") or document.get("modality") or {}
    ordered = sorted(channels.items(), key=lambda channel: int(channel[0])) if isinstance(channels, dict) else []
    return Card(names, tuple(str(name) for _, name in ordered))


def folder_split(entry: DatasetEntry, path: str) -> str | None:
    """The official split that a folder of a path, or the array `file#array` at its end, names; the nearest counts."""
    for part in reversed(PurePosixPath(path).parts):
        for pattern, split in entry.splits.items():
            if fnmatchcase(part, pattern):
                return split
    return None


def held_out_first(splits: Iterable[str]) -> str | None:
    """Of several splits the one that leaks nothing: test before val before train; None of none."""
    return max(splits, key=SPLITS.index, default=None)


def _table_splits(table: TableRule, rows: Sequence[tables.Row]) -> Iterator[str]:
    """The official splits that the rows of one table state of a volume."""
    if not table.split:
        return
    for row in rows:
        if "is" in table.split:
            yield table.split["is"]
        elif all(tables.column(row, name) == value for name, value in table.split.get("where", {}).items()):
            word = tables.column(row, table.split["column"]) or ""
            if (meaning := table.split["values"].get(word.lower())) is not None:
                yield meaning


def _key(name: str, member: str) -> str:
    """A file, or one array of an archive."""
    return f"{name}#{member}" if member else name


def _folder_of(name: str, template: str) -> str:
    """The folders of a name that lie above a pattern, with a slash at the end."""
    depth = FIELD.sub("", template).count("/")
    parts = name.split("/")
    return "".join(f"{part}/" for part in parts[: len(parts) - 1 - depth]) if "**/" not in template else ""


def _fixed_folder(template: str, fields: Mapping[str, str]) -> str:
    return filled(template.rpartition("/")[0], fields) or ""


def _with_keys(probe: Probe, fields: Mapping[str, str], rule: ImageRule) -> Probe:
    patient = filled(rule.patient, fields)
    # A volume whose name ends like a BIDS label is a volume when its layout says so.
    kind = "nifti" if probe.kind == "label" else probe.kind
    placed = replace(
        probe, kind=kind, series=probe.series or probe.name, samples=rule.samples, matlab_array=rule.matlab_array
    )
    if patient is None:
        return placed
    return replace(placed, patient=patient, study=f"{patient}|{fields.get('session', '')}")


def _facts(values: Mapping[str, Any]) -> Facts:
    """Facts in our words.

    Raises:
        ValueError: If one is unknown.
    """
    if unknown := sorted(set(values) - set(_FACTS)):
        raise ValueError(f"unknown facts {', '.join(unknown)}; known: {', '.join(_FACTS)}.")
    return {name: _FACTS[name](value) for name, value in values.items()}


def _layout_facts(placed: Placed, card: Card) -> Facts:
    """What path and rule state: fixed facts, fields that are facts, the contrast by its word or channel."""
    rule, fields = placed.rule, placed.fields
    stated = {name: rule.values.get(name, {}).get(word, word) for name, word in fields.items() if name in _FACTS}
    stated.pop("contrast", None)
    result = _facts({**stated, **rule.facts})
    if "contrast" in fields:
        result["contrast"] = rule.contrasts.get(fields["contrast"]) or None
    elif "channel" in fields and "contrast" not in result and int(fields["channel"]) < len(card.channels):
        result["contrast"] = _channel_contrast(rule, card.channels[int(fields["channel"])])
    return result


def _channel_contrast(rule: ImageRule, word: str) -> str | None:
    return rule.contrasts.get(word) or contrast_of(word)


def _channels(placed: Placed, card: Card) -> dict[int, dict[str, Any]]:
    """Contrast of each volume of a file with channels in its last axis."""
    if "channel" in placed.fields or len(card.channels) < 2:
        return {}
    stated = _layout_facts(placed, card)
    return {
        volume: {"layout_facts": {**stated, "contrast": _channel_contrast(placed.rule, word)}}
        for volume, word in enumerate(card.channels)
    }


def _field_classes(placed: Placed) -> list[str]:
    found = (meanings.get(placed.fields.get(name, "")) for name, meanings in placed.rule.classes.items())
    return [name for name in found if name]


def _classes(table: TableRule, rows: Sequence[tables.Row]) -> Iterator[str]:
    """Classes of some rows; a value whose meaning is empty is a negative."""
    for rule in table.classes:
        for row in rows:
            if rule.get("columns") == "*":
                joined = {tables.column(row, name) for name in table.join.values()}
                yield from (name for name, value in row.items() if value in ("1", "1.0") and value not in joined)
                continue
            if "unless" in rule and tables.column(row, rule["unless"]):
                continue
            value = tables.column(row, rule["column"])
            meaning = rule["values"].get(value, "") if "values" in rule else value
            if meaning:
                yield meaning


def _boxes(table: TableRule, rows: Sequence[tables.Row]) -> list[dict[str, Any]]:
    return [_box(table, row) for row in rows if tables.column(row, table.boxes["x"])]


def _box(table: TableRule, row: tables.Row) -> dict[str, Any]:
    """A box in one slice, half-open.

    Raises:
        ValueError: If a column is missing or holds no number.
    """
    rule = table.boxes
    numbers = {name: tables.column(row, rule[name]) for name in ("slice", "x", "y", "width", "height")}
    if None in numbers.values():
        raise ValueError(f"a box needs columns {', '.join(str(rule[name]) for name in numbers)}.")
    z, x, y, width, height = (tables.whole_number(value) for value in numbers.values())
    return {
        "label": tables.column(row, rule["label"]) or "", "side": None,
        "box_voxel": [z, y, x, z + 1, y + height, x + width],
    }  # fmt: skip


def _report(rows: Iterable[tuple[TableRule, list[tables.Row]]]) -> str | None:
    texts = [tables.column(row, name) for table, found in rows for row in found for name in table.report]
    return "\n".join(text for text in texts if text) or None


def _table_facts(rows: Iterable[tuple[TableRule, list[tables.Row]]]) -> Facts:
    stated = {
        name: tables.column(row, at) for table, found in rows for row in found for name, at in table.facts.items()
    }
    return _facts({name: value for name, value in stated.items() if value})


def _label_frames(rows: Iterable[tuple[TableRule, list[tables.Row]]]) -> tuple[int, ...] | None:
    """Numbers of the volumes that are labelled; None where all may be."""
    found = [(table, row) for table, matched in rows for row in matched if table.label_frames]
    if not found:
        return None
    values = [tables.column(row, name) for table, row in found for name in table.label_frames]
    return tuple(tables.whole_number(value) for value in values if value)
