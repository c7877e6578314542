"""The sample stream: what is read is known beforehand, wherever and by whomever the samples are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from omnimri.platform.data.stream import SampleMaker, SourceRows, StreamConfig, row_position, stream_batches
from omnimri.platform.training.schedule import build_schedule

NUM_ROWS = 7
LOCAL = StreamConfig(num_tasks=0, prefetch=0)


@dataclass(frozen=True)
class Row:
    row_id: str
    value: int


def load(row: Row) -> dict[str, Any]:
    return {"value": row.value}


def make(row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {"value": row["value"], "noise": rng.standard_normal(3)}


def refuse_row_5(row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    if row["value"] == 5:
        raise KeyError("kspace")
    return make(row, rng)


def maker(seed: int = 0, make_sample: Any = make) -> SampleMaker:
    rows = [Row(f"row-{i}", i) for i in range(NUM_ROWS)]
    return SampleMaker(
        sources={name: SourceRows(rows=rows, load=load, make=make_sample) for name in ("a", "b")}, seed=seed
    )


def slots(first: int = 0) -> list[Any]:
    return build_schedule({"a": 0.5, "b": 0.5}, {"a": 4, "b": 2}, 20, seed=0).slots(first)


def values(batches: Any) -> list[list[tuple[int, float]]]:
    return [[(sample["value"], float(sample["noise"][0])) for sample in batch] for batch in batches]


def read(first: int = 0, **options: Any) -> list[list[tuple[int, float]]]:
    options.setdefault("config", LOCAL)
    return values(stream_batches(slots(first), options.pop("maker", maker()), list, **options))


def test_every_epoch_shows_every_row_once_in_another_order() -> None:
    epochs = [[row_position(0, "a", epoch * NUM_ROWS + i, NUM_ROWS) for i in range(NUM_ROWS)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(position for _, position in epoch) == list(range(NUM_ROWS))
    orders = [tuple(position for _, position in epoch) for epoch in epochs]
    assert len(set(orders)) > 1


def test_same_seed_same_samples() -> None:
    assert read() == read()
    assert read() != read(maker=maker(seed=1))


def test_resuming_gives_what_would_have_come() -> None:
    assert read(first=13) == read()[13:]


def test_two_ranks_share_the_samples_of_one() -> None:
    alone, first, second = read(), read(rank=0, world_size=2), read(rank=1, world_size=2)
    for whole, left, right in zip(alone, first, second, strict=True):
        assert sorted(left + right) == sorted(whole)


def test_prefetching_changes_nothing() -> None:
    assert read(config=StreamConfig(num_tasks=0, prefetch=3)) == read()


def test_ray_data_makes_the_same_samples_in_the_same_order(ray_cluster: None) -> None:
    """Over several segments: of six slots, then five at a time."""
    assert read(config=StreamConfig(num_tasks=2, slots_per_task=3, slots_per_segment=5)) == read()


def test_a_failing_row_is_named() -> None:
    with pytest.raises(KeyError) as error:
        read(maker=maker(make_sample=refuse_row_5))
    assert "from row 'row-5'" in error.value.__notes__[0]


def test_a_failing_row_is_named_through_ray_and_the_thread(ray_cluster: None) -> None:
    with pytest.raises(Exception, match="from row 'row-5'"):
        read(maker=maker(make_sample=refuse_row_5), config=StreamConfig(num_tasks=2, prefetch=2))


def test_leaving_early_stops_the_thread() -> None:
    stream = stream_batches(slots(), maker(), list, config=StreamConfig(num_tasks=0, prefetch=2))
    next(stream)
    stream.close()
    assert list(stream) == []


def test_fewer_rows_than_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer rows in a step than the 8 workers"):
        stream_batches(slots(), maker(), list, rank=5, world_size=8, config=LOCAL)
