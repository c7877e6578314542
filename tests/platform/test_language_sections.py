"""Sections of reports, sentences, and what is affirmed, negated or uncertain in them."""

from __future__ import annotations

import numpy as np
import pytest

from omnimri.models.vocabulary import DIAGNOSES
from omnimri.platform.corpus.language import Case, write_report
from omnimri.platform.corpus.truth import Lesion
from omnimri.platform.language.sections import Sections, affirmed, sentences, split_sections, statements

REPORTS = {
    "inline": (
        "Technique: Axial T2. Findings: A mass. No oedema. Impression: Mass. Recommendation: Biopsy.",
        Sections(technique="Axial T2.", findings="A mass. No oedema.", impression="Mass.", recommendation="Biopsy."),
    ),
    "capitals on lines of their own": (
        "MRI BRAIN\n\nCLINICAL HISTORY\nRule out stroke.\n\nFINDINGS\nNo infarct.\nOld bleed.\n\n"
        "IMPRESSION\n1. Old bleed.",
        Sections(
            findings="No infarct.\nOld bleed.",
            impression="1. Old bleed.",
            history="Rule out stroke.",
            other="MRI BRAIN",
        ),
    ),
    "another order": (
        "Conclusion: Normal study.\nFindings: Normal.\nProtocol: T1, T2.",
        Sections(impression="Normal study.", findings="Normal.", technique="T1, T2."),
    ),
    "marked down": (
        "**Findings:** A cyst.\n**Impression:** Cyst.",
        Sections(findings="A cyst.", impression="Cyst."),
    ),
    "twice": ("Findings: A.\nImpression: B.\nFindings: C.", Sections(findings="A.\nC.", impression="B.")),
    "no heading": ("Old infarct. The findings are stable.", Sections(other="Old infarct. The findings are stable.")),
    "nothing": ("", Sections()),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTS)
def test_sections(name: str) -> None:
    report, expected = REPORTS[name]
    assert split_sections(report) == expected


def test_a_heading_in_the_middle_of_a_sentence_is_none() -> None:
    text = "Findings: These findings: a mass. See the impression below. My impression is of a mass."
    assert (
        split_sections(text).findings == "These findings: a mass. See the impression below. My impression is of a mass."
    )


@pytest.mark.parametrize("diagnosis", DIAGNOSES)
def test_reports_of_the_built_in_corpus_are_split_and_read(diagnosis: str) -> None:
    lesion = Lesion(label="x", side="left", region="frontal lobe", box_voxel=(0, 0, 0, 1, 1, 1), size_mm=12)
    parts = ("cavity", "gliosis", "plaque", "mass", "oedema", "blood core", "blood rim")
    case = Case(
        diagnosis=diagnosis, lesions=[] if diagnosis == "normal" else [lesion], contrast="T2w",
        sequence_kind="spin echo", field_strength_t=3.0, brightness=dict.fromkeys(parts, 1.5), snr=40,
        has_wide_ventricles=False, pushes_brain=False,
    )  # fmt: skip
    for seed in range(5):
        report = write_report(case, np.random.default_rng(seed))
        sections = split_sections(report)
        assert all((sections.technique, sections.findings, sections.impression, sections.recommendation))
        assert not sections.other
        [said] = affirmed(sections.impression)
        word = {"normal": "Normal", "demyelinating disease": "plaques"}.get(diagnosis, diagnosis)
        assert word.lower() in said.lower()
        # The line of what is absent names the other findings, and none of them may count.
        absent = {"normal": "infarct", "old infarct": "mass"}.get(diagnosis, "infarct")
        assert not any(absent in line.lower() for line in affirmed(sections.findings))


def test_sentences_end_where_they_end() -> None:
    text = "1. Old infarct, 3.5 mm.\n2. No mass.\n- Small cyst that\ngoes on. Seen by Dr. Who today. At 1.5 T vs. 3 T!"
    text += "\n\nEnd"
    assert sentences(text) == [
        "Old infarct, 3.5 mm", "No mass", "Small cyst that goes on", "Seen by Dr. Who today", "At 1.5 T vs. 3 T", "End",
    ]  # fmt: skip


N, A, U = "negated", "affirmed", "uncertain"


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("No evidence of infarct, mass or haemorrhage", [("infarct, mass or haemorrhage", N)]),
        ("Old infarct without haemorrhage", [("Old infarct", A), ("haemorrhage", N)]),
        ("A mass is not seen", [("A mass", N)]),
        ("Rule out metastasis", [("metastasis", U)]),
        ("Haemorrhage cannot be excluded", [("Haemorrhage", U)]),
        ("Haemorrhage is ruled out", [("Haemorrhage", N)]),
        ("No mass but a 3.5 mm cyst", [("mass", N), ("a 3.5 mm cyst", A)]),
        ("Cyst, no mass; stable infarct", [("Cyst", A), ("mass", N), ("stable infarct", A)]),
        ("No change in the left mass", [("No change in the left mass", A)]),
        ("Infarct due to embolism", [("Infarct due to embolism", A)]),
        ("There is no abnormal enhancement", [("enhancement", N)]),
        ("Plaques, suggestive of demyelinating disease", [("Plaques, suggestive of demyelinating disease", A)]),
        ("Possible glioma", [("glioma", U)]),
        ("Glioma is unlikely", [("Glioma", N)]),
        ("Neither infarct nor haemorrhage", [("infarct", N), ("haemorrhage", N)]),
        ("Normal ventricles; no hydrocephalus, however there is atrophy",
         [("Normal ventricles", A), ("hydrocephalus", N), ("atrophy", A)]),
        ("NO FOCAL LESION", [("FOCAL LESION", N)]),
        ("Nodule in the node", [("Nodule in the node", A)]),
        ("", []),
    ],
)  # fmt: skip
def test_negation(sentence: str, expected: list[tuple[str, str]]) -> None:
    assert [(said.text, said.certainty) for said in statements(sentence)] == expected


def test_only_what_is_sure_is_affirmed() -> None:
    text = "1. Old infarct of the left frontal lobe.\n2. No haemorrhage.\n3. Metastasis cannot be ruled out."
    assert affirmed(text) == ["Old infarct of the left frontal lobe"]
