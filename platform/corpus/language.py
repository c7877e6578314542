"""The words of a simulated patient: five-level description and report, every statement true of what was simulated.

Signal words compare a tissue with white matter by the signal equations that made the image; sides, regions, counts and
sizes come from the label map. What the simulation does not know stays empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omnimri.models.vocabulary import NORMAL
from omnimri.platform.corpus.lesions import FINDING_OF
from omnimri.platform.corpus.truth import Lesion
from omnimri.platform.language.description import (
    Description,
    DiagnosticImpression,
    ImageModalitySequence,
    Origin,
    PathologicalFindings,
    TissueSignalCharacteristics,
    VisibleAnatomicalStructures,
)
from omnimri.platform.language.words import CONTRASTS_IN_WORDS, noise_words, signal_word

_KIND_NAMES = {"spin echo": "spin echo", "inversion recovery": "inversion recovery", "gradient echo": "gradient echo"}
_ABSENT = {
    "old infarct": "infarct",
    "demyelinating plaque": "demyelinating plaques",
    "oedematous mass": "mass",
    "haemorrhage": "haemorrhage",
}
_ADVICE = {
    NORMAL: ("No follow-up imaging needed", "No further imaging needed"),
    "old infarct": ("Vascular risk assessment", "Clinical and vascular work-up"),
    "demyelinating disease": ("Neurological referral and contrast-enhanced MRI", "Contrast-enhanced MRI and neurology"),
    "oedematous mass": ("Neurosurgical referral and contrast-enhanced MRI", "Contrast-enhanced MRI and neurosurgery"),
    "haemorrhage": ("Urgent neurological assessment", "Urgent clinical review"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """All that words may be made of, for one series."""

    diagnosis: str
    lesions: Sequence[Lesion]
    """Largest first; empty in a healthy head."""
    contrast: str
    sequence_kind: str
    field_strength_t: float
    brightness: dict[str, float]
    """Signal of tissues and lesion parts over that of white matter."""
    snr: float
    has_wide_ventricles: bool
    pushes_brain: bool
    """Brain was displaced by the lesion."""

    @property
    def side(self) -> str:
        """`left`, `right`, `midline` or `bilateral` of all lesions together."""
        sides = {lesion.side for lesion in self.lesions} - {"midline"}
        return "bilateral" if len(sides) == 2 else sides.pop() if sides else "midline"

    @property
    def place(self) -> str:
        """Side and region of the largest lesion: `left frontal lobe`."""
        return f"{self.lesions[0].side} {self.lesions[0].region}"

    @property
    def size_mm(self) -> int:
        """Of the largest lesion."""
        return max(lesion.size_mm for lesion in self.lesions)

    def look(self, part: str) -> str:
        """`hypointense`, `isointense` or `hyperintense` to white matter."""
        return signal_word(self.brightness[part])


def write_report(case: Case, rng: np.random.Generator) -> str:
    """Technique, findings, impression and recommendation in at most 90 words."""
    pick = _Picker(rng)
    technique = f"Technique: axial {CONTRASTS_IN_WORDS[case.contrast]} brain MRI at {case.field_strength_t:g} T."
    findings = " ".join([*_finding_sentences(case, pick), _absent(case, pick), _spaces(case, pick)])
    advice = pick(*_ADVICE[case.diagnosis])
    return f"{technique} Findings: {findings} Impression: {_impression(case, pick)}. Recommendation: {advice}."


class _Picker:
    """One of several ways to say the same."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def __call__(self, *phrases: str) -> str:
        return phrases[int(self._rng.integers(len(phrases)))]


def _finding_sentences(case: Case, pick: _Picker) -> list[str]:
    if case.diagnosis == NORMAL:
        return [pick("No focal signal abnormality.", "Brain parenchyma of normal signal.", "No focal lesion.")]
    kind = FINDING_OF[case.diagnosis]
    size = pick(f"{case.size_mm} mm", f"about {case.size_mm} mm")
    if kind == "old infarct":
        return [
            f"{pick('Old infarct', 'Chronic infarct')} in the {case.place}, {size}: {case.look('cavity')} cavity "
            f"with {case.look('gliosis')} gliotic rim."
        ]
    if kind == "demyelinating plaque":
        return [_plaque_sentence(case, size, pick)]
    effect = [pick("Local mass effect.", "Mild local mass effect.")] if case.pushes_brain else []
    if kind == "oedematous mass":
        body = pick("Solid mass", "Mass")
        oedema = f"{case.look('oedema')} surrounding oedema"
        return [f"{body} in the {case.place}, {case.look('mass')}, with {oedema}, together {size}.", *effect]
    rim = f"{case.look('blood core')} core and {case.look('blood rim')} rim"
    return [f"{pick('Haemorrhage', 'Parenchymal haemorrhage')} in the {case.place}, {size}, {rim}.", *effect]


def _plaque_sentence(case: Case, size: str, pick: _Picker) -> str:
    count = len(case.lesions)
    number = "One" if count == 1 else "Two" if count == 2 else pick(str(count), "Multiple")
    where = "both cerebral hemispheres" if case.side == "bilateral" else f"the {case.side} cerebral hemisphere"
    noun = "demyelinating plaque" if count == 1 else "demyelinating plaques"
    extent = size if count == 1 else f"up to {size}"
    return f"{number} {case.look('plaque')} periventricular {noun} in {where}, {extent}."


