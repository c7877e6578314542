"""The words of derived descriptions: what a label's name means, how a fact is said, and the templates of phrases.

Names are those of the label maps and boxes of the catalogue, of the built-in corpus, of TotalSegmentator MRI and of the
codes that DICOM segmentations mostly carry. A name that no table knows is left out of a description.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

from omnimri.models.vocabulary import FINDINGS, LESION, TISSUES, structure_of

CONTRASTS_IN_WORDS = {
    "T1w": "T1-weighted", "T2w": "T2-weighted", "FLAIR": "FLAIR", "PD": "proton density-weighted",
    "T2*w": "T2*-weighted", "STIR": "STIR", "DWI": "diffusion-weighted", "SWI": "susceptibility-weighted",
    "PWI": "perfusion-weighted", "MRA": "MR angiography", "MRS": "MR spectroscopy", "BOLD": "BOLD",
    "DCE": "dynamic contrast-enhanced", "cine": "cine", "MRE": "MR elastography", "Dixon": "Dixon",
    "localizer": "localizer", "fieldmap": "field map",
}  # fmt: skip
"""Contrast, as the column of that name has it, in the words of a report."""

FLAGS_IN_WORDS = {
    "low SNR": "low signal-to-noise ratio", "ghosting": "ghosting", "small matrix": "small matrix",
    "tissues not separable": "grey and white matter not separable",
}  # fmt: skip
"""Flags of intake that say how good an image is."""

GOOD_SNR = 30.0
HYPOINTENSE_BELOW, HYPERINTENSE_ABOVE = 0.87, 1.15
"""Ratio of a signal to that of its reference."""

MIDLINE_MM = 5.0
"""Centres nearer to the midline than this are on neither side."""

StructureKind = Literal["bone", "joint", "soft tissue", "organ", "vessel, nerve or ligament", "space"]

STRUCTURE_FIELDS: dict[StructureKind, str] = dict(
    zip(
        get_args(StructureKind),
        (
            "bony_structures", "articular_structures", "soft_tissues_and_musculature", "organs_or_central_structures",
            "neurovascular_or_connective_structures", "spaces_or_cavities_or_joint_compartments",
        ),
        strict=True,
    )
)  # fmt: skip
"""Kind of a structure to its key of level 2."""

_STRUCTURES: dict[StructureKind, tuple[str, ...]] = {
    "bone": (
        "bone", "vertebra", "vertebrae", "sacrum", "coccyx", "skull", "mandible", "bone mandible", "maxilla", "femur",
        "tibia", "fibula", "patella", "humerus", "radius", "ulna", "scapula", "clavicula", "clavicle", "hip", "rib",
        "sternum", "femoral bone", "tibial bone",
    ),
    "joint": (
        "cartilage", "articular cartilage", "femoral cartilage", "tibial cartilage", "patellar cartilage",
        "medial tibial cartilage", "lateral tibial cartilage", "meniscus", "medial meniscus", "lateral meniscus",
        "menisci", "intervertebral disc", "intervertebral discs", "disc", "labrum",
    ),
    "soft tissue": (
        "muscle", "subcutaneous fat", "subcutaneous adipose tissue", "visceral adipose tissue", "fat", "breast",
        "fibroglandular tissue", "autochthon", "iliopsoas", "gluteus maximus", "gluteus medius", "gluteus minimus",
        "quadriceps femoris", "thigh medial compartment", "thigh posterior compartment", "sartorius", "deltoid",
        "scalp",
    ),
    "organ": (
        "brain", *TISSUES[1:], "gray matter", "cerebral cortex", "cortex", "cerebellum", "brainstem", "brain stem",
        "thalamus", "caudate", "caudate nucleus", "putamen", "pallidum", "basal ganglia", "hippocampus",
        "anterior hippocampus", "posterior hippocampus", "amygdala", "spinal cord", "pituitary", "eye", "eyeball",
        "prostate", "prostate gland", "whole prostate", "peripheral zone", "transition zone", "central gland",
        "central zone", "peripheral zone of prostate", "transition zone of prostate", "seminal vesicle", "uterus",
        "ovary", "bladder", "urinary bladder", "rectum", "liver", "spleen", "kidney", "pancreas", "gallbladder",
        "stomach", "duodenum", "small bowel", "colon", "adrenal gland", "esophagus", "oesophagus", "lung", "lungs",
        "thyroid", "parotid", "parotid gland", "submandibular gland", "heart", "heart substructures", "myocardium",
        "left ventricular myocardium", "left ventricle myocardium", "placenta",
    ),
    "vessel, nerve or ligament": (
        "vessel", "vessels", "artery", "vein", "aorta", "inferior vena cava", "postcava", "carotid", "carotid artery",
        "portal vein and splenic vein", "iliac artery", "iliac vena", "pulmonary artery", "optic nerve",
        "optic chiasm", "optic radiation", "corticospinal tract", "nerve", "brachial plexus", "ligament",
        "anterior cruciate ligament", "posterior cruciate ligament", "tendon",
    ),
    "space": (
        TISSUES[0], "csf", "ventricle", "ventricles", "lateral ventricle", "third ventricle", "fourth ventricle",
        "spinal canal", "perivascular space", "left ventricle", "right ventricle", "left atrium", "right atrium",
        "left ventricular cavity", "right ventricular cavity", "joint space",
    ),
}  # fmt: skip

STRUCTURE_KINDS: dict[str, StructureKind] = {name: kind for kind, names in _STRUCTURES.items() for name in names}
"""Name of a normal structure to its kind."""

MIDLINE_ORGANS = {
    "brain": frozenset(
        {
            "brain", *TISSUES, "gray matter", "csf", "cerebral cortex", "cortex", "cerebellum", "brainstem",
            "brain stem", "lateral ventricle", "ventricles",
        }
    ),
    "prostate": frozenset(
        {
            "prostate", "prostate gland", "whole prostate", "peripheral zone", "transition zone", "central gland",
            "central zone", "peripheral zone of prostate", "transition zone of prostate",
        }
    ),
}  # fmt: skip
"""Organs that lie across the middle of the body, with the labels that together make them: only in these does a lesion
have a side by where it lies."""

FINDING_NOUNS = {
    "structural_abnormalities": (
        FINDINGS[0], "infarct", "chronic stroke lesion", "scar", "resection cavity", "tear", "defect", "loss/defect",
        "fracture", "sprain", "craniotomy", "aneurysm", "stenosis", "malformation", "atrophy",
    ),
    "signal_abnormalities_or_fluid_collections": (
        FINDINGS[1], FINDINGS[3], "plaque", "plaques", "hemorrhage", "oedema", "edema", "hyperintensity",
        "hyperintensities", "multiple sclerosis lesion", "ms lesion", "white matter lesion", "stroke lesion",
        "hypoxic-ischaemic lesion", "effusion", "cyst", "collection", "haematoma", "hematoma",
    ),
    "masses_or_suspicious_lesions": (
        FINDINGS[2], LESION, "mass", "tumour", "tumor", "tumour region", "tumour core", "cancer", "carcinoma",
        "metastasis", "metastases", "neuroblastoma", "meningioma", "glioma", "nodule", "neoplasm",
    ),
}  # fmt: skip
"""Key of level 4 to the words in which the name of a finding ends; the longest that fits decides."""

_FINDING_FIELDS = {noun: field for field, nouns in FINDING_NOUNS.items() for noun in nouns}

REPORT_ORDER: tuple[frozenset[str], ...] = tuple(
    frozenset(words.split())
    for words in (
        "effusion synovitis", "meniscus meniscal menisci labrum labral disc", "cartilage chondral",
        "bone marrow bony fracture vertebra", "ligament cruciate acl pcl mcl lcl tendon", "soft muscle fat cyst",
    )
)  # fmt: skip
"""Words in the names of findings, in the order in which a report goes through a joint."""

_SIDE_WORDS = {"left", "right", "l", "r"}


def plain_name(label: str) -> str:
    """A label's name as it is said: lower case, no underscores, no running number."""
    return structure_of(" ".join(label.lower().replace("_", " ").split()))


