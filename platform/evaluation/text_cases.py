"""Scoring one volume on the text tasks: detection, diagnosis and report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from omnimri.models import metrics
from omnimri.models.boxes import Box
from omnimri.models.decoding import TextAnswer
from omnimri.models.prompts import diagnosis_choices, instruction_for
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import DIAGNOSES, LESION, TISSUES
from omnimri.platform.data.shards import row_to_scan
from omnimri.platform.evaluation import baselines
from omnimri.platform.evaluation.cases import (
    MASK_BOXES,
    CaseContext,
    CaseResult,
    base_picture,
    lead_method,
    recorder,
    timed,
)
from omnimri.platform.evaluation.figures import orient_slice
from omnimri.platform.evaluation.image_cases import model_segmentation
from omnimri.platform.evaluation.mask_boxes import boxes_of
from omnimri.platform.evaluation.text import LEXICAL, ReportCounts, compare_reports, label_text, missing_package
from omnimri.platform.language.outline import drawn_outline, outline_instructions, outlined

MAX_CANDIDATES = 64
"""Of a volume, the surest ones."""


def detect_case(context: CaseContext, row: Mapping[str, Any]) -> CaseResult:
    """Boxes in the answer against the row's boxes."""
    record, scan, threshold = recorder(row, "detect"), row_to_scan(row), context.config.iou_threshold
    condition = f"iou_{threshold:g}"
    reference = reference_boxes(row)
    methods = context.methods(
        "detect",
        lambda seen: _model_boxes(context, seen, seen),
        lambda seen: _model_boxes(context, baselines.blank_scan(seen), seen),
    )
    if context.engine is not None and context.config.mask_boxes:
        methods[MASK_BOXES] = lambda seen: _mask_boxes(context, seen)
    records, answers = [], {}
    for method, detect in methods.items():
        found, seconds = timed(partial(detect, scan))
        found = found if isinstance(found, Detected) else Detected(boxes=found)
        answers[method] = found.boxes
        candidates = _candidates(context, found, scan)
        values = detection_values(reference, found.boxes, threshold) | {"seconds": seconds}
        if candidates is not None:
            is_calibrated = found.answer is not None and context.engine.detection.calibration is not None
            values |= box_table(candidates, reference, threshold, is_calibrated=is_calibrated)
        texts = {"reference": reference, "predicted": found.boxes or [], "candidates": candidates or []}
        listed = {name: [asdict(box) for box in boxes] for name, boxes in texts.items()}
        records.append(record(condition, method, values, answer=found.answer.text if found.answer else "", **listed))
    boxes = answers[lead_method(answers)]
    shown = _box_slice(reference or boxes or [], len(scan.image))
    picture = base_picture(scan.image, scan, shown, "image")
    picture |= _rectangles("reference", reference, shown, scan) | _rectangles("predicted", boxes or [], shown, scan)
    return CaseResult(records, picture)


def reference_boxes(row: Mapping[str, Any]) -> list[Box]:
    """Boxes that a row is annotated with."""
    return [
        Box(label=box["label"], side=box["side"], box_voxel=tuple(int(v) for v in box["box_voxel"]))
        for box in row["boxes"]
    ]


@dataclass(frozen=True)
class Detected:
    """What a method found in one volume."""

    boxes: list[Box] | None
    """None: the answer cannot be read."""
    answer: TextAnswer | None = None
    """Of the model; a specialist writes none."""
    prompt: Any = None
    """What the model was shown."""


def _model_boxes(context: CaseContext, seen: Scan, scan: Scan) -> Detected:
    """The greedy answer to `seen` and its boxes on the grid of `scan`."""
    prompt = _prompt(context, seen, "detect")
    answer = _answer(context, prompt)
    try:
        return Detected(context.engine.boxes(answer, scan), answer, prompt)
    except ValueError:  # counted as `parsed` = 0
        return Detected(None, answer, prompt)


def _mask_boxes(context: CaseContext, scan: Scan) -> list[Box]:
    """Boxes around the lesions that the model draws."""
    found = model_segmentation(context, scan, (*TISSUES, LESION))
    return boxes_of(scan, found.probabilities, LESION, threshold=0.5)


