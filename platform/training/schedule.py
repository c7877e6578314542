"""Which source each step reads: exact shares, seeded, the same on every rank, resumable at any step.

Ranks that run different heads in one step get silently wrong gradients under ZeRO-1, 2 and 3, so the order is a pure
function of the configuration that every rank computes for itself; nothing is drawn at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One forward pass of all ranks together."""

    source: str
    start: int
    """Index of the first sample of its source that this slot reads."""
    num_rows: int
    """Samples summed over all ranks."""

    def sample_indices(self, rank: int, world_size: int) -> range:
        """Samples of this rank: every `world_size`-th, so that the slot holds the same samples for any world size."""
        return range(self.start + rank, self.start + self.num_rows, world_size)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The source of every slot of a run."""

    sources: tuple[str, ...]
    order: np.ndarray
    """`(num_slots,)` int, index into `sources`."""
    rows: tuple[int, ...]
    """Samples per slot of each source, summed over all ranks."""

    def __len__(self) -> int:
        return len(self.order)

    def slots(self, first: int = 0, last: int | None = None) -> list[Slot]:
        """Slots `first` to `last` (exclusive), each with the position of its samples."""
        seen = np.bincount(self.order[:first], minlength=len(self.sources))
        slots = []
        for which in self.order[first:last]:
            slots.append(
                Slot(source=self.sources[which], start=int(seen[which]) * self.rows[which], num_rows=self.rows[which])
            )
            seen[which] += 1
        return slots

    def counts(self, upto: int | None = None) -> dict[str, int]:
        """Slots that each source got among the first `upto`."""
        seen = np.bincount(self.order[:upto], minlength=len(self.sources))
        return {source: int(n) for source, n in zip(self.sources, seen, strict=True)}

    def positions(self, upto: int) -> dict[str, int]:
        """Samples that each source has given before slot `upto`: where its stream goes on."""
        return {source: n * rows for (source, n), rows in zip(self.counts(upto).items(), self.rows, strict=True)}


def exact_counts(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers that sum to `total` and follow `shares` by the method of largest remainders."""
    if not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise ValueError(f"Shares must be non-negative with a positive sum, found {dict(shares)}.")
    whole = sum(shares.values())
    exact = {name: share / whole * total for name, share in shares.items()}
    counts = {name: int(value + 1e-9) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def build_schedule(shares: Mapping[str, float], rows: Mapping[str, int], num_slots: int, seed: int) -> Schedule:
    """Lay the sources out so that the run has exact shares and every beginning of it nearly so.

    The j-th of a source's n slots falls at a random place inside the j-th n-th of the run (stratified sampling), so a
    prefix never strays from the shares by more than the number of sources.

    Args:
        shares: Share of the slots by source; scaled to sum to one. A source with share 0 is left out.
        rows: Samples per slot by source, summed over all ranks.
        num_slots: Forward passes of the whole run.
        seed: Same seed, same schedule, on any machine.
    """
    counts = {source: n for source, n in exact_counts(shares, num_slots).items() if n}
    if missing := sorted(set(counts) - set(rows)):
        raise ValueError(f"TrainConfig.rows_per_step has no entry for {missing}; it has {sorted(rows)}.")
    sources = tuple(sorted(counts))
    rng = np.random.default_rng([seed, num_slots])
    places = [(np.arange(counts[source]) + rng.random(counts[source])) / counts[source] for source in sources]
    which = np.repeat(np.arange(len(sources)), [counts[source] for source in sources])
    order = which[np.argsort(np.concatenate(places), kind="stable")]
    return Schedule(sources=sources, order=order, rows=tuple(rows[source] for source in sources))
