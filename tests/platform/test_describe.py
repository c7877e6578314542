"""The description as an answer: what training teaches is what the grammar of serving decodes, and parses back."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher
from transformers import PreTrainedTokenizerBase

from omnimri.models import special_tokens as special
from omnimri.models.config import InputConfig, preset
from omnimri.models.decoding import assemble, grammar_tokens, matcher_of
from omnimri.models.grammars import MAX_PHRASE, json_grammar
from omnimri.models.instructions import INSTRUCTIONS
from omnimri.models.preprocess import Preprocess
from omnimri.models.prompts import IGNORED, SequenceBuilder, untagged
from omnimri.models.tokenizer import train_tokenizer
from omnimri.platform.corpus.anatomy import load_template
from omnimri.platform.corpus.corpus import CorpusConfig, write_patient
from omnimri.platform.corpus.patient import Patient
from omnimri.platform.data.draws import ViewOptions
from omnimri.platform.data.shards import Shards, load_row
from omnimri.platform.data.views import SOURCES, study_sample, text_sample
from omnimri.platform.language.derive import derive
from omnimri.platform.language.description import Description, description_schema
from omnimri.platform.language.evidence import Evidence
from omnimri.platform.language.instruct import draw_text_pair, plain_pair, plain_tasks
from omnimri.platform.training.omnimri_kit import corpus_texts
from tests.platform.shards_fakes import write_shards

PREPROCESS = Preprocess(InputConfig(volume_shape=(8, 32, 32), volume_spacing_mm=(12.0, 4.0, 4.0), slice_spacing_mm=4.0))
Row = dict[str, Any]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return Shards.open(write_shards(tmp_path_factory.mktemp("describe") / "shards"))


@pytest.fixture(scope="module")
def labelled(shards: Shards) -> list[Row]:
    return [load_row(ref, SOURCES["instruct.text"].columns) for ref in shards.rows]


@pytest.fixture(scope="module")
def rows(labelled: list[Row], tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Rows with each description of two patients of the built-in corpus, and with those that follow from labels."""
    folder, template = tmp_path_factory.mktemp("corpus"), load_template()
    written = []
    for index in range(2):
        path = write_patient(Patient.draw(index, 3), template, folder, CorpusConfig(num_patients=2))
        series = json.loads((path / "annotations.json").read_text())["series"].values()
        written += [json.dumps(entry["description"], sort_keys=True) for entry in series]
    written += [derive(Evidence.of_row(row).known)[0].model_dump_json() for row in labelled]
    return [labelled[number % len(labelled)] | {"description": text} for number, text in enumerate(written)]


@pytest.fixture(scope="module")
def tokenizer(rows: list[Row], shards: Shards) -> PreTrainedTokenizerBase:
    described = [Description.model_validate_json(row["description"]).answer() for row in rows]
    return train_tokenizer([*corpus_texts(shards), *described], preset("tiny").backbone.vocab_size)


def asked(row: Row, seed: int = 0) -> Any:
    return plain_pair("describe", row, Evidence.of_row(row), PREPROCESS, np.random.default_rng(seed))


def decoded(answer: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The answer as training labels it, each token first asked of the grammar that serving decodes with."""
    sequence = SequenceBuilder(tokenizer, num_visual=4, num_queries=4).example("Describe.", {}, "report", answer)
    opening, *ids, closing, _ = sequence.labels[sequence.labels != IGNORED].tolist()
    assert tokenizer.convert_ids_to_tokens([opening, closing]) == [special.RESPONSE, special.RESPONSE_END]
    matcher = matcher_of(
        grammar_tokens(tokenizer, preset("tiny").backbone.vocab_size), json_grammar(description_schema())
    )
    for place, token in enumerate(ids):
        assert matcher.consume_token(token), tokenizer.decode(ids[: place + 1])[-40:]
    assert matcher.is_accepting()
    assert closing in allowed_tokens(matcher, tokenizer)
    return assemble(tokenizer, "report", [*ids, closing], [0.0] * (len(ids) + 1)).readable


def allowed_tokens(matcher: LLMatcher, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    allowed = np.frombuffer(matcher.compute_logit_bias(), np.uint8)
    return set(np.flatnonzero(allowed).tolist()) & set(range(len(tokenizer)))


def test_the_grammar_accepts_every_answer_token_by_token(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(rows) == 20
    for row in rows:
        text = decoded(asked(row).answer, tokenizer)
        assert Description.model_validate_json(text) == Description.model_validate_json(row["description"])


def test_letters_of_any_kind_pass_the_grammar(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    phrase = 'œdème "½" \\ 5 µm\t正常 😀'
    for words in (phrase, "é" * MAX_PHRASE, '"' * MAX_PHRASE):
        description = Description.from_fields({"diagnostic_impression.suggestive_of": words})
        row = rows[0] | {"description": description.model_dump_json()}
        assert Description.model_validate_json(decoded(asked(row).answer, tokenizer)) == description


def test_a_description_that_does_not_fit_or_tells_nothing_is_not_asked_for(rows: list[Row]) -> None:
    header = {"image_modality_sequence.modality": "MRI", "image_modality_sequence.plane": "axial"}
    told = header | {"diagnostic_impression.suggestive_of": "x" * (MAX_PHRASE + 1)}
    for text in (None, *(Description.from_fields(fields).model_dump_json() for fields in ({}, header, told))):
        assert "describe" not in plain_tasks(Evidence.of_row(rows[0] | {"description": text}))
    assert "describe" in plain_tasks(Evidence.of_row(rows[0]))


def test_rows_without_description_never_get_the_task(labelled: list[Row]) -> None:
    tasks = {"describe": 1000.0, "report": 1.0}
    for seed, row in enumerate(labelled * 3):
        plain = row | {"description": None}
        pair, _ = draw_text_pair(plain, PREPROCESS, np.random.default_rng(seed), tasks=tasks, question_share=0.0)
        assert pair.topic != "description"


def test_the_context_does_not_state_what_is_described(rows: list[Row]) -> None:
    options = ViewOptions(preprocess=PREPROCESS, text_tasks={"describe": 1.0}, question_share=0.0)
    histories = 0
    for seed, row in enumerate(rows * 4):
        sample = text_sample(row, np.random.default_rng(seed), options)
        assert sample["task"] == "report"
        assert sample["instruction"] in INSTRUCTIONS["describe"]
        assert not {"plane", "contrast"} & set(sample["facts"])
        histories += "history" in sample["facts"]
    assert histories
    study = study_sample([lambda row=row: row for row in rows[:3]], np.random.default_rng(0), options)  # type: ignore[misc]
    assert not {"plane", "contrast"} & set(study["facts"][0])
    assert untagged(study["answer"]) in {asked(row).answer[len("<response>") : -len("</response>")] for row in rows[:3]}


def test_it_takes_a_twentieth_by_default_and_leaves_the_others_their_shares(rows: list[Row]) -> None:
    options = ViewOptions(preprocess=PREPROCESS)
    assert sum(options.text_tasks.values()) == pytest.approx(1.0)
    drawn: Counter[str] = Counter()
    for seed in range(1500):
        row = rows[seed % len(rows)]
        if len(plain_tasks(Evidence.of_row(row))) == 4:
            pair, _ = draw_text_pair(
                row, PREPROCESS, np.random.default_rng(seed), tasks=options.text_tasks, question_share=0.0
            )
            drawn[pair.topic or pair.task] += 1
    assert drawn["description"] / drawn.total() == pytest.approx(0.05, abs=0.02)
    assert drawn["diagnose"] / drawn.total() == pytest.approx(0.43, abs=0.05)
