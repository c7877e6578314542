"""The numbers of a summary: what each is called, how it is computed from records, and which of them decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from omnimri.models import metrics
from omnimri.models.vocabulary import TISSUES
from omnimri.platform.evaluation.cases import ABLATIONS, BLANK, CEILING, MASK_BOXES, MODEL, RIVALS, SHUFFLED

Table = Mapping[str, np.ndarray]
"""Columns of one method's records, row by row."""


@dataclass(frozen=True)
class Metric:
    """One number of the summary: how it is called, read and computed."""

    label: str
    compute: Callable[[Table], float]
    columns: tuple[str, ...]
    """Columns it reads; a record counts where all of them have a value."""
    definition: str
    unit: str = ""
    digits: int = 3
    higher_is_better: bool | None = True
    """None: neither."""
    undefined: str = "nothing to divide by in these volumes"
    """Why there is no value although there are cases."""


def _mean(column: str) -> Callable[[Table], float]:
    return lambda table: float(table[column].mean())


def _ratio(numerator: str, denominator: str, *, complement: bool = False) -> Callable[[Table], float]:
    def compute(table: Table) -> float:
        total = table[denominator].sum()
        if total == 0:
            return math.nan
        share = float(table[numerator].sum() / total)
        return 1 - share if complement else share

    return compute


def _f1(matched: str, predicted: str, reference: str) -> Callable[[Table], float]:
    def compute(table: Table) -> float:
        total = table[predicted].sum() + table[reference].sum()
        return float(2 * table[matched].sum() / total) if total else math.nan

    return compute


def _froc(false_positives: float) -> Callable[[Table], float]:
    def compute(table: Table) -> float:
        is_box = table["box_scores"] >= 0
        return metrics.froc_sensitivity(
            table["box_scores"][is_box], table["box_right"][is_box], num_reference=int(table["num_reference"].sum()),
            num_volumes=len(is_box), false_positives=false_positives,
        )  # fmt: skip

    return compute


def _calibration_error(column: str) -> Callable[[Table], float]:
    def compute(table: Table) -> float:
        is_box = table[column] >= 0
        return metrics.expected_calibration_error(table[column][is_box], table["box_right"][is_box])

    return compute


def _classes(score: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[Table], float]:
    return lambda table: score(table["truth"], table["probabilities"].argmax(axis=1))


def _dice(structure: str) -> Metric:
    column = f"dice_{structure.replace(' ', '_')}"
    return Metric(
        f"Dice, {structure}", _mean(column), (column,),
        "Overlap 2|A and B| / (|A| + |B|); a volume where both masks are empty is not scored, one empty scores 0.",
    )  # fmt: skip


_SECONDS = Metric(
    "Seconds", _mean("seconds"), ("seconds",), "Wall time per volume on the machine named below.", "s", 2, False
)

