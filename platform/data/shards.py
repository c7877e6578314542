"""Read a corpus of Parquet shards: which rows there are, and one row at a time. Plain pyarrow, no Ray."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omnimri.models.scan import Scan
from omnimri.platform.data.generated import GeneratedRef, read_line, usable_lines, with_generated
from omnimri.platform.data.schema import FACTS, FLAGS, READABLE_VERSIONS, SCHEMA, SCHEMA_VERSION

MANIFEST_NAME = "manifest.json"
SHARDS_FOLDER = "shards"

ARRAYS = ("image", "kspace", "mask", "label_map")


@dataclass(frozen=True, kw_only=True)
class RowRef:
    """One row of a manifest: enough to choose rows without opening a shard."""

    row_id: str
    path: str
    """Absolute path of the Parquet file."""
    row_group: int
    digest: str
    """SHA-256 of the row's content, pseudonyms and split left out."""
    dataset: str
    licence: str | None
    simulated: bool
    split: str
    preprocessing_version: str
    """How its voxels were made of the file; see `omnimri.platform.data.intake.writer`."""
    patient_id: str
    person_id: str
    """The same for one person in all data sets that overlap."""
    study_id: str
    series_id: str
    source_format: str
    shape: tuple[int, int, int]
    """`(Z, Y, X)`."""
    spacing_mm: tuple[float, float, float]
    """`(z, y, x)`."""
    contrast: str | None
    quantitative: bool | None
    contrast_agent: bool | None
    acquisition_type: str | None
    plane: str | None
    body_part: str | None
    vendor: str | None
    field_strength_t: float | None
    sex: str | None
    age_years: float | None
    has_kspace: bool
    fully_sampled: bool
    """K-space without missing lines, fit to be a reconstruction target."""
    has_labels: bool
    has_boxes: bool
    """Annotated for boxes; there may be none to find."""
    has_classes: bool
    has_measurements: bool
    has_report: bool
    has_description: bool
    flags: tuple[str, ...]
    """What quality checks found; see `omnimri.platform.data.intake.quality`."""
    generated: GeneratedRef | None = None
    """What a model wrote about it; see `omnimri.platform.data.generated`."""


@dataclass(frozen=True, kw_only=True)
class StudyRef:
    """The rows of one study, for samples that show several of its series together."""

    rows: tuple[RowRef, ...]

    @property
    def row_id(self) -> str:
        """Those of its rows."""
        return " ".join(row.row_id for row in self.rows)


def studies(rows: Iterable[RowRef], *, at_least: int = 2) -> list[StudyRef]:
    """Rows by study, in the order of their first; studies with fewer rows are left out."""
    found: dict[tuple[str, str, str], list[RowRef]] = {}
    for row in rows:
        found.setdefault((row.dataset, row.patient_id, row.study_id), []).append(row)
    return [StudyRef(rows=tuple(members)) for members in found.values() if len(members) >= at_least]


class Shards:
    """The rows of one or several corpora."""

    def __init__(self, rows: Sequence[RowRef], manifests: Sequence[dict[str, Any]]) -> None:
        self.rows = list(rows)
        self.manifests = list(manifests)

    @classmethod
    def open(cls, folders: Path | str | Iterable[Path | str]) -> Shards:
        """Read the manifest of one folder or of several.

        Raises:
            ValueError: If a folder is no corpus, or its schema is of another version.
        """
        paths = [folders] if isinstance(folders, (str, Path)) else list(folders)
        manifests = [_load_manifest(Path(folder)) for folder in paths]
        rows = [
            _row_ref(entry, Path(folder).absolute() / SHARDS_FOLDER)
            for folder, manifest in zip(paths, manifests, strict=True)
            for entry in manifest["rows"]
        ]
        lines = {row_id: line for folder in paths for row_id, line in usable_lines(Path(folder)).items()}
        return cls([replace(row, generated=lines.get(row.row_id)) for row in rows], manifests)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, **conditions: Any) -> Shards:
        """The rows whose fields equal the values given; a list, tuple or set means any of its members.

        Raises:
            ValueError: If a field is unknown.
        """
        known = RowRef.__dataclass_fields__
        if unknown := sorted(set(conditions) - set(known)):
            raise ValueError(f"Rows have no field {', '.join(unknown)}; known: {', '.join(known)}.")
        rows = [row for row in self.rows if all(_matches(getattr(row, k), v) for k, v in conditions.items())]
        return Shards(rows, self.manifests)

    def without_patients(self, **conditions: Any) -> Shards:
        """The rows of patients of whom no row has these values: what is left when a vendor or a data set is held out.

        Raises:
            ValueError: If a field is unknown, or no row has the values: a held-out set that is empty proves nothing.
        """
        if not conditions:
            return self
        held_out = {row.person_id for row in self.select(**conditions).rows}
        if not held_out:
            raise ValueError(f"hold_out {conditions} names no row.")
        return Shards([row for row in self.rows if row.person_id not in held_out], self.manifests)

    def without_flags(self, flags: Iterable[str]) -> Shards:
        """The rows that intake flagged for none of these reasons, of `FLAGS`.

        Raises:
            ValueError: If a flag is unknown, or no row is left.
        """
        unwanted = set(flags)
        check_flags(unwanted)
        rows = [row for row in self.rows if not unwanted & set(map(flag_kind, row.flags))]
        if self.rows and not rows:
            raise ValueError(
                f"Without volumes flagged {', '.join(sorted(unwanted))} none is left: {self.count_flags()}."
            )
        return Shards(rows, self.manifests)

    def without_generated(self) -> Shards:
        """The same rows without what models wrote about them."""
        return Shards([replace(row, generated=None) for row in self.rows], self.manifests)

    def count_flags(self) -> dict[str, int]:
        """Volumes by what they are flagged for, the commonest first."""
        kinds = (kind for row in self.rows for kind in set(map(flag_kind, row.flags)))
        return dict(Counter(kinds).most_common())

    def count_preprocessing(self) -> dict[str, int]:
        """Volumes by preprocessing version, the commonest first."""
        return dict(Counter(row.preprocessing_version for row in self.rows).most_common())

    @cached_property
    def digest(self) -> str:
        """Version of the data: changes with any row's content, not with the order, the layout or the key."""
        version = max((manifest["schema_version"] for manifest in self.manifests), default=SCHEMA_VERSION)
        return content_digest(((_digest_with_generated(row), row.split) for row in self.rows), version)


