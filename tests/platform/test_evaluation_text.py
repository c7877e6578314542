"""The report labeller: negation, scope, side, and the counts made from its labels."""

import numpy as np
import pytest

from omnimri.models.vocabulary import CONTRASTS, FINDINGS
from omnimri.platform.corpus.language import Case, write_report
from omnimri.platform.corpus.lesions import FINDING_OF
from omnimri.platform.corpus.signal import RELAXATION
from omnimri.platform.corpus.truth import Lesion
from omnimri.platform.evaluation.text import UNSTATED, compare_reports, label_text


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("No haemorrhage.", set()),
        ("There is no haemorrhage, mass or old infarct.", set()),
        ("Brain of normal appearance without mass or haemorrhage.", set()),
        ("Haemorrhage is not seen. Infarction was excluded.", set()),
        ("No focal lesion. Diagnosis: normal.", set()),
        ("Follow-up to exclude haemorrhage.", set()),
        ("No mass effect.", set()),
        ("Mild mass effect is seen.", set()),
        ("Findings favour demyelination rather than haemorrhage.", {("demyelinating plaque", UNSTATED)}),
        ("Haemorrhage cannot be excluded.", {("haemorrhage", UNSTATED)}),
        ("No change in the left frontal haemorrhage.", {("haemorrhage", "left")}),
        ("Old infarct in the left hemisphere.", {("old infarct", "left")}),
        ("Right hematoma without mass.", {("haemorrhage", "right")}),
        ("No haemorrhage, but an oedematous mass in the right frontal lobe.", {("oedematous mass", "right")}),
        ("No haemorrhage, there is an old infarct on the right.", {("old infarct", "right")}),
        (
            "Demyelinating plaques in the left and right periventricular white matter.",
            {("demyelinating plaque", "left"), ("demyelinating plaque", "right")},
        ),
        (
            "Bilateral plaques. Impression: demyelinating disease.",
            {("demyelinating plaque", "left"), ("demyelinating plaque", "right")},
        ),
        (
            "Left frontal infarct and right parietal mass.",
            {("old infarct", "left"), ("oedematous mass", "right")},
        ),
        (
            "An old infarct in the left and a haemorrhage in the right hemisphere.",
            {("old infarct", "left"), ("haemorrhage", "right")},
        ),
        ("In the left thalamus, a well-defined cavity, consistent with an old infarct.", {("old infarct", "left")}),
        ("Oedematous mass. It measures 30 mm.", {("oedematous mass", UNSTATED)}),
        ("", set()),
    ],
)
def test_labels_of_a_sentence(text: str, labels: set[tuple[str, str]]) -> None:
    assert label_text(text) == labels


def test_a_stated_side_replaces_the_same_finding_without_one() -> None:
    text = "Findings: haemorrhage in the left temporal lobe. No mass.\nImpression: haemorrhage."
    assert label_text(text) == {("haemorrhage", "left")}


def test_a_wrong_side_is_no_match_but_no_hallucination_either() -> None:
    counts = compare_reports("Old infarct on the left. No haemorrhage.", "Old infarct on the right. No haemorrhage.")
    assert (counts.matched, counts.predicted, counts.reference) == (0, 1, 1)
    assert counts.supported_findings == counts.predicted_findings == counts.reference_findings == 1
    assert not counts.agrees


def test_an_invented_finding_is_unsupported_and_a_missed_one_omitted() -> None:
    counts = compare_reports("Old infarct on the left.", "Haemorrhage on the left.")
    assert counts.supported_findings == 0
    assert (counts.predicted_findings, counts.reference_findings) == (1, 1)


def test_two_normal_reports_agree() -> None:
    assert compare_reports("No haemorrhage.", "Normal brain, no mass.").agrees


_DIAGNOSIS_OF = {finding: diagnosis for diagnosis, finding in FINDING_OF.items()}


def _case(finding: str | None, contrast: str, *sides: str) -> Case:
    box = (0, 0, 0, 2, 8, 8)
    lesions = [Lesion(label=str(finding), side=s, region="frontal lobe", box_voxel=box, size_mm=16) for s in sides]
    return Case(
        diagnosis=_DIAGNOSIS_OF[finding], lesions=lesions, contrast=contrast, sequence_kind="spin echo",
        field_strength_t=3.0, brightness=dict.fromkeys(RELAXATION[3.0], 1.3), snr=30.0,
        has_wide_ventricles=False, pushes_brain=finding in ("oedematous mass", "haemorrhage"),
    )  # fmt: skip


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("finding", FINDINGS)
def test_reports_of_the_built_in_corpus_are_read_as_they_were_meant(finding: str, side: str, contrast: str) -> None:
    for seed in range(8):
        report = write_report(_case(finding, contrast, side), np.random.default_rng(seed))
        assert label_text(report) == {(finding, side)}


def test_plaques_on_both_sides_and_normal_reports_of_the_built_in_corpus() -> None:
    rng, plaques = np.random.default_rng(0), _case("demyelinating plaque", "FLAIR", "right", "left")
    expected = {("demyelinating plaque", side) for side in ("left", "right")}
    assert label_text(write_report(plaques, rng)) == expected
    assert not any(label_text(write_report(_case(None, "T2w"), rng)) for _ in range(8))
