"""From samples to batches: what training, evaluation and serving feed the model, laid out in one place."""

# B samples, S slices per sample, L sequence length

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnimri.models import special_tokens as special
from omnimri.models.prompts import IGNORED, SequenceBuilder, TokenSequence

STACKED = ("volume", "spacing_mm", "contrast", "attributes")
"""One per sample."""
JOINED = ("volumes", "kspace", "mask", "sens_maps", "target", "slices", "slice_target")
"""Several slices per sample, joined along the first axis."""


def collate(samples: Sequence[dict[str, Any]], builder: SequenceBuilder) -> dict[str, Tensor]:
    """One batch of samples of one source (see `platform.data.views`).

    Raises:
        ValueError: If raw samples of different matrix or coils meet in one batch.

    Returns:
        The arrays of the samples; for samples with text the sequence fields of `sequence_batch`; for paired samples
        also `text_ids`, `text_lengths` and `text_group` for the text encoder.
    """
    first = samples[0]
    if "kspace" in first and len(shapes := {s["kspace"].shape[1:] for s in samples}) > 1:
        raise ValueError(
            f"One batch holds k-space of several sizes (coils, Y, X): {sorted(shapes)}. Set rows_per_step of "
            "instruct.reconstruct to 1, or ingest data of one matrix at a time."
        )
    batch = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in STACKED if name in first}
    batch |= {name: torch.from_numpy(np.concatenate([s[name] for s in samples])) for name in JOINED if name in first}
    if "volumes" in batch:
        batch["volume"] = batch.pop("volumes")
        batch["attributes"] = batch["attributes"].flatten(0, 1)
    if "instruction" in first:
        sequences = [
            builder.example(instruction, s["facts"], s["task"], s.get("answer", ""))
            for s in samples
            for instruction in _instructions(s)
        ]
        batch |= sequence_batch(sequences, builder)
    elif "text" in first:
        sequences = [builder.paired(s["text"], image_first=s["image_first"]) for s in samples]
        batch |= sequence_batch(sequences, builder) | _text_batch(samples, builder)
    return batch


def _instructions(sample: dict[str, Any]) -> list[str]:
    """One, or those of a segmentation sample, which asks for several structures."""
    asked = sample["instruction"]
    return [asked] if isinstance(asked, str) else list(asked)


def sequence_batch(sequences: Sequence[TokenSequence], builder: SequenceBuilder) -> dict[str, Tensor]:
    """Right-padded `token_ids`, `labels` `(B, L)`, `lengths` `(B,)`, and where things stand.

    `visual_places`, `query_places` and `instruction_places` (the user's words after the volume, with the end of
    the turn) are bool `(B, L)`.
    """
    ids = _pad([s.token_ids for s in sequences], builder.tokenizer.pad_token_id)
    queries = [builder.tokenizer.convert_tokens_to_ids(f"<q{i}>") for i in range(builder.num_queries)]
    return {
        "token_ids": ids,
        "labels": _pad([s.labels for s in sequences], IGNORED),
        "lengths": torch.tensor([len(s.token_ids) for s in sequences]),
        "visual_places": ids == builder.tokenizer.convert_tokens_to_ids(special.IMAGE_PAD),
        "query_places": torch.isin(ids, torch.tensor(queries)),
        "instruction_places": _after(ids, builder, special.VISION_END) & ~_after(ids, builder, special.TURN_END),
        "num_tokens": torch.tensor(sum(len(s.token_ids) for s in sequences)),
    }


def _after(ids: Tensor, builder: SequenceBuilder, token: str) -> Tensor:
    """Places behind the first occurrence of a token, bool `(B, L)`."""
    seen = (ids == builder.tokenizer.convert_tokens_to_ids(token)).cumsum(1) > 0
    return seen.roll(1, dims=1).index_fill(1, torch.tensor([0]), value=False)


def _text_batch(samples: Sequence[dict[str, Any]], builder: SequenceBuilder) -> dict[str, Tensor]:
    """Texts for the text encoder; samples with the same text or of the same study share a group."""
    ids = [builder.plain(s["text"]).token_ids for s in samples]
    return {
        "text_ids": _pad(ids, builder.tokenizer.pad_token_id),
        "text_lengths": torch.tensor([len(i) for i in ids]),
        "text_group": torch.tensor([s["text_group"] for s in samples]),
    }


def _pad(rows: Sequence[np.ndarray], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    padded = np.full((len(rows), longest), value, np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded)
