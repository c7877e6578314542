"""From samples to batches: what training, evaluation and serving feed the model, laid out in one place."""

# B samples, S slices per sample, M images of a sequence, L sequence length

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnimri.models import special_tokens as special
from omnimri.models.packing import join, pack
from omnimri.models.prompts import IGNORED, SequenceBuilder, TokenSequence
from omnimri.models.vocabulary import IMAGE_TASKS

STACKED = ("volume", "spacing_mm", "contrast", "attributes")
"""One per sample; where a sample shows M images of one patient in one sequence, M, joined along the first axis."""
JOINED = ("volumes", "labels", "known", "kspace", "mask", "sens_maps", "target", "slices", "slice_target")
"""Several slices or patches per sample, joined along the first axis."""


def collate(
    samples: Sequence[dict[str, Any]], builder: SequenceBuilder, *, pack_length: int | None = None
) -> dict[str, Tensor]:
    """One batch of samples of one source (see `platform.data.views`).

    Args:
        samples: Of one source.
        builder: Lays out their sequences.
        pack_length: Tokens of a row that several sequences may share (see `packing`); None gives each a row of its
            own. Sequences that are answered by an image always have one.

    Raises:
        ValueError: If raw samples of different matrix or coils meet in one batch.

    Returns:
        The arrays of the samples; for samples with text the sequence fields of `sequence_batch`; for paired samples
        also `text_ids`, `text_lengths` and `text_group` for the text encoder, one per image. Images stand in the order
        of their sequences' places.
    """
    first = samples[0]
    if "kspace" in first and len(shapes := {s["kspace"].shape[1:] for s in samples}) > 1:
        raise ValueError(
            f"One batch holds k-space of several sizes (coils, Y, X): {sorted(shapes)}. Set rows_per_step of "
            "instruct.reconstruct to 1, or ingest data of one matrix at a time."
        )
    sequences = [sequence for s in samples for sequence in _sequences(s, builder)]
    if pack_length and sequences and first.get("task") not in IMAGE_TASKS:
        rows = pack([len(s.token_ids) for s in sequences], pack_length)
        samples = [samples[i] for row in rows for i in row]
        sequences = [join([sequences[i] for i in row]) for row in rows]
    put_together = np.concatenate if np.ndim(first.get("contrast", 0)) else np.stack
    batch = {name: torch.from_numpy(put_together([s[name] for s in samples])) for name in STACKED if name in first}
    batch |= {name: torch.from_numpy(np.concatenate([s[name] for s in samples])) for name in JOINED if name in first}
    if "volumes" in batch:
        batch["volume"] = batch.pop("volumes")
        if "attributes" in batch:
            batch["attributes"] = batch["attributes"].flatten(0, 1)
    if sequences:
        batch |= sequence_batch(sequences, builder)
    if _texts(first):
        batch |= _text_batch(samples, builder)
    return batch


def _sequences(sample: dict[str, Any], builder: SequenceBuilder) -> list[TokenSequence]:
    """None of an image-only sample; several of a segmentation sample, one for each structure that it asks for."""
    if "instruction" in sample:
        asked = sample["instruction"]
        return [
            builder.example(instruction, sample["facts"], sample["task"], sample.get("answer", ""))
            for instruction in ([asked] if isinstance(asked, str) else asked)
        ]
    if not (texts := _texts(sample)):
        return []
    kind, count = sample.get("image_kind", special.VOLUME), _images_per_text(sample)
    return [builder.interleaved(texts, image_first=sample["image_first"], images_per_text=count, kind=kind)]


def _texts(sample: dict[str, Any]) -> list[str]:
    """What a sample of the paired view says of its images, in their order."""
    return sample["texts"] if "texts" in sample else [sample["text"]] if "text" in sample else []


def _images_per_text(sample: dict[str, Any]) -> int:
    return np.size(sample["contrast"]) // len(_texts(sample))


def sequence_batch(sequences: Sequence[TokenSequence], builder: SequenceBuilder) -> dict[str, Tensor]:
    """Right-padded `token_ids`, `labels` `(B, L)`, `lengths` `(B,)`, and where things stand.

    `visual_places`, `query_places` and `instruction_places` (the user's own words, where a row holds one sequence)
    are bool `(B, L)`. Where sequences share a row, also `position_ids` `(B, L)`; `lengths` are those of rows.
    """
    ids = _pad([s.token_ids for s in sequences], builder.tokenizer.pad_token_id)
    queries = [builder.tokenizer.convert_tokens_to_ids(f"<q{i}>") for i in range(builder.num_queries)]
    batch = {
        "token_ids": ids,
        "labels": _pad([s.labels for s in sequences], IGNORED),
        "lengths": torch.tensor([len(s.token_ids) for s in sequences]),
        "visual_places": ids == builder.tokenizer.convert_tokens_to_ids(special.IMAGE_PAD),
        "query_places": torch.isin(ids, torch.tensor(queries)),
        "instruction_places": _within([s.instruction for s in sequences], ids.shape[1]),
        "num_tokens": torch.tensor(sum(len(s.token_ids) for s in sequences)),
    }
    if any(s.positions is not None for s in sequences):
        positions = [np.arange(len(s.token_ids)) if s.positions is None else s.positions for s in sequences]
        batch["position_ids"] = _pad(positions, 0)
    return batch


def _within(ranges: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Places in the half-open range of each row, bool `(B, L)`."""
    start, stop = torch.tensor(ranges)[..., None].unbind(1)
    places = torch.arange(length)
    return (places >= start) & (places < stop)


def _text_batch(samples: Sequence[dict[str, Any]], builder: SequenceBuilder) -> dict[str, Tensor]:
    """A text for every image, for the text encoder; those of the same study share a group."""
    pairs = [(text, s["text_group"]) for s in samples for text in _texts(s) for _ in range(_images_per_text(s))]
    ids = [builder.plain(text).token_ids for text, _ in pairs]
    return {
        "text_ids": _pad(ids, builder.tokenizer.pad_token_id),
        "text_lengths": torch.tensor([len(i) for i in ids]),
        "text_group": torch.tensor([group for _, group in pairs]),
    }


def _pad(rows: Sequence[np.ndarray], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    padded = np.full((len(rows), longest), value, np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded)
