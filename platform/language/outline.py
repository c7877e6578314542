"""What is drawn of a volume, in words that the text decoder reads before it writes.

A small backbone does not learn from weak evidence spread over hundreds of visual tokens, but reads a sentence at once;
and what the image decoder draws is evidence that can be counted, measured and looked at. In use the sentence tells of
the drawn masks, in training of the labels with the errors that such masks have.
"""

# Z Y X voxels of the native grid

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import ndimage

from omnimri.models.boxes import BoxCoder
from omnimri.models.instructions import OUTLINED
from omnimri.models.preprocess import Preprocess
from omnimri.models.prompts import instruction_for
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import FINDINGS, LESION, TISSUES
from omnimri.platform.data.shards import row_to_scan
from omnimri.platform.language.evidence import Evidence
from omnimri.platform.language.measure import Measured
from omnimri.platform.language.words import finding_field, number_of_ml, number_of_mm, plain_name

MAX_PLACES = 6
"""Lesions whose places are told, the largest ones."""

_NO_LESION = "no lesion."
_EDGES = ("as it is", "eroded", "dilated")
_MISSED, _MISSED_SMALL, _SMALL_ML = 0.1, 0.4, 1.0
"""Chance that a lesion is not drawn: of a large one, and what is added for small ones, and what is small."""
_INVENTED, _INVENTED_MM = 0.2, (2.5, 7.0)
"""Chance that a lesion is drawn where none is, and its radius."""

Probabilities = Mapping[str, np.ndarray]
"""Structure to probability `(Z, Y, X)`."""


def outline_instructions() -> dict[str, str]:
    """What the image decoder is asked for, by structure: lesions, and the tissues that they are told by."""
    return {name: instruction_for("segment", structure=name) for name in (*TISSUES, LESION)}


def drawn_outline(scan: Scan, probabilities: Probabilities, preprocess: Preprocess) -> str:
    """The sentence about what was drawn.

    Args:
        scan: The image.
        probabilities: Of the structures of `outline_instructions`.
        preprocess: Whose grid places count in.
    """
    return outline_words(evidence_of(scan, probabilities, LESION, threshold=0.5), scan, preprocess)


def outlined(scan: Scan, outline: str) -> Scan:
    """The scan with the sentence among its facts, for `Engine.encode`."""
    return replace(scan, facts=scan.facts | {OUTLINED: outline})


def evidence_of(
    scan: Scan, probabilities: Probabilities, finding: str, *, threshold: float, classes: Sequence[str] | None = None
) -> Evidence:
    """What a row would say whose labels were the predicted ones.

    Args:
        scan: The image.
        probabilities: Of tissues and lesion.
        finding: Name of the lesions.
        threshold: From which probability a voxel is lesion.
        classes: Diagnoses; without them only what is drawn is known.
    """
    names = (*TISSUES, *dict.fromkeys((*FINDINGS, finding)))
    tissues = np.stack([probabilities[name] for name in TISSUES])
    label_map = np.where(tissues.max(0) >= 0.5, 1 + tissues.argmax(0), 0).astype(np.uint8)
    label_map[probabilities[LESION] >= threshold] = 1 + names.index(finding)
    row: dict[str, Any] = {
        **scan.facts,
        "image": scan.image,
        "affine": scan.affine,
        "label_map": label_map,
        "label_names": dict(enumerate(names, start=1)),
        "classes": classes,
    }
    return Evidence.of_row(row)


def outline_words(evidence: Evidence, scan: Scan, preprocess: Preprocess) -> str:
    """`2 lesions, up to 14 mm, 1.3 mL, hyperintense to white matter, in white matter: left [1, 2, 3, 4, 5, 6].`."""
    measured = evidence.lesions.get(LESION)
    if measured is None:
        return _NO_LESION
    told = [
        "1 lesion" if measured.count == 1 else f"{measured.count} lesions",
        f"up to {number_of_mm(measured.extent_mm)} mm",
        f"{number_of_ml(measured.volume_ml)} mL",
        f"{measured.signal} to {measured.reference}" if measured.signal else "",
        f"in {measured.site}" if measured.site else "",
    ]
    return f"{', '.join(filter(None, told))}: {_places(measured, BoxCoder(scan, preprocess))}."


