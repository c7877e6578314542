"""Contradictions that are planted are found, each as what it is; true descriptions raise none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnimri.models.vocabulary import CONTRASTS, DIAGNOSES, FINDINGS, LESION, NORMAL, PLANES
from omnimri.platform.annotation.check_words import LESION_WORDS, SEEN_IN, any_number, plain_spelling
from omnimri.platform.annotation.checks import Contradiction, contradictions
from omnimri.platform.data.catalogue.entries import catalogue, find_dataset
from omnimri.platform.data.formats.facts import BODY_PARTS
from omnimri.platform.data.schema import FACTS, unpack_array
from omnimri.platform.language.derive import Known, derive
from omnimri.platform.language.measure import LabelledVolume
from omnimri.platform.language.words import CONTRASTS_IN_WORDS, FINDING_NOUNS
from tests.platform.annotation_rows import TrueRow, corpus_rows
from tests.platform.catalogue_fixtures import FIXTURES, write_fixture
from tests.platform.language_cases import ORIENTATIONS, mirrored, random_case, stored_as
from tests.platform.test_catalogue import read_as

LEVEL2 = "visible_anatomical_structures.organs_or_central_structures"
NORMAL_SIGNAL = "tissue_signal_characteristics.normal_signal_appearance"
ABNORMAL_SIGNAL = "tissue_signal_characteristics.abnormal_signal_patterns"
MASSES = "pathological_findings.masses_or_suspicious_lesions"
IMPRESSION = "diagnostic_impression.suggestive_of"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[TrueRow]:
    """Twenty-five patients in four contrasts each."""
    return list(corpus_rows(tmp_path_factory.mktemp("corpus"), num_patients=25, seed=7))


def found(text: str, known: Known, field: str = MASSES) -> list[str]:
    """Kinds of what contradicts."""
    return [contradiction.kind for contradiction in contradictions({field: text}, known)]


def knowing(*, labels: np.ndarray | None = None, names: dict[int, str] | None = None, **more: Any) -> Known:
    facts = {name: more.pop(name) for name in FACTS if name in more}
    return Known(
        image=np.ones((4, 8, 8)), affine=np.eye(4), facts=facts, label_map=labels, label_names=names or {}, **more
    )


@pytest.mark.slow
def test_the_true_descriptions_of_the_built_in_corpus_contradict_nothing(rows: list[TrueRow]) -> None:
    assert len(rows) >= 100
    assert {row.known.classes[0] for row in rows} == set(DIAGNOSES)
    assert {row.known.facts["contrast"] for row in rows} == set(CONTRASTS)
    sides = Counter(side for row in rows for box in row.known.boxes for side in [box["side"]])
    assert min(sides["left"], sides["right"]) >= 20
    for row in rows:
        assert contradictions(row.fields, row.known) == []
        assert contradictions(dict(derive(row.known)[0].filled()), row.known) == []
        findings = row.known.report.partition("Recommendation:")[0]
        assert contradictions({IMPRESSION: findings}, row.known) == []


@pytest.mark.parametrize("name", catalogue())
def test_derived_descriptions_and_label_names_of_public_sets_contradict_nothing(name: str, tmp_path: Path) -> None:
    for row in read_as(write_fixture(FIXTURES[name], tmp_path), find_dataset(name))[0]:
        known = Known(
            image=unpack_array(row["image"]), affine=np.reshape(row["affine"], (4, 4)), boxes=row["boxes"],
            facts={fact: row[fact] for fact in FACTS}, label_map=unpack_array(row["label_map"]),
            label_names=dict(row["label_names"] or {}), classes=row["classes"], report=row["report"],
        )  # fmt: skip
        assert contradictions(dict(derive(known)[0].filled()), known) == []
        # Whatever a set has labels for can be seen in its body part.
        unlabelled = replace(known, facts={"body_part": row["body_part"], "sex": row["sex"]}, label_map=None)
        listed = {LEVEL2: ", ".join(known.label_names.values()).replace("_", " ")}
        assert [c for c in contradictions(listed, unlabelled) if c.kind == "anatomy"] == []


@pytest.mark.parametrize("seed", range(24))
def test_derived_descriptions_hold_in_any_orientation_and_not_in_the_mirror(seed: int) -> None:
    case = random_case(seed)
    fields = dict(derive(case.known())[0].filled())
    for order, signs in ORIENTATIONS[seed % 6 :: 6]:
        assert contradictions(fields, stored_as(case, order, signs).known()) == []
    wrong = contradictions(fields, mirrored(case).known())
    assert {contradiction.kind for contradiction in wrong} <= {"side"}
    volume = LabelledVolume(case.labels, case.known().label_names, case.affine, case.image)
    turned = [lesions for lesions in volume.lesions() if set(lesions.sides) in ({"left"}, {"right"})]
    assert len(wrong) == len(turned)


Plant = tuple[Known, str, str]
"""What is known, the phrase, its kind."""


def _pick(rng: np.random.Generator, options: Any) -> Any:
    ordered = sorted(options)
    return ordered[int(rng.integers(len(ordered)))]


def _plane(row: TrueRow, rng: np.random.Generator) -> Plant:
    plane = _pick(rng, set(PLANES) - {row.known.facts["plane"]})
    said = _pick(rng, ["{} image", "seen on {} slices", "this is a {} view", "{} MRI of the head", "{}ly acquired"])
    return row.known, said.format(plane), "plane"


def _contrast(row: TrueRow, rng: np.random.Generator) -> Plant:
    contrast = _pick(rng, set(CONTRASTS) - {row.known.facts["contrast"]})
    name = _pick(rng, {CONTRASTS_IN_WORDS[contrast], {"PD": "PDw"}.get(contrast, contrast)})
    said = _pick(rng, ["{} image", "typical of a {} sequence", "as expected on {} images", "{} MRI"])
    return row.known, said.format(name), "contrast"


def _agent(row: TrueRow, rng: np.random.Generator) -> Plant:
    given = bool(rng.integers(2))
    known = replace(row.known, facts={**row.known.facts, "contrast_agent": given})
    with_agent = ["post-contrast image", "avid enhancement of the vessels", "enhancing choroid plexus",
                  "after gadolinium"]  # fmt: skip
    without = ["without contrast agent", "non-contrast image", "pre-contrast image", "no intravenous contrast"]
    return known, _pick(rng, without if given else with_agent), "contrast agent"


def _anatomy(row: TrueRow, rng: np.random.Generator) -> Plant:
    structure = _pick(rng, {name for name, parts in SEEN_IN.items() if "brain" not in parts})
    said = _pick(rng, ["{}", "the {} is seen", "left {} of normal shape", "intact {}", "{} and adjacent fat"])
    return row.known, said.format(structure), "anatomy"


def _absent_structure(row: TrueRow, rng: np.random.Generator) -> Plant:
    name = _pick(rng, ["hippocampus", "amygdala", "hippocampus_left", "corpus callosum", "pituitary"])
    known = replace(row.known, label_names={**row.known.label_names, 200: name})
    said = _pick(rng, ["{}", "the {} is seen", "{} of normal shape"])
    return known, said.format(" ".join(reversed(name.split("_")))), "absent structure"


def _lesion(row: TrueRow, rng: np.random.Generator) -> Plant:
    """A lesion in a healthy head, or of another kind than the one that is labelled."""
    nouns = {"infarct", "lacune", "demyelinating plaques", "mass", "tumour", "haemorrhage", "hematoma", "metastases"}
    if row.known.classes == [NORMAL]:
        nouns |= {"lesion", "cyst", "aneurysm", "hyperintensities", "oedema", "abnormality", "glioma", "nodules"}
    kinds = [kind for kind in FINDINGS if row.known.classes[0] in (kind, "demyelinating disease")]
    own = LESION_WORDS[FINDINGS[1] if row.known.classes[0] == "demyelinating disease" else kinds[0]] if kinds else "$^"
    noun = _pick(rng, {noun for noun in nouns if not re.search(own, plain_spelling(noun))})
    said = _pick(rng, ["{} in the left frontal lobe", "large {}", "there is a {} near the vertex",
                       "two small {} of the white matter", "findings consistent with {}"])  # fmt: skip
    return row.known, said.format(noun), "lesion"


def _denied_lesion(row: TrueRow, rng: np.random.Generator) -> Plant | None:
    if row.known.classes == [NORMAL]:
        return None
    said = ["no focal lesion", "no lesion is seen", "without abnormality", f"no {row.known.boxes[0]['label']}",
            "lesions: none"]  # fmt: skip
    return row.known, _pick(rng, said), "denied lesion"


def _side(row: TrueRow, rng: np.random.Generator) -> Plant | None:
    sides = {box["side"] for box in row.known.boxes}
    if sides not in ({"left"}, {"right"}):
        return None
    name, side = row.known.boxes[0]["label"], "right" if sides == {"left"} else "left"
    said = ["{side}-sided {name}", "{name} in the {side} hemisphere", "{name}: 1 lesion, {side}",
            "the {side} frontal lobe shows a {name}", "{side} parietal lesion"]  # fmt: skip
    return row.known, _pick(rng, said).format(name=name, side=side), "side"


def _count(row: TrueRow, rng: np.random.Generator) -> Plant:
    count = len(row.known.boxes)
    if not count:
        return _lesion(row, rng)
    others = [
        number for number in (1, 2, 3, 8, 12, 20) if abs(number - count) > 1 and not count / 2 < number < 2 * count
    ]
    said = _pick(rng, ["{} lesions", "{} small focal lesions", "{name}: {} lesions"])
    return row.known, said.format(_pick(rng, others), name=row.known.boxes[0]["label"]), "count"


def _signal(row: TrueRow, rng: np.random.Generator) -> Plant | None:
    volume = LabelledVolume(row.known.label_map, row.known.label_names, row.known.affine, row.known.image)
    lesions = [lesion for lesion in volume.lesions() if lesion.signal in ("hypointense", "hyperintense")]
    fluid = volume.signals("white matter", ["cerebrospinal fluid"])
    known = [(name, signal) for name, signal in fluid.items() if signal != "isointense"]
    known += [(lesion.name, lesion.signal) for lesion in lesions] * 3
    if not known:
        return None
    name, signal = known[int(rng.integers(len(known)))]
    other = _pick(rng, {"hypointense": ["hyperintense", "bright", "increased signal of the"],
                        "hyperintense": ["hypointense", "dark", "low signal of the"]}[signal])  # fmt: skip
    return row.known, f"{other} {name}", "signal"


def _modality(row: TrueRow, rng: np.random.Generator) -> Plant:
    return row.known, _pick(rng, ["axial CT of the head", "hypodense white matter", "hyperdense vessels"]), "modality"


PLANTERS: dict[str, Callable[[TrueRow, np.random.Generator], Plant | None]] = {
    "plane": _plane, "contrast": _contrast, "contrast agent": _agent, "anatomy": _anatomy, "lesion": _lesion,
    "absent structure": _absent_structure, "denied lesion": _denied_lesion, "side": _side, "count": _count,
    "signal": _signal, "modality": _modality,
}  # fmt: skip
NUM_PLANTS = 60


def _planted(row: TrueRow, phrase: str, rng: np.random.Generator) -> tuple[dict[str, str], str]:
    """The true words of levels 2 to 5 with a phrase put between two of them, in any field or in an empty one."""
    fields = {name: text for name, text in row.fields.items() if not name.startswith("image_modality_sequence.")}
    places = {*fields, MASSES, ABNORMAL_SIGNAL} - {"diagnostic_impression.recommendation"}
    field = _pick(rng, places)
    items = fields[field].split(", ") if field in fields else []
    place = int(rng.integers(len(items) + 1))
    joint = _pick(rng, [", ", "; ", ", and ", ". "]) if items else ""
    before, after = ", ".join(items[:place]), ", ".join(items[place:])
    return {**fields, field: joint.join(filter(None, (before, phrase, after)))}, field


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANTERS)
def test_every_planted_contradiction_is_found_in_its_field_as_its_kind(kind: str, rows: list[TrueRow]) -> None:
    rng = np.random.default_rng([11, list(PLANTERS).index(kind)])
    planted = 0
    while planted < NUM_PLANTS:
        row = rows[int(rng.integers(len(rows)))]
        plant = PLANTERS[kind](row, rng)
        if plant is None:
            continue
        known, phrase, expected = plant
        fields, field = _planted(row, phrase, rng)
        wrong = contradictions(fields, known)
        assert (field, expected) in {(c.field, c.kind) for c in wrong}, (fields[field], expected, wrong)
        assert {c.field for c in wrong} == {field}, (fields[field], wrong)
        planted += 1


HEALTHY = knowing(plane="axial", contrast="T2w", body_part="brain", contrast_agent=False, sex="M", classes=[NORMAL])
INFARCT = knowing(
    plane="axial", contrast="FLAIR", body_part="brain", classes=["old infarct"],
    boxes=[{"label": "old infarct", "side": "left", "box_voxel": [0, 0, 0, 2, 2, 2]}],
)  # fmt: skip
KNEE = knowing(plane="sagittal", contrast="PD", body_part="knee", contrast_agent=True, boxes=[], sex="F")


@pytest.mark.parametrize(
    ("known", "text"),
    [
        (HEALTHY, "No focal lesion, mass or haemorrhage."),
        (HEALTHY, "No mass, haemorrhage, infarct."),
        (HEALTHY, "There is no evidence of infarction or tumour; no midline shift"),
        (HEALTHY, "without mass effect, ventricles of normal width"),
        (HEALTHY, "Masses: none. Fluid collections: none"),
        (HEALTHY, "lesions are absent"),
        (HEALTHY, "free of focal lesions"),
        (HEALTHY, "the brain is tumour-free"),
        (HEALTHY, "mild generalised atrophy, age-appropriate"),
        (HEALTHY, "a small lacune cannot be excluded"),
        (HEALTHY, "possible tiny cyst"),
        (HEALTHY, "expected hyperintensity of cerebrospinal fluid"),
        (HEALTHY, "normal hyperintense focus of the posterior pituitary"),
        (HEALTHY, "transverse T2W slices through the head"),
        (HEALTHY, "axial T2\u2011weighted image, not a coronal one"),
        (HEALTHY, "superior sagittal sinus and coronal suture are unremarkable"),
        (HEALTHY, "symmetric about the midsagittal plane; frontal lobes and frontal horns"),
        (HEALTHY, "dens and C2 vertebral body, the body of T1 is not included"),
        (HEALTHY, "the knee is not in the field of view"),
        (HEALTHY, "neither heart nor liver"),
        (HEALTHY, "heart-shaped clivus, genu of the corpus callosum, hippocampal formation"),
        (HEALTHY, "good grey-white contrast, high contrast between fluid and cortex"),
        (HEALTHY, "non-contrast T2 image without edge enhancement"),
        (HEALTHY, "acquired without contrast agent"),
        (HEALTHY, "bright cerebrospinal fluid in ventricles and sulci"),
        (HEALTHY, "left and right hemispheres are symmetric"),
        (HEALTHY, "none"),
        (HEALTHY, "unremarkable MRI of the brain"),
        (INFARCT, "T2-weighted FLAIR, hyperintense rim of a left-sided infarct"),
        (INFARCT, "encephalomalacia in the left parietal lobe, no other lesion"),
        (INFARCT, "old left infarct, the right hemisphere is normal"),
        (INFARCT, "no acute infarct, no haemorrhage, no lesion in the right hemisphere"),
        (INFARCT, "gliosis around the lesion on the left, midline shift to the right: none"),
        (INFARCT, "old infarct, compression of the right ventricle, the right hippocampus is seen"),
        (INFARCT, "chronic stroke with dilatation of the adjacent left ventricle"),
        (KNEE, "intact menisci, ACL and PCL, femoral condyles and tibial plateaus"),
        (KNEE, "fat-suppressed proton-density images, enhancing synovium"),
        (KNEE, "no tear, effusion or fracture"),
        (KNEE, "normal muscle mass, no Baker cyst"),
        (KNEE, "PD-weighted parasagittal slices after contrast"),
        (knowing(), "sagittal T1-weighted contrast-enhanced CT-like image of a meniscus with a mass"),
        (knowing(contrast="T1w", quantitative=True, quantity="T1"), "T1 map, T2-weighted appearance"),
        (knowing(contrast="SWI"), "susceptibility-weighted, T2*-weighted"),
        (knowing(body_part="spine"), "T1 and T2 vertebrae, cerebellum at the upper edge, spinal cord"),
        (knowing(body_part="heart", contrast="cine"), "left ventricle, mitral valve, dome of the liver; T1-weighted"),
        (knowing(classes=["no tumor"]), "no tumour"),
        (knowing(classes=["glioma"]), "glioblastoma, infiltrating mass"),
        (knowing(plane="axial"), "measures 12 mm in the coronal plane; extends in the sagittal plane"),
    ],
)  # fmt: skip
def test_other_ways_to_say_what_is_true_contradict_nothing(known: Known, text: str) -> None:
    for field in (LEVEL2, NORMAL_SIGNAL, ABNORMAL_SIGNAL, MASSES):
        if "CT" in text:
            known = replace(known, facts={})
            assert [kind for kind in found(text, known, field) if kind != "modality"] == []
        else:
            assert found(text, known, field) == []


TRUE_TEXTS = {
    "brain": """
        Gray matter and white matter are well differentiated with normal T1 signal intensity
        The cerebral hemispheres are symmetric with no evidence of mass effect or midline shift.
        CSF appears hypointense, as expected on T1-weighted imaging; white matter is brighter than gray matter.
        Orbits, globes and optic nerves are visible; the optic nerve sheath complexes are unremarkable.
        Calvarium and skull base with bright diploic marrow; no fracture or lytic lesion seen
        Falx cerebri, interhemispheric fissure, superior sagittal sinus, transverse sinuses
        No abnormal signal intensity is identified within the brain parenchyma.
        No abnormal areas of hyperintensity or hypointensity
        Temporalis muscles and scalp fat are hyperintense, masticator muscles are intermediate
        Basal ganglia: caudate head, lentiform nucleus, thalamus; internal capsule
        No obvious focal lesions, hemorrhage, or mass effect
        No acute intracranial abnormality
        Flow voids in the circle of Willis, carotid arteries, and basilar artery
        Absence of signal abnormality in the deep gray nuclei.
        There are no signs of ischemia, infarction, hemorrhage, or neoplasm.
        No evidence of acute infarct; no intracranial hemorrhage; no mass lesion
        The brain parenchyma demonstrates normal morphology without mass lesion, edema or hemorrhage
        Lesions: not identified. Masses: not seen.
        No lesions or masses detected in this axial slice
        This appears to be a normal T1-weighted axial brain MRI without contrast
        negative for mass
        dark CSF in the ventricles, dark cortical bone, bright subcutaneous fat
        choroid plexus, pineal region, tentorium, heads of the caudate nuclei, foot of the hippocampus
        absence of masses, no edema""",
    "prostate": """
        Prostate gland with peripheral zone (hyperintense) and transition zone (heterogeneous)
        Bladder, rectum, seminal vesicles, obturator internus muscles, pubic symphysis and femoral heads
        Peripheral zone shows normal high T2 signal
        Femurs and acetabula show normal marrow; no lymphadenopathy
        BPH nodules cannot be excluded""",
    "heart": """
        Left and right ventricles, interventricular septum, papillary muscles, left atrium, aortic root
        Descending aorta, vertebral body, liver dome and spleen partially visible; lungs are dark
        short-axis bright-blood steady-state image; stroke volume cannot be assessed""",
    "abdomen": """
        Liver, spleen, both kidneys, pancreas, gallbladder, aorta and inferior vena cava, portal vein
        Hepatic vessels enhance homogeneously; enhancing renal cortex, corticomedullary differentiation
        Transverse colon and head of the pancreas; neck of the gallbladder; lung bases
        spinal cord and cerebrospinal fluid in the spinal canal""",
    "spine": """
        Vertebral bodies L1 to S1, T12 is partly visible; intervertebral discs with bright nucleus pulposus
        kidneys and abdominal aorta at the edge, sacrum, spinous processes and transverse processes
        No disc herniation, no spinal stenosis, sagittal T2-weighted fast spin-echo
        T1 vertebral body, C7-T1 disc, cerebellar tonsils above the foramen magnum, trachea
        no compression fracture; alignment is normal in the sagittal plane""",
}
TRUE_FACTS: dict[str, dict[str, Any]] = {
    "brain": {"plane": "axial", "contrast": "T1w", "contrast_agent": False, "sex": "F"},
    "prostate": {"plane": "axial", "contrast": "T2w", "contrast_agent": False, "sex": "M"},
    "heart": {"plane": "axial", "contrast": "cine"},
    "abdomen": {"plane": "axial", "contrast": "T1w", "contrast_agent": True},
    "spine": {"plane": "sagittal", "contrast": "T2w"},
}


@pytest.mark.parametrize("part", TRUE_TEXTS)
def test_what_a_radiologist_may_write_of_a_healthy_person_contradicts_nothing(part: str) -> None:
    known = knowing(body_part=part, boxes=[], classes=[NORMAL], **TRUE_FACTS[part])
    for text in TRUE_TEXTS[part].strip().splitlines():
        assert contradictions({NORMAL_SIGNAL: text.strip()}, known) == []


@pytest.mark.parametrize(
    ("known", "text", "kind"),
    [
        (HEALTHY, "no midline shift, large mass in the left frontal lobe", "lesion"),
        (HEALTHY, "Haemorrhagic foci are present, infarct not seen", "lesion"),
        (HEALTHY, "hyperintense periventricular white matter lesions", "lesion"),
        (HEALTHY, "glioblastomas", "lesion"),
        (HEALTHY, "T1W", "contrast"),
        (HEALTHY, "typical T1-weighted appearance of fat", "contrast"),
        (HEALTHY, "FLAIR", "contrast"),
        (HEALTHY, "parasagittal slice", "plane"),
        (HEALTHY, "coronal view", "plane"),
        (HEALTHY, "gadolinium-avid meninges with enhancement", "contrast agent"),
        (HEALTHY, "both menisci", "anatomy"),
        (HEALTHY, "the uterus is empty", "anatomy"),
        (HEALTHY, "vertebrae, kidneys", "anatomy"),
        (HEALTHY, "hypodense region", "modality"),
        (INFARCT, "infarct of the right hemisphere", "side"),
        (INFARCT, "normal brain MRI", "denied lesion"),
        (INFARCT, "no infarct", "denied lesion"),
        (KNEE, "meniscal tears", "lesion"),
        (KNEE, "transverse slice", "plane"),
        (KNEE, "T2-weighted image without contrast medium", "contrast agent"),
        (KNEE, "seminal vesicles", "anatomy"),
        (knowing(sex="M", body_part="pelvis"), "the uterus is empty", "anatomy"),
        (knowing(sex="F", body_part="pelvis"), "enlarged prostate", "anatomy"),
    ],
)  # fmt: skip
def test_what_cannot_be_true_is_found(known: Known, text: str, kind: str) -> None:
    assert kind in found(text, known)


def _two_labels() -> tuple[np.ndarray, dict[int, str]]:
    labels = np.zeros((4, 8, 8), np.uint8)
    labels[:, :, :4] = 1
    return labels, {1: "kidney_right", 2: "kidney_left", 3: "spleen", 4: "liver", 5: "tumour"}


def test_a_structure_whose_label_has_no_voxel_is_not_there() -> None:
    labels, names = _two_labels()
    known = knowing(labels=labels, names=names, body_part="abdomen")
    assert found("right kidney, pancreas", known) == []
    assert found("kidneys", known) == []
    assert found("left kidney", known) == ["absent structure"]
    assert found("enlarged spleen and right kidney", known) == ["absent structure"]
    assert found("no spleen, splenic hilum not included", known) == []
    assert found("the spleen is not visible", known) == []
    assert found("hepatic tumours", known) == ["lesion"]
    assert found("a cyst of the right kidney", known) == []  # cysts have no label in this set


def test_a_label_map_overrules_the_header() -> None:
    labels, names = _two_labels()
    assert found("right kidney", knowing(labels=labels, names=names, body_part="brain")) == []
    assert found("right kidney", knowing(body_part="brain")) == ["anatomy"]


def test_recommendations_speak_of_other_images() -> None:
    field = "diagnostic_impression.recommendation"
    assert found("sagittal contrast-enhanced T1-weighted MRI to exclude a tumour", HEALTHY, field) == []


def test_a_statement_is_quoted_with_what_it_contradicts() -> None:
    (wrong,) = contradictions({LEVEL2: "brainstem; meniscus", NORMAL_SIGNAL: "bright fluid"}, HEALTHY)
    assert wrong == Contradiction(field=LEVEL2, kind="anatomy", said="meniscus", known="body part brain")


def test_the_tables_agree_with_those_of_the_project() -> None:
    parts = {part for part, _ in BODY_PARTS if part}
    assert {part for where in SEEN_IN.values() for part in where} <= parts
    assert all(plain_spelling(name) == name for name in SEEN_IN)
    for nouns in FINDING_NOUNS.values():
        for noun in map(plain_spelling, nouns):
            assert noun in ("atrophy", "stenosis") or any(re.search(p, noun) for p in LESION_WORDS.values()), noun
    assert set(FINDINGS) | {LESION} <= set(LESION_WORDS)


@pytest.mark.parametrize(
    ("noun", "plurals"),
    [("meniscus", "menisci"), ("vertebra", "vertebrae vertebras"), ("artery", "arteries"), ("kidney", "kidneys"),
     ("lens", "lenses"), ("testis", "testes"), ("acetabulum", "acetabula")],
)  # fmt: skip
def test_plurals(noun: str, plurals: str) -> None:
    for form in (noun, *plurals.split()):
        assert re.fullmatch(any_number(noun), form)


@pytest.mark.parametrize(("grey", "signal"), [(60, "hypointense"), (150, "hyperintense")])
def test_grey_beside_white_matter_is_compared_either_way_round(grey: int, signal: str) -> None:
    labels = np.zeros((4, 16, 16), np.uint8)
    labels[:, :8], labels[:, 8:] = 1, 2
    known = replace(knowing(labels=labels, names={1: "grey matter", 2: "white matter"}),
                    image=np.where(labels == 1, grey, 100).astype(np.float32))  # fmt: skip
    opposite = {"hypointense": "hyperintense", "hyperintense": "hypointense"}[signal]
    for true, false in (
        (f"grey matter {signal} to white matter", f"gray matter is {opposite} relative to white matter"),
        (f"white matter is {opposite} to gray matter", f"white matter {signal} compared with grey matter"),
    ):
        assert found(true, known, NORMAL_SIGNAL) == []
        assert found(false, known, NORMAL_SIGNAL) == ["signal"]
    assert found("grey matter isointense to white matter", known, NORMAL_SIGNAL) == []
