"""A pretrained vocabulary keeps its words and its rows; our special tokens take rows that nothing uses."""

import json
import unicodedata
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from omnimri.models.backbone import build_backbone
from omnimri.models.config import BackboneConfig
from omnimri.models.special_tokens import END_OF_TEXT, SPECIAL_TOKENS, TURN_END
from omnimri.models.tokenizer import adopt_tokenizer, load_tokenizer, train_tokenizer
from tests.models.qwen_fakes import QWEN_ADDED, WORDS, write_qwen

TEXTS = (
    "24 x 18 mm, côté gauche; T2*-gradient: 1,5 T",
    "  leading,\ttabs \n\n and trailing  \r\n",
    "don't clean up , this . or that ' s",
    "脑部 MRI ✓ 🧠 Ω µ ≥ \u200b\u00a0\x00",
    "1234567890 mm3 <not a token> </seg",
)


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return write_qwen(tmp_path / "qwen")


def rows_of(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def plain(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def test_words_and_known_tokens_keep_their_rows(qwen: Path) -> None:
    before, after = plain(qwen), adopt_tokenizer(qwen, rows_of(qwen))
    known = before.get_vocab()
    assert [known[token] for token in QWEN_ADDED] == list(range(len(known) - len(QWEN_ADDED), len(known)))
    assert {token: after.get_vocab()[token] for token in known} == known
    for text in (*TEXTS, *WORDS):
        assert after.encode(text) == before.encode(text)
    assert after.convert_tokens_to_ids(TURN_END) == known[TURN_END] == after.eos_token_id
    assert after.convert_tokens_to_ids(END_OF_TEXT) == known[END_OF_TEXT] == after.pad_token_id


def test_new_tokens_take_free_rows_in_order_and_the_embedding_stays(qwen: Path) -> None:
    before, rows = plain(qwen), rows_of(qwen)
    after = adopt_tokenizer(qwen, rows)
    new = [token for token in SPECIAL_TOKENS if token not in before.get_vocab()]
    assert len(new) == 75
    assert after.convert_tokens_to_ids(new) == list(range(len(before), len(before) + len(new)))
    assert len(after) <= rows
    config = BackboneConfig(
        hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, shared_width=32, num_experts=2, experts_per_token=1,
        expert_width=16, vocab_size=rows,
    )  # fmt: skip
    backbone = build_backbone(config)
    ids = torch.tensor([after.encode(f"{TEXTS[0]}{''.join(SPECIAL_TOKENS)}")])
    assert backbone(input_ids=ids).logits.shape[-1] == rows == backbone.get_input_embeddings().num_embeddings


def test_special_tokens_are_single_wherever_they_stand(qwen: Path) -> None:
    tokenizer = adopt_tokenizer(qwen, rows_of(qwen))
    for token in SPECIAL_TOKENS:
        ids = tokenizer.encode(f"a{token}b {token}")
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == 2
        assert tokenizer.decode(ids) == f"a{token}b {token}"


def test_it_is_the_same_after_saving_beside_a_model(qwen: Path, tmp_path: Path) -> None:
    tokenizer = adopt_tokenizer(qwen, rows_of(qwen))
    tokenizer.save_pretrained(tmp_path / "saved")
    for again in (load_tokenizer(tmp_path / "saved"), plain(tmp_path / "saved")):
        assert again.get_vocab() == tokenizer.get_vocab()
        assert (again.eos_token, again.pad_token) == (TURN_END, END_OF_TEXT)
        for text in (*TEXTS, *SPECIAL_TOKENS):
            assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["pretrained", "trained"])
@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_byte_by_byte(qwen: Path, kind: str, text: str) -> None:
    tokenizer = adopt_tokenizer(qwen, rows_of(qwen)) if kind == "pretrained" else train_tokenizer(WORDS, 400)
    assert tokenizer.decode(tokenizer.encode(text)).encode() == text.encode()


@pytest.mark.parametrize("kind", ["pretrained", "trained"])
def test_decomposed_letters_come_back_composed(qwen: Path, kind: str) -> None:
    """As Qwen2.5 does it: its normaliser is NFC, and is part of the vocabulary that is reused."""
    tokenizer = adopt_tokenizer(qwen, rows_of(qwen)) if kind == "pretrained" else train_tokenizer(WORDS, 400)
    text = "le\u0301sion"
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text) != text


def test_too_few_free_rows_are_refused_and_counted(qwen: Path) -> None:
    (qwen / "config.json").unlink()
    used = len(plain(qwen))
    assert len(adopt_tokenizer(qwen, used + 75)) == used + 75
    with pytest.raises(ValueError, match=r"75 special tokens .*\(<recon> to <q63>\).* only 70 are free .* 5 too few"):
        adopt_tokenizer(qwen, used + 70)
    with pytest.raises(ValueError, match="only 0 are free"):
        adopt_tokenizer(qwen, used - 100)


def test_an_embedding_of_another_size_is_refused(qwen: Path) -> None:
    rows = rows_of(qwen)
    with pytest.raises(ValueError, match=rf"has {rows} rows, BackboneConfig.vocab_size is 2048.*vocab_size={rows}"):
        adopt_tokenizer(qwen, 2048)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the tokenizer of a Qwen2"):
        adopt_tokenizer(tmp_path, 2048)


def test_a_tokenizer_that_loses_bytes_is_refused(qwen: Path) -> None:
    """Lower-cased texts would come back changed: boxes and reports are read from what is written."""
    tokenizer = json.loads((qwen / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (qwen / "tokenizer.json").write_text(json.dumps(tokenizer))
    (qwen / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (qwen / "config.json").unlink()
    with pytest.raises(ValueError, match=r"does not give .* back"):
        adopt_tokenizer(qwen, 2048)
