"""The report labeller: negation, scope, side, and the counts made from its labels."""

import numpy as np
import pytest

from omnimri.models.vocabulary import FINDINGS, SIDES
from omnimri.platform.corpus.language import Lesion, write_report
from omnimri.platform.corpus.signal import PROTOCOLS
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


def _lesion(label: str, side: str) -> Lesion:
    return Lesion(label=label, side=side, region="frontal lobe", box_voxel=(0, 0, 0, 2, 8, 8), extent_mm=16)


@pytest.mark.parametrize("contrast", list(PROTOCOLS))
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("finding", FINDINGS)
def test_reports_of_the_built_in_corpus_are_read_as_they_were_meant(finding: str, side: str, contrast: str) -> None:
    report = write_report([_lesion(finding, side)], PROTOCOLS[contrast], 3.0, np.random.default_rng(0))
    assert label_text(report) == {(finding, side)}


def test_plaques_on_both_sides_and_normal_reports_of_the_built_in_corpus() -> None:
    rng, protocol = np.random.default_rng(0), PROTOCOLS["FLAIR"]
    plaques = [_lesion("demyelinating plaque", side) for side in ("right", "left")]
    assert label_text(write_report(plaques, protocol, 1.5, rng)) == {(p.label, p.side) for p in plaques}
    assert not any(label_text(write_report([], protocol, 3.0, rng)) for _ in range(8))