def _places(measured: Measured, coder: BoxCoder) -> str:
    """Sides and boxes of the largest lesions in the order of a detection answer, as integers of its grid."""
    sides = measured.sides or ("",) * measured.count
    largest = sorted(zip(sides, measured.boxes_voxel, strict=True), key=lambda place: -_voxels(place[1]))[:MAX_PLACES]
    coded = sorted((coder.encode(box), side) for side, box in largest)
    return "; ".join(f"{side} {box}".strip() for box, side in coded)


def _voxels(box: tuple[int, ...]) -> int:
    return int(np.prod(np.subtract(box[3:], box[:3])))


def imagined_outline(row: Mapping[str, Any], preprocess: Preprocess, rng: np.random.Generator) -> str | None:
    """The sentence about a row's labels as if they had been drawn: some lesions missed, others frayed or invented.

    None where nobody looked for lesions.
    """
    names: Mapping[int, str] = row["label_names"] or {}
    plain = {value: plain_name(name) for value, name in names.items()}
    findings = [value for value, name in plain.items() if finding_field(name)]
    if row["label_map"] is None or not findings:
        return None
    scan = row_to_scan(row)
    labels, lesion = np.array(row["label_map"]), np.isin(row["label_map"], findings)
    tissue = next((value for value, name in plain.items() if name == TISSUES[2]), 0)
    labels[lesion] = tissue  # what a drawing that misses the lesion shows there
    labels[_drawn(lesion, labels > 0, scan.spacing_mm, rng)] = findings[0]
    drawn = {**row, "label_map": labels, "label_names": {**names, findings[0]: LESION}, "boxes": None, "classes": None}
    return outline_words(Evidence.of_row(drawn), scan, preprocess)


def _drawn(lesion: np.ndarray, tissue: np.ndarray, spacing_mm: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """A lesion mask with the errors of a segmentation."""
    parts, _ = ndimage.label(lesion, structure=np.ones((3, 3, 3)))
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    drawn = np.zeros_like(lesion)
    for index, place in enumerate(ndimage.find_objects(parts), start=1):
        around = tuple(slice(max(0, part.start - 1), part.stop + 1) for part in place)
        part = parts[around] == index
        if rng.random() >= _MISSED + _MISSED_SMALL * np.exp(-part.sum() * voxel_ml / _SMALL_ML):
            drawn[around] |= _frayed(part, str(rng.choice(_EDGES)))
    if tissue.any() and rng.random() < _INVENTED:
        centre = np.unravel_index(int(rng.choice(np.flatnonzero(tissue))), tissue.shape)
        place, ball = _ball(centre, tissue.shape, np.asarray(spacing_mm), rng.uniform(*_INVENTED_MM))
        drawn[place] |= ball & tissue[place]
    return drawn


def _frayed(part: np.ndarray, edge: str) -> np.ndarray:
    """A mask with its in-plane edge moved by a voxel; one that would vanish stays."""
    in_plane = ndimage.generate_binary_structure(2, 1)[None]
    if edge == "dilated":
        return ndimage.binary_dilation(part, in_plane)
    eroded = ndimage.binary_erosion(part, in_plane) if edge == "eroded" else part
    return eroded if eroded.any() else part


def _ball(
    centre: Sequence[np.intp], shape: Sequence[int], spacing_mm: np.ndarray, radius_mm: float
) -> tuple[tuple[slice, ...], np.ndarray]:
    """The place around a ball in a volume, and the ball there."""
    reach = np.floor(radius_mm / spacing_mm).astype(int)
    edges = list(zip(centre, reach, shape, strict=True))
    place = tuple(slice(max(0, at - steps), min(size, at + steps + 1)) for at, steps, size in edges)
    z, y, x = np.ogrid[place]
    offsets = [(axis - at) * mm for axis, at, mm in zip((z, y, x), centre, spacing_mm, strict=True)]
    return place, np.asarray(sum(np.square(offset) for offset in offsets) <= radius_mm**2)
