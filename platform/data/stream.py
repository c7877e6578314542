"""Samples in an order that is known beforehand: the same seed gives the same samples, and any position can be resumed.

Which row the i-th sample of a source shows, and with which random augmentation, is a pure function of the seed, the
source and i. A run is a list of slots (see `training.schedule`), and each rank makes its own samples of each slot. The
making is done by Ray Data inside the worker process, one execution for all sources, in the order of the slots.

`Dataset.streaming_split` and `Dataset.mix` are not used. The first hands out whole blocks to whichever rank asks, so
ranks would see different sources in one step, and with different heads in one step the gradients are silently wrong
under ZeRO; neither can go on from the middle of an epoch.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import queue
import threading
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

logger = logging.getLogger(__name__)


class SlotLike(Protocol):
    """What the stream reads of a slot of the schedule."""

    @property
    def source(self) -> str:
        """Name of the source that the slot reads."""

    def sample_indices(self, rank: int, world_size: int) -> range:
        """Samples of one rank."""


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How samples are made."""

    num_tasks: int = 2
    """Ray Data tasks that make samples at the same time, per worker; 0 makes them in a thread of the worker itself."""
    cpus_per_task: float = 0.25
    """Logical CPUs that Ray reserves for one task; less than one, so that a trainer and its data share few cores."""
    slots_per_task: int = 4
    """Slots that one task makes; larger wastes less time on starting tasks, smaller gives the first batch sooner."""
    prefetch: int = 4
    """Batches that lie ready in the worker; 0 makes each when it is asked for."""
    slots_per_segment: int = 32
    """Slots of one execution of Ray Data, at most; fewer where `memory_mb` asks for it."""
    memory_mb: int = 512
    """About what finished samples may take in Ray's object store, per worker; three segments lie there at most."""

    def __post_init__(self) -> None:
        positive = (self.slots_per_task, self.slots_per_segment, self.memory_mb)
        if min(self.num_tasks, self.prefetch) < 0 or min(positive) < 1:
            raise ValueError(
                "StreamConfig: num_tasks and prefetch must be 0 or more, slots_per_task, slots_per_segment and "
                f"memory_mb 1 or more; found {self}."
            )


@dataclass(frozen=True, kw_only=True)
class SourceRows:
    """A source bound to the rows it may show."""

    rows: Sequence[Any]
    """References of rows, in the order of the manifest."""
    load: Callable[[Any], Mapping[str, Any]]
    """Reads a row."""
    make: Callable[[Mapping[str, Any], np.random.Generator], dict[str, Any]]
    """Makes a sample of a row."""


@dataclass(frozen=True, kw_only=True)
class SampleMaker:
    """Makes the i-th sample of a source; travels to the tasks of Ray Data."""

    sources: Mapping[str, SourceRows]
    seed: int

    def __call__(self, source: str, index: int) -> dict[str, Any]:
        """The sample; an exception on the way carries a note that names the row."""
        bound = self.sources[source]
        _, position = row_position(self.seed, source, index, len(bound.rows))
        row = bound.rows[position]
        try:
            return bound.make(bound.load(row), sample_generator(self.seed, source, index))
        except Exception as error:
            name = getattr(row, "row_id", position)
            error.add_note(f"While making sample {index} of source {source!r} from row {name!r}.")
            raise


def row_position(seed: int, source: str, index: int, num_rows: int) -> tuple[int, int]:
    """Epoch and position among the rows of the index-th sample: each epoch is a permutation of its own."""
    epoch, place = divmod(index, num_rows)
    return epoch, int(_permutation(seed, source, epoch, num_rows)[place])


def sample_generator(seed: int, source: str, index: int) -> np.random.Generator:
    """Random numbers of one sample, whoever makes it and whenever."""
    return np.random.default_rng([seed, zlib.crc32(source.encode()), 1, index])