def _digest_with_generated(row: RowRef) -> str:
    return f"{row.digest}+{row.generated.digest}" if row.generated else row.digest


def flag_kind(flag: str) -> str:
    """A flag without the row that it points to or its reason: one of `FLAGS`."""
    return re.sub(r" of [0-9a-f]{16}$|: .*$", "", flag)


def check_flags(flags: Iterable[str]) -> None:
    """Check that every flag is one that intake may set.

    Raises:
        ValueError: With the known ones, if it is not.
    """
    if unknown := sorted(set(flags) - set(FLAGS)):
        raise ValueError(f"Unknown flags {', '.join(map(repr, unknown))}; known: {', '.join(FLAGS)}.")


def content_digest(rows: Iterable[tuple[str, str]], schema_version: int = SCHEMA_VERSION) -> str:
    """SHA-256 over the schema version and the sorted `(digest, split)` of rows."""
    digest = hashlib.sha256(f"omnimri schema {schema_version}\n".encode())
    for row_digest, split in sorted(rows):
        digest.update(f"{row_digest} {split}\n".encode())
    return digest.hexdigest()


def load_row(ref: RowRef, columns: Sequence[str] | None = None) -> dict[str, Any]:
    """Read one row from disk; nothing is kept open, so threads and processes may call it at will.

    Args:
        ref: Which row.
        columns: Columns to read; all by default. Leave `kspace` out where it is not used: it is most of the bytes.

    Returns:
        Column to value: arrays as read-only numpy arrays, the image as float32, `label_names` as a dictionary, absent
        values as None, and so are columns that the schema did not have when the row was written. The description holds
        what a model wrote where nothing else was known.

    Raises:
        ValueError: If a column is unknown, or what a model wrote was changed under its manifest.
    """
    names = list(SCHEMA.names if columns is None else columns)
    if unknown := sorted(set(names) - set(SCHEMA.names)):
        raise ValueError(f"The row schema has no column {', '.join(unknown)}; known: {', '.join(SCHEMA.names)}.")
    with pq.ParquetFile(ref.path) as file:
        written = set(file.schema_arrow.names)
        table = file.read_row_group(ref.row_group, columns=[n for n in names if n in written], use_threads=False)
    row = {name: _value(name, table.column(name)[0]) if name in written else None for name in names}
    return _with_generated(row, ref.generated) if ref.generated and "description" in row else row


def _with_generated(row: dict[str, Any], ref: GeneratedRef) -> dict[str, Any]:
    merged = with_generated(row["description"], row.get("description_origin"), read_line(ref)["fields"])
    return {**row, **{name: text for name, text in zip(_DESCRIBED, merged, strict=True) if name in row}}


_DESCRIBED = ("description", "description_origin")


def row_to_scan(row: Mapping[str, Any]) -> Scan:
    """The scan of a row that was loaded with at least `image` and `affine`."""
    return Scan(
        image=row["image"],
        affine=np.array(row["affine"], dtype=np.float64).reshape(4, 4),
        kspace=row.get("kspace"),
        mask=row.get("mask"),
        facts={name: row[name] for name in FACTS if name in row},
    )


def _value(name: str, scalar: pa.Scalar) -> Any:
    if not scalar.is_valid:
        return None
    if name in ARRAYS:
        array = _array(scalar)
        return _as_float32(array) if name == "image" else array
    return dict(scalar.as_py()) if name == "label_names" else scalar.as_py()


def _array(scalar: pa.StructScalar) -> np.ndarray:
    """An ARRAY struct without copying its bytes."""
    dtype = np.dtype(scalar["dtype"].as_py())
    if dtype.hasobject:
        raise ValueError(f"Array column holds dtype {dtype}, which would need pickle; expected a plain number type.")
    return np.frombuffer(scalar["data"].as_buffer(), dtype=dtype).reshape(scalar["shape"].as_py())


def _as_float32(array: np.ndarray) -> np.ndarray:
    converted = array.astype(np.float32, copy=False)
    converted.flags.writeable = False
    return converted


def _load_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is no ingested corpus: it holds no {MANIFEST_NAME}. Run `omnimri ingest` first.")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("schema_version") not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise ValueError(
            f"{folder} has row schema {manifest.get('schema_version')}, this program reads {readable}. "
            "Ingest the data again."
        )
    return manifest


def _row_ref(entry: dict[str, Any], shards: Path) -> RowRef:
    values: dict[str, Any] = {name: entry.get(name) for name in RowRef.__dataclass_fields__ if name != "path"}
    values["shape"], values["spacing_mm"] = tuple(entry["shape"]), tuple(entry["spacing_mm"])
    values["flags"] = tuple(entry["flags"])
    values["person_id"] = entry.get("person_id") or entry["patient_id"]
    values["preprocessing_version"] = entry.get("preprocessing_version") or "unknown"
    values["has_measurements"] = entry.get("has_measurements", False)  # from schema version 3 on
    return RowRef(path=str(shards / entry["file"]), **values)


def _matches(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, (list, tuple, set, frozenset)) else value == wanted
