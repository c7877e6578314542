"""Scoring one volume on the image tasks: reconstruction beside its baselines, and segmentation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from omnimri.models import metrics, physics
from omnimri.models.prompts import instruction_for
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import FINDINGS, LESION, TISSUES, structure_of
from omnimri.platform.data.labels import structure_mask
from omnimri.platform.data.shards import row_to_scan
from omnimri.platform.evaluation import baselines
from omnimri.platform.evaluation.baselines import Acquisition, SenseSetting
from omnimri.platform.evaluation.cases import (
    CEILING,
    MODEL,
    CaseContext,
    CaseResult,
    base_picture,
    lead_method,
    recorder,
    timed,
)
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.figures import orient_slice

if TYPE_CHECKING:
    from omnimri.models.engine import Segmentation


def reconstruct_case(context: CaseContext, row: Mapping[str, Any]) -> CaseResult:
    """Every method at every acceleration against the image of all lines."""
    if row["mask"] is not None and not row["mask"].all():
        return CaseResult(skipped="acquired undersampled, so there is no fully sampled reference")
    config, record = context.config, recorder(row, "reconstruct")
    whole = row_to_scan(row)
    scan = baselines.central_slices(whole, config.max_slices)
    target = baselines.reference_magnitude(scan, config.reference)
    first = (len(whole.image) - len(target)) // 2
    shown = _lesion_slice(row, first, len(target))
    records, picture = [], base_picture(target, scan, shown, "target")
    picture["slice"] = np.array([first + shown, len(whole.image)])
    for acceleration, acquisition in acquisitions(config, scan, row["row_id"]):
        for method, reconstruct in _reconstructions(context, scan, acceleration).items():
            started = time.perf_counter()
            magnitude, residual = reconstruct(acquisition)
            seconds = (time.perf_counter() - started) / len(target)
            values = reconstruction_values(target, magnitude) | {"residual": residual, "seconds_per_slice": seconds}
            if method == MODEL and config.uncertainty_samples:
                values |= _uncertainty_values(context, scan, acquisition.mask)
            records.append(record(f"{acceleration}x", method, values))
            picture[f"{acceleration}x_{method}"] = orient_slice(magnitude[shown], scan.affine).pixels
    return CaseResult(records, picture)


def acquisitions(config: EvaluateConfig, scan: Scan, row_id: str) -> Iterator[tuple[int, Acquisition]]:
    """Every acceleration with the scan undersampled at it."""
    for acceleration, center_fraction in config.conditions:
        mask = baselines.case_mask(
            scan, row_id, acceleration=acceleration, center_fraction=center_fraction,
            kind=config.mask_kind, seed=config.seed,
        )  # fmt: skip
        yield acceleration, baselines.acquire(scan, mask, config.sens_maps)


Reconstruct = Callable[[Acquisition], tuple[np.ndarray, float]]


def _reconstructions(context: CaseContext, scan: Scan, acceleration: int) -> dict[str, Reconstruct]:
    """Every method, as a function from an acquisition to magnitude and data residual."""
    methods: dict[str, Reconstruct] = {
        "zero_filled": lambda acquisition: _with_residual(baselines.zero_filled(acquisition), acquisition),
        # The magnitude without coil maps is not an image the forward model can be applied to.
        "zero_filled_rss": lambda acquisition: (acquisition.scan.image, float("nan")),
        **{
            method: partial(_iterative, baselines.ITERATIVE[method], settings[acceleration])
            for method, settings in context.settings.items()
        },
    }
    if context.config.reference == "rss":
        methods[CEILING] = lambda acquisition: _with_residual(baselines.fully_sampled(scan, acquisition), acquisition)
    for name, rival in context.rivals.get("reconstruct", {}).items():
        methods[name] = partial(_rival_reconstruction, rival)
    if context.engine is not None:
        methods[MODEL] = lambda acquisition: _model_reconstruction(context, acquisition)
    return methods


def _rival_reconstruction(
    rival: Callable[[Acquisition], torch.Tensor], acquisition: Acquisition
) -> tuple[np.ndarray, float]:
    return _with_residual(rival(acquisition), acquisition)


def _iterative(
    method: Callable[[Acquisition, SenseSetting], torch.Tensor], setting: SenseSetting, acquisition: Acquisition
) -> tuple[np.ndarray, float]:
    return _with_residual(method(acquisition, setting), acquisition)


def _model_reconstruction(context: CaseContext, acquisition: Acquisition) -> tuple[np.ndarray, float]:
    prompt = context.engine.encode(acquisition.scan, instruction_for("reconstruct"), "reconstruct")
    result = context.engine.reconstruct(
        acquisition.scan, prompt, num_steps=context.config.reconstruct_steps, seed=context.config.seed
    )
    return _with_residual(torch.from_numpy(np.asarray(result.image)), acquisition)


def _uncertainty_values(context: CaseContext, scan: Scan, mask: np.ndarray) -> dict[str, float]:
    """The model's uncertainty against its error, on the central slices."""
    config = context.config
    part = baselines.central_slices(scan, config.uncertainty_slices)
    acquired = baselines.acquire(part, mask, config.sens_maps).scan
    result = context.engine.reconstruct(
        acquired, context.engine.encode(acquired, instruction_for("reconstruct"), "reconstruct"),
        num_steps=config.reconstruct_steps, seed=config.seed, num_samples=config.uncertainty_samples,
    )  # fmt: skip
    return metrics.uncertainty_scores(
        baselines.reference_magnitude(part, config.reference),
        np.abs(np.asarray(result.image)),
        np.asarray(result.uncertainty),
    )


