"""Several token sequences in one row, so that the backbone computes on tokens instead of padding.

Each keeps its own positions from 0 on. Where positions start again, transformers lets no token attend to what lies
before (`masking_utils.find_packed_sequence_indices`), so a sequence is computed as if it stood alone.
"""

# L sequence length

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omnimri.models.prompts import IGNORED, TokenSequence


def pack(lengths: Sequence[int], pack_length: int) -> list[list[int]]:
    """Which sequences share a row of at most `pack_length` tokens; one that is longer stands alone.

    As few rows as first fit needs, evenly filled where that is possible, since all are padded to the longest. Equal
    lengths give equal rows, whoever asks.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    rows: list[list[int]] = []
    free: list[int] = []
    for index in longest_first:
        row = next((r for r, space in enumerate(free) if lengths[index] <= space), None)
        if row is None:
            rows.append([index])
            free.append(pack_length - lengths[index])
        else:
            rows[row].append(index)
            free[row] -= lengths[index]
    even = _spread(lengths, longest_first, len(rows))
    longest = max((sum(lengths[i] for i in row) for row in even), default=0)
    return even if longest <= pack_length else rows


def _spread(lengths: Sequence[int], order: Sequence[int], num_rows: int) -> list[list[int]]:
    """Each sequence to the row that is shortest by then."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    tokens = [0] * num_rows
    for index in order:
        row = tokens.index(min(tokens))
        rows[row].append(index)
        tokens[row] += lengths[index]
    return rows


def join(sequences: Sequence[TokenSequence]) -> TokenSequence:
    """One row of several sequences; a single one stays as it is."""
    if len(sequences) == 1:
        return sequences[0]
    labels = [s.labels.copy() for s in sequences]
    for own in labels:
        own[0] = IGNORED  # nothing of its own sequence predicts a first token
    return TokenSequence(
        token_ids=np.concatenate([s.token_ids for s in sequences]),
        labels=np.concatenate(labels),
        positions=np.concatenate([np.arange(len(s.token_ids)) for s in sequences]),
    )
