"""Turn planned work items into rows of one Parquet shard; runs inside the tasks of ingest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omnimri.models.scan import Scan
from omnimri.platform.data.deid import scrub, whitelisted
from omnimri.platform.data.formats.kspace.prewhitening import prewhitened
from omnimri.platform.data.formats.readers import WorkItem, read_item
from omnimri.platform.data.formats.records import UNREADABLE, ReadError, ReadLimits, SeriesRecord
from omnimri.platform.data.formats.sources import open_container
from omnimri.platform.data.intake.annotations import Annotation, check_boxes, merge_facts, placed_boxes, read_labels
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.deface import Faceless, face_flags, remove_face
from omnimri.platform.data.intake.quality import fingerprint, image_quality, quality_flags
from omnimri.platform.data.schema import SCHEMA, SCHEMA_VERSION, pack_array, pack_image
from omnimri.platform.language.derive import Known, derive

INTAKE_VERSION = "intake-5"
"""Raised when the same file would give other voxels, geometry, labels or facts, or the same ones another digest."""


def preprocessing_version(config: IngestConfig) -> str:
    """What made the voxels of a row: the intake's version and a digest of the settings that change them."""
    return f"{INTAKE_VERSION}-{config.voxel_digest}"


_PSEUDONYMS = ("row_id", "patient_id", "study_id", "series_id")
_DERIVED = ("quality", "flags", "fingerprint")
_ARRAYS = ("image", "kspace", "mask", "label_map")
_NOT_SAID = (*_PSEUDONYMS, "split", "split_origin", *_DERIVED, *_ARRAYS)
_SAID = [name for name in SCHEMA.names if name not in _NOT_SAID]
_STATISTICS = [name for name in SCHEMA.names if pa.types.is_primitive(SCHEMA.field(name).type)]