def _with_residual(image: torch.Tensor, acquisition: Acquisition) -> tuple[np.ndarray, float]:
    """Magnitude, and how far the complex image is from the measured lines, for all methods by one forward model.

    A magnitude without phase has no residual: NaN.
    """
    if not image.is_complex():
        return image.numpy(), math.nan
    per_slice = physics.relative_residual(image, acquisition.kspace, acquisition.operator)
    energy = acquisition.kspace.abs().square().sum(dim=(1, 2, 3))
    residual = ((per_slice.square() * energy).sum() / energy.sum().clamp_min(1e-12)).sqrt()
    return image.abs().numpy(), float(residual)


def reconstruction_values(target: np.ndarray, magnitude: np.ndarray) -> dict[str, float]:
    """PSNR, SSIM and NMSE of a magnitude `(Z, Y, X)`."""
    return {
        "psnr": metrics.psnr(target, magnitude),
        "ssim": metrics.ssim(target, magnitude),
        "nmse": metrics.nmse(target, magnitude),
    }


def _lesion_slice(row: Mapping[str, Any], first: int, num_slices: int) -> int:
    """Slice of the scored ones to show: the largest section of a lesion where it is labelled, else the middle one."""
    if row["label_map"] is None:
        return num_slices // 2
    lesion = lesion_mask(row["label_map"], row["label_names"])[first : first + num_slices]
    return largest_section(lesion, num_slices // 2)


def lesion_mask(label_map: np.ndarray, label_names: Mapping[int, str]) -> np.ndarray:
    """Union of all findings of a label map, bool of the same shape."""
    return np.isin(label_map, [value for value, name in label_names.items() if _is_finding(name)])


def _is_finding(label: str) -> bool:
    return structure_of(label) in (*FINDINGS, LESION)


def reference_masks(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Mask per structure that the row is annotated for.

    A tissue is annotated where the label names list it. Lesions are annotated where the names list a finding, or the
    row carries an empty list of boxes (looked for, none there); boxes alone do not outline a lesion.
    """
    names = row["label_names"]
    tissues = {structure_of(name) for name in names.values()} & set(TISSUES)
    masks = {name: structure_mask(row["label_map"], names, name) for name in TISSUES if name in tissues}
    if row.get("boxes") == [] or any(map(_is_finding, names.values())):
        masks[LESION] = lesion_mask(row["label_map"], names)
    return masks


def largest_section(mask: np.ndarray, default: int) -> int:
    """Index of the slice with the most voxels of a mask `(Z, Y, X)`; `default` for an empty mask."""
    areas = mask.sum(axis=(1, 2))
    return int(areas.argmax()) if areas.any() else default


def segment_case(context: CaseContext, row: Mapping[str, Any]) -> CaseResult:
    """Masks of every structure that the row is annotated for, each asked for by its own instruction."""
    masks = reference_masks(row)
    if not masks:
        return CaseResult(skipped="its label map names no structure of the vocabulary")
    record, scan = recorder(row, "segment"), row_to_scan(row)
    methods = context.methods(
        "segment",
        lambda seen, names: _model_masks(context, seen, names),
        lambda seen, names: _model_masks(context, baselines.blank_scan(seen), names),
    )
    records, answers = [], {}
    for method, segment in methods.items():
        answers[method], seconds = timed(partial(segment, scan, list(masks)))
        records.append(record("volume", method, segmentation_values(masks, answers[method]) | {"seconds": seconds}))
    predicted = answers[lead_method(answers)]
    tissue = np.any([mask for name, mask in masks.items() if name != LESION] or [scan.image > 0], axis=0)
    shown = largest_section(masks.get(LESION, np.zeros_like(tissue)), largest_section(tissue, len(tissue) // 2))
    picture = base_picture(scan.image, scan, shown, "image")
    for name, mask in masks.items():
        picture[f"reference_{name}"] = orient_slice(mask[shown], scan.affine).pixels
        picture[f"predicted_{name}"] = orient_slice(predicted[name][shown], scan.affine).pixels
    return CaseResult(records, picture)


def model_segmentation(context: CaseContext, scan: Scan, structures: Sequence[str]) -> Segmentation:
    """The model's answer to a prompt for each structure."""
    prompts = {
        name: context.engine.encode(scan, instruction_for("segment", structure=name), "segment") for name in structures
    }
    answer: Segmentation = context.engine.segment(scan, prompts, num_steps=context.config.segment_steps)
    return answer


def _model_masks(context: CaseContext, scan: Scan, structures: Sequence[str]) -> dict[str, np.ndarray]:
    answer = model_segmentation(context, scan, structures)
    return {name: np.asarray(answer.masks[name], dtype=bool) for name in structures}


def segmentation_values(reference: Mapping[str, np.ndarray], predicted: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Dice per structure and its mean over tissues; lesions by presence, because most volumes have none.

    `dice_lesion` is scored where the reference holds a lesion; `lesion_false_alarm` is 1 or 0 where it holds none.
    Of the structures that are there and got a mask (`num_drawn`), `num_drawn_right` are overlapped more by their mask
    than any other structure is.
    """
    scores = {name: metrics.dice(mask, predicted[name]) for name, mask in reference.items()}
    tissues = [scores[name] for name in TISSUES if name in scores and not math.isnan(scores[name])]
    values = {f"dice_{name.replace(' ', '_')}": scores.get(name, math.nan) for name in TISSUES}
    present = LESION in reference and bool(reference[LESION].any())
    healthy = LESION in reference and not present
    drawn = [name for name, mask in reference.items() if mask.any() and predicted[name].any()]
    return values | {
        "dice_tissues": float(np.mean(tissues)) if tissues else math.nan,
        "dice_lesion": scores[LESION] if present else math.nan,
        "lesion_false_alarm": float(predicted[LESION].any()) if healthy else math.nan,
        "num_drawn": len(drawn),
        "num_drawn_right": sum(_overlapped_most(reference, predicted[name]) == name for name in drawn),
    }


def _overlapped_most(reference: Mapping[str, np.ndarray], mask: np.ndarray) -> str:
    """The structure of a reference that a mask is most like, by Dice."""
    return max((name for name in reference if reference[name].any()), key=lambda n: metrics.dice(reference[n], mask))
