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


def adopt_tokenizer(folder: Path | str, num_rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a Qwen2.5 checkpoint, our special tokens in rows that its embedding has and nothing uses.

    Qwen2.5 pads its embedding: 151,665 tokens in 151,936 rows (152,064 from 7B on). Tokens that it has in common with
    ours keep their rows, and so does every word: texts encode as before, and the embedding keeps its shape.

    Args:
        folder: Local, with `tokenizer.json` or `vocab.json` and `merges.txt`; weights need not be there.
        num_rows: Rows of the embedding, `BackboneConfig.vocab_size`.

    Raises:
        ValueError: If the folder has no byte-level tokenizer, its embedding has another number of rows, or too few of
            them are free.
    """
    tokenizer = read_tokenizer(Path(folder))
    _check_rows(Path(folder), num_rows)
    known = tokenizer.get_vocab()
    new = [token for token in SPECIAL_TOKENS if token not in known]
    first = max(known.values()) + 1
    if first + len(new) > num_rows:
        raise ValueError(
            f"{folder}: {len(new)} special tokens are not in its vocabulary ({new[0]} to {new[-1]}), but of the "
            f"embedding's {num_rows} rows only {max(0, num_rows - first)} are free behind token {first - 1}: "
            f"{first + len(new) - num_rows} too few. An embedding is not resized: take a checkpoint with a padded one."
        )
    return _with_special_tokens(tokenizer)


_PROBE = "T2*: 1,5 mm (Ø 3 µm), 脑 ✓\n\n\tdon't  "


def has_tokenizer(folder: Path | str) -> bool:
    """Whether a local folder has the files of a tokenizer."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, as it is.

    Raises:
        ValueError: If there is none, or it does not give every byte back.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: expected the tokenizer of a Qwen2.5 checkpoint: {error}") from error
    if tokenizer.decode(tokenizer.encode(_PROBE)) != _PROBE:
        raise ValueError(
            f"{folder}: expected a byte-level tokenizer, as Qwen2.5's is; this {type(tokenizer).__name__} does not "
            f"give {_PROBE!r} back as it was."
        )
    return tokenizer


def _check_rows(folder: Path, num_rows: int) -> None:
    """Check that the embedding beside a tokenizer, if there is one, has as many rows as ours."""
    config = folder / "config.json"
    rows = json.loads(config.read_text(encoding="utf-8")).get("vocab_size") if config.is_file() else None
    if rows not in (None, num_rows):
        raise ValueError(
            f"{folder}: its embedding has {rows} rows, BackboneConfig.vocab_size is {num_rows}; an embedding is not "
            f"resized. Set model.backbone.vocab_size={rows}, or choose the preset of that checkpoint's size."
        )


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, or of a local Qwen2/Qwen2.5 folder, with our special tokens added."""
    return _with_special_tokens(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))


def _with_special_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL_TOKENS[1:])})
    tokenizer.pad_token = END_OF_TEXT
    tokenizer.eos_token = TURN_END
    return tokenizer