def _candidates(context: CaseContext, found: Detected, scan: Scan) -> list[Box] | None:
    """Boxes for every point of operation: of the model's greedy and drawn answers, or all that a specialist found.

    None where no answers are drawn.
    """
    config, engine = context.config, context.engine
    if found.answer is None:
        return found.boxes
    if not config.box_samples:
        return None
    drawn = engine.sample_texts(
        found.prompt, config.box_samples, max_new_tokens=config.max_new_tokens, seed=config.seed
    )
    return list(engine.candidates([found.answer, *drawn], scan))


def box_table(
    boxes: list[Box], reference: list[Box], iou_threshold: float, *, is_calibrated: bool = False
) -> dict[str, Any]:
    """Scores of the surest candidates and whether each is right, padded with -1 to `MAX_CANDIDATES`.

    `box_raw` is the probability of a box's tokens, -1 where it is not made of any; `box_scores` the score;
    `num_calibrated` has a value where they differ.
    """
    surest = sorted(boxes, key=_score, reverse=True)[:MAX_CANDIDATES]
    found = {index for _, index in _matches(reference, surest, iou_threshold).pairs}
    padding = [-1.0] * (MAX_CANDIDATES - len(surest))
    return {
        "num_candidates": len(surest),
        "num_calibrated": len(surest) if is_calibrated else math.nan,
        "box_scores": [_score(box) for box in surest] + padding,
        "box_raw": [-1.0 if box.logprob is None else math.exp(box.logprob) for box in surest] + padding,
        "box_right": [float(index in found) for index in range(len(surest))] + padding,
    }


def _score(box: Box) -> float:
    return float(box.score or 0.0)


def _matches(reference: list[Box], boxes: list[Box], iou_threshold: float) -> metrics.DetectionMatch:
    scores = [_score(box) for box in boxes]
    return metrics.match_boxes(_corners(reference), _corners(boxes), iou_threshold=iou_threshold, scores=scores)


def detection_values(reference: list[Box], predicted: list[Box] | None, iou_threshold: float) -> dict[str, Any]:
    """Counts of one volume; boxes match whatever their label, and the label is scored on the matched ones.

    `side_correct`: whether the largest predicted box names the side of the largest reference box, where there is one;
    no box is a wrong side.
    """
    boxes = predicted or []
    match = _matches(reference, boxes, iou_threshold)
    overlap = metrics.box_iou(_corners(reference), _corners(boxes))
    largest = max(reference, key=_volume, default=None)
    guess = max(boxes, key=_volume, default=None)
    return {
        "matched": match.true_positives,
        "matched_label": sum(reference[r].label == boxes[p].label for r, p in match.pairs),
        "num_reference": match.num_reference,
        "num_predicted": match.num_predicted,
        "false_positives": match.false_positives,
        "best_iou": float(overlap.max(axis=1, initial=0.0).mean()) if reference else math.nan,
        "side_correct": math.nan if largest is None else float(guess is not None and guess.side == largest.side),
        "parsed": float(predicted is not None),
    }


def _corners(boxes: list[Box]) -> np.ndarray:
    return np.array([box.box_voxel for box in boxes], dtype=float).reshape(-1, 6)


def _volume(box: Box) -> int:
    z1, y1, x1, z2, y2, x2 = box.box_voxel
    return (z2 - z1) * (y2 - y1) * (x2 - x1)


def _shown(row: Mapping[str, Any]) -> int:
    """Slice to show of a row: through its largest box where it has one."""
    return _box_slice([Box(**box) for box in row["boxes"] or []], len(row["image"]))


def _box_slice(boxes: list[Box], num_slices: int) -> int:
    """Slice through the middle of the largest box; the middle of the volume without boxes."""
    largest = max(boxes, key=_volume, default=None)
    return num_slices // 2 if largest is None else (largest.box_voxel[0] + largest.box_voxel[3] - 1) // 2


def _rectangles(name: str, boxes: list[Box], shown: int, scan: Scan) -> dict[str, np.ndarray]:
    """Rectangles `(N, 4)` `[top, left, bottom, right]` on the oriented slice, and whether the slice cuts each box."""
    rectangles = np.zeros((len(boxes), 4))
    for index, box in enumerate(boxes):
        _, y1, x1, _, y2, x2 = box.box_voxel
        filled = np.zeros(scan.image.shape[1:], bool)
        filled[y1:y2, x1:x2] = True
        rows, columns = np.nonzero(orient_slice(filled, scan.affine).pixels)
        rectangles[index] = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    cut = np.array([box.box_voxel[0] <= shown < box.box_voxel[3] for box in boxes], dtype=bool)
    return {f"{name}_rectangles": rectangles, f"{name}_cut": cut}


