"""Every instruction-response pair follows from the labels of its row, in training and in the written set alike."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnimri.jobs import instruct as job
from omnimri.models.boxes import Box, BoxCoder, text_to_boxes
from omnimri.models.config import InputConfig
from omnimri.models.instructions import NEAR
from omnimri.models.preprocess import Preprocess
from omnimri.models.prompts import diagnosis_in, task_of, untagged
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import CONTRASTS, DIAGNOSES, NORMAL
from omnimri.models.vocabulary import FINDINGS as FINDING_NAMES
from omnimri.platform.corpus.anatomy import load_template
from omnimri.platform.corpus.patient import Patient, Simulated, simulate
from omnimri.platform.corpus.truth import LABEL_NAMES
from omnimri.platform.data.draws import ViewOptions
from omnimri.platform.data.labels import structure_mask
from omnimri.platform.data.schema import SCHEMA
from omnimri.platform.data.shards import Shards, load_row
from omnimri.platform.data.views import SOURCES, segmentation_sample, text_sample
from omnimri.platform.evaluation.text import label_text
from omnimri.platform.language.description import Description
from omnimri.platform.language.evidence import MAX_BOXES, Evidence
from omnimri.platform.language.instruct import (
    draw_text_pair,
    drawn_context,
    plain_pair,
    plain_tasks,
    question_pair,
    segmentable,
)
from omnimri.platform.language.instruction_set import (
    InstructConfig,
    balancing_weights,
    make_instruction_set,
    partial_folder,
)
from omnimri.platform.language.questions import Question, draw_question, questions, slice_question
from omnimri.platform.language.reports import derived_report, report_place
from omnimri.platform.language.words import signal_word
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
from tests.platform.shards_fakes import write_shards
from tests.platform.test_language_derive import number_before, swapped

SEEDS = range(16)
VALUES = {name: value for value, name in FINDINGS.items()}
BRIGHTNESS = {"white matter": 100, "grey matter": 70, "demyelinating plaque": 140, "haemorrhage": 40}
"""Of the images of `random_case`, within 5 %."""
HEADER = {"contrast": "T2w", "plane": "coronal", "body_part": "brain", "sex": "F", "age_years": 58.0}
PREPROCESS = Preprocess(InputConfig(volume_shape=(40, 48, 40), volume_spacing_mm=(4.0, 4.0, 4.0), slice_spacing_mm=4.0))


def evidence_of(case: Stored, **more: Any) -> Evidence:
    return Evidence(replace(case.known(facts=HEADER), **more))


def row_of(case: Stored, **more: Any) -> dict[str, Any]:
    return {"image": case.image, "affine": case.affine.ravel().tolist(), "label_map": case.labels,
            "label_names": NAMES, "boxes": None, "classes": None, "report": None, **HEADER, **more}  # fmt: skip


def is_true(question: Question, case: Stored) -> bool:
    """Whether what a question about labels takes for right is right, worked out anew from the voxels."""
    slots = question.slots
    if question.name == "structure":
        value = next(value for value, name in NAMES.items() if name == slots["structure"])
        return (question.verdict == "yes") == bool((case.labels == value).any())
    value = VALUES[slots["finding"]]
    lesions, sides = lesions_of(case, value), true_sides(case, value)
    if question.name == "finding":
        return (question.verdict in ("yes", "boxes")) == bool(lesions)
    if (question.kind, question.name) == ("choice", "side"):
        lateral = {"left", "right"} & set(sides)
        place = "both sides" if len(lateral) == 2 else "midline" if not lateral else f"{lateral.pop()} side"
        return question.verdict == place
    right_of = {
        "side": lambda: slots["side"] in sides,
        "size": lambda: true_extent_mm(case, value) > float(slots["limit"]),
        "count": lambda: len(lesions) > 1,
        "signal": lambda: slots["signal"] == true_signal(slots),
    }
    choice_of = {
        "count": lambda: str(len(lesions)),
        "signal": lambda: true_signal(slots),
        "site": lambda: true_site(case, value),
    }
    if question.kind == "choice":
        return question.verdict == choice_of[question.name]()
    return (question.verdict == "yes") == right_of[question.name]()


def true_signal(slots: Any) -> str:
    return signal_word(BRIGHTNESS[slots["finding"]] / BRIGHTNESS[slots["reference"]])


def about_labels(evidence: Evidence) -> list[Question]:
    return [q for q in questions(evidence) if {"finding", "structure"} & q.slots.keys() and q.kind != "refusal"]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_question_about_labels_is_answered_as_the_voxels_say(seed: int) -> None:
    case = random_case(seed)
    for question in about_labels(evidence_of(case)):
        assert is_true(question, case), question


@pytest.mark.parametrize("seed", SEEDS)
def test_every_wrong_option_is_wrong(seed: int) -> None:
    case = random_case(seed)
    for question in about_labels(evidence_of(case)):
        for option in question.options:
            assert not is_true(replace(question, verdict=option), case), (question, option)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_words_of_an_answer_say_what_is_true(seed: int) -> None:
    case, rng = random_case(seed), np.random.default_rng(seed)
    for question in about_labels(evidence_of(case)):
        instruction, answer = question.asked(rng)
        assert "{" not in instruction + answer
        if question.kind == "yes-no":
            assert answer.startswith({"yes": "Yes. ", "no": "No. "}[question.verdict])
        if question.kind == "choice":
            letter, words = re.fullmatch(r"([A-D])\) (.+)\.", answer).groups()
            assert words == question.verdict
            assert f"{letter}) {words}" in instruction
            assert instruction.count(f") {words}") == 1
        value = VALUES.get(question.slots.get("finding", ""))
        if question.kind == "yes-no" and question.name == "size":
            assert number_before("mm", answer) == pytest.approx(true_extent_mm(case, value), abs=0.51)
        if question.kind == "yes-no" and question.name == "count":
            assert int(re.search(r"\d+", answer)[0]) == len(lesions_of(case, value))
        if question.kind == "yes-no" and question.name == "side" and question.verdict == "no":
            assert set(re.findall("left|right|midline", answer)) == set(true_sides(case, value))


def test_the_cases_ask_for_everything_with_both_answers() -> None:
    asked = Counter((q.kind, q.name, q.verdict) for seed in SEEDS for q in about_labels(evidence_of(random_case(seed))))
    for name in ("finding", "side", "count", "size", "signal"):
        assert min(asked["yes-no", name, "yes"], asked["yes-no", name, "no"]) >= 2, name
    assert min(asked["named", "finding", "boxes"], asked["named", "finding", "none"]) >= 2
    assert {name for kind, name, _ in asked if kind == "choice"} == {"side", "count", "signal", "site"}


def keys_of(evidence: Evidence) -> Counter[str]:
    """What is asked and answered, but for where boxes lie in the grid."""
    return Counter(
        str((q.kind, q.name, q.verdict, sorted(q.slots.items()), sorted(q.options), q.labels))
        for q in about_labels(evidence)
    )


def sorted_words(text: str) -> list[str]:
    return sorted(re.findall(r"[\w.-]+", text))


@pytest.mark.parametrize("seed", SEEDS)
def test_mirroring_exchanges_left_and_right_and_nothing_else(seed: int) -> None:
    case = random_case(seed)
    image = Counter(" ".join(sorted_words(key)) for key in keys_of(evidence_of(case)).elements())
    mirror = Counter(" ".join(sorted_words(swapped(key))) for key in keys_of(evidence_of(mirrored(case))).elements())
    assert image == mirror
    reports = [derived_report(evidence_of(c)) for c in (case, mirrored(case))]
    if reports[0] is not None:
        assert sorted_words(swapped(reports[1][0])) == sorted_words(reports[0][0])


@pytest.mark.parametrize("seed", [0, 2])
def test_storage_changes_no_question_and_no_report(seed: int) -> None:
    case = random_case(seed)
    expected, report = keys_of(evidence_of(case)), derived_report(evidence_of(case))
    assert report
    for order, signs in ORIENTATIONS[::5]:
        evidence = evidence_of(stored_as(case, order, signs))
        assert keys_of(evidence) == expected, (order, signs)
        assert derived_report(evidence) == report, (order, signs)


@pytest.mark.parametrize("seed", SEEDS)
def test_boxes_of_a_label_map_hold_one_lesion_each(seed: int) -> None:
    case = random_case(seed)
    boxes = evidence_of(case).boxes
    if boxes is None:
        return  # specks only
    for value, name in FINDINGS.items():
        mine = [box for box in boxes if box.label == name]
        assert Counter(box.side for box in mine) == Counter(true_sides(case, value))
        inside = np.zeros(case.labels.shape, bool)
        for box in mine:
            z1, y1, x1, z2, y2, x2 = box.box_voxel
            held = case.labels[z1:z2, y1:y2, x1:x2] == value
            assert all(held.take(edge, axis=axis).any() for axis in range(3) for edge in (0, -1))
            inside[z1:z2, y1:y2, x1:x2] = True
        assert len(mine) == len(lesions_of(case, value))
        assert sum(map(len, lesions_of(case, value))) <= ((case.labels == value) & inside).sum()


def test_more_lesions_than_can_be_listed_are_counted_and_not_boxed() -> None:
    def evidence(lesions: int) -> Evidence:
        labels = np.zeros((4, 8, 2 * lesions), np.uint8)
        labels[1, 2:5, ::2] = 1
        case = Stored(labels, np.ones(labels.shape, np.float32), np.eye(4))
        return Evidence(replace(case.known(), label_names={1: "ms lesion"}))

    assert len(evidence(MAX_BOXES).boxes) == MAX_BOXES
    many = evidence(MAX_BOXES + 1)
    assert many.boxes is None
    assert "detect" not in plain_tasks(many)
    assert {q.slots["count"] for q in questions(many) if (q.kind, q.name) == ("yes-no", "count")} == {"25"}


@pytest.mark.parametrize("seed", [2, 5, 8])
def test_a_detection_answer_leads_back_to_the_lesions(seed: int) -> None:
    case, rng = random_case(seed), np.random.default_rng(seed)
    row = row_of(case)
    scan = Scan(image=case.image, affine=case.affine)
    evidence = Evidence.of_row(row)
    coder = BoxCoder(scan, PREPROCESS)
    plain = plain_pair("detect", row, evidence, PREPROCESS, rng)
    assert same_boxes(text_to_boxes(plain.answer, coder), evidence.boxes)
    named = [q for q in questions(evidence) if q.kind == "named"]
    assert {q.slots["finding"] for q in named} == set(FINDINGS.values())
    for question in named:
        pair = question_pair(question, row, PREPROCESS, rng)
        wanted = [box for box in evidence.boxes if box.label == question.slots["finding"]]
        assert same_boxes(text_to_boxes(pair.answer, coder), wanted)


def same_boxes(found: list[Box], wanted: list[Box]) -> bool:
    """Equal labels and sides, and edges within what whole numbers up to 999 tell apart."""

    def key(box: Box) -> tuple[Any, ...]:
        return box.label, box.side or "", box.box_voxel

    pairs = list(zip(sorted(found, key=key), sorted(wanted, key=key), strict=True))
    off = [np.abs(np.subtract(f.box_voxel, w.box_voxel)).max() for f, w in pairs]
    return all((f.label, f.side) == (w.label, w.side) for f, w in pairs) and max(off, default=0) <= 1


@pytest.mark.parametrize("diagnosis", DIAGNOSES)
def test_diagnoses_are_those_of_the_row(diagnosis: str) -> None:
    evidence = evidence_of(random_case(0), label_map=None, classes=[diagnosis])
    rng = np.random.default_rng(0)
    asked = [q for q in questions(evidence) if q.name == "diagnosis"]
    assert sum(q.verdict == "yes" for q in asked) == 1
    assert any(q.kind == "differential" for q in asked) == (diagnosis != NORMAL)
    for question in asked:
        _, answer = question.asked(rng)
        assert diagnosis_in(answer) == diagnosis
        if question.kind == "differential":
            listed = answer.removeprefix("Differential diagnosis: ").split(". ")[0].split(", ")
            assert diagnosis in listed
            assert len(set(listed)) == 3
            assert set(listed) <= set(DIAGNOSES) - {NORMAL}
        if question.kind == "yes-no":
            assert (question.verdict == "yes") == (question.slots["diagnosis"] == diagnosis)
    [abnormality] = [q for q in questions(evidence) if q.name == "abnormality"]
    assert (abnormality.verdict == "no") == (diagnosis == NORMAL)


def test_what_the_labels_do_not_say_is_not_asked() -> None:
    empty = np.zeros((8, 8, 8), np.uint8)
    speck = empty.copy()
    speck[0, 0, 0] = 2
    plain = {"facts": {}}
    names = {1: "white matter", 2: "haemorrhage", 3: "lesion"}
    case = Stored(empty, np.ones(empty.shape, np.float32), np.eye(4))

    def topics(labels: np.ndarray | None, **more: Any) -> set[tuple[str, str, str]]:
        known = replace(case.known(**plain, **more), label_map=labels, label_names=names if labels is not None else {})
        return {(q.name, q.verdict, q.slots.get("finding", "")) for q in questions(Evidence(known))}

    assert topics(None) == set()
    assert topics(None, classes=[]) == set()
    assert topics(None, classes=["HC"]) == set()  # a control, or a disease: the table that it comes from knows
    assert ("abnormality", "no", "") not in topics(empty)  # only two findings were looked for
    assert ("finding", "no", "lesion") in topics(empty)
    assert not any(finding for _, _, finding in topics(speck))  # neither there nor not there
    assert plain_tasks(Evidence(replace(case.known(), label_map=speck, label_names=names))) == ()
    # Something is there, so the absence of a voxel called `lesion` does not mean that there is no lesion.
    there = empty.copy()
    there[2:5, 2:5, 2:5] = 2
    assert ("finding", "no", "lesion") not in topics(there)
    assert ("finding", "yes", "haemorrhage") in topics(there)
    # Contradictory: a normal volume with a lesion.
    assert not any(name == "abnormality" for name, _, _ in topics(there, classes=[NORMAL]))


def test_boxes_alone_tell_presence_and_side_but_no_number_of_lesions() -> None:
    boxes = [{"label": "Meniscus Tear", "side": "left", "box_voxel": [z, 2, 3, z + 1, 6, 13]} for z in (4, 5)]
    case = random_case(0)
    evidence = evidence_of(case, label_map=None, label_names={}, boxes=boxes, facts={"body_part": "knee"})
    asked = {(q.name, q.verdict) for q in questions(evidence) if q.kind == "yes-no"}
    assert asked == {("finding", "yes"), ("abnormality", "yes"), ("side", "yes"), ("side", "no")}
    text, labels = derived_report(evidence)
    assert text == "Technique: Knee MRI. Findings: Meniscus tear, left. Impression: Meniscus tear."
    assert labels == {"boxes": "meniscus tear"}


def test_questions_about_another_part_of_the_body_are_refused() -> None:
    for part in (*NEAR, "phantom", None):
        evidence = evidence_of(random_case(0), label_map=None, facts={"body_part": part})
        refused = [q for q in questions(evidence) if q.kind == "refusal"]
        others = {q.slots["other"] for q in refused}
        assert not others & {part, *NEAR.get(part or "", ())}
        assert bool(others) == (part in NEAR)
        for question in refused:
            instruction, answer = question.asked(np.random.default_rng(0))
            assert f"it shows the {part}, not the {question.slots['other']}" in answer
            assert task_of(instruction) == question.topic.task


def test_facts_are_asked_for_without_being_told() -> None:
    evidence = evidence_of(random_case(0), facts=HEADER | {"contrast": "FLAIR"})
    for question in questions(evidence):
        if question.name not in ("contrast", "plane"):
            continue
        contexts = [
            drawn_context(evidence, np.random.default_rng(s), is_text=True, hides=question.topic.hides)
            for s in range(9)
        ]
        assert not any(question.name in context for context in contexts)
        assert "T2-weighted" not in (*question.options, question.slots.get("contrast"))  # FLAIR is T2-weighted
        if question.kind == "yes-no":
            told = question.slots[question.name]
            assert (question.verdict == "yes") == (told in ("FLAIR", "coronal"))
    told = [drawn_context(evidence, np.random.default_rng(s), is_text=True, acceleration=4) for s in range(60)]
    assert {key for context in told for key in context} == {"contrast", "plane", "acceleration", "history"}
    images = [drawn_context(evidence, np.random.default_rng(s), is_text=False) for s in range(60)]
    assert {key for context in images for key in context} == {"contrast", "plane"}
    assert next(c["history"] for c in told if "history" in c) == "58-year-old woman."


def test_history_comes_from_the_report_and_spares_the_findings() -> None:
    report = "Clinical history: Rule out stroke. Findings: Old infarct. Impression: Old infarct."
    assert evidence_of(random_case(0), report=report).history == "58-year-old woman. Rule out stroke."
    assert evidence_of(random_case(0), facts={"sex": "M", "age_years": 7.0}).history == "7-year-old patient."
    assert evidence_of(random_case(0), facts={"sex": "M"}).history == ""


def test_every_drawn_question_is_routed_to_the_task_that_answers_it() -> None:
    rng = np.random.default_rng(0)
    for seed in SEEDS:
        evidence = evidence_of(random_case(seed), classes=["haemorrhage"])
        for question in questions(evidence):
            for _ in range(4):
                instruction, _ = question.asked(rng)
                assert task_of(instruction) == question.topic.task, instruction


def test_answers_are_drawn_evenly_where_both_are_there() -> None:
    case = next(c for c in map(random_case, SEEDS) if len(evidence_of(c).present) == 1)
    pool, rng = questions(evidence_of(case, classes=["haemorrhage"])), np.random.default_rng(1)
    drawn = [draw_question(pool, rng) for _ in range(1500)]
    assert {q.kind for q in drawn} == {"yes-no", "choice", "named", "differential", "refusal"}
    for name in ("finding", "side", "size", "signal", "contrast", "plane", "diagnosis"):
        verdicts = Counter(q.verdict for q in drawn if (q.kind, q.name) == ("yes-no", name))
        if len(verdicts) == 2:
            assert 0.25 < verdicts["yes"] / verdicts.total() < 0.75, (name, verdicts)
    letters = Counter(q.asked(rng)[1][0] for q in drawn if q.kind == "choice" and len(q.options) >= 3)
    assert min(letters[letter] for letter in "ABCD") > 0.15 * letters.total()


def test_any_volume_has_a_question() -> None:
    case, rng = random_case(0), np.random.default_rng(0)
    seen = set()
    for _ in range(20):
        question = slice_question(evidence_of(case), rng)
        assert (question.verdict == "yes") == (len(case.image) > int(question.slots["limit"]))
        seen.add(question.verdict)
    assert seen == {"yes", "no"}
    bare = {"image": case.image, "affine": case.affine.ravel().tolist(), "classes": []}
    pair, _ = draw_text_pair(bare, PREPROCESS, rng, tasks={"diagnose": 1.0}, question_share=0.0)
    assert f"It has {len(case.image)}." in pair.answer


# Reports


@pytest.fixture(scope="module")
def patients() -> list[Simulated]:
    template = load_template()
    drawn = [Patient.draw(index, 11) for index in range(8)]
    return [simulate(p, template, (14, 80, 72), (9.0, 2.6, 2.6), 1) for p in drawn]


def test_the_labeller_of_the_evaluation_reads_derived_reports_as_the_corpus_drew_them(
    patients: list[Simulated],
) -> None:
    for simulated in patients:
        row = {
            "image": np.ones(simulated.labels.shape, np.float32), "affine": simulated.grid.affine.ravel(),
            "label_map": simulated.labels, "label_names": LABEL_NAMES, "contrast": CONTRASTS[0], "plane": "axial",
            "body_part": "brain",
        }  # fmt: skip
        text, _ = derived_report(Evidence.of_row(row))
        assert label_text(text) == {(lesion.label, lesion.side) for lesion in simulated.lesions}
        assert text.startswith("Technique: Axial T1-weighted brain MRI. Findings: ")
        denied = re.search(r"No ([^.]+)\.", text)[1]
        shown = {lesion.label for lesion in simulated.lesions}
        assert set(re.split(", | or ", denied)) == set(FINDING_NAMES) - shown
        assert "Recommendation" not in text
    assert any(not simulated.lesions for simulated in patients)


def test_a_report_goes_through_a_joint_in_the_order_of_the_paper() -> None:
    names = ["soft tissue oedema", "bone marrow oedema", "cartilage defect", "meniscus tear", "joint effusion"]
    boxes = [{"label": name, "side": None, "box_voxel": [0, 0, 0, 1, 2, 2]} for name in [*names, "mass"]]
    evidence = evidence_of(random_case(0), label_map=None, label_names={}, boxes=boxes, facts={"body_part": "knee"})
    text, _ = derived_report(evidence)
    places = [text.lower().index(name) for name in [*names[::-1], "mass"]]
    assert places == sorted(places)
    assert [report_place(name) for name in names[::-1]] == sorted(report_place(name) for name in names)


def test_a_report_that_was_written_is_not_replaced() -> None:
    row = row_of(random_case(2), report="Findings: As written.")
    pair = plain_pair("report", row, Evidence.of_row(row), PREPROCESS, np.random.default_rng(0))
    assert untagged(pair.answer) == "Findings: As written."
    assert pair.labels == {"report": "as written"}


# Segmentation


def test_structures_of_any_body_part_are_asked_for_and_are_no_lesions() -> None:
    names = {1: "femoral_cartilage", 2: "medial meniscus", 3: "something new"}
    assert segmentable(names) == ["femoral cartilage", "medial meniscus", "something new"]
    assert segmentable({**names, 4: "bone marrow edema"})[-1] == "lesion"
    labels = np.arange(5, dtype=np.uint8).reshape(1, 1, 5)
    found = structure_mask(labels, {**names, 4: "bone marrow edema"}, "lesion").ravel()
    assert found.tolist() == [False, False, False, False, True]
    assert structure_mask(labels, names, "femoral cartilage").ravel().tolist() == [False, True, False, False, False]


# Training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows, of which one has nothing to ask about and one cannot be read."""
    folder = write_shards(tmp_path_factory.mktemp("instruct") / "shards")
    manifest = json.loads((folder / "manifest.json").read_text())
    bare, broken = manifest["rows"][1], manifest["rows"][2]
    path = folder / "shards" / bare["file"]
    [row] = pq.read_table(path).to_pylist()
    emptied = ("label_map", "label_names", "boxes", "report", "description", "contrast", "plane", "body_part", "kspace")
    row |= dict.fromkeys(emptied)
    pq.write_table(pa.Table.from_pylist([row | {"classes": []}], schema=SCHEMA), path)
    bare |= {"has_labels": False, "has_boxes": False, "has_report": False, "has_kspace": False, "fully_sampled": False,
             "contrast": None, "plane": None, "body_part": None}  # fmt: skip
    (folder / "shards" / broken["file"]).write_bytes(b"PAR1 cut off")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def rows(corpus: Path) -> list[dict[str, Any]]:
    source = SOURCES["instruct.text"]
    refs = [ref for ref in Shards.open(corpus).rows if not ref.row_id.endswith(("-1", "-2"))]
    return [load_row(ref, source.columns) for ref in refs if source.accepts(ref)]


