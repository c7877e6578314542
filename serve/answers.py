"""From arrays and text to the parts of an answer: files, measurements, findings. No Ray, no HTTP."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np

from omnimri.models.boxes import BoxCoder, text_to_boxes
from omnimri.models.geometry import voxel_box_to_mm
from omnimri.models.preprocess import Preprocess
from omnimri.models.prompts import instruction_for, structures_of, untagged
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import DIAGNOSES, RESEARCH_NOTICE, STRUCTURES, TISSUES
from omnimri.serve.intake import Intake
from omnimri.serve.pictures import contact_sheet
from omnimri.serve.schemas import Finding, Measurement, RequestError

MM3_PER_ML = 1000.0


def nifti_bytes(array: np.ndarray, affine: np.ndarray) -> bytes:
    """A gzipped NIfTI-1 of `(Z, Y, X)` on its native grid, with the affine as sform and qform in scanner space."""
    image = nib.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = f"OmniMRI. {RESEARCH_NOTICE}".encode()
    return gzip.compress(image.to_bytes(), compresslevel=6)


def reconstruction_files(scan: Scan, result: dict[str, Any]) -> dict[str, bytes]:
    """Magnitude volume, its contact sheet, the zero-filled sheet beside it, and the uncertainty where sampled."""
    files = {
        "reconstruction.nii.gz": nifti_bytes(result["magnitude"].astype(np.float32), scan.affine),
        "preview.png": contact_sheet(result["magnitude"], scan.affine),
        "zero_filled.png": contact_sheet(scan.image, scan.affine),
    }
    if result["uncertainty"] is not None:
        files["uncertainty.nii.gz"] = nifti_bytes(result["uncertainty"].astype(np.float32), scan.affine)
    return files


def reconstruction_measurements(scan: Scan, result: dict[str, Any]) -> list[Measurement]:
    """How far the image is from what was measured, and how much was measured."""
    numbers = [Measurement(name="residual", value=result["residual"], unit="1")]
    if scan.mask is not None:
        numbers.append(Measurement(name="acceleration", value=scan.mask.size / max(int(scan.mask.sum()), 1), unit="1"))
    return numbers


def label_map(masks: dict[str, np.ndarray], probabilities: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[int, str]]:
    """One uint8 map `(Z, Y, X)` of several masks: 0 is background, overlaps go to the most probable structure.

    Returns:
        The map, and the name of each of its values in the order of `masks`.
    """
    names = dict(enumerate(masks, start=1))
    shape = next(iter(masks.values())).shape
    labels, best = np.zeros(shape, np.uint8), np.full(shape, -np.inf, np.float32)
    for value, name in names.items():
        wins = masks[name] & (probabilities[name] > best)
        labels[wins] = value
        best[wins] = probabilities[name][wins]
    return labels, names


def segmentation_files(scan: Scan, labels: np.ndarray, names: dict[int, str]) -> dict[str, bytes]:
    """The label map on the native grid, and its overlay."""
    return {
        "masks.nii.gz": nifti_bytes(labels, scan.affine),
        "overlay.png": contact_sheet(scan.image, scan.affine, labels=labels, names=names),
    }


def segmentation_measurements(scan: Scan, labels: np.ndarray, names: dict[int, str]) -> list[Measurement]:
    """Volume of every structure in mL."""
    voxel_ml = abs(float(np.linalg.det(scan.affine[:3, :3]))) / MM3_PER_ML
    counts = np.bincount(labels.ravel(), minlength=len(names) + 1)
    return [
        Measurement(name="volume", label=name, label_value=value, value=float(counts[value]) * voxel_ml, unit="mL")
        for value, name in names.items()
    ]


def findings(scan: Scan, preprocess: Preprocess, result: dict[str, Any]) -> list[Finding]:
    """Boxes of a detection answer on the native grid, each with its own score.

    Raises:
        ValueError: If the text is not a detection answer.
    """
    boxes = text_to_boxes(result["text"], BoxCoder(scan, preprocess))
    return [
        Finding(
            label=box.label,
            side=box.side,
            box_voxel=list(box.box_voxel),
            box_mm=voxel_box_to_mm(list(box.box_voxel), scan.affine),
            score=score,
            calibrated=result["calibrated"],
        )
        for box, score in zip(boxes, result["box_scores"], strict=True)
    ]


def choice_measurements(labels: Sequence[str], scores: Sequence[float]) -> list[Measurement]:
    """Probability of every closed answer."""
    return [
        Measurement(name="probability", label=label, value=float(score), unit="1")
        for label, score in zip(labels, scores, strict=True)
    ]


@dataclass
class Draft:
    """What a task contributes to its answer."""

    instruction: str
    warnings: list[str]
    text: str | None = None
    findings: list | None = None
    measurements: list | None = None
    files: dict[str, bytes] | None = None


def wanted_structures(structures: str | None, instruction: str | None) -> list[str]:
    """Structures by the field, else those the instruction names, else the tissues.

    Raises:
        RequestError: 422 for a structure the model does not know.
    """
    if structures is None:
        return (structures_of(instruction) if instruction else []) or list(TISSUES)
    wanted = list(dict.fromkeys(name.strip().lower() for name in structures.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in STRUCTURES]
    if unknown or not wanted:
        raise RequestError(
            422, "unknown_structure", f"structures={structures!r} is not known; known: {', '.join(STRUCTURES)}."
        )
    return wanted


def structure_instructions(structures: list[str], instruction: str | None) -> dict[str, str]:
    """One sentence per structure: the caller's own where it is about one structure only."""
    if instruction is not None and len(structures) == 1:
        return {structures[0]: instruction}
    return {name: instruction_for("segment", structure=name) for name in structures}


def reconstruction_draft(intake: Intake, instruction: str, result: dict[str, Any]) -> Draft:
    """The answer to `reconstruct` from what the image deployment returned."""
    return Draft(
        instruction,
        [*intake.warnings, *result["warnings"]],
        measurements=reconstruction_measurements(intake.scan, result),
        files=reconstruction_files(intake.scan, result),
    )


def segmentation_draft(intake: Intake, instruction: str, result: dict[str, Any]) -> Draft:
    """The answer to `segment` from what the image deployment returned."""
    scan = intake.scan
    labels, names = label_map(result["masks"], result["probabilities"])
    return Draft(
        instruction,
        [*intake.warnings, *result["warnings"]],
        measurements=segmentation_measurements(scan, labels, names),
        files=segmentation_files(scan, labels, names),
    )


def text_draft(task: str, intake: Intake, instruction: str, result: dict[str, Any], preprocess: Preprocess) -> Draft:
    """The answer to a text task from what the text deployment returned."""
    draft = Draft(instruction, [*intake.warnings, *result["warnings"]], text=untagged(result["text"]))
    if task == "detect":
        try:
            draft.findings = findings(intake.scan, preprocess, result)
        except ValueError:
            draft.findings = []
            draft.warnings.append("The model's answer is no list of boxes, so it names no finding; see text.")
    if result["scores"]:
        draft.measurements = choice_measurements(DIAGNOSES, result["scores"])
    return draft
