"""Sequences, instructions and answers are read back as they were written."""

from collections import Counter

import numpy as np
import pytest

from omnimri.models import special_tokens as special
from omnimri.models.instructions import (
    CHOICE,
    DIFFERENTIAL,
    FIRST_SHARE,
    INSTRUCTIONS,
    NAMED,
    REFUSAL,
    YES_NO,
    Topic,
    context_sentence,
    is_question,
    lettered,
    question_texts,
    with_options,
)
from omnimri.models.prompts import (
    IGNORED,
    SequenceBuilder,
    diagnosis_answer,
    diagnosis_choices,
    diagnosis_in,
    instruction_for,
    structures_of,
    tagged,
    task_of,
    untagged,
)
from omnimri.models.special_tokens import SPECIAL_TOKENS
from omnimri.models.tokenizer import load_tokenizer, train_tokenizer
from omnimri.models.vocabulary import DIAGNOSES, STRUCTURES, TASKS


@pytest.fixture(scope="module")
def builder() -> SequenceBuilder:
    return SequenceBuilder(
        train_tokenizer(["Segment the grey matter in this MRI."] * 3, 500), num_visual=5, num_queries=4
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_phrasing_names_its_task_and_structure(task: str) -> None:
    for phrase in INSTRUCTIONS[task]:
        instruction = phrase.format(structure="grey matter")
        assert task_of(instruction) == task
        if task == "segment":
            assert structures_of(instruction) == ["grey matter"]


def test_a_description_is_asked_for_as_a_report_and_is_no_question() -> None:
    assert {task_of(phrase) for phrase in INSTRUCTIONS["describe"]} == {"report"}
    assert not any(map(is_question, INSTRUCTIONS["describe"]))


WORDS = {
    "finding": "old infarct", "diagnosis": "haemorrhage", "side": "left", "limit": "12", "signal": "hypointense",
    "reference": "white matter", "structure": "grey matter", "contrast": "T1-weighted", "plane": "axial",
    "other": "knee",
}  # fmt: skip


@pytest.mark.parametrize(
    "topic", [*YES_NO.values(), *CHOICE.values(), NAMED, DIFFERENTIAL, *REFUSAL], ids=lambda t: t.phrasings[0]
)
def test_every_question_leads_to_its_task(topic: Topic) -> None:
    for phrase in topic.phrasings:
        asked = phrase.format(**WORDS)
        if topic in CHOICE.values():
            asked = with_options(asked, ["left side", "normal", "old infarct"])
        assert task_of(asked) == topic.task, asked
        assert is_question(asked) == (topic in YES_NO.values() or topic in CHOICE.values() or topic is REFUSAL[0])


@pytest.mark.parametrize("task", TASKS)
def test_a_plain_instruction_is_no_question(task: str) -> None:
    assert not any(is_question(phrase.format(structure="lesion")) for phrase in INSTRUCTIONS[task])


@pytest.mark.parametrize(
    ("instruction", "task"),
    [
        ("Is there a lesion? Outline it.", "segment"),
        ("Is there a lesion? If so, where?", "detect"),
        ("Can you segment the lesion?", "segment"),
        ("Could you report this?", "report"),
        ("Does this image suggest an ACL tear?", "diagnose"),
        ("Is the contour of the lesion smooth?", "diagnose"),
        ("Where is the mass?", "detect"),
    ],
)
def test_questions_of_people_are_routed(instruction: str, task: str) -> None:
    assert task_of(instruction) == task


def test_the_default_phrasing_is_drawn_most() -> None:
    rng = np.random.default_rng(0)
    drawn = Counter(instruction_for("report", rng=rng) for _ in range(600))
    assert set(drawn) == set(INSTRUCTIONS["report"])
    assert drawn[instruction_for("report")] / 600 == pytest.approx(FIRST_SHARE, abs=0.07)


def test_options_are_lettered() -> None:
    assert with_options("Which?", ["x", "y"]) == "Which? Choose one: A) x, B) y."
    assert lettered("abcd")[-1] == "D) d"


def test_texts_for_the_tokenizer_have_no_braces() -> None:
    texts = list(question_texts())
    assert len(texts) > 50
    assert not any("{" in text or "}" in text for text in texts)


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({}, ""),
        ({"plane": "axial", "contrast": "T2w"}, "This is an axial T2w MRI. "),
        ({"contrast": "T1w", "vendor": "GE"}, "This is a T1w MRI. "),
        ({"plane": "coronal", "acceleration": 4}, "This is a coronal MRI with 4x acceleration. "),
        ({"acceleration": 8}, "This is an MRI with 8x acceleration. "),
        ({"plane": "sagittal", "history": "Fall."}, "This is a sagittal MRI. History: Fall. "),
        ({"history": "Fall."}, "History: Fall. "),
    ],
)
def test_context(facts: dict[str, object], sentence: str) -> None:
    assert context_sentence(facts) == sentence