def diagnose_case(context: CaseContext, row: Mapping[str, Any]) -> CaseResult:
    """Probabilities over the diagnoses against the row's class; the first known class where there are several."""
    known = [name for name in row["classes"] if name in DIAGNOSES]
    if not known:
        return CaseResult(skipped="none of its classes is a diagnosis of the vocabulary")
    record, scan, truth = recorder(row, "diagnose"), row_to_scan(row), DIAGNOSES.index(known[0])

    def values(probabilities: np.ndarray) -> dict[str, Any]:
        return {"truth": truth, "probabilities": [float(p) for p in probabilities],
                "truth_probability": float(probabilities[truth])}  # fmt: skip

    methods = context.methods(
        "diagnose",
        lambda seen: _model_probabilities(context, seen),
        lambda seen: _model_probabilities(context, baselines.blank_scan(seen)),
    )
    records = [record("volume", "majority_class", values(context.frequencies))]
    for method, diagnose in methods.items():
        probabilities, seconds = timed(partial(diagnose, scan))
        records.append(record("volume", method, values(probabilities) | {"seconds": seconds}))
    return CaseResult(records, base_picture(scan.image, scan, _shown(row), "image"))


def _model_probabilities(context: CaseContext, scan: Scan) -> np.ndarray:
    """Probabilities over DIAGNOSES."""
    prompt = _prompt(context, scan, "diagnose")
    return np.asarray(context.engine.score_choices(prompt, diagnosis_choices()), dtype=np.float64)


def report_case(context: CaseContext, row: Mapping[str, Any]) -> CaseResult:
    """Findings of the generated report against those of the row's report."""
    record, scan, reference = recorder(row, "report"), row_to_scan(row), row["report"]
    methods = context.methods(
        "report",
        lambda seen: _answer(context, _prompt(context, seen, "report")).readable,
        lambda seen: _answer(context, _prompt(context, baselines.blank_scan(seen), "report")).readable,
    )
    agreement = {"labeller_agrees": _labeller_agreement(row)}
    records = []
    for method, write in methods.items():
        answer, seconds = timed(partial(write, scan))
        values = report_values(reference, answer) | agreement | {"seconds": seconds}
        records.append(record("volume", method, values, reference=reference, answer=answer))
    return CaseResult(records, base_picture(scan.image, scan, _shown(row), "image"))


def report_values(reference: str, answer: str) -> dict[str, float]:
    """Label counts of one report, and the lexical scores whose package is installed."""
    counts = compare_reports(reference, answer)
    lexical = {name: math.nan if missing_package(name) else score(reference, answer) for name, score in LEXICAL.items()}
    cleared = math.nan if counts.reference else float(counts.predicted == 0)
    return asdict(counts) | {"agrees": float(counts.agrees), "cleared": cleared, "case_f1": _case_f1(counts)} | lexical


def _case_f1(counts: ReportCounts) -> float:
    """Label F1 of one report; two reports without findings agree perfectly. It orders the cases of the page."""
    total = counts.predicted + counts.reference
    return 2 * counts.matched / total if total else 1.0


def _labeller_agreement(row: Mapping[str, Any]) -> float:
    """Whether the labels read from the reference report are those of the row's boxes; NaN without boxes."""
    if row["boxes"] is None:
        return math.nan
    return float(label_text(row["report"]) == {(box["label"], box["side"]) for box in row["boxes"]})


def _prompt(context: CaseContext, scan: Scan, task: str) -> Any:
    """What the text decoder is given: the scan, and what the image decoder draws of it."""
    if context.config.outline:
        drawn = model_segmentation(context, scan, tuple(outline_instructions()))
        scan = outlined(scan, drawn_outline(scan, drawn.probabilities, context.engine.preprocess))
    return context.engine.encode(scan, instruction_for(task), task)


def _answer(context: CaseContext, prompt: Any) -> TextAnswer:
    """The greedy text answer."""
    answer: TextAnswer = context.engine.generate_text(
        prompt, max_new_tokens=context.config.max_new_tokens, temperature=0.0, seed=context.config.seed
    )
    return answer
