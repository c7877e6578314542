"""A small ingested corpus with every kind of label, written straight to shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from omnimri.models.physics import fft2c
from omnimri.models.vocabulary import CONTRASTS, DIAGNOSES, FINDINGS, NORMAL, TISSUES
from omnimri.platform.data.schema import SCHEMA, SCHEMA_VERSION, pack_array

LABELS = dict(enumerate((*TISSUES, *FINDINGS), start=1))


def write_shards(out: Path, *, patients: int = 3, shape: tuple[int, int, int] = (6, 32, 32)) -> Path:
    """Nested balls with a lesion in every patient but the first; the last patient is held out.

    Every patient has the four contrasts; the last two carry k-space of four coils.
    """
    (out / "shards").mkdir(parents=True)
    entries = []
    for patient in range(patients):
        rng = np.random.default_rng(patient)
        labels, box = _labels(patient, shape, rng)
        for number, contrast in enumerate(CONTRASTS):
            row = _row(patient, number, contrast, labels, box, rng)
            row["split"] = "val" if patient == patients - 1 else "train"
            file = f"part-{patient}-{number}.parquet"
            pq.write_table(pa.Table.from_pylist([row], schema=SCHEMA), out / "shards" / file)
            entries.append(_entry(row, file))
    (out / "manifest.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION, "rows": entries}))
    return out


def _labels(patient: int, shape: tuple[int, int, int], rng: np.random.Generator) -> tuple[np.ndarray, list[int] | None]:
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    labels = np.zeros(shape, np.uint8)
    for value, edge in ((2, 0.9), (3, 0.6), (1, 0.3)):
        labels[radius < edge] = value
    if patient == 0:
        return labels, None
    centre = rng.uniform(-0.3, 0.3, 3)
    lesion = np.sqrt(sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True))) < 0.3
    labels[lesion] = len(TISSUES) + 1 + (patient - 1) % len(FINDINGS)
    where = np.argwhere(lesion)
    return labels, [*where.min(0).tolist(), *(where.max(0) + 1).tolist()]


def _row(
    patient: int, number: int, contrast: str, labels: np.ndarray, box: list[int] | None, rng: np.random.Generator
) -> dict[str, Any]:
    intensity = np.linspace(0, 1, len(LABELS) + 1) ** (0.5 + 0.3 * number)
    image = (intensity[labels] + 0.02 * rng.standard_normal(labels.shape)).astype(np.float32)
    kspace = None
    if number >= 2:
        coils = np.ones((1, 4, 1, 1), np.complex64) * np.exp(1j * np.arange(4))[None, :, None, None] / 2
        kspace = fft2c(torch.from_numpy((image[:, None] * coils).astype(np.complex64))).numpy()
    diagnosis = NORMAL if patient == 0 else DIAGNOSES[1 + (patient - 1) % len(FINDINGS)]
    finding = FINDINGS[(patient - 1) % len(FINDINGS)]
    return dict.fromkeys(SCHEMA.names) | {
        "row_id": f"row-{patient}-{number}",
        "schema_version": SCHEMA_VERSION,
        "dataset": "balls",
        "licence": "none",
        "patient_id": f"patient-{patient}",
        "study_id": f"study-{patient}",
        "series_id": f"series-{patient}-{number}",
        "source_format": "nifti",
        "simulated": True,
        "image": pack_array(image),
        "affine": np.diag([4.0, 4.0, 12.0, 1.0]).ravel().tolist(),
        "spacing_mm": [12.0, 4.0, 4.0],
        "shape": list(labels.shape),
        "kspace": pack_array(kspace),
        "label_map": pack_array(labels),
        "label_names": list(LABELS.items()),
        "boxes": [] if box is None else [{"label": finding, "side": "midline", "box_voxel": box}],
        "classes": [diagnosis],
        "report": f"Axial {contrast} MRI of the brain. Impression: {diagnosis}.",
        "description": json.dumps({"diagnostic_impression": {"suggestive_of": diagnosis}}),
        "description_origin": "{}",
        "contrast": contrast,
        "plane": "axial",
        "body_part": "brain",
        "vendor": "Siemens",
        "field_strength_t": 3.0,
        "sex": "F",
        "age_years": 50.0,
    }


def _entry(row: dict[str, Any], file: str) -> dict[str, Any]:
    copied = (
        "row_id", "dataset", "licence", "simulated", "split", "patient_id", "study_id", "series_id", "source_format",
        "shape", "spacing_mm", "contrast", "plane", "body_part", "vendor", "field_strength_t", "sex", "age_years",
    )  # fmt: skip
    return {name: row[name] for name in copied} | {
        "file": file,
        "row_group": 0,
        "digest": row["row_id"],
        "has_kspace": row["kspace"] is not None,
        "fully_sampled": row["kspace"] is not None,
        "has_labels": True,
        "has_boxes": True,
        "has_classes": True,
        "has_report": True,
        "has_description": True,
        "flags": [],
    }
