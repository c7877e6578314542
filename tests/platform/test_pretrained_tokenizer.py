"""A run that is given a Qwen2.5 checkpoint takes its tokenizer, and the model it makes keeps the checkpoint's rows."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from omnimri.models.special_tokens import SPECIAL_TOKENS
from omnimri.platform.training.config import RunConfig
from omnimri.platform.training.trainer import default_kit, find_tokenizer
from tests.models.qwen_fakes import FREE_ROWS, write_qwen
from tests.platform.shards_fakes import write_shards
from tests.platform.smallest import smallest_run


def run_on(qwen: Path, tmp_path: Path, *, rows: int) -> RunConfig:
    run = smallest_run(write_shards(tmp_path / "balls"), tmp_path / "out")
    backbone = replace(run.model.backbone, vocab_size=rows)
    return replace(run, model=replace(run.model, backbone=backbone), tokenizer=str(qwen))


def test_a_new_model_takes_the_tokenizer_and_its_rows(tmp_path: Path) -> None:
    qwen = write_qwen(tmp_path / "qwen")
    before = AutoTokenizer.from_pretrained(str(qwen), local_files_only=True)
    run = run_on(qwen, tmp_path, rows=len(before) + FREE_ROWS)
    kit = default_kit(run)
    folder = find_tokenizer(run, kit, None)
    tokenizer = kit.load_tokenizer(folder)
    assert before.get_vocab().items() <= tokenizer.get_vocab().items()
    assert set(SPECIAL_TOKENS) <= set(tokenizer.get_vocab())
    model = kit.create(run.model, tokenizer)
    assert model.parts()["backbone"].get_input_embeddings().num_embeddings == len(before) + FREE_ROWS
    model.save(tmp_path / "model", tokenizer, version="x", run={})
    assert find_tokenizer(run, kit, tmp_path / "model") == tmp_path / "model" / "tokenizer"


def test_a_preset_of_another_size_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = run_on(write_qwen(tmp_path / "qwen"), tmp_path, rows=2048)
    with pytest.raises(ValueError, match="an embedding is not resized"):
        find_tokenizer(run, default_kit(run), None)
    assert not (tmp_path / "out" / "tokenizer").exists()