def test_training_draws_what_the_one_function_draws(rows: list[dict[str, Any]]) -> None:
    options = ViewOptions(preprocess=PREPROCESS, question_share=0.5)
    for seed, row in enumerate(rows * 3):
        sample = text_sample(row, np.random.default_rng(seed), options)
        pair, _ = draw_text_pair(
            row, PREPROCESS, np.random.default_rng(seed), tasks=options.text_tasks, question_share=0.5
        )
        assert (sample["task"], sample["instruction"], sample["answer"]) == (pair.task, pair.instruction, pair.answer)
        again = text_sample(row, np.random.default_rng(seed), options)
        assert {k: again[k] for k in ("instruction", "facts", "answer")} == {
            k: sample[k] for k in ("instruction", "facts", "answer")
        }


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_the_share_of_questions_is_an_option(rows: list[dict[str, Any]], share: float) -> None:
    tasks = {"detect": 0.25, "diagnose": 0.45, "report": 0.3}
    drawn = [
        draw_text_pair(rows[n % len(rows)], PREPROCESS, np.random.default_rng(n), tasks=tasks, question_share=share)[0]
        for n in range(300)
    ]
    assert np.mean([pair.kind != "plain" for pair in drawn]) == pytest.approx(share, abs=0.07 * (0 < share < 1))
    plain = Counter(pair.task for pair in drawn if pair.kind == "plain")
    for task, weight in tasks.items() if share < 1 else ():
        assert plain[task] / plain.total() == pytest.approx(weight, abs=0.1)


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"question_share must be between 0 and 1, found 1\.5"):
        ViewOptions(preprocess=PREPROCESS, question_share=1.5)


