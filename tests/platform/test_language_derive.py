"""Every statement of a derived description is true of the volume that it is derived from."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from omnimri.models.vocabulary import CONTRASTS
from omnimri.platform.corpus.anatomy import load_template
from omnimri.platform.corpus.patient import Patient, Simulated, simulate
from omnimri.platform.corpus.truth import LABEL_NAMES
from omnimri.platform.language.derive import Known, derive, quality_words, sequence_words
from omnimri.platform.language.description import Description
from omnimri.platform.language.words import finding_field, plain_name, side_of, signal_word, structure_kind
from tests.platform.language_cases import (
    FINDINGS,
    NAMES,
    ORIENTATIONS,
    Stored,
    lesions_of,
    mirrored,
    random_case,
    stored_as,
    true_extent_mm,
    true_sides,
    true_site,
)

SEEDS = range(24)


def findings_of(description: Description) -> dict[str, str]:
    """Name to what is said of it."""
    phrases = "; ".join(filter(None, description.pathological_findings.model_dump().values()))
    return dict(phrase.split(": ", 1) for phrase in phrases.split("; ")) if phrases else {}


def sides_in(phrase: str) -> Counter[str]:
    """Side to the number of lesions that a phrase puts there."""
    count = int(re.match(r"(\d+) lesions?", phrase)[1])
    if listed := re.search(r"\((.*?)\)", phrase):
        return Counter({side: int(number) for number, side in (part.split() for part in listed[1].split(", "))})
    found = re.search(r", (left|right|midline),", phrase)
    return Counter({found[1]: count}) if found else Counter()


def number_before(unit: str, phrase: str) -> float:
    return float(re.search(rf"([\d.e-]+) {unit}\b", phrase)[1])


def swapped(text: str) -> str:
    """Left and right exchanged."""
    return re.sub(r"left|right", lambda side: {"left": "right", "right": "left"}[side[0]], text)


@pytest.mark.parametrize("seed", SEEDS)
def test_presence_count_side_size_and_volume_are_true(seed: int) -> None:
    case = random_case(seed)
    stated = findings_of(derive(case.known())[0])
    voxel_ml = abs(np.linalg.det(case.affine[:3, :3])) / 1000
    for value, name in FINDINGS.items():
        lesions = lesions_of(case, value)
        assert (name in stated) == bool(lesions)
        if not lesions:
            continue
        phrase = stated[name]
        assert int(phrase.split()[0]) == len(lesions)
        assert sides_in(phrase) == Counter(true_sides(case, value))
        assert number_before("mm", phrase) == pytest.approx(true_extent_mm(case, value), abs=0.51)
        assert number_before("mL", phrase) == pytest.approx(sum(map(len, lesions)) * voxel_ml, rel=0.051)
    assert set(stated) <= set(FINDINGS.values())


def test_the_cases_have_lesions_on_both_sides_and_in_the_middle() -> None:
    cases = [random_case(seed) for seed in SEEDS]
    sides = Counter(side for case in cases for value in FINDINGS for side in true_sides(case, value))
    assert min(sides[side] for side in ("left", "right", "midline")) >= 5
    assert any(not lesions_of(case, 3) and not lesions_of(case, 4) for case in cases)


@pytest.mark.parametrize("seed", SEEDS)
def test_mirroring_exchanges_the_sides_and_nothing_else(seed: int) -> None:
    case = random_case(seed)
    (description, origin), (mirror, mirror_origin) = derive(case.known()), derive(mirrored(case).known())
    assert mirror_origin == origin
    for (key, phrase), (_, other) in zip(description.filled(), mirror.filled(), strict=True):
        # Lists name the left side first.
        assert sorted(re.findall(r"[^\s,()]+", swapped(other))) == sorted(re.findall(r"[^\s,()]+", phrase)), key
    for name, phrase in findings_of(description).items():
        assert sides_in(swapped(findings_of(mirror)[name])) == sides_in(phrase)


@pytest.mark.parametrize("seed", [0, 2])
def test_storage_changes_nothing(seed: int) -> None:
    case = random_case(seed)
    expected = derive(case.known())
    assert findings_of(expected[0])
    for order, signs in ORIENTATIONS:
        assert derive(stored_as(case, order, signs).known()) == expected, (order, signs)


@pytest.mark.parametrize("seed", SEEDS)
def test_only_names_that_have_voxels_are_named(seed: int) -> None:
    case = random_case(seed)
    rng = np.random.default_rng(seed)
    removed = rng.choice(list(NAMES), size=2, replace=False)
    case = Stored(np.where(np.isin(case.labels, removed), 0, case.labels).astype(np.uint8), case.image, case.affine)
    text = derive(case.known())[0].model_dump_json()
    for value, name in NAMES.items():
        if not (case.labels == value).any() or not (structure_kind(name) or finding_field(name)):
            assert name not in text


@pytest.mark.parametrize("seed", SEEDS)
def test_signal_words_hold_in_the_image(seed: int) -> None:
    case = random_case(seed)
    description, _ = derive(case.known())
    # The image of a case gives each label one brightness, within 5 %.
    brightness = {"white matter": 100, "grey matter": 70, "demyelinating plaque": 140, "haemorrhage": 40}
    for phrase in filter(None, description.tissue_signal_characteristics.abnormal_signal_patterns.split(", ")):
        name, word, reference = re.fullmatch(r"(.+) (\w+intense) to (.+)", phrase).groups()
        assert word == signal_word(brightness[name] / brightness[reference])
    assert description.tissue_signal_characteristics.normal_signal_appearance == (
        "grey matter hypointense to white matter"
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_what_surrounds_a_lesion_is_most_of_what_is_near(seed: int) -> None:
    case = random_case(seed)
    stated = findings_of(derive(case.known())[0])
    for value, name in FINDINGS.items():
        if name in stated:
            site = re.search(r", surrounded mostly by (.+)$", stated[name])
            assert (site[1] if site else "") == true_site(case, value)


def test_nothing_is_said_of_signal_in_a_map_or_without_normal_tissue() -> None:
    case = random_case(2)
    quantitative, _ = derive(case.known(facts={"quantitative": True, "quantity": "T2"}))
    assert not any(quantitative.tissue_signal_characteristics.model_dump().values())
    assert quantitative.image_modality_sequence.sequence == "quantitative T2 map"
    alone = Stored(np.where(np.isin(case.labels, [3, 4]), case.labels, 0).astype(np.uint8), case.image, case.affine)
    description, _ = derive(alone.known())
    assert not any(description.tissue_signal_characteristics.model_dump().values())
    assert findings_of(description)
    assert not re.search("left|right|midline|surrounded", description.model_dump_json())


def test_side_is_not_told_in_an_organ_that_lies_on_one_side() -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[2:18, 2:18, 2:18] = 1
    labels[8:11, 8:11, 3:6] = 2
    for organ, side in (("liver", None), ("prostate", "left"), ("left kidney", None)):
        known = Known(
            image=np.ones(labels.shape), affine=np.diag([3.0, 3, 3, 1]), label_map=labels,
            label_names={1: organ, 2: "tumour"},
        )  # fmt: skip
        phrase = findings_of(derive(known)[0])["tumour"]
        assert dict(sides_in(phrase)) == ({side: 1} if side else {})
        assert phrase.endswith(f"surrounded mostly by {organ}")
        assert "9 mm along image axes, 0.73 mL" in phrase


def test_side_is_not_told_where_half_of_the_brain_is_missing() -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[2:18, 2:18, 2:18] = 1
    labels[8:11, 8:11, 3:6] = 2
    for shown, name, side in ((labels, "white matter", "left"), (labels[..., :9], "white matter", None),
                              (labels, "left white matter", None)):  # fmt: skip
        known = Known(
            image=np.ones(shown.shape), affine=np.diag([3.0, 3, 3, 1]), label_map=shown,
            label_names={1: name, 2: "haemorrhage"},
        )  # fmt: skip
        assert dict(sides_in(findings_of(derive(known)[0])["haemorrhage"])) == ({side: 1} if side else {})


def test_specks_are_no_lesions_and_separate_labels_of_one_name_are_counted_apart() -> None:
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[0, 0, 0:2] = 1
    labels[4:6, 4, 4] = labels[4:6, 5, 4] = 2
    labels[4:6, 6, 4] = labels[4:6, 7, 4] = 3
    known = Known(
        image=np.ones(labels.shape), affine=np.eye(4), label_map=labels,
        label_names={1: "cyst", 2: "lesion", 3: "lesion 2"},
    )  # fmt: skip
    assert findings_of(derive(known)[0]) == {"lesion": "2 lesions, up to 2 mm along image axes, 0.008 mL in total"}


def test_boxes_are_counted_as_boxes() -> None:
    boxes = [{"label": "Meniscus Tear", "side": None, "box_voxel": [z, 2, 3, z + 1, 6, 13]} for z in (4, 5)]
    boxes += [{"label": "old infarct", "side": "left", "box_voxel": [1, 2, 0, 3, 5, 4]},
              {"label": "something new", "side": "left", "box_voxel": [1, 2, 0, 3, 5, 4]}]  # fmt: skip
    known = Known(image=np.ones((9, 20, 20)), affine=np.diag([0.5, 0.5, 3, 1]), boxes=boxes)
    description, origin = derive(known)
    assert description.pathological_findings.structural_abnormalities == (
        "meniscus tear: marked by 2 boxes, up to 5 mm along image axes; "
        "old infarct: marked by 1 box, left, 2 mm along image axes"
    )
    assert origin["pathological_findings.structural_abnormalities"] == "label"
    assert "something new" not in description.model_dump_json()


@pytest.mark.parametrize(
    ("label", "kind", "field"),
    [
        ("Vertebra 12", "bone", None),
        ("kidney_right", "organ", None),
        ("left atrium", "space", None),
        ("left optic radiation", "vessel, nerve or ligament", None),
        ("intervertebral disc 3", "joint", None),
        ("cerebrospinal fluid", "space", None),
        ("gluteus_maximus_left", "soft tissue", None),
        ("tumour label 2", None, None),
        ("something new", None, None),
        ("lesion 2", None, "masses_or_suspicious_lesions"),
        ("clinically significant prostate cancer", None, "masses_or_suspicious_lesions"),
        ("surrounding non-enhancing FLAIR hyperintensity", None, "signal_abnormalities_or_fluid_collections"),
        ("Nonspecific white matter lesion", None, "signal_abnormalities_or_fluid_collections"),
        ("Cartilage - Partial Thickness loss/defect", None, "structural_abnormalities"),
        ("chronic stroke lesion", None, "structural_abnormalities"),
    ],
)
def test_names_of_the_catalogue_are_known_for_what_they_are(label: str, kind: str | None, field: str | None) -> None:
    assert structure_kind(plain_name(label)) == kind
    assert finding_field(plain_name(label)) == field


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"contrast": "T1w", "acquisition_type": "3D", "contrast_agent": True}, "3D T1-weighted, with contrast agent"),
        ({"contrast": "FLAIR", "contrast_agent": False}, "FLAIR, without contrast agent"),
        ({"contrast": "T2w", "quantitative": True, "quantity": "ADC"}, "quantitative ADC map"),
        ({"contrast": None, "acquisition_type": None, "contrast_agent": None}, ""),
        ({}, ""),
    ],
)
def test_sequence_in_words(facts: dict[str, object], words: str) -> None:
    assert sequence_words(facts) == words


def test_quality_is_told_only_where_it_was_measured() -> None:
    assert quality_words({"snr": None}, []) == ""
    assert quality_words({"snr": 50.0}, ["defaced: x"]) == "good signal-to-noise ratio"
    assert quality_words({"snr": 3.0, "ghosting": 0.4}, ["ghosting", "low SNR"]) == (
        "low signal-to-noise ratio, ghosting"
    )


def test_side_of_the_patient() -> None:
    assert [side_of(x) for x in (-30.0, 30.0, 1.0)] == ["left", "right", "midline"]


def test_an_empty_row_says_only_that_it_is_mri() -> None:
    description, origin = derive(Known(image=np.ones((2, 3, 4)), affine=np.eye(4)))
    assert dict(description.filled()) == {"image_modality_sequence.modality": "MRI"}
    assert origin == {"image_modality_sequence.modality": "header"}


def test_classes_win_over_the_report() -> None:
    plain = {"image": np.ones((2, 3, 4)), "affine": np.eye(4)}
    report = "Findings: A plaque. Impression: No haemorrhage. Old infarct, rule out tumour. Recommendation: None."
    description, origin = derive(Known(**plain, classes=["old infarct"], report=report))
    assert description.diagnostic_impression.suggestive_of == "old infarct"
    assert origin["diagnostic_impression.suggestive_of"] == "label"
    description, origin = derive(Known(**plain, classes=[], report=report))
    assert description.diagnostic_impression.suggestive_of == "Old infarct"
    assert origin["diagnostic_impression.suggestive_of"] == "report"
    assert not description.diagnostic_impression.recommendation
    assert not description.diagnostic_impression.severity_or_grading


@pytest.fixture(scope="module")
def patients() -> list[Simulated]:
    template = load_template()
    drawn = [Patient.draw(index, 11) for index in range(10)]
    return [simulate(p, template, (14, 80, 72), (9.0, 2.6, 2.6), 1) for p in drawn]


def test_the_built_in_corpus_agrees_in_side_count_and_size(patients: list[Simulated]) -> None:
    for simulated in patients:
        known = Known(
            image=np.ones(simulated.labels.shape), affine=simulated.grid.affine, label_map=simulated.labels,
            label_names=LABEL_NAMES, facts={"contrast": CONTRASTS[0]},
        )  # fmt: skip
        stated = findings_of(derive(known)[0])
        assert set(stated) == {lesion.label for lesion in simulated.lesions}
        for phrase in stated.values():
            assert sides_in(phrase) == Counter(lesion.side for lesion in simulated.lesions)
            assert number_before("mm", phrase) == max(lesion.size_mm for lesion in simulated.lesions)
    assert sum(len(simulated.lesions) > 1 for simulated in patients) >= 2