METRICS: dict[str, dict[str, Metric]] = {
    "reconstruct": {
        "psnr": Metric("PSNR", _mean("psnr"), ("psnr",), "Over the volume; peak: the target's maximum.", "dB", 2),
        "ssim": Metric("SSIM", _mean("ssim"), ("ssim",), "7x7 uniform window, per slice, data range of the volume."),
        "nmse": Metric("NMSE", _mean("nmse"), ("nmse",), "Squared error over squared target.", "", 4, False),
        "residual": Metric(
            "Data residual", _mean("residual"), ("residual",),
            "|A x - y| / |y| on the measured lines, coil maps from the centre lines; lower is closer to the data.",
            "", 3, None,
        ),
        "uncertainty_correlation": Metric(
            "Error follows uncertainty", _mean("uncertainty_correlation"), ("uncertainty_correlation",),
            "Spearman correlation of mean error and mean uncertainty over foreground squares of 8 x 8 voxels, the "
            "uncertainty by simulated acquisitions of the image; on some central slices (uncertainty_slices).",
        ),
        "uncertainty_ratio": Metric(
            "Uncertainty over error", _mean("uncertainty_ratio"), ("uncertainty_ratio",),
            "Root mean squares over the foreground of the same slices; one is calibrated, less is overconfident.",
            "", 2, None,
        ),
        "uncertainty_coverage": Metric(
            "Error below two uncertainties", _mean("uncertainty_coverage"), ("uncertainty_coverage",),
            "Share of foreground voxels of the same slices; 0.95 where errors are Gaussian and the map is calibrated.",
            "", 3, None,
        ),
        "seconds_per_slice": Metric(
            "Seconds per slice", _mean("seconds_per_slice"), ("seconds_per_slice",),
            "Wall time on the machine named below; for OmniMRI with its prompt and coil maps, for the others without.",
            "s", 3, False,
        ),
    },
    "segment": {
        "dice_tissues": Metric(
            "Dice, mean over tissues", _mean("dice_tissues"), ("dice_tissues",),
            "Mean over the tissues of a volume, then over volumes.",
        ),
        **{f"dice_{name.replace(' ', '_')}": _dice(name) for name in TISSUES},
        "dice_lesion": Metric(
            "Dice, lesion where present", _mean("dice_lesion"), ("dice_lesion",), "Volumes with a labelled lesion only."
        ),
        "lesion_false_alarm": Metric(
            "Lesion drawn where none is", _mean("lesion_false_alarm"), ("lesion_false_alarm",),
            "Share of lesion-free volumes with at least one voxel called lesion.", "", 3, False,
        ),
        "right_structure": Metric(
            "Structure asked for", _ratio("num_drawn_right", "num_drawn"), ("num_drawn",),
            "Of the structures that are there and got a mask, those that it overlaps more than any other, by Dice.",
            undefined="no mask was drawn",
        ),
        "seconds": _SECONDS,
    },
    "detect": {
        "sensitivity": Metric(
            "Sensitivity", _ratio("matched", "num_reference"), ("matched", "num_reference"),
            "Reference boxes found, all volumes pooled; greedy matching, label not considered.",
            undefined="no box in the reference",
        ),
        "sensitivity_1fp": Metric(
            "Sensitivity at 1 false box per volume", _froc(1.0), ("num_candidates",),
            "FROC: reference boxes found by candidates above the lowest score that keeps to one false box per volume "
            "on average. Candidates of OmniMRI are the boxes of the greedy and of drawn answers, without those that "
            "overlap a surer one; of a specialist all its boxes.",
            undefined="no box in the reference",
        ),
        "precision": Metric(
            "Precision", _ratio("matched", "num_predicted"), ("matched", "num_predicted"),
            "Predicted boxes that found a reference box.",
            undefined="no box was predicted",
        ),
        "sensitivity_label": Metric(
            "Sensitivity, right label", _ratio("matched_label", "num_reference"), ("matched_label", "num_reference"),
            "Reference boxes found by a box of the same label.",
            undefined="no box in the reference",
        ),
        "false_positives": Metric(
            "False boxes per volume", _mean("false_positives"), ("false_positives",), "", "", 2, False
        ),
        "best_iou": Metric(
            "Best IoU", _mean("best_iou"), ("best_iou",),
            "Largest overlap per reference box, mean over boxes, then volumes."
        ),
        "side_accuracy": Metric(
            "Side accuracy", _mean("side_correct"), ("side_correct",),
            "Volumes with a lesion whose largest predicted box names the side of the largest reference box.",
        ),
        "ece_raw": Metric(
            "ECE, probability of a box's tokens", _calibration_error("box_raw"), ("num_candidates",),
            "Expected calibration error of the candidates, 10 bins, before calibration.", "", 3, False,
            undefined="no candidate",
        ),
        "ece": Metric(
            "ECE, calibrated score", _calibration_error("box_scores"), ("num_calibrated",),
            "As above after calibration on the tuning split (detection.json of the checkpoint).", "", 3, False,
            undefined="no candidate",
        ),
        "parse_rate": Metric("Readable answers", _mean("parsed"), ("parsed",), "Answers that follow the box format."),
        "seconds": _SECONDS,
    },
    "diagnose": {
        "accuracy": Metric("Accuracy", _classes(metrics.accuracy), ("truth",), "Most probable answer is right."),
        "balanced_accuracy": Metric(
            "Balanced accuracy", _classes(metrics.balanced_accuracy), ("truth",),
            "Mean recall over the diagnoses that occur.",
        ),
        "macro_auroc": Metric(
            "Macro AUROC", lambda table: metrics.macro_auroc(table["truth"], table["probabilities"]), ("truth",),
            "One against the rest, mean over the diagnoses that occur, from the probabilities of the answers.",
        ),
        "seconds": _SECONDS,
    },
    "report": {
        "label_f1": Metric(
            "Label F1", _f1("matched", "predicted", "reference"), ("matched",),
            "Finding and side, read from both texts by one negation-aware labeller, all reports pooled.",
            undefined="no finding in either text",
        ),
        "label_precision": Metric("Label precision", _ratio("matched", "predicted"), ("matched",), "As above.",
            undefined="no finding was asserted",
        ),
        "label_recall": Metric("Label recall", _ratio("matched", "reference"), ("matched",), "As above.",
            undefined="no finding in the reference",
        ),
        "finding_f1": Metric(
            "Finding F1", _f1("supported_findings", "predicted_findings", "reference_findings"), ("matched",),
            "Kind of finding, whatever its side.",
            undefined="no finding in either text",
        ),
        "hallucination_rate": Metric(
            "Hallucination rate", _ratio("supported_findings", "predicted_findings", complement=True), ("matched",),
            "Findings asserted without support in the reference, of all findings asserted.", "", 3, False,
            undefined="no finding was asserted",
        ),
        "omission_rate": Metric(
            "Omission rate", _ratio("supported_findings", "reference_findings", complement=True), ("matched",),
            "Findings of the reference that the report does not assert.", "", 3, False,
            undefined="no finding in the reference",
        ),
        "same_labels": Metric(
            "Reports with the same labels", _mean("agrees"), ("agrees",), "Including those rightly without findings."
        ),
        "cleared": Metric(
            "Normal reports kept normal", _mean("cleared"), ("cleared",),
            "Volumes whose reference tells of no finding and whose report asserts none.",
        ),
        "bleu4": Metric("BLEU-4", _mean("bleu4"), ("bleu4",), "sacrebleu, sentence level."),
        "rouge_l": Metric("ROUGE-L", _mean("rouge_l"), ("rouge_l",), "rouge-score, F-measure."),
        "seconds": _SECONDS,
    },
}  # fmt: skip

