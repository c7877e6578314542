"""Calibration of box scores on held-out patients (Platt, 1999), kept in the checkpoint folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from omnimri.models.detection import Detection, PlattMap
from omnimri.platform.data.shards import RowRef, Shards, load_row
from omnimri.platform.evaluation import baselines
from omnimri.platform.evaluation.cases import MODEL
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.workers import Unit, score_units

SMALLEST = 1e-300
"""Raw probabilities below have no logarithm."""


def calibrate_boxes(
    model_dir: Path,
    shards: Shards,
    refs: Sequence[RowRef],
    config: EvaluateConfig,
    engine_loader: Callable[[Path], Any],
) -> list[str]:
    """Write `detection.json` to a checkpoint folder: labels of the training boxes, and the fit of the scores.

    Args:
        model_dir: Checkpoint folder.
        shards: The corpus.
        refs: Rows with boxes of the tuning split.
        config: Of the evaluation.
        engine_loader: Makes the engine from `model_dir` inside each worker.

    Returns:
        Notes on what was found.
    """
    labels = box_labels(shards)
    Detection(labels=labels).write(model_dir)  # The answers that are scored must be decoded under the labels.
    scores, right = _candidates(model_dir, refs, config, engine_loader)
    fit = fit_platt(scores, right, split=config.tuning_split, data_digest=shards.digest)
    Detection(labels=labels, calibration=fit).write(model_dir)
    where = f"{len(scores)} candidate boxes of {len(refs)} volumes of split {config.tuning_split!r}"
    if fit is None:
        return [f"detect: scores not calibrated: {int(right.sum())} of {where} are right, or the surer are not."]
    return [f"detect: scores calibrated on {where}, {fit.num_right} of them right (detection.json)."]


def box_labels(shards: Shards) -> tuple[str, ...]:
    """Labels of the boxes of the training split."""
    refs = shards.select(split="train", has_boxes=True).rows
    return tuple(sorted({box["label"] for ref in refs for box in load_row(ref, ("boxes",))["boxes"]}))


def _candidates(
    model_dir: Path, refs: Sequence[RowRef], config: EvaluateConfig, engine_loader: Callable[[Path], Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Raw scores `(N,)` of all candidates, and which of them are right."""
    if not refs:
        return np.zeros(0), np.zeros(0, bool)
    plain = dataclasses.replace(config, blank_tasks=(), mask_boxes=False)
    results = score_units(
        [Unit("detect", ref) for ref in refs], plain, model_dir=model_dir, engine_loader=engine_loader,
        settings={}, frequencies=baselines.class_frequencies({}),
    )  # fmt: skip
    records = [record for _, result, _ in results for record in result.records if record.method == MODEL]
    raw, right = (np.array([record.values[name] for record in records]).ravel() for name in ("box_raw", "box_right"))
    return raw[raw >= 0], right[raw >= 0] > 0


def fit_platt(scores: np.ndarray, right: np.ndarray, *, split: str, data_digest: str) -> PlattMap | None:
    """Logistic regression of right on the logarithm of the raw scores; None where it would not keep their order."""
    if len(np.unique(right)) < 2:
        return None
    logarithms = np.log(np.maximum(scores, SMALLEST))
    fit = LogisticRegression(C=1e3).fit(logarithms[:, None], right)
    if fit.coef_[0, 0] <= 0:
        return None
    return PlattMap(
        slope=float(fit.coef_[0, 0]), intercept=float(fit.intercept_[0]), num_boxes=len(scores),
        num_right=int(right.sum()), split=split, data_digest=data_digest,
    )  # fmt: skip