@dataclass(frozen=True, kw_only=True)
class PlannedItem:
    """A work item with everything the driver decided about it. Holds pseudonyms, no raw identifiers."""

    item: WorkItem
    dataset: str
    licence: str | None
    simulated: bool
    split: str
    split_origin: str = "drawn"
    """`drawn`; `official`, as a layout says of the person; `moved` from there, because another holds the person out."""
    patient_id: str
    study_id: str
    series_id: str
    person_id: str
    """The same for one person in all data sets that overlap."""
    item_id: str
    """Of the files the series is made of."""
    annotation: Annotation | None = None


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What a task did: the manifest entries of the rows it wrote, and the ledger lines of what it could not read."""

    rows: list[dict[str, Any]]
    rejects: list[dict[str, str]]


def write_shard(planned: list[PlannedItem], path: Path, config: IngestConfig) -> ShardReport:
    """Read items and write their volumes to one shard, one row to a row group.

    The shard appears under its name when it is complete, so a task that is run again after a crash changes nothing.
    A volume of which no row can be made is one line of the ledger, whatever it raises.

    Args:
        planned: What to read.
        path: The Parquet file; not made when no item could be read.
        config: Limits, compression, quality bounds, coils.
    """
    rows: list[dict[str, Any]] = []
    rejects: list[ReadError] = []
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with pq.ParquetWriter(
        partial,
        SCHEMA,
        compression="zstd",
        compression_level=config.compression_level,
        # Dictionaries and minima of megabyte values would double the file.
        use_dictionary=False,
        write_statistics=_STATISTICS,
    ) as writer:
        for plan in planned:
            records, errors = _volumes(plan, config)
            rejects += errors
            for record in records:
                try:
                    row = make_row(record, plan, config)
                    table = pa.Table.from_pylist([row.values], schema=SCHEMA)
                except UNREADABLE as error:
                    rejects.append(_refused(record, error))
                    continue
                rejects += row.misfits
                writer.write_table(table, row_group_size=1)
                rows.append(_manifest_entry(row, record, plan, path.name, len(rows)))
    if rows:
        partial.replace(path)
    else:
        partial.unlink()
    return ShardReport(rows=rows, rejects=[error.as_row() for error in rejects])


def _volumes(plan: PlannedItem, config: IngestConfig) -> tuple[list[SeriesRecord], list[ReadError]]:
    """Volumes of an item as they are to be kept, and what was refused."""
    records, errors = read_item(plan.item, config.limits)
    kept = []
    for record in records:
        try:
            kept.append(_as_kept(record, config))
        except UNREADABLE as error:
            errors.append(_refused(record, error))
    return kept, errors


def _refused(record: SeriesRecord, error: Exception) -> ReadError:
    """The line of a volume that cannot be made a row."""
    if isinstance(error, ReadError):
        return error
    reason = f"The volume cannot be made a row ({type(error).__name__})."
    return ReadError(record.source, reason, "Leave it out, and tell us.")


def _as_kept(record: SeriesRecord, config: IngestConfig) -> SeriesRecord:
    """A volume with white noise and as many coils as are wanted.

    Raises:
        ReadError: If it is blank.
    """
    if np.ptp(record.scan.image) == 0:
        raise ReadError(record.source, "A blank volume: every voxel has one value.", "Leave it out.")
    if config.prewhiten:
        record = prewhitened(record)
    if record.scan.kspace is not None and config.max_coils is not None:
        record = replace(record, scan=_with_fewer_coils(record.scan, config.max_coils))
    return record


def _with_fewer_coils(scan: Scan, num_coils: int) -> Scan:
    # Torch takes a second to import, and most ingests do without it.
    import torch

    from omnimri.models.physics import compress_coils

    return replace(scan, kspace=compress_coils(torch.from_numpy(scan.kspace), num_coils).numpy())


@dataclass(frozen=True, kw_only=True)
class Row:
    """One volume as the shard holds it."""

    values: dict[str, Any]
    """By column of `SCHEMA`."""
    digest: str
    """SHA-256 of what the row says: every column but pseudonyms, split, and what is computed from the others."""
    voxels: str
    """SHA-256 of voxels and geometry: equal for two copies of one volume, whatever their headers say."""
    misfits: list[ReadError]
    """What of its annotation did not fit."""


def make_row(record: SeriesRecord, plan: PlannedItem, config: IngestConfig) -> Row:
    """The row of one volume.

    Raises:
        ReadError: If a face is to be removed and cannot be.
    """
    annotation = (plan.annotation or Annotation()).of_volume(record.volume)
    label_map, label_names, boxes, errors = _fitted(annotation, record, plan.item, config.limits)
    facts = whitelisted(merge_facts(record.scan.facts, annotation))
    # Before a face is cut: what is cut counts as no air, and a defaced copy resembles its original.
    measured = image_quality(record.scan.image, label_map, label_names)
    faceless = Faceless(record.scan, label_map, None)
    if config.deface and not plan.simulated:
        faceless = remove_face(record, facts, label_map, label_names, boxes, undefaced=config.undefaced)
    scan, label_map = faceless.scan, faceless.label_map
    flags = quality_flags(scan.image.shape, measured, config.quality, t1_weighted=facts["contrast"] == "T1w")
    flags += faceless.flags or face_flags(scan, facts, measured, simulated=plan.simulated)
    flags += record.flags
    classes = record.classes if annotation.classes is None else annotation.classes
    report = scrub(annotation.report, record.identifiers)
    known = Known(
        image=scan.image, affine=scan.affine, facts=facts, quality=measured, flags=flags, label_map=label_map,
        label_names=label_names, boxes=boxes, classes=classes, report=report,
    )  # fmt: skip
    description, origin = _described(annotation, known, config)
    row = {
        "schema_version": SCHEMA_VERSION,
        "dataset": plan.dataset,
        "licence": plan.licence,
        "split": plan.split,
        "split_origin": plan.split_origin,
        "patient_id": plan.patient_id,
        "study_id": plan.study_id,
        "series_id": plan.series_id,
        "source_format": record.source_format,
        "simulated": plan.simulated,
        "image": pack_image(scan.image),
        "affine": scan.affine.ravel().tolist(),
        "spacing_mm": list(scan.spacing_mm),
        "shape": list(scan.image.shape),
        "kspace": pack_array(scan.kspace),
        "mask": pack_array(scan.mask),
        "label_map": pack_array(label_map),
        "label_names": sorted(label_names.items()) if label_map is not None else None,
        "boxes": boxes,
        "classes": classes,
        "measurements": record.measurements,
        "report": report,
        "description": _json(scrub(description, record.identifiers)),
        "description_origin": _json(origin),
        **facts,
        "quality": measured,
        "flags": flags,
        "fingerprint": fingerprint(record.scan.image, record.scan.affine),
        "preprocessing_version": preprocessing_version(config) + faceless.version,
    }
    arrays = {name: _array_digest(row[name]) for name in _ARRAYS}
    said = {name: row[name] for name in _SAID}
    digest = _digest_of(arrays, said)
    voxels = _digest_of(arrays["image"], arrays["kspace"], row["affine"])
    return Row(values={"row_id": digest[:16], **row}, digest=digest, voxels=voxels, misfits=errors)


def _described(
    annotation: Annotation, known: Known, config: IngestConfig
) -> tuple[dict[str, Any] | None, Mapping[str, str] | None]:
    """The description that came with a volume, else the one that follows from what is known; and its origin."""
    if annotation.description is not None or not config.describe:
        return annotation.description, annotation.description_origin
    description, origin = derive(known)
    return description.model_dump(), origin


def _fitted(
    annotation: Annotation, record: SeriesRecord, item: WorkItem, limits: ReadLimits
) -> tuple[np.ndarray | None, dict[int, str], list[dict[str, Any]] | None, list[ReadError]]:
    """Label map with the names of its values, and boxes, as far as they fit the volume.

    What the annotation names wins over what came with the series, which is used where a label map does not fit.
    """
    source, boxes = record.source, placed_boxes(annotation, record.scan.image.shape)
    label_map, label_names, errors = record.label_map, record.label_names, []
    if annotation.label_map or annotation.structures:
        container = open_container(Path(item.container), limits)
        try:
            label_map, label_names = read_labels(annotation, container, record.scan, source, record.volume)
        except ReadError as error:
            errors.append(error)
    try:
        check_boxes(boxes or [], record.scan.image.shape)
    except ValueError as error:
        boxes = None
        errors.append(ReadError(source, str(error), "Correct annotations.json; the volume was kept."))
    return label_map, label_names, record.boxes if annotation.boxes is None else boxes, errors


def _json(value: Mapping[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _digest_of(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _array_digest(packed: dict[str, Any] | None) -> str | None:
    if packed is None:
        return None
    digest = hashlib.sha256(f"{packed['dtype']}{packed['shape']}\n".encode())
    digest.update(packed["data"])
    return digest.hexdigest()


def _manifest_entry(row: Row, record: SeriesRecord, plan: PlannedItem, file: str, row_group: int) -> dict[str, Any]:
    """What the manifest says of a row; `source` serves the driver and is not kept."""
    values = row.values
    copied = (
        "row_id", "dataset", "licence", "simulated", "split", "split_origin", "preprocessing_version",
        "patient_id", "study_id", "series_id", "source_format",
        "shape", "spacing_mm", "contrast", "quantitative", "contrast_agent", "acquisition_type", "plane", "body_part",
        "vendor", "field_strength_t", "sex", "age_years", "flags", "fingerprint",
    )  # fmt: skip
    return {
        **{name: values[name] for name in copied},
        "person_id": plan.person_id,
        "item_id": plan.item_id,
        "file": file,
        "row_group": row_group,
        "digest": row.digest,
        "has_kspace": values["kspace"] is not None,
        "fully_sampled": values["kspace"] is not None and values["mask"] is None,
        "has_labels": values["label_map"] is not None,
        "has_boxes": values["boxes"] is not None,
        "has_classes": values["classes"] is not None,
        "has_measurements": bool(values["measurements"]),
        "has_report": values["report"] is not None,
        "has_description": values["description"] is not None,
        "source": record.source,
        "voxels": row.voxels,
    }
