"""Boxes: between voxels of a scan and the integers 0-999 that the text decoder reads and writes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from omnimri.models.geometry import to_canonical
from omnimri.models.preprocess import Preprocess
from omnimri.models.scan import Scan
from omnimri.models.special_tokens import BBOX, BBOX_END

STEPS = 999
"""Integer at the far edge of the grid; coordinates run from 0 along z, y, x of the encoder's volume grid."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """One finding with its place on the native grid of a scan."""

    label: str
    side: str | None
    box_voxel: tuple[int, ...]
    """Half-open `[z1, y1, x1, z2, y2, x2]`."""
    score: float | None = None
    """Probability that it is right, in [0, 1]; None of a reference."""
    logprob: float | None = None
    """Log-probability of its tokens, that the score is made from; None of a box that no text says."""


class BoxCoder:
    """Maps boxes of one scan to the integers of its text and back."""

    def __init__(self, scan: Scan, preprocess: Preprocess) -> None:
        volume = preprocess.volume(scan)
        canonical = to_canonical(scan.image, scan.affine)
        self._shape = np.array(scan.image.shape)
        self._to_canonical = np.linalg.inv(canonical.affine) @ scan.affine
        self._origin = volume.origin_index.double().numpy()
        self._extent = volume.scale.double().numpy() * np.array(preprocess.inputs.volume_shape)

    def encode(self, box_voxel: tuple[int, ...]) -> list[int]:
        """Voxel box of the scan to six integers in 0-999."""
        corners = self._corners(np.array(box_voxel, dtype=float), self._to_canonical)
        share = (corners - np.tile(self._origin, 2)) / np.tile(self._extent, 2)
        return [int(v) for v in np.clip(np.round(share * STEPS), 0, STEPS)]

    def decode(self, integers: Sequence[int]) -> tuple[int, int, int, int, int, int]:
        """Six integers to a voxel box inside the scan, at least one voxel wide."""
        share = np.array(integers, dtype=float) / STEPS
        corners = share * np.tile(self._extent, 2) + np.tile(self._origin, 2)
        native = self._corners(corners, np.linalg.inv(self._to_canonical))
        low = np.clip(np.round(native[:3]), 0, self._shape - 1).astype(int)
        high = np.clip(np.maximum(np.round(native[3:]), low + 1), 1, self._shape).astype(int)
        z1, y1, x1 = (int(v) for v in low)
        z2, y2, x2 = (int(v) for v in high)
        return z1, y1, x1, z2, y2, x2

    @staticmethod
    def _corners(box: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """Bounds of a half-open box under a voxel-to-voxel affine; `[z1, y1, x1, z2, y2, x2]`."""
        ends = np.stack([box[:3], box[3:]])[:, ::-1] - 0.5
        mapped = ends @ matrix[:3, :3].T + matrix[:3, 3]
        return np.concatenate([mapped.min(0)[::-1], mapped.max(0)[::-1]]) + 0.5


def boxes_to_text(boxes: list[Box], coder: BoxCoder) -> str:
    """The detection answer: `<bbox>[{"label", "side", "box"}]</bbox>`, ordered by label and place."""
    entries = [{"label": box.label, "side": box.side or "", "box": coder.encode(box.box_voxel)} for box in boxes]
    entries.sort(key=lambda entry: (entry["label"], entry["box"]))
    return f"{BBOX}{json.dumps(entries)}{BBOX_END}"


def text_to_boxes(text: str, coder: BoxCoder) -> list[Box]:
    """Read a detection answer.

    Raises:
        ValueError: If there is no `<bbox>` span or it does not hold a list of label, side and six integers in 0-999.
    """
    start, end = text.find(BBOX), text.find(BBOX_END)
    if start < 0 or end < start:
        raise ValueError(f"Detection answer: expected {BBOX}[...]{BBOX_END}, found {text[:80]!r}.")
    try:
        entries = json.loads(text[start + len(BBOX) : end])
    except json.JSONDecodeError as error:
        raise ValueError(f"Detection answer is not JSON ({error.msg}): {text[:80]!r}.") from error
    return [_read_entry(entry, coder) for entry in entries]


def entry_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each box in a detection answer, its separator included."""
    ends = [match.end() for match in re.finditer(r"\{[^{}]*\}", text)]
    return list(pairwise([text.find("{"), *ends])) if ends else []


def whole_entries(text: str) -> str:
    """A list of boxes that was cut somewhere, up to its last whole box."""
    return f"{text[: text.rfind('}') + 1] or '['}]"


def _read_entry(entry: object, coder: BoxCoder) -> Box:
    fields = entry if isinstance(entry, dict) else {}
    label, integers = fields.get("label"), fields.get("box")
    valid = (
        isinstance(integers, list) and len(integers) == 6 and all(type(v) is int and 0 <= v <= STEPS for v in integers)
    )
    if not isinstance(label, str) or not isinstance(integers, list) or not valid:
        raise ValueError(f"Detection entry: expected label, side and six integers 0-{STEPS}, found {str(entry)[:80]}.")
    return Box(label=label, side=fields.get("side") or None, box_voxel=coder.decode(integers))
