"""Turn planned work items into rows of one Parquet shard; runs inside the tasks of ingest."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from omnimri.models.physics import compress_coils
from omnimri.platform.data.deid import scrub, whitelisted
from omnimri.platform.data.formats.readers import WorkItem, read_item
from omnimri.platform.data.formats.records import ReadError, ReadLimits, SeriesRecord
from omnimri.platform.data.formats.sources import open_container
from omnimri.platform.data.intake.annotations import Annotation, check_boxes, merge_facts, placed_boxes, read_labels
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.deface import Faceless, face_flags, remove_face
from omnimri.platform.data.intake.quality import QualityLimits, fingerprint, image_quality, quality_flags
from omnimri.platform.data.schema import SCHEMA, SCHEMA_VERSION, pack_array

INTAKE_VERSION = "intake-2"
"""Raised when the same file would give other voxels, geometry, labels or facts."""

_PSEUDONYMS = ("row_id", "patient_id", "study_id", "series_id")
_DERIVED = ("quality", "flags", "fingerprint")
_ARRAYS = ("image", "kspace", "mask", "label_map")
_STATISTICS = [name for name in SCHEMA.names if pa.types.is_primitive(SCHEMA.field(name).type)]


@dataclass(frozen=True, kw_only=True)
class PlannedItem:
    """A work item with everything the driver decided about it. Holds pseudonyms, no raw identifiers."""

    item: WorkItem
    dataset: str
    licence: str | None
    simulated: bool
    split: str
    patient_id: str
    study_id: str
    series_id: str
    annotation: Annotation | None = None


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What a task did: the manifest entries of the rows it wrote, and the ledger lines of what it could not read."""

    rows: list[dict[str, Any]]
    rejects: list[dict[str, str]]


def write_shard(planned: list[PlannedItem], path: Path, config: IngestConfig) -> ShardReport:
    """Read items and write their volumes to one shard, one row to a row group.

    The shard appears under its name when it is complete, so a task that is run again after a crash changes nothing.

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
            records, errors = read_item(plan.item, config.limits)
            rejects += errors
            for record in records:
                if np.ptp(record.scan.image) == 0:
                    rejects.append(
                        ReadError(record.source, "A blank volume: every voxel has one value.", "Leave it out.")
                    )
                    continue
                if record.scan.kspace is not None and config.max_coils is not None:
                    kspace = compress_coils(torch.from_numpy(record.scan.kspace), config.max_coils).numpy()
                    record = replace(record, scan=replace(record.scan, kspace=kspace))
                try:
                    row, errors = make_row(record, plan, config.limits, config.quality, undefaced=config.faces_left)
                except ReadError as error:
                    rejects.append(error)
                    continue
                rejects += errors
                writer.write_table(pa.Table.from_pylist([row], schema=SCHEMA), row_group_size=1)
                rows.append(manifest_entry(row, record, path.name, len(rows)))
    if rows:
        partial.replace(path)
    else:
        partial.unlink()
    return ShardReport(rows=rows, rejects=[error.as_row() for error in rejects])


def make_row(
    record: SeriesRecord,
    plan: PlannedItem,
    limits: ReadLimits,
    quality: QualityLimits,
    *,
    undefaced: Literal["reject", "flag"] | None = None,
) -> tuple[dict[str, Any], list[ReadError]]:
    """The row of one volume, and what of its annotation did not fit.

    Args:
        record: The volume.
        plan: What the driver decided about it.
        limits: Bounds on files of label maps.
        quality: Beyond what it is flagged.
        undefaced: Faces are removed, and this becomes of one that cannot be; None leaves all faces.

    Raises:
        ReadError: If a face is to be removed and cannot be.
    """
    annotation = (plan.annotation or Annotation()).of_volume(record.volume)
    label_map, label_names, boxes, errors = _fitted(annotation, record, plan.item, limits)
    facts = whitelisted(merge_facts(record.scan.facts, annotation))
    faceless = Faceless(record.scan, label_map, None)
    if undefaced is not None and not plan.simulated:
        faceless = remove_face(record, facts, label_map, label_names, boxes, undefaced=undefaced)
    scan, label_map = faceless.scan, faceless.label_map
    measured = image_quality(scan.image, label_map, label_names)
    row = {
        "schema_version": SCHEMA_VERSION,
        "dataset": plan.dataset,
        "licence": plan.licence,
        "split": plan.split,
        "patient_id": plan.patient_id,
        "study_id": plan.study_id,
        "series_id": plan.series_id,
        "source_format": record.source_format,
        "simulated": plan.simulated,
        "image": pack_array(scan.image),
        "affine": scan.affine.ravel().tolist(),
        "spacing_mm": list(scan.spacing_mm),
        "shape": list(scan.image.shape),
        "kspace": pack_array(scan.kspace),
        "mask": pack_array(scan.mask),
        "label_map": pack_array(label_map),
        "label_names": sorted(label_names.items()) if label_map is not None else None,
        "boxes": boxes,
        "classes": annotation.classes,
        "report": scrub(annotation.report, record.identifiers),
        "description": _json(scrub(annotation.description, record.identifiers)),
        "description_origin": _json(annotation.description_origin),
        **facts,
        "quality": measured,
        "flags": quality_flags(scan.image.shape, measured, quality, t1_weighted=facts["contrast"] == "T1w")
        + (faceless.flags or face_flags(scan, facts, measured, simulated=plan.simulated)),
        "fingerprint": fingerprint(scan.image, scan.affine),
        "preprocessing_version": INTAKE_VERSION + faceless.version,
    }
    return {"row_id": row_digest(row)[:16], **row}, errors


def _fitted(
    annotation: Annotation, record: SeriesRecord, item: WorkItem, limits: ReadLimits
) -> tuple[np.ndarray | None, dict[int, str], list[dict[str, Any]] | None, list[ReadError]]:
    """Label map with the names of its values, and boxes, as far as they fit the volume.

    A label map that the annotation names wins over what came with the series, which is used where it does not fit.
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
    return label_map, label_names, boxes, errors


