"""Sequences, instructions and answers are read back as they were written."""

import numpy as np
import pytest

from omnimri.models import special_tokens as special
from omnimri.models.instructions import INSTRUCTIONS
from omnimri.models.prompts import (
    IGNORED,
    SequenceBuilder,
    diagnosis_answer,
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
    start = len(request.token_ids)
    np.testing.assert_array_equal(example.token_ids[:start], request.token_ids)
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