def _absent(case: Case, pick: _Picker) -> str:
    """What is not there, in changing order."""
    others = [words for finding, words in _ABSENT.items() if finding != FINDING_OF[case.diagnosis]]
    start = int(pick(*map(str, range(len(others)))))
    *most, last = others[start:] + others[:start]
    return f"No {', '.join(most)} or {last}."


def _spaces(case: Case, pick: _Picker) -> str:
    if case.has_wide_ventricles:
        return pick("Ventricles and sulci are mildly widened.", "Mild widening of ventricles and sulci.")
    if case.pushes_brain:
        return pick("No generalised atrophy.", "Sulci of normal width elsewhere.")
    return pick("Ventricles and sulci are of normal width.", "Normal ventricles and sulci.")


def _impression(case: Case, pick: _Picker) -> str:
    if case.diagnosis == NORMAL:
        return pick("Normal brain MRI", "Normal MRI of the brain")
    if case.diagnosis == "demyelinating disease":
        side = "Bilateral" if case.side == "bilateral" else f"{case.side.capitalize()}-sided"
        return pick(f"{side} plaques, suggestive of demyelinating disease", f"{side} demyelinating plaques")
    name = {"old infarct": "Old infarct", "oedematous mass": "Oedematous mass", "haemorrhage": "Haemorrhage"}
    return f"{name[case.diagnosis]} {pick('in', 'of')} the {case.place}"


def describe(case: Case, rng: np.random.Generator) -> tuple[Description, dict[str, Origin]]:
    """The five-level description, and the origin of every field that is filled."""
    pick = _Picker(rng)
    description = Description(
        image_modality_sequence=_modality(case),
        visible_anatomical_structures=_structures(case),
        tissue_signal_characteristics=_signals(case),
        pathological_findings=_pathology(case),
        diagnostic_impression=DiagnosticImpression(
            suggestive_of=case.diagnosis,
            recommendation=pick(*_ADVICE[case.diagnosis]).lower().replace("mri", "MRI"),
        ),
    )
    return description, {field: _origin_of(field) for field, _ in description.filled()}


def _origin_of(field: str) -> Origin:
    return "header" if field.rpartition(".")[2] in ("modality", "sequence", "plane") else "label"


def _modality(case: Case) -> ImageModalitySequence:
    return ImageModalitySequence(
        modality="MRI",
        sequence=f"{CONTRASTS_IN_WORDS[case.contrast]} {_KIND_NAMES[case.sequence_kind]}",
        plane="axial",
        acquisition_quality_or_artifacts=f"{noise_words(case.snr)}, no motion artefact",
    )


def _structures(case: Case) -> VisibleAnatomicalStructures:
    spaces = "mildly widened ventricles and sulci" if case.has_wide_ventricles else "ventricles and sulci"
    return VisibleAnatomicalStructures(
        bony_structures="skull",
        soft_tissues_and_musculature="scalp and face",
        organs_or_central_structures="cerebral hemispheres, basal ganglia, brainstem, cerebellum",
        spaces_or_cavities_or_joint_compartments=spaces,
    )


def _signals(case: Case) -> TissueSignalCharacteristics:
    parts = {
        NORMAL: (),
        "old infarct": (("cavity", "cavity"), ("gliosis", "rim")),
        "demyelinating disease": (("plaque", "white matter plaques"),),
        "oedematous mass": (("mass", "mass"), ("oedema", "surrounding oedema")),
        "haemorrhage": (("blood core", "core"), ("blood rim", "rim")),
    }[case.diagnosis]
    fluid, grey = (case.look(tissue) for tissue in ("cerebrospinal fluid", "grey matter"))
    return TissueSignalCharacteristics(
        normal_signal_appearance=f"{fluid} fluid, {grey} cortex",
        abnormal_signal_patterns=", ".join(f"{case.look(part)} {name}" for part, name in parts),
        symmetry_and_structural_integrity=_symmetry(case),
    )


def _symmetry(case: Case) -> str:
    if case.diagnosis == NORMAL:
        return "no focal asymmetry"
    if case.side in ("left", "right"):
        return f"{case.side}-sided lesion" + (" with local mass effect" if case.pushes_brain else "")
    return "bilateral lesions" if case.side == "bilateral" else "midline lesion"


def _pathology(case: Case) -> PathologicalFindings:
    if case.diagnosis == "old infarct":
        return PathologicalFindings(structural_abnormalities=f"{case.size_mm} mm old infarct in the {case.place}")
    if case.diagnosis == "demyelinating disease":
        plaques = f"{len(case.lesions)} {case.side} periventricular plaques up to {case.size_mm} mm"
        return PathologicalFindings(signal_abnormalities_or_fluid_collections=plaques)
    if case.diagnosis == "haemorrhage":
        bleed = f"{case.size_mm} mm haemorrhage in the {case.place}"
        return PathologicalFindings(signal_abnormalities_or_fluid_collections=bleed)
    if case.diagnosis == "oedematous mass":
        mass = f"{case.size_mm} mm mass with oedema in the {case.place}"
        return PathologicalFindings(masses_or_suspicious_lesions=mass)
    return PathologicalFindings()
