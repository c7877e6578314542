"""Lesions that a segmentation draws, as a label map would tell of them, and as boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from omnimri.models.boxes import Box
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import FINDINGS, LESION, TISSUES
from omnimri.platform.language.evidence import Evidence, boxes_of_measured

Probabilities = Mapping[str, np.ndarray]
"""Structure to probability `(Z, Y, X)`."""


def evidence_of(
    scan: Scan, probabilities: Probabilities, finding: str, *, threshold: float, classes: Sequence[str] | None = None
) -> Evidence:
    """What a row would say whose labels were the predicted ones.

    Args:
        scan: The image.
        probabilities: Of tissues and lesion.
        finding: Name of the lesions.
        threshold: From which probability a voxel is lesion.
        classes: Diagnoses; without them only what is drawn is known.
    """
    names = (*TISSUES, *dict.fromkeys((*FINDINGS, finding)))
    tissues = np.stack([probabilities[name] for name in TISSUES])
    label_map = np.where(tissues.max(0) >= 0.5, 1 + tissues.argmax(0), 0).astype(np.uint8)
    label_map[probabilities[LESION] >= threshold] = 1 + names.index(finding)
    row: dict[str, Any] = {
        **scan.facts,
        "image": scan.image,
        "affine": scan.affine,
        "label_map": label_map,
        "label_names": dict(enumerate(names, start=1)),
        "classes": classes,
    }
    return Evidence.of_row(row)


def boxes_of(scan: Scan, probabilities: Probabilities, finding: str, *, threshold: float) -> list[Box]:
    """Connected parts of the lesion mask with their sides; the score is the mean probability inside, surest first."""
    evidence = evidence_of(scan, probabilities, finding, threshold=threshold)
    lesion = probabilities[LESION]
    return sorted(
        (
            replace(box, score=_mean_inside(lesion, box.box_voxel, threshold))
            for measured in evidence.lesions.values()
            for box in boxes_of_measured(measured)
        ),
        key=lambda box: -(box.score or 0.0),
    )


def _mean_inside(lesion: np.ndarray, box_voxel: tuple[int, ...], threshold: float) -> float:
    z1, y1, x1, z2, y2, x2 = box_voxel
    inside = lesion[z1:z2, y1:y2, x1:x2]
    return float(inside[inside >= threshold].mean())
