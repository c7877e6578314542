"""Where the time of a training step goes, stage by stage and source by source.

The steps are those of training: its bench, its schedule, its `optimizer_step`. Times by part come from steps without a
profiler; what in them takes the time comes from one more step of each source under torch's.
"""

from __future__ import annotations

import contextlib
import cProfile
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from pstats import Stats
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from omnimri.platform.data.stream import SampleMaker
from omnimri.platform.training.bench import Bench, StageJob, open_bench
from omnimri.platform.training.config import RunConfig, TrainConfig
from omnimri.platform.training.kit import Kit
from omnimri.platform.training.loop import labelled_batches, optimizer_step, set_training_mode, worker_process
from omnimri.platform.training.meters import PHASES, Meters, peak_memory_mb
from omnimri.platform.training.schedule import Slot
from omnimri.platform.training.session import LocalSession
from omnimri.platform.training.stages import STAGES, Stage, stage_named
from omnimri.platform.training.trainer import default_kit, find_tokenizer

WARMUP = 2
"""Steps of each source that do not count."""
TOP = 5
REST = "the rest"
_RANGE = "omnimri: "
"""Begins the names of our own ranges in a trace."""
_BACKWARD = "autograd::engine::evaluate_function: "
_ELSEWHERE = "elsewhere"
"""What belongs to no module: summing gradients, their norm and clipping, the loop itself."""


def benchmark_steps(
    run: RunConfig, *, repeats: int = 5, stages: Sequence[str] = tuple(STAGES), kit: Kit | None = None
) -> dict[str, Any]:
    """Time and profile the steps of a run's stages in this process, each stage on a new model.

    On a CPU a frozen encoder remembers the volumes that it has seen (`models.vision.TokenCache`), so that the first
    epoch differs from the later ones: the volumes of the first steps come again, and both are timed.

    Args:
        run: Its model, data, sources and rows per step are taken as they are.
        repeats: Steps of each source whose median counts.
        stages: Names in `STAGES`.
        kit: Builder of model and samples; None takes OmniMRI's.

    Returns:
        `preset`, `precision`, and by stage `threads`, `mixture_ms`, the mean step of the stage's mixture, and its
        `sources`: each with its `share` of the steps, `rows`, `step_ms` and its `parts` in milliseconds, the same of
        the `first_epoch`, and shares of a step of a later epoch by part of the `model`, by `modules` and `operators`,
        and of the making of its samples by `functions`. The waiting for data is all of their making, unless
        `run.stream` has it done ahead.

    Raises:
        ValueError: If `repeats` is not positive, or a source has no rows.
    """
    if repeats < 1:
        raise ValueError(f"benchmark steps: repeats must be 1 or more, found {repeats}.")
    kit = kit or default_kit(run)
    with TemporaryDirectory(prefix="omnimri-benchmark-") as folder:
        run = replace(run, out=folder, scaling=replace(run.scaling, num_workers=0))
        found = {name: _measured_stage(name, run, repeats, kit) for name in stages}
    return {
        "preset": getattr(run.model, "preset", None),
        "precision": run.zero.precision,
        "memory_peak_mb": round(peak_memory_mb()),
        "stages": found,
    }


def _measured_stage(name: str, run: RunConfig, repeats: int, kit: Kit) -> dict[str, Any]:
    train, stage = run.stage(name), stage_named(name)
    shares = train.shares(stage, kit.kinds())
    settings = every_source(train, stage, kit.kinds(), WARMUP + 2 * repeats + 1)
    run = replace(run, train=replace(run.train, **{name: settings}))
    job = StageJob(
        stage=name, run=run, kit=kit, init=None, tokenizer=str(find_tokenizer(run, kit, None)),
        model_folder="", settings_digest="", data_digest="", export=False,
    )  # fmt: skip
    session = LocalSession(Path(run.out) / name)
    with worker_process(job, session):
        bench, _ = open_bench(job, session, None)
        measured = watch_steps(bench, repeats)
        threads = torch.get_num_threads()
        bench.engine.destroy()
    sources = {
        source: {"share": round(share, 4), "rows": train.rows_per_step[source]} | measured[source]
        for source, share in shares.items()
    }
    mixture_ms = sum(share * measured[source]["step_ms"] for source, share in shares.items())
    return {"threads": threads, "mixture_ms": round(mixture_ms, 1), "sources": sources}


def every_source(train: TrainConfig, stage: Stage, kinds: Mapping[str, str], steps: int) -> TrainConfig:
    """The stage's settings with so many steps of each of its sources, of one forward pass each."""
    sources = train.shares(stage, kinds)
    of_kind = Counter(kinds[source] for source in sources)
    return replace(
        train,
        steps=steps * len(sources),
        weights=dict.fromkeys(sources, 1.0),
        ratio={kind: count / len(sources) for kind, count in of_kind.items()},
        accumulation=1,
        validate_every=None,
    )


def watch_steps(bench: Bench, repeats: int) -> dict[str, dict[str, Any]]:
    """Go through all steps of a bench; by source its times and, of its last step, what takes them."""
    first = WARMUP + repeats
    new_steps = let_rows_return(bench, first)
    seconds: dict[str, list[dict[str, float]]] = defaultdict(list)
    found: dict[str, dict[str, Any]] = {}
    set_training_mode(bench)
    with labelled_batches(bench, 0) as batches:
        for step, slot in enumerate(bench.schedule.slots()):
            timed, meters = seconds[slot.source], Meters()
            if len(timed) == first + repeats:
                found[slot.source] = _hot_spots(bench, step, batches) | {"functions": _functions(bench.maker, slot)}
                continue
            optimizer_step(bench, step, batches, meters, {})
            timed.append(meters.seconds)
    return {
        source: step_times(timed[first:])
        | {"first_epoch": step_times(timed[WARMUP : min(first, new_steps[source])])}
        | found[source]
        for source, timed in seconds.items()
    }


