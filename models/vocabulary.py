"""The words every room shares: tasks, structures, findings, and the label values they stand for."""

import re

TASKS = ("reconstruct", "segment", "detect", "diagnose", "report")
"""The five tasks of the paper's Table 1; the names of the routes and of the instruction sets."""

IMAGE_TASKS = ("reconstruct", "segment")
"""Tasks answered by the image decoder; the others are answered in text."""

TISSUES = ("cerebrospinal fluid", "grey matter", "white matter")

FINDINGS = ("old infarct", "demyelinating plaque", "oedematous mass", "haemorrhage")
"""Findings that the built-in corpus simulates; a row may hold several of one kind."""

NORMAL = "normal"
DIAGNOSES = (NORMAL, "old infarct", "demyelinating disease", "oedematous mass", "haemorrhage")
"""Answers of the diagnosis task on the built-in corpus, one per patient."""

LESION = "lesion"
STRUCTURES = (*TISSUES, LESION)
"""What segmentation can be asked for by name; `lesion` is the union of all findings."""

DENSE_LABELS = (*STRUCTURES, *FINDINGS)
"""What stage 1 can be told of each voxel, where a volume has labels."""

CONTRASTS = ("T1w", "T2w", "FLAIR", "PD")
PLANES = ("axial", "coronal", "sagittal")
SIDES = ("left", "right", "midline")

RESEARCH_NOTICE = "Research use only, not for diagnosis."


def structure_of(label: str) -> str:
    """The structure that a label of a volume names: `lesion 2` is the second lesion."""
    return re.sub(r" \d+$", "", label)
