"""Lesions that a segmentation draws, as boxes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from omnimri.models.boxes import Box
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import LESION
from omnimri.platform.language.evidence import boxes_of_measured
from omnimri.platform.language.outline import Probabilities, evidence_of


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
