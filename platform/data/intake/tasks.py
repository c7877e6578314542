"""Running our own functions over our own small objects through Ray Data."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray.data
from ray.data._internal.execution import backpressure_policy as backpressure

from omnimri.platform.cluster import quiet_ray_data


def run_tasks(function: Callable[[Any], Any], tasks: Sequence[Any], *, cpus_per_task: float) -> Iterator[Any]:
    """Results of a function over tasks through Ray Data, one block per task, as they are ready.

    Tasks and results are our own small objects; they travel as bytes because Arrow has no type for them.
    """
    if not tasks:
        return
    rows = [{"task": pickle.dumps(task)} for task in tasks]
    with quiet_ray_data(), _queued():
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        for row in dataset.map(_Pickled(function), num_cpus=cpus_per_task).iter_rows():
            yield pickle.loads(row["result"])


@contextlib.contextmanager
def _queued() -> Iterator[None]:
    """Let tasks wait at the workers instead of in the driver; a cluster that scales sees how many there are.

    By its budgets Ray Data would give a worker its next task 0.2 s after the last one, and in the first second of an
    execution feed one worker alone (measured, Ray 2.60). Our tasks hold next to nothing, so there is no memory to keep.
    """
    context, key = ray.data.DataContext.get_current(), backpressure.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY
    former = context.get_config(key, backpressure.ENABLED_BACKPRESSURE_POLICIES)
    context.set_config(key, [])
    try:
        yield
    finally:
        context.set_config(key, former)


@dataclass(frozen=True)
class _Pickled:
    function: Callable[[Any], Any]

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        return {"result": pickle.dumps(self.function(pickle.loads(row["task"])))}
