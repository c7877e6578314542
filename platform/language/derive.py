"""A description of what a row knows: facts of its header, labels, boxes, classes and report, and nothing else.

Level 1 comes from the header and the measures of the row, levels 2 to 4 from labels, level 5 from classes, else from
the impression of the report. What is not known stays empty: symmetry, severity and recommendation always.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from omnimri.models.vocabulary import SIDES, TISSUES
from omnimri.platform.language.description import Description, Origin
from omnimri.platform.language.measure import LabelledVolume, Measured, fine_extent_mm
from omnimri.platform.language.sections import affirmed, split_sections
from omnimri.platform.language.words import (
    CONTRASTS_IN_WORDS,
    FLAGS_IN_WORDS,
    STRUCTURE_FIELDS,
    TEMPLATES,
    finding_field,
    noise_words,
    number_of_ml,
    number_of_mm,
    one_line,
    plain_name,
    structure_kind,
)

_REFERENCE = TISSUES[2]


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a row knows, by the names of its columns."""

    image: np.ndarray
    """`(Z, Y, X)`."""
    affine: np.ndarray
    """`(4, 4)`, voxel index `(x, y, z, 1)` to RAS mm."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """By `schema.FACTS`."""
    quality: Mapping[str, float | None] = field(default_factory=dict)
    flags: Sequence[str] = ()
    label_map: np.ndarray | None = None
    """uint8 `(Z, Y, X)`."""
    label_names: Mapping[int, str] = field(default_factory=dict)
    boxes: Sequence[Mapping[str, Any]] | None = None
    classes: Sequence[str] | None = None
    report: str | None = None


def derive(known: Known) -> tuple[Description, dict[str, Origin]]:
    """The description of a volume, and the origin of every field that is filled, by `level.key`."""
    phrases = {**dict(_header(known)), **dict(_labels(known)), **dict(_impression(known))}
    filled = {key: (phrase, origin) for key, (phrase, origin) in phrases.items() if phrase}
    description = Description.from_fields({key: phrase for key, (phrase, _) in filled.items()})
    return description, {key: filled[key][1] for key, _ in description.filled()}


Phrases = Iterator[tuple[str, tuple[str, Origin]]]


def _header(known: Known) -> Phrases:
    level = "image_modality_sequence"
    yield f"{level}.modality", ("MRI", "header")
    yield f"{level}.sequence", (sequence_words(known.facts), "header")
    yield f"{level}.plane", (known.facts.get("plane") or "", "header")
    yield f"{level}.acquisition_quality_or_artifacts", (quality_words(known.quality, known.flags), "header")


def sequence_words(facts: Mapping[str, Any]) -> str:
    """Acquisition type, contrast or quantity, and contrast agent, as far as they are known."""
    if facts.get("quantitative") and facts.get("quantity"):
        weighting = TEMPLATES["map"].format(quantity=facts["quantity"])
    else:
        weighting = CONTRASTS_IN_WORDS.get(facts.get("contrast") or "", "")
    given = facts.get("contrast_agent")
    agent = "" if given is None else TEMPLATES["agent"].format(whether="with" if given else "without")
    kind = facts.get("acquisition_type") or ""
    return ", ".join(filter(None, (f"{kind} {weighting}".strip(), agent)))


def quality_words(quality: Mapping[str, float | None], flags: Sequence[str]) -> str:
    """What was measured: a flag, or that the noise is low; a measure that is null says nothing."""
    flagged = [words for flag, words in FLAGS_IN_WORDS.items() if flag in flags]
    snr = quality.get("snr")
    if snr is not None and "low SNR" not in flags:
        flagged.insert(0, noise_words(snr))
    return ", ".join(flagged)


def _labels(known: Known) -> Phrases:
    volume = labelled_volume(known)
    lesions = volume.lesions() if volume else []
    if volume:
        yield from _structures(volume)
        yield from _signals(volume, lesions)
    found: dict[str, list[str]] = defaultdict(list)
    for measured in lesions:
        found[finding_field(measured.name) or ""].append(finding_phrase(measured))
    for name, phrase in _boxed(known, {measured.name for measured in lesions}):
        found[finding_field(name) or ""].append(phrase)
    for key, phrases in found.items():
        yield f"pathological_findings.{key}", ("; ".join(phrases), "label")


def labelled_volume(known: Known) -> LabelledVolume | None:
    """The label map with the image behind it, unless that is a map of a quantity."""
    if known.label_map is None:
        return None
    image = None if known.facts.get("quantitative") else known.image
    return LabelledVolume(known.label_map, known.label_names, known.affine, image)


def _structures(volume: LabelledVolume) -> Phrases:
    for kind, key in STRUCTURE_FIELDS.items():
        names = [name for name in volume.structures if structure_kind(name) == kind]
        yield f"visible_anatomical_structures.{key}", (", ".join(names), "label")


def _signals(volume: LabelledVolume, lesions: Sequence[Measured]) -> Phrases:
    normal = volume.signals(_REFERENCE, [name for name in volume.structures if name in TISSUES and name != _REFERENCE])
    compared = [(name, signal, _REFERENCE) for name, signal in normal.items()]
    yield "tissue_signal_characteristics.normal_signal_appearance", (_signal_phrases(compared), "label")
    abnormal = [(m.name, m.signal, m.reference) for m in lesions if m.signal]
    yield "tissue_signal_characteristics.abnormal_signal_patterns", (_signal_phrases(abnormal), "label")


def _signal_phrases(compared: Sequence[tuple[str, str, str]]) -> str:
    template = TEMPLATES["signal"]
    return ", ".join(template.format(name=name, signal=word, reference=other) for name, word, other in compared)


def finding_phrase(measured: Measured) -> str:
    """Name, count, side, size, volume and surroundings of all lesions of one name."""
    is_one = measured.count == 1
    parts = (
        TEMPLATES["one lesion" if is_one else "lesions"].format(count=measured.count),
        _sides(measured.sides),
        TEMPLATES["extent" if is_one else "largest extent"].format(extent=number_of_mm(measured.extent_mm)),
        TEMPLATES["volume" if is_one else "total volume"].format(volume=number_of_ml(measured.volume_ml)),
        TEMPLATES["site"].format(site=measured.site) if measured.site else "",
    )
    return f"{measured.name}: {', '.join(filter(None, parts))}"


def _sides(sides: Sequence[str]) -> str:
    """`left`, or how many on each side."""
    counts = Counter(sides)
    if len(counts) < 2:
        return next(iter(counts), "")
    listed = ", ".join(f"{counts[side]} {side}" for side in SIDES if side in counts)
    return TEMPLATES["bilateral" if {"left", "right"} <= counts.keys() else "sides"].format(sides=listed)


def _boxed(known: Known, measured: set[str]) -> Iterator[tuple[str, str]]:
    """Name and phrase of findings that only boxes show; a lesion may have a box on each slice, so boxes are counted."""
    spacing_zyx = np.linalg.norm(known.affine[:3, :3], axis=0)[::-1]
    boxes: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for box in known.boxes or ():
        boxes[plain_name(box["label"])].append(box)
    for name, same in boxes.items():
        if name in measured or finding_field(name) is None:
            continue
        edges = [np.subtract(box["box_voxel"][3:], box["box_voxel"][:3]) for box in same]
        extent = number_of_mm(max(fine_extent_mm(edge, spacing_zyx) for edge in edges))
        sides = [box["side"] for box in same if box.get("side") in SIDES]
        parts = (
            TEMPLATES["one box" if len(same) == 1 else "boxes"].format(count=len(same)),
            _sides(sides) if len(sides) == len(same) else "",
            TEMPLATES["extent" if len(same) == 1 else "largest extent"].format(extent=extent),
        )
        yield name, f"{name}: {', '.join(filter(None, parts))}"


def _impression(known: Known) -> Phrases:
    key = "diagnostic_impression.suggestive_of"
    if known.classes:
        yield key, (", ".join(map(one_line, known.classes)), "label")
    elif known.report:
        yield key, ("; ".join(affirmed(split_sections(known.report).impression)), "report")