def test_structures_are_known_by_their_synonyms() -> None:
    assert structures_of("Outline the CSF, gray matter and the tumour") == [
        "cerebrospinal fluid", "grey matter", "lesion"
    ]  # fmt: skip


def test_an_instruction_without_a_task_is_refused() -> None:
    with pytest.raises(ValueError, match="names none of the tasks"):
        task_of("Hello there")
    with pytest.raises(ValueError, match="needs a structure"):
        instruction_for("segment")


@pytest.mark.parametrize("diagnosis", DIAGNOSES)
def test_diagnosis_is_read_back(diagnosis: str) -> None:
    assert diagnosis_in(untagged(tagged(diagnosis_answer(diagnosis)))) == diagnosis
    for other in DIAGNOSES:
        assert diagnosis_in(f"Differential diagnosis: {other}, {diagnosis}. {diagnosis_answer(diagnosis)}") == diagnosis
    choice = diagnosis_choices()[DIAGNOSES.index(diagnosis)]
    assert special.RESPONSE + choice == tagged(diagnosis_answer(diagnosis))


def test_a_diagnosis_is_read_where_it_is_stated_and_in_whole_words() -> None:
    assert diagnosis_in("An abnormal volume with haemorrhage.") == "haemorrhage"
    assert diagnosis_in("Haemorrhage or old infarct? Most likely diagnosis: something else. No haemorrhage.") is None
    assert diagnosis_in("Nothing is named.") is None


def test_special_tokens_are_single_and_survive_saving(builder: SequenceBuilder, tmp_path) -> None:
    builder.tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for token in SPECIAL_TOKENS:
        assert len(loaded.encode(token)) == 1
        assert loaded.decode(loaded.encode(token)) == token


@pytest.mark.parametrize("text", ["24 x 18 mm, côté gauche", "T2*-gradient: 1.5 T\n- no lesion"])
def test_any_text_round_trips_through_bytes(builder: SequenceBuilder, text: str) -> None:
    assert builder.tokenizer.decode(builder.tokenizer.encode(text)) == text


def test_vocabulary_that_cannot_hold_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="below the"):
        train_tokenizer(["a"], 100)


def test_an_example_is_its_request_and_a_labelled_answer(builder: SequenceBuilder) -> None:
    facts = {"plane": "axial", "contrast": "T2w"}
    request = builder.request("Report this MRI.", facts, "report")
    example = builder.example("Report this MRI.", facts, "report", tagged("Normal."))
    np.testing.assert_array_equal(example.token_ids[: len(request.token_ids)], request.token_ids)
    start = len(request.token_ids) - 1
    assert builder.tokenizer.decode(request.token_ids[start:]) == special.RESPONSE
    assert (example.labels[:start] == IGNORED).all()
    assert (example.labels[start:] == example.token_ids[start:]).all()
    answer = builder.tokenizer.decode(example.token_ids[start:])
    assert answer == tagged("Normal.") + special.TURN_END


@pytest.mark.parametrize("task", ["reconstruct", "segment"])
def test_image_answers_hold_the_queries_unlabelled(builder: SequenceBuilder, task: str) -> None:
    example = builder.example(instruction_for(task, structure=STRUCTURES[0]), {}, task)
    queries = np.isin(example.token_ids, [builder.tokenizer.convert_tokens_to_ids(f"<q{i}>") for i in range(4)])
    assert queries.sum() == 4
    assert (example.labels[queries] == IGNORED).all()
    request = builder.request(instruction_for(task, structure=STRUCTURES[0]), {}, task)
    np.testing.assert_array_equal(example.token_ids[: len(request.token_ids)], request.token_ids)


@pytest.mark.parametrize("image_first", [True, False])
def test_pairs_come_in_both_orders(builder: SequenceBuilder, image_first: bool) -> None:
    sequence = builder.paired("A normal brain.", image_first=image_first)
    pads = np.flatnonzero(sequence.token_ids == builder.tokenizer.convert_tokens_to_ids(special.IMAGE_PAD))
    text = np.flatnonzero(sequence.labels != IGNORED)
    assert len(pads) == 5
    assert (pads.max() < text.min()) == image_first
