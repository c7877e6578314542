"""Rows of a corpus for one training process: drawn without end, each loaded and prepared once while memory lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from omnimri.platform.data.shards import RowRef, load_row

Prepared = TypeVar("Prepared")

CACHE_MB = 2048


class Rows(Generic[Prepared]):
    """Rows that were prepared by a function, kept up to a number of megabytes; the others are read each time."""

    def __init__(
        self,
        refs: Sequence[RowRef],
        columns: Sequence[str],
        prepare: Callable[[dict[str, Any]], Prepared | None],
        *,
        cache_mb: int = CACHE_MB,
    ) -> None:
        """Take the rows of a corpus.

        Args:
            refs: The rows.
            columns: What `prepare` reads of them.
            prepare: A row to what a batch is made of, or None for a row that is of no use.
            cache_mb: How much of that is kept.
        """
        self._refs = list(refs)
        self._columns = tuple(columns)
        self._prepare = prepare
        self._kept: dict[int, Prepared | None] = {}
        self._room = cache_mb * 2**20

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, index: int) -> Prepared | None:
        if index in self._kept:
            return self._kept[index]
        prepared = self._prepare(load_row(self._refs[index], self._columns))
        size = num_bytes(prepared)
        if size <= self._room:
            self._room -= size
            self._kept[index] = prepared
        return prepared

    def __iter__(self) -> Iterator[Prepared]:
        """Every usable row once, in order."""
        for index in range(len(self)):
            if (prepared := self[index]) is not None:
                yield prepared

    def endless(self, rng: np.random.Generator) -> Iterator[Prepared]:
        """Usable rows without end, each once before any comes again.

        Raises:
            ValueError: If a whole round has no usable row.
        """
        while True:
            used = 0
            for index in rng.permutation(len(self)):
                if (prepared := self[int(index)]) is not None:
                    used += 1
                    yield prepared
            if not used:
                raise ValueError(f"None of {len(self)} rows of the training split can be used by this specialist.")


def num_bytes(value: Any) -> int:
    """Bytes of the arrays and tensors in a value, through the fields of dataclasses, mappings and sequences."""
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if isinstance(value, dict):
        return sum(map(num_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(num_bytes, value))
    return sum(map(num_bytes, vars(value).values())) if hasattr(value, "__dict__") else 0