def let_rows_return(bench: Bench, steps: int) -> dict[str, int]:
    """Have every source show only the rows of its first steps, again and again; by source the steps with new rows."""
    bound, new_steps = dict(bench.maker.sources), {}
    for source, rows in zip(bench.schedule.sources, bench.schedule.rows, strict=True):
        bound[source] = replace(bound[source], rows=bound[source].rows[: steps * rows])
        new_steps[source] = len(bound[source].rows) // rows
    bench.maker = replace(bench.maker, sources=bound)
    return new_steps


def step_times(steps: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Median of each part over steps in milliseconds, and a step as their sum; empty without steps."""
    if not steps:
        return {}
    parts = {phase: round(1e3 * statistics.median(step[phase] for step in steps), 1) for phase in PHASES}
    return {"step_ms": round(sum(parts.values()), 1), "parts": parts}


def _hot_spots(bench: Bench, step: int, batches: Iterator[tuple[str, Any]]) -> dict[str, dict[str, float]]:
    """One step under the profiler."""
    activities = [ProfilerActivity.CPU]
    if bench.engine.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with named_modules(bench.objective, bench.job.kit.parts(bench.model)), profile(activities=activities) as trace:
        optimizer_step(bench, step, _in_range("data", batches), Meters(), {})
    return hot_spots(trace.events())


def _in_range(name: str, batches: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The next batch, waited for inside a range of the trace."""
    with record_function(_RANGE + name):
        batch = next(batches)
    yield batch


@contextlib.contextmanager
def named_modules(objective: nn.Module, parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Ranges of a trace around the calls of every part and of the modules in it that are not torch's own layers.

    They are named PART: CLASS.
    """
    names = {id(objective): f"objective: {type(objective).__name__}"}
    for part, whole in parts.items():
        for module in whole.modules():
            if module is whole or not type(module).__module__.startswith("torch."):
                names[id(module)] = f"{part}: {type(module).__name__}"
    ranges: list[record_function] = []

    def enter(module: nn.Module, _: Any) -> None:
        ranges.append(record_function(_RANGE + names[id(module)]))
        ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    named = [module for module in objective.modules() if id(module) in names]
    handles = [module.register_forward_pre_hook(enter) for module in named]
    handles += [module.register_forward_hook(leave) for module in named]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hot_spots(events: Iterable[Any]) -> dict[str, dict[str, float]]:
    """What takes the time of a traced step, forward and backward together, as shares of it.

    A backward operator belongs to the module whose forward operator it differentiates: autograd numbers both alike.
    Time between operators is Python's; it counts for the module in whose call it passes.

    Args:
        events: Of a trace, with the ranges of `named_modules`.

    Returns:
        By part of the `model`, beside `data`, `optimizer`, the `objective`'s own losses and what lies elsewhere; by
        `modules` and by `operators`, the largest and the rest. Each sums to one.
    """
    by_module: dict[str, float] = defaultdict(float)
    by_operator: dict[str, float] = defaultdict(float)
    owners: dict[int, str] = {}

    def walk(event: Any, label: str) -> None:
        is_range = event.name.startswith((_RANGE, "Optimizer."))
        if is_range:
            label = "optimizer" if event.name.startswith("Optimizer.") else event.name.removeprefix(_RANGE)
        elif event.name.startswith(_BACKWARD):
            label = owners.get(event.sequence_nr, label)
        elif event.sequence_nr >= 0:
            owners[event.sequence_nr] = label
        own = _own_us(event)
        by_module[label] += own
        by_operator[label if label == "data" else "Python" if is_range else event.name] += own
        for child in event.cpu_children:
            walk(child, label)

    roots = (event for event in events if event.cpu_parent is None)
    for root in sorted(roots, key=lambda event: event.time_range.start):
        walk(root, _ELSEWHERE)
    by_part: dict[str, float] = defaultdict(float)
    for label, own in by_module.items():
        by_part[label.partition(":")[0]] += own
    return {"model": shares(by_part, len(by_part)), "modules": shares(by_module), "operators": shares(by_operator)}


def _own_us(event: Any) -> float:
    """Microseconds of an event on the device where there is one, else on the CPU, without the events inside."""
    return max(event.self_device_time_total, 0) or event.self_cpu_time_total


def _functions(maker: SampleMaker, slot: Slot) -> dict[str, float]:
    """Functions in which the making of a slot's samples spends its time, as shares of it."""
    with cProfile.Profile() as watched:
        for index in slot.sample_indices(0, 1):
            maker(slot.source, index)
    times: dict[str, float] = defaultdict(float)
    for (file, _, name), (_, _, own, *_) in Stats(watched).stats.items():  # type: ignore[attr-defined]
        times[name if file == "~" else f"{Path(file).stem}.{name}"] += own
    return shares(times)


def shares(times: Mapping[str, float], most: int = TOP) -> dict[str, float]:
    """The largest as shares of the whole, and the rest; they sum to one."""
    whole = sum(times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1])
    found = {name: round(own / whole, 4) for name, own in ordered[:most]}
    return found | ({REST: round(1 - sum(found.values()), 4)} if len(times) > most else {})
