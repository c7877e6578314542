"""The task schedule: exact shares, the same for everyone, and any beginning nearly exact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from omnimri.platform.training.schedule import build_schedule, exact_counts

SHARES = {"paired": 0.8, "instruct.reconstruct": 0.05, "instruct.segment": 0.1, "instruct.text": 0.05}
ROWS = {"paired": 16, "instruct.reconstruct": 4, "instruct.segment": 4, "instruct.text": 8}


def test_counts_are_exact() -> None:
    assert exact_counts({"a": 0.8, "b": 0.2}, 120) == {"a": 96, "b": 24}
    assert sum(exact_counts({"a": 1, "b": 1, "c": 1}, 100).values()) == 100
    assert exact_counts({"a": 0.5, "b": 0.5, "c": 0.0}, 7)["c"] == 0


def test_schedule_gives_every_source_its_share() -> None:
    assert build_schedule(SHARES, ROWS, 120, seed=0).counts() == {
        "paired": 96, "instruct.reconstruct": 6, "instruct.segment": 12, "instruct.text": 6,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_every_beginning_is_close_to_the_shares(seed: int) -> None:
    schedule = build_schedule(SHARES, ROWS, 1000, seed=seed)
    for upto in range(1, 1000, 7):
        for source, count in schedule.counts(upto).items():
            assert abs(count - SHARES[source] * upto) <= len(SHARES)


def test_schedule_is_a_function_of_the_seed() -> None:
    first, again, other = (build_schedule(SHARES, ROWS, 200, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first.order, again.order)
    assert not np.array_equal(first.order, other.order)
    assert first.slots() == again.slots()


def test_going_on_at_a_step_reads_what_the_whole_run_would_have_read() -> None:
    schedule = build_schedule(SHARES, ROWS, 200, seed=3)
    assert schedule.slots(77) == schedule.slots()[77:]
    seen = dict.fromkeys(schedule.sources, 0)
    for slot in schedule.slots(0, 77):
        assert slot.start == seen[slot.source]
        seen[slot.source] += slot.num_rows
    assert schedule.positions(77) == seen


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_together_read_the_same_samples_for_any_number_of_workers(world_size: int) -> None:
    for slot in build_schedule(SHARES, ROWS, 50, seed=0).slots():
        shares = [list(slot.sample_indices(rank, world_size)) for rank in range(world_size)]
        assert sorted(itertools.chain.from_iterable(shares)) == list(range(slot.start, slot.start + slot.num_rows))
        assert len({len(share) for share in shares}) == 1


def test_a_source_without_rows_per_step_is_named() -> None:
    with pytest.raises(ValueError, match=r"rows_per_step has no entry for \['b'\]"):
        build_schedule({"a": 0.5, "b": 0.5}, {"a": 4}, 10, seed=0)


def test_shares_must_be_sensible() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        exact_counts({"a": -1.0, "b": 2.0}, 10)