def test_segmentation_asks_in_the_words_of_the_templates(rows: list[dict[str, Any]]) -> None:
    sample = segmentation_sample(
        rows[0], np.random.default_rng(0), ViewOptions(preprocess=PREPROCESS, slices_per_sample=2)
    )
    assert {task_of(text) for text in sample["instruction"]} == {"segment"}


# The written set


@pytest.fixture(scope="module")
def written(corpus: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> Path:
    out = tmp_path_factory.mktemp("pairs") / "set"
    assert job.main([str(corpus), "--out", str(out), "--seed", "3", "--set", "questions_per_row=12"]) == 0
    return out


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_job_writes_pairs_and_says_which_rows_gave_none(written: Path, corpus: Path) -> None:
    pairs, skipped = lines_of(written / "pairs.jsonl"), lines_of(written / "skipped.jsonl")
    assert {line["row_id"] for line in skipped} == {"row-0-1", "row-0-2"}
    reasons = {line["row_id"]: line["reason"] for line in skipped}
    assert reasons["row-0-1"].startswith("It has classes, none of them stated, and no contrast, plane")
    assert "Parquet" in reasons["row-0-2"]
    assert {line["row_id"] for line in pairs} == {ref.row_id for ref in Shards.open(corpus).rows} - set(reasons)
    assert {line["task"] for line in pairs} == {"reconstruct", "segment", "detect", "diagnose", "report"}
    assert {line["topic"] for line in pairs if line["task"] == "report"} == {"", "description"}
    refs = {ref.row_id: ref for ref in Shards.open(corpus).rows}
    for line in pairs:
        row = load_row(refs[line["row_id"]])
        assert task_of(line["instruction"]) == line["task"]
        assert set(line["labels"]) <= set(SCHEMA.names)
        assert all(row[column] is not None for column in line["labels"])
        if line["topic"] == "description":
            described = Description.model_validate_json(untagged(line["answer"]))
            assert described == Description.model_validate_json(row["description"])
            assert not {"plane", "contrast"} & set(line["context"])
        elif line["task"] == "report":
            assert untagged(line["answer"]) == row["report"]
        if line["task"] == "diagnose" and line["kind"] == "plain":
            assert diagnosis_in(line["answer"]) == row["classes"][0]


def test_answers_of_the_set_are_balanced(written: Path) -> None:
    pairs = lines_of(written / "pairs.jsonl")
    answers: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    weights: dict[str, float] = defaultdict(float)
    for line in pairs:
        weights[line["task"]] += line["weight"]
        if line["kind"] in ("yes-no", "named"):
            answers[line["anatomy"], line["kind"], line["topic"]][line["verdict"]] += 1
    assert len(answers) >= 5
    for cell, counts in answers.items():
        assert len(counts) == 2, cell
        assert len(set(counts.values())) == 1, (cell, counts)
    assert np.mean([line["weight"] for line in pairs]) == pytest.approx(1, abs=1e-3)
    assert max(weights.values()) == pytest.approx(min(weights.values()), rel=1e-3)


def test_the_table_counts_what_is_in_the_file(written: Path) -> None:
    summary, pairs = json.loads((written / "summary.json").read_text()), lines_of(written / "pairs.jsonl")
    keys = ("task", "anatomy", "kind", "topic")
    counted = Counter((*(line[key] for key in keys), line["verdict"]) for line in pairs)
    assert {(*(e[key] for key in keys), e["answer"]): e["pairs"] for e in summary["table"]} == counted
    assert summary["pairs"] == len(pairs)
    assert (summary["rows"], summary["rows_without_pairs"]) == (12, 2)
    assert summary["left_out_to_balance"] > 0


def test_the_same_seed_gives_the_same_file(written: Path, corpus: Path, tmp_path: Path, ray_cluster: object) -> None:
    shards = Shards.open(corpus)
    config = InstructConfig(seed=3, questions_per_row=12)
    make_instruction_set(shards, tmp_path / "again", config)
    assert (tmp_path / "again" / "pairs.jsonl").read_bytes() == (written / "pairs.jsonl").read_bytes()
    make_instruction_set(shards, tmp_path / "other", replace(config, seed=4))
    assert (tmp_path / "other" / "pairs.jsonl").read_bytes() != (written / "pairs.jsonl").read_bytes()
    stamp = (written / "pairs.jsonl").stat().st_mtime_ns
    assert make_instruction_set(shards, written, config)["pairs"] > 0
    assert (written / "pairs.jsonl").stat().st_mtime_ns == stamp


def test_an_interrupted_run_goes_on_with_the_parts_that_it_has(
    written: Path, corpus: Path, tmp_path: Path, ray_cluster: object
) -> None:
    settings = json.loads((written / "summary.json").read_text())["settings"]
    [first, *_] = lines_of(written / "pairs.jsonl")
    part = partial_folder(tmp_path / "set", settings) / "parts" / "000000000.jsonl"
    part.parent.mkdir(parents=True)
    part.write_text(json.dumps(first | {"instruction": "From before."}) + "\n")
    make_instruction_set(Shards.open(corpus), tmp_path / "set", InstructConfig(seed=3, questions_per_row=12))
    assert [line["instruction"] for line in lines_of(tmp_path / "set" / "pairs.jsonl")] == ["From before."]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_mistakes_of_the_command_are_one_line(
    written: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_cluster: object
) -> None:
    def error_of(*arguments: str) -> str:
        assert job.main([str(corpus), *arguments]) == 1
        return capsys.readouterr().err

    assert "holds something else, or pairs of other data or settings" in error_of("--out", str(written), "--seed", "9")
    assert "No row is of split 'tset'; known: train, val" in error_of("--out", str(tmp_path / "a"), "--split", "tset")
    assert "known: " in error_of("--out", str(tmp_path / "a"), "--preset", "huge")
    assert not any(tmp_path.iterdir())


def test_weights_make_tasks_anatomies_topics_and_answers_equal() -> None:
    counts = {
        ("diagnose", "brain", "yes-no", "side", "yes"): 8, ("diagnose", "brain", "yes-no", "side", "no"): 8,
        ("diagnose", "brain", "plain", "", "normal"): 30, ("diagnose", "knee", "plain", "", "tear"): 2,
        ("report", "brain", "plain", "", "normal"): 2,
    }  # fmt: skip
    weights = balancing_weights(counts)
    mass = {cell: weights[cell] * counts[cell] for cell in counts}
    assert sum(mass.values()) == pytest.approx(50)
    assert [mass[cell] / 50 for cell in counts] == pytest.approx([1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2])
