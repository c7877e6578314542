"""What is true of a simulated patient, in words: lesions measured on the label map, description, report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from omnimri.models.vocabulary import FINDINGS, TISSUES
from omnimri.platform.corpus import signal
from omnimri.platform.corpus.acquisition import Grid, Sampled

_MAIN_PART = {
    "old infarct": "cavity",
    "demyelinating plaque": "plaque",
    "oedematous mass": "mass",
    "haemorrhage": "blood core",
}
_PHRASE = {
    "old infarct": ("fluid-filled cavity with a gliotic rim", "Old infarct"),
    "demyelinating plaque": ("ovoid white matter plaques", "Demyelinating disease"),
    "oedematous mass": ("solid mass with surrounding oedema", "Oedematous mass"),
    "haemorrhage": ("focal haemorrhage with a dark rim", "Haemorrhage"),
}
_ABSENT = {
    "old infarct": "infarct",
    "demyelinating plaque": "demyelinating plaque",
    "oedematous mass": "mass",
    "haemorrhage": "haemorrhage",
}
_ADVICE = {
    None: "none",
    "old infarct": "vascular work-up",
    "demyelinating plaque": "neurological referral",
    "oedematous mass": "neurosurgical referral",
    "haemorrhage": "urgent clinical correlation",
}


@dataclass(frozen=True)
class Lesion:
    """One connected lesion on the label map."""

    label: str
    side: str
    region: str
    box_voxel: tuple[int, int, int, int, int, int]
    """Half-open `[z1, y1, x1, z2, y2, x2]`."""
    extent_mm: int
    """Longest edge of the box in plane, rounded."""

    def as_box(self) -> dict[str, Any]:
        return {"label": self.label, "side": self.side, "box_voxel": list(self.box_voxel)}


def find_lesions(sampled: Sampled, grid: Grid) -> list[Lesion]:
    """Connected lesions (26 neighbours, two voxels or more), largest first."""
    components, count = ndimage.label(sampled.label_map > len(TISSUES), structure=np.ones((3, 3, 3)))
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    order = [i for i in np.argsort(-sizes, kind="stable") if i and sizes[i] >= 2]
    return [_measure(components == i, sampled, grid) for i in order]


def _measure(mask: np.ndarray, sampled: Sampled, grid: Grid) -> Lesion:
    index = np.argwhere(mask)
    low, high = index.min(0), index.max(0) + 1
    value = int(np.bincount(sampled.label_map[mask]).argmax())
    x_mm, y_mm, z_mm = (float(axis[mask].mean()) for axis in sampled.mni_mm)
    extent = max((high - low)[1] * grid.spacing_mm[1], (high - low)[2] * grid.spacing_mm[2])
    return Lesion(
        label=FINDINGS[value - len(TISSUES) - 1],
        side="midline" if abs(x_mm) < 4 else "left" if x_mm < 0 else "right",
        region=region_of(x_mm, y_mm, z_mm),
        box_voxel=tuple(int(v) for v in (*low, *high)),
        extent_mm=round(extent),
    )


def region_of(x_mm: float, y_mm: float, z_mm: float) -> str:
    """Region of a point by planes in MNI space: coarse, but the same rule for every patient.

    Deep: within 36 mm of the midline, y -30 to 20, z -12 to 22. Cerebellum: below z -18 behind y -40. Occipital:
    behind y -68. Temporal: below z 6, 28 mm or more off the midline. Parietal: behind y -22. Frontal: the rest.
    """
    if 8 <= abs(x_mm) <= 36 and -30 <= y_mm <= 20 and -12 <= z_mm <= 22:
        return "basal ganglia"
    if z_mm < -18 and y_mm < -40:
        return "cerebellum"
    if y_mm < -68:
        return "occipital lobe"
    if z_mm < 6 and abs(x_mm) >= 28:
        return "temporal lobe"
    return "parietal lobe" if y_mm < -22 else "frontal lobe"


def intensity_word(finding: str, protocol: signal.Protocol, field_strength_t: float) -> str:
    """Hypo-, iso- or hyperintense to white matter, by the signal equations that made the image."""
    white = signal.signal(signal.TISSUES[field_strength_t]["white matter"], protocol)
    ratio = signal.signal(signal.LESIONS[_MAIN_PART[finding]], protocol) / white
    return "hypointense" if ratio < 0.9 else "hyperintense" if ratio > 1.1 else "isointense"


def write_report(
    lesions: list[Lesion], protocol: signal.Protocol, field_strength_t: float, rng: np.random.Generator
) -> str:
    """Technique, findings, impression, recommendation; every statement follows from the lesions and the protocol."""
    field = f"{field_strength_t:g} T"
    technique = f"Technique: axial {protocol.contrast} of the brain at {field}."
    if not lesions:
        normal = ("No focal lesion.", "No focal signal abnormality.")[int(rng.integers(2))]
        absent = "No haemorrhage, no mass, no infarct."
        return f"{technique} Findings: {normal} {absent} Impression: normal. Recommendation: none."
    finding = lesions[0].label
    word = intensity_word(finding, protocol, field_strength_t)
    what, impression = _PHRASE[finding]
    if finding == "demyelinating plaque":
        sides = " and ".join(side for side in ("left", "right", "midline") if any(e.side == side for e in lesions))
        largest = lesions[0]
        body = (
            f"Multiple {word} {what} in the {sides} {'hemispheres' if ' and ' in sides else 'hemisphere'}, "
            f"the largest about {largest.extent_mm} mm."
        )
        conclusion = impression
    else:
        main = lesions[0]
        place = f"{main.side} {main.region}"
        body = f"{what[0].upper()}{what[1:]} in the {place}, {word}, about {main.extent_mm} mm."
        conclusion = f"{impression} of the {place}"
    others = [name for name in ("haemorrhage", "oedematous mass", "old infarct") if name != finding]
    absent = "No " + ", no ".join(_ABSENT[name] for name in others) + "."
    return f"{technique} Findings: {body} {absent} Impression: {conclusion}. Recommendation: {_ADVICE[finding]}."


def describe(
    lesions: list[Lesion], protocol: signal.Protocol, field_strength_t: float
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The five-level description (paper, Figure 2) with the origin of every filled field; empty means unknown."""
    finding = lesions[0].label if lesions else None
    places = sorted({f"{lesion.side} {lesion.region}" for lesion in lesions})
    where = ", ".join(places)
    word = intensity_word(finding, protocol, field_strength_t) if finding else ""
    is_mass = finding == "oedematous mass"
    description = {
        "image_modality_sequence": {
            "modality": "MRI", "sequence": protocol.contrast, "plane": "axial", "acquisition_quality_or_artifacts": "",
        },
        "visible_anatomical_structures": {
            "bony_structures": "skull", "articular_structures": "", "soft_tissues_and_musculature": "scalp",
            "organs_or_central_structures": "brain", "neurovascular_or_connective_structures": "",
            "spaces_or_cavities_or_joint_compartments": "ventricles and subarachnoid space",
        },
        "tissue_signal_characteristics": {
            "normal_signal_appearance": "" if finding else "normal grey and white matter signal",
            "abnormal_signal_patterns": f"{word} lesion" if finding else "",
            "symmetry_and_structural_integrity": "",
        },
        "pathological_findings": {
            "structural_abnormalities": f"cavity in the {where}" if finding == "old infarct" else "",
            "signal_abnormalities_or_fluid_collections": f"{finding} in the {where}" if finding and not is_mass else "",
            "masses_or_suspicious_lesions": f"mass in the {where}" if is_mass else "",
        },
        "diagnostic_impression": {
            "suggestive_of": _PHRASE[finding][1].lower() if finding else "normal",
            "severity_or_grading": "",
            "recommendation": _ADVICE[finding],
        },
    }  # fmt: skip
    origin = {
        f"{level}.{key}": "header" if level == "image_modality_sequence" else "label"
        for level, fields in description.items()
        for key, value in fields.items()
        if value
    }
    return description, origin
