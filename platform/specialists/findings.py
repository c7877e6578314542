"""Boxes and a report from what the segmentation and diagnosis specialists found.

Nothing is trained here: the lesions that the U-Net draws are the boxes, the classifier names them, and the report is
the one that `language.reports` makes of labels, here of predicted ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from omnimri.models.boxes import Box
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import DIAGNOSES, FINDINGS, LESION, NORMAL
from omnimri.platform.evaluation.mask_boxes import boxes_of
from omnimri.platform.evaluation.measures import METRICS
from omnimri.platform.evaluation.text_cases import box_table
from omnimri.platform.language.outline import Probabilities, evidence_of
from omnimri.platform.language.reports import derived_report

FINDING_OF = dict(zip(DIAGNOSES[1:], FINDINGS, strict=True))
"""The finding behind each diagnosis."""
THRESHOLDS = (0.1, 0.2, 0.35, 0.5, 0.65)
"""Probabilities tried as the edge of a lesion; the best on the validation split is kept."""


def finding_of(diagnoses: np.ndarray | None) -> str:
    """The most probable finding of probabilities `(K,)` over DIAGNOSES, normal left out; `lesion` without any."""
    if diagnoses is None:
        return LESION
    diseases = np.where(np.array(DIAGNOSES) == NORMAL, -1.0, diagnoses)
    return FINDING_OF[DIAGNOSES[int(diseases.argmax())]]


@dataclass(frozen=True)
class Detector:
    """Boxes from a segmenter and, where there is one, a classifier."""

    probabilities: Callable[[Scan], Probabilities]
    diagnose: Callable[[Scan], np.ndarray] | None
    threshold: float

    def __call__(self, scan: Scan) -> list[Box]:
        finding = finding_of(self.diagnose(scan) if self.diagnose else None)
        return boxes_of(scan, self.probabilities(scan), finding, threshold=self.threshold)


@dataclass(frozen=True)
class Reporter:
    """The report of a predicted label map: the classifier decides what is said, the segmenter where it is."""

    probabilities: Callable[[Scan], Probabilities]
    diagnose: Callable[[Scan], np.ndarray]
    threshold: float

    def __call__(self, scan: Scan) -> str:
        diagnoses = self.diagnose(scan)
        diagnosis = DIAGNOSES[int(diagnoses.argmax())]
        found = dict(self.probabilities(scan))
        if diagnosis == NORMAL:
            found[LESION] = np.zeros_like(found[LESION])
        evidence = evidence_of(scan, found, finding_of(diagnoses), threshold=self.threshold, classes=[diagnosis])
        report = derived_report(evidence)
        return report[0] if report else ""


Case = tuple[Scan, Probabilities, list[Box]]
"""A scan, what the segmenter says of it, and its reference boxes."""


def best_threshold(cases: Sequence[Case], iou_threshold: float) -> float:
    """The edge of a lesion with the highest sensitivity at one false box per volume; 0.5 without cases or boxes.

    Args:
        cases: Of the validation split.
        iou_threshold: Overlap from which a box is found.
    """
    scores = {threshold: _sensitivity(cases, threshold, iou_threshold) for threshold in THRESHOLDS}
    if all(np.isnan(score) for score in scores.values()):
        return 0.5
    return max(THRESHOLDS, key=lambda threshold: (scores[threshold], -abs(threshold - 0.5)))


def _sensitivity(cases: Sequence[Case], threshold: float, iou_threshold: float) -> float:
    """As the evaluation scores it."""
    rows = [
        box_table(boxes_of(scan, probabilities, LESION, threshold=threshold), reference, iou_threshold)
        | {"num_reference": len(reference)}
        for scan, probabilities, reference in cases
    ]
    if not rows:
        return float("nan")
    return METRICS["detect"]["sensitivity_1fp"].compute(
        {name: np.array([row[name] for row in rows]) for name in rows[0]}
    )