def _json(value: dict[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, sort_keys=True)


def row_digest(row: dict[str, Any]) -> str:
    """SHA-256 of what a row says: every column but pseudonyms, split, and what is computed from the others."""
    digest = hashlib.sha256()
    for name in SCHEMA.names:
        if name in (*_PSEUDONYMS, "split", *_DERIVED):
            continue
        value = row[name]
        if name in _ARRAYS and value is not None:
            _update_array(digest, name, value)
        else:
            digest.update(f"{name}={json.dumps(value, sort_keys=True)}\n".encode())
    return digest.hexdigest()


def voxel_digest(row: dict[str, Any]) -> str:
    """SHA-256 of voxels and geometry alone: equal for two copies of one volume, whatever their headers say."""
    digest = hashlib.sha256(json.dumps(row["affine"]).encode())
    for name in ("image", "kspace"):
        if row[name] is not None:
            _update_array(digest, name, row[name])
    return digest.hexdigest()


def _update_array(digest: Any, name: str, packed: dict[str, Any]) -> None:
    digest.update(f"{name}={packed['dtype']}{packed['shape']}\n".encode())
    digest.update(packed["data"])


def manifest_entry(row: dict[str, Any], record: SeriesRecord, file: str, row_group: int) -> dict[str, Any]:
    """What the manifest says of a row; `source`, `voxels` and `fingerprint` serve the driver and are not kept."""
    copied = (
        "row_id", "dataset", "licence", "simulated", "split", "patient_id", "study_id", "series_id", "source_format",
        "shape", "spacing_mm", "contrast", "quantitative", "contrast_agent", "acquisition_type", "plane", "body_part",
        "vendor", "field_strength_t", "sex", "age_years", "flags", "fingerprint",
    )  # fmt: skip
    return {
        **{name: row[name] for name in copied},
        "file": file,
        "row_group": row_group,
        "digest": row_digest(row),
        "has_kspace": row["kspace"] is not None,
        "fully_sampled": row["kspace"] is not None and row["mask"] is None,
        "has_labels": row["label_map"] is not None,
        "has_boxes": row["boxes"] is not None,
        "has_classes": row["classes"] is not None,
        "has_report": row["report"] is not None,
        "has_description": row["description"] is not None,
        "source": record.source,
        "voxels": voxel_digest(row),
    }