HEADLINE = {
    "reconstruct": ("psnr", "ssim"),
    "segment": ("dice_tissues", "dice_lesion"),
    "detect": ("sensitivity", "precision", "sensitivity_1fp", "ece_raw", "ece"),
    "diagnose": ("balanced_accuracy", "macro_auroc"),
    "report": ("label_f1", "hallucination_rate"),
}
"""Metrics of the first table; the first of each decides the verdict and the subgroups."""

QUALITY = {
    "reconstruct": ("psnr", "ssim"),
    "segment": ("dice_tissues", "dice_lesion", "lesion_false_alarm", "right_structure"),
    "detect": ("sensitivity_1fp", "side_accuracy"),
    "diagnose": ("macro_auroc",),
    "report": ("finding_f1", "hallucination_rate", "omission_rate", "cleared"),
}
"""Metrics on which the model is compared with specialists."""

SUBGROUP_METRIC = {name: chosen[0] for name, chosen in HEADLINE.items()} | {"diagnose": "accuracy"}
"""Balanced accuracy means little in a group that holds one diagnosis."""

METHOD_LABELS = {
    MODEL: "OmniMRI",
    BLANK: "OmniMRI on a blank image",
    SHUFFLED: "OmniMRI on another patient's image",
    MASK_BOXES: "OmniMRI's lesions as boxes",
    **{name: f"OmniMRI {what}" for name, what in ABLATIONS.items()},
    **RIVALS,
    "zero_filled": "Zero-filled, coil maps",
    "zero_filled_rss": "Zero-filled, root sum of squares",
    "cg_sense": "CG-SENSE, tuned",
    "l1_wavelet": "L1-wavelet, tuned",
    "total_variation": "Total variation, tuned",
    CEILING: "Ceiling: all lines, same coil maps",
    "majority_class": "Commonest diagnosis in training",
}

NOT_APPLICABLE = {
    (name, "residual"): "a magnitude has no phase, so no k-space follows from it"
    for name in ("zero_filled_rss", "recon_unet", "varnet")
} | {
    (name, metric): reason
    for metric, reason in (("ece_raw", "its boxes are not made of tokens"), ("ece", "its scores are not calibrated"))
    for name in ("segment_boxes", MASK_BOXES)
}
"""Why a method has no value of a metric."""