@lru_cache(maxsize=64)
def _permutation(seed: int, source: str, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng([seed, zlib.crc32(source.encode()), 0, epoch]).permutation(num_rows)


def stream_batches(
    slots: Sequence[SlotLike],
    maker: SampleMaker,
    collate: Callable[[list[dict[str, Any]]], Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    config: StreamConfig,
) -> Generator[Any, None, None]:
    """One collated batch per slot, in order.

    Args:
        slots: What to make, from the position where the run starts or goes on.
        maker: Makes samples.
        collate: Joins the samples of one slot.
        rank: Of this worker.
        world_size: Workers that share each slot.
        config: Where and how far ahead the samples are made.
    """
    for slot in slots:
        if not slot.sample_indices(rank, world_size):
            raise ValueError(f"Source {slot.source!r}: fewer rows in a step than the {world_size} workers.")
    wanted = [(slot.source, tuple(slot.sample_indices(rank, world_size))) for slot in slots]
    made = _made_by_ray(wanted, maker, config) if config.num_tasks else _made_here(wanted, maker)
    batches = (collate(samples) for samples in made)
    return _ahead(batches, config.prefetch) if config.prefetch else batches


Wanted = Sequence[tuple[str, tuple[int, ...]]]


def _made_here(wanted: Wanted, maker: SampleMaker) -> Iterator[list[dict[str, Any]]]:
    for source, indices in wanted:
        yield [maker(source, index) for index in indices]


def _made_by_ray(wanted: Wanted, maker: SampleMaker, config: StreamConfig) -> Iterator[list[dict[str, Any]]]:
    """One execution of Ray Data per segment, the next one made while this one is read.

    Segments are made to their end and not streamed: an execution that waits for its reader keeps scheduling, in this
    process, and took more than half of a trainer's time on two cores (Ray 2.60).
    """
    with contextlib.closing(_ahead(_segments(wanted, maker, config), 1)) as ready:
        for blocks in ready:
            for block in blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
                for packed in block["samples"]:
                    yield pickle.loads(packed.as_buffer())


def _segments(wanted: Wanted, maker: SampleMaker, config: StreamConfig) -> Iterator[Any]:
    """A short segment first, so that training starts soon; the size of each bounds the number of slots in the next."""
    first, count = 0, config.num_tasks * config.slots_per_task
    while first < len(wanted):
        segment = wanted[first : first + count]
        blocks = _segment_by_ray(segment, maker, config)
        yield blocks
        first += count
        slot_bytes = max(1.0, blocks.size_bytes() / len(segment))
        count = max(1, min(config.slots_per_segment, int(config.memory_mb * 2**20 / (3 * slot_bytes))))


def _segment_by_ray(wanted: Wanted, maker: SampleMaker, config: StreamConfig) -> Any:
    """The samples of these slots, in their order, as a materialised dataset in Ray's object store."""
    import ray.data

    from omnimri.platform.cluster import quiet_ray_data

    def make_slot(row: dict[str, Any]) -> dict[str, Any]:
        source, indices = wanted[row["item"]]
        # Samples differ in keys and shapes between sources, which no table schema holds; the bytes never leave Ray.
        return {"samples": pickle.dumps([maker(source, index) for index in indices], protocol=5)}

    num_blocks = -(-len(wanted) // config.slots_per_task)
    with quiet_ray_data():
        dataset = ray.data.from_items(list(range(len(wanted))), override_num_blocks=num_blocks)
        dataset = dataset.map(
            make_slot, num_cpus=config.cpus_per_task, compute=ray.data.TaskPoolStrategy(size=config.num_tasks)
        )
        dataset.context.execution_options.preserve_order = True
        return dataset.materialize()


_END = object()


def _ahead(items: Iterator[Any], depth: int) -> Generator[Any, None, None]:
    """Draw from `items` in a thread, at most `depth` ahead; its exception is raised here, and leaving stops it."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Any, error: BaseException | None = None) -> bool:
        while not stop.is_set():
            try:
                ready.put((item, error), timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def draw() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_END)
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
            put(None, error)

    thread = threading.Thread(target=draw, name="omnimri-stream", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stop.set()
        thread.join()