def structure_kind(name: str) -> StructureKind | None:
    """The kind of a normal structure by its plain name, with a side or without; None where the name is not known."""
    return STRUCTURE_KINDS.get(name) or STRUCTURE_KINDS.get(without_side(name))


def finding_field(name: str) -> str | None:
    """The key of level 4 that a finding belongs to by its plain name; None for what is no finding."""
    words = name.split()
    endings = (" ".join(words[start:]) for start in range(len(words)))
    return next((_FINDING_FIELDS[ending] for ending in endings if ending in _FINDING_FIELDS), None)


def midline_organ(name: str) -> str | None:
    """The organ across the midline that a structure is a part of, by its plain name; None for the part on one side."""
    return next((organ for organ, parts in MIDLINE_ORGANS.items() if name in parts), None)


def without_side(name: str) -> str:
    """A plain name without `left` or `right` at its start or end."""
    words = name.split()
    if words and words[0] in _SIDE_WORDS:
        words = words[1:]
    elif words and words[-1] in _SIDE_WORDS:
        words = words[:-1]
    return " ".join(words)


def side_of(offset_mm: float) -> str:
    """`left`, `right` or `midline` of what lies so far to the patient's right of the middle."""
    if abs(offset_mm) < MIDLINE_MM:
        return "midline"
    return "left" if offset_mm < 0 else "right"


def signal_word(ratio: float) -> str:
    """`hypointense`, `isointense` or `hyperintense` by the ratio of a signal to that of its reference."""
    if ratio < HYPOINTENSE_BELOW:
        return "hypointense"
    return "hyperintense" if ratio > HYPERINTENSE_ABOVE else "isointense"


def noise_words(snr: float) -> str:
    """How good a signal-to-noise ratio is."""
    return f"{'good' if snr >= GOOD_SNR else 'moderate'} signal-to-noise ratio"


TEMPLATES: Mapping[str, str] = {
    "one lesion": "1 lesion",
    "lesions": "{count} lesions",
    "one box": "marked by 1 box",
    "boxes": "marked by {count} boxes",
    "sides": "({sides})",
    "bilateral": "bilateral ({sides})",
    "extent": "{extent} mm along image axes",
    "largest extent": "up to {extent} mm along image axes",
    "volume": "{volume} mL",
    "total volume": "{volume} mL in total",
    "site": "surrounded mostly by {site}",
    "signal": "{name} {signal} to {reference}",
    "map": "quantitative {quantity} map",
    "agent": "{whether} contrast agent",
}
"""Every phrase of a derived description that is more than a name."""


def number_of_mm(value: float) -> str:
    """Whole millimetres; tenths below two."""
    return f"{value:.0f}" if value >= 2 else f"{value:.1f}"


def number_of_ml(value: float) -> str:
    """Tenths of a millilitre; two digits that count below one."""
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


_SPACES = re.compile(r"\s+")


def one_line(text: str) -> str:
    """Text without line breaks and doubled spaces."""
    return _SPACES.sub(" ", text).strip()
