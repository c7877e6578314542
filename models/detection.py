"""What decoding boxes knows of a checkpoint's data: the labels they may have, and how sure their scores are.

It lies in the checkpoint folder as `detection.json`, written by `omnimri evaluate --set calibrate=true`. Without it a
box may have any label, and its score is the probability of its tokens as it is.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

DETECTION_FILE = "detection.json"


@dataclass(frozen=True, kw_only=True)
class PlattMap:
    """`p = 1 / (1 + exp(-(slope log q + intercept)))` of a raw probability q (Platt 1999, on its logarithm)."""

    slope: float
    """Above zero, so that the order of boxes stays."""
    intercept: float
    num_boxes: int
    """Candidates that it was fitted on."""
    num_right: int
    """Of these, how many found a reference box."""
    split: str
    data_digest: str
    """Of the corpus that the split is of."""

    def probability(self, logprob: float) -> float:
        """Calibrated probability of a box whose tokens have this log-probability."""
        return float(1 / (1 + math.exp(min(700.0, -(self.slope * logprob + self.intercept)))))


@dataclass(frozen=True, kw_only=True)
class Detection:
    """See the module."""

    labels: tuple[str, ...] = ()
    calibration: PlattMap | None = None

    def score(self, logprob: float) -> float:
        """Probability that a box is right, calibrated where the checkpoint can."""
        return self.calibration.probability(logprob) if self.calibration else math.exp(min(0.0, logprob))

    def write(self, folder: Path | str) -> None:
        """Put it into a checkpoint folder."""
        (Path(folder) / DETECTION_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_detection(folder: Path | str) -> Detection:
    """That of a checkpoint folder; the default where it has none."""
    path = Path(folder) / DETECTION_FILE
    if not path.is_file():
        return Detection()
    saved = json.loads(path.read_text(encoding="utf-8"))
    calibration = saved["calibration"]
    return Detection(labels=tuple(saved["labels"]), calibration=PlattMap(**calibration) if calibration else None)
