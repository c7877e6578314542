"""Tokenizer: Qwen2's own class; its vocabulary, or for the tiny preset one trained on the corpus' texts."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from omnimri.models.special_tokens import END_OF_TEXT, SPECIAL_TOKENS, TURN_END

logger = logging.getLogger(__name__)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of at most `vocab_size` entries with Qwen2's splitting rules and our special tokens.

    Raises:
        ValueError: If `vocab_size` cannot hold the special tokens and the 256 bytes.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} is below the {smallest} entries that bytes and special tokens need.")
    blank = Qwen2Tokenizer(vocab={END_OF_TEXT: 0}, merges=[])
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe = Tokenizer(BPE())
    bpe.normalizer = blank.backend_tokenizer.normalizer
    bpe.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return _with_special_tokens(Qwen2Tokenizer(vocab=learned["vocab"], merges=merges))


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, or of a local Qwen2/Qwen2.5 folder, with our special tokens added."""
    return _with_special_tokens(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))


def _with_special_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL_TOKENS[1:])})
    tokenizer.pad_token = END_OF_TEXT
    tokenizer.eos_token = TURN_END
    return tokenizer
