"""The floor of a model that does not look: its answers about one patient held against the truth of another.

A shuffled answer is as plausible as a right one, which the answer to a blank image need not be; only looking at the
image tells them apart. It is made of the answers that are there, so it costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from omnimri.models.boxes import Box
from omnimri.platform.evaluation.cases import MODEL, SHUFFLED, Record
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.text_cases import box_table, detection_values, report_values


def shuffled(records: Sequence[Record], config: EvaluateConfig) -> list[Record]:
    """A record of SHUFFLED for each of the model on the text tasks; none of a task with a single patient."""
    tasks: dict[str, Callable[[Record, Record], dict[str, Any]]] = {
        "detect": lambda truth, other: _boxes_of_another(truth, other, config.iou_threshold),
        "diagnose": _probabilities_of_another,
        "report": lambda truth, other: report_values(truth.texts["reference"], other.texts["answer"]),
    }
    made = []
    for task, values in tasks.items():
        own = [record for record in records if (record.task, record.method) == (task, MODEL)]
        for record, other in _partners(own, config.seed):
            made.append(replace(record, method=SHUFFLED, values=values(record, other), texts={}))
    return made


def _partners(records: Sequence[Record], seed: int) -> list[tuple[Record, Record]]:
    """Each record with one of the next patient, the patients in an order that is drawn."""
    by_patient: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.row_id):
        by_patient.setdefault(record.patient_id, []).append(record)
    if len(by_patient) < 2:
        return []
    order = np.random.default_rng(seed).permutation(sorted(by_patient))
    following = dict(zip(order, np.roll(order, -1), strict=True))
    return [
        (record, by_patient[following[patient]][place % len(by_patient[following[patient]])])
        for patient, members in by_patient.items()
        for place, record in enumerate(members)
    ]


def _boxes_of_another(truth: Record, other: Record, iou_threshold: float) -> dict[str, Any]:
    reference, predicted, candidates = (
        [Box(**box) for box in record.texts[name]]
        for record, name in ((truth, "reference"), (other, "predicted"), (other, "candidates"))
    )
    values = detection_values(reference, predicted if other.values["parsed"] else None, iou_threshold)
    if "num_candidates" not in other.values:
        return values
    is_calibrated = math.isfinite(other.values["num_calibrated"])
    return values | box_table(candidates, reference, iou_threshold, is_calibrated=is_calibrated)


def _probabilities_of_another(truth: Record, other: Record) -> dict[str, Any]:
    index, probabilities = int(truth.values["truth"]), other.values["probabilities"]
    return {"truth": index, "probabilities": probabilities, "truth_probability": probabilities[index]}
