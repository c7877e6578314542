"""What scoring one volume on one task takes and gives, shared by the image and the text tasks.

The scoring functions take one loaded row and return plain numbers and one slice of pictures; they know nothing of Ray
or of the other volumes. A value that a case does not have is NaN.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from omnimri.models.scan import Scan
from omnimri.platform.data.schema import FACTS
from omnimri.platform.evaluation.baselines import SenseSetting
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.figures import orient_slice

MODEL = "omnimri"
BLANK = "blank_image"
SHUFFLED = "shuffled_image"
MASK_BOXES = "mask_boxes"
"""The same model, but the image decoder answers: boxes around the lesions that it draws."""
CEILING = "fully_sampled"
"""Not a rival: the best that any reconstruction with the same coil maps could reach."""
RIVALS = {
    "recon_unet": "U-Net",
    "varnet": "VarNet",
    "segment_unet": "U-Net",
    "segment_boxes": "U-Net's lesions as boxes",
    "classifier": "CNN classifier",
    "template": "Template from classifier and U-Net",
}
"""Specialists of `omnimri benchmark quality` and how they are called; see `omnimri.platform.specialists`."""
ABLATIONS = {
    "without_vision": "without stage 1, a new encoder",
    "without_align": "without stage 2",
    "without_multimodal": "without stage 3",
    "dense": "dense, of the size that is active",
}
"""Variants of `omnimri benchmark ablation` and how they are called; see `omnimri.platform.benchmark.ablation`."""
SUBGROUP_FACTS = ("vendor", "field_strength_t", "sex", "age_years", "contrast")

ANNOTATION = {
    "reconstruct": ("kspace", "mask", "label_map", "label_names"),
    "segment": ("label_map", "label_names", "boxes"),
    "detect": ("boxes",),
    "diagnose": ("classes", "boxes"),
    "report": ("report", "boxes"),
}
"""Columns that each task reads besides the scan."""


def columns_of(task: str) -> tuple[str, ...]:
    """Columns of a row that a task needs, so that nothing else is read."""
    return ("row_id", "patient_id", "image", "affine", "spacing_mm", "shape", *FACTS, *ANNOTATION[task])


@dataclass(frozen=True, kw_only=True)
class Record:
    """The numbers of one method on one volume under one condition."""

    task: str
    condition: str
    method: str
    row_id: str
    patient_id: str
    facts: dict[str, str | float | None]
    values: dict[str, Any]
    """Number, or list of numbers, per column; NaN where this case has none."""
    texts: dict[str, Any] = field(default_factory=dict)
    """Reference and answer of text tasks, for the page."""

    def as_json(self) -> dict[str, Any]:
        """The record with NaN as null."""
        return asdict(self) | {"values": {name: _finite(value) for name, value in self.values.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Inverse of `as_json`."""
        values = {name: math.nan if value is None else value for name, value in data["values"].items()}
        return cls(**{**data, "values": values})


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class CaseResult:
    """What one unit of work returns."""

    records: list[Record] = field(default_factory=list)
    picture: dict[str, np.ndarray] = field(default_factory=dict)
    """One slice in radiological orientation, and what is drawn over it."""
    skipped: str | None = None
    """Why the volume could not be scored; None if it was."""


Rivals = Mapping[str, Mapping[str, Callable[..., Any]]]
"""Task -> method -> what answers the same cases as the model, in plain values:

- reconstruct: an `Acquisition` to an image `(Z, Y, X)`, complex, or a real magnitude that no k-space follows from
- segment: a `Scan` and names of structures to a bool mask `(Z, Y, X)` by name
- detect: a `Scan` to a list of `Box`
- diagnose: a `Scan` to probabilities `(K,)` over DIAGNOSES
- report: a `Scan` to a text
"""


@dataclass(frozen=True, kw_only=True)
class CaseContext:
    """What every case needs besides its row."""

    engine: Any
    """`omnimri.models.engine.Engine`, or anything with its methods; None scores the rivals alone."""
    config: EvaluateConfig
    settings: Mapping[str, Mapping[int, SenseSetting]]
    """Tuned iterative baselines, by name and acceleration."""
    frequencies: np.ndarray
    """`(K,)` share of training patients per diagnosis."""
    rivals: Rivals = field(default_factory=dict)

    def methods(self, task: str, model: Callable[..., Any], blank: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """Everything that answers a text or segmentation case, the model and its floor first where there is one."""
        own = {MODEL: model} | ({BLANK: blank} if task in self.config.blank_tasks else {})
        return (own if self.engine is not None else {}) | dict(self.rivals.get(task, {}))


def recorder(row: Mapping[str, Any], task: str) -> Callable[..., Record]:
    """A function that makes records of this row and task."""
    facts = {name: row.get(name) for name in SUBGROUP_FACTS}

    def record(condition: str, method: str, values: dict[str, Any], **texts: Any) -> Record:
        return Record(
            task=task, condition=condition, method=method, row_id=row["row_id"], patient_id=row["patient_id"],
            facts=facts, values=values, texts=texts,
        )  # fmt: skip

    return record


def lead_method(methods: Iterable[str]) -> str:
    """The method that a page is about: the model, or without one the first rival."""
    known = list(methods)
    rivals = [name for name in known if name in RIVALS] or known
    return MODEL if MODEL in known else rivals[0]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result and the seconds it took."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def base_picture(volume: np.ndarray, scan: Scan, shown: int, name: str) -> dict[str, np.ndarray]:
    """One slice as a viewer sees it, with its window, letters and pixel spacing."""
    view = orient_slice(volume[shown], scan.affine)
    return {
        name: view.pixels.astype(np.float32),
        "window": np.array([0.0, np.percentile(volume, 99.7)]),
        "letters": np.array(view.letters),
        "spacing_mm": np.array(view.spacing_mm),
        "slice": np.array([shown, len(volume)]),
    }
