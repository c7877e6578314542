"""The one training loop: every stage, every number of workers, every ZeRO stage.

All ranks go through the same sources in the same order (see `schedule`), so each step runs the same heads everywhere.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import pickle
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from omnimri.platform.cluster import environment
from omnimri.platform.data.stream import stream_batches
from omnimri.platform.training import checkpoints
from omnimri.platform.training.bench import Bench, StageJob, open_bench
from omnimri.platform.training.config import TrainConfig
from omnimri.platform.training.meters import Meters
from omnimri.platform.training.optimizer import forget_gradients, set_learning_rates
from omnimri.platform.training.session import RayTrainSession, Session
from omnimri.platform.training.zero import uses_autocast

logger = logging.getLogger(__name__)


def train_loop(config: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker; `config["job"]` is the pickled `StageJob`.

    Pickled, so that Ray Train's controller, which passes it on, need not import what only the workers use.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("omnimri").setLevel(logging.INFO)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    # DeepSpeed calls what torch renames; ours to watch in the tests, not on every step of a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    train_stage(pickle.loads(config["job"]), RayTrainSession())


def train_stage(job: StageJob, session: Session) -> None:
    """Train a stage from its start or from its last checkpoint, and write the model folder.

    Raises:
        ValueError: If the checkpoint belongs to another configuration, or rows do not divide among the workers.
        FloatingPointError: If a loss is not finite.
    """
    with worker_process(job, session):
        with session.last_checkpoint() as checkpoint:
            bench, first_step = open_bench(job, session, checkpoint)
        batches = run_steps(bench, first_step)
        finish(bench, batches)
        bench.engine.destroy()


@contextlib.contextmanager
def worker_process(job: StageJob, session: Session) -> Iterator[None]:
    """Threads, log level, and a process group of one where Ray Train made none."""
    scaling = job.run.scaling
    former_threads = torch.get_num_threads()
    torch.set_num_threads(scaling.threads_per_worker or max(1, (os.cpu_count() or 1) // session.world_size))
    # Read when deepspeed is imported and when an engine starts.
    variables = {"LOCAL_RANK": os.environ.get("LOCAL_RANK", "0")} | (
        {} if scaling.use_gpu else {"DS_ACCELERATOR": "cpu"}
    )
    with environment(variables):
        if not dist.is_initialized():
            # Stays until the process ends: DeepSpeed remembers groups and has no way to forget them.
            dist.init_process_group("nccl" if scaling.use_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            torch.set_num_threads(former_threads)


def run_steps(bench: Bench, first_step: int) -> dict[str, Any]:
    """Optimizer steps `first_step` to the end; returns the last batch of each source."""
    train, meters = bench.train, Meters()
    last: dict[str, Any] = {}
    set_training_mode(bench)
    with labelled_batches(bench, first_step) as batches:
        for step in range(first_step, train.steps):
            optimizer_step(bench, step, batches, meters, last)
            after_step(bench, step + 1, meters)
    return last


@contextlib.contextmanager
def labelled_batches(bench: Bench, first_step: int) -> Iterator[Iterator[tuple[str, Any]]]:
    """Source and batch of every forward pass from a step on; leaving stops what makes them."""
    slots = bench.schedule.slots(first_step * bench.train.accumulation)
    stream = stream_batches(
        slots,
        bench.maker,
        lambda samples: bench.job.kit.collate(samples, bench.tokenizer, bench.model),
        rank=bench.session.rank,
        world_size=bench.session.world_size,
        config=bench.job.run.stream,
    )
    with contextlib.closing(stream) as batches:
        yield zip((slot.source for slot in slots), batches, strict=True)


def set_training_mode(bench: Bench) -> None:
    """Training mode for what learns; frozen parts give the same features whatever their drop-out."""
    bench.engine.train()
    for part in bench.job.kit.parts(bench.model).values():
        if not any(parameter.requires_grad for parameter in part.parameters()):
            part.eval()


def optimizer_step(
    bench: Bench, step: int, batches: Iterator[tuple[str, Any]], meters: Meters, last: dict[str, Any]
) -> None:
    """Forward and backward passes of one step and the update; DeepSpeed accumulates between updates."""
    set_learning_rates(bench.engine.optimizer.param_groups, bench.base_lrs, bench.train.lr_factor(step))
    forget_gradients(bench.engine.optimizer)
    for micro in range(bench.train.accumulation):
        times = [time.perf_counter()]
        source, batch = next(batches)
        batch = last[source] = to_device(batch, bench.engine.device)
        times.append(time.perf_counter())
        torch.manual_seed(step_seed(bench.train.seed, step * bench.train.accumulation + micro, bench.session.rank))
        losses = bench.engine(batch)
        means = mean_over_ranks(losses)
        check_finite(means, step, source)
        times.append(time.perf_counter())
        bench.engine.backward(losses["loss"])
        times.append(time.perf_counter())
        if micro + 1 == bench.train.accumulation and is_recorded(bench.train, step + 1):
            meters.gradient_norm = whole_gradient_norm(bench.engine)
        bench.engine.step()
        times.append(time.perf_counter())
        seconds = dict(zip(("data", "forward", "backward", "optimizer"), _differences(times), strict=True))
        rows = bench.schedule.rows[bench.schedule.sources.index(source)]
        tokens = int(batch["num_tokens"]) * bench.session.world_size if "num_tokens" in batch else 0
        meters.add(source, means, seconds, rows, tokens)
        bench.tenths.add(step, source, means)
    if bench.average is not None:
        bench.average.update(step)
    meters.steps += 1


def after_step(bench: Bench, done: int, meters: Meters) -> None:
    """Record, report and save what is due after `done` optimizer steps."""
    train, last = bench.train, done == bench.train.steps
    if is_recorded(train, done):
        norm = meters.gradient_norm
        record = meters.flush()
        record["gradient_norm"] = sharded_gradient_norm(bench.engine) if norm is None else norm
        record["lr"] = train.lr * train.lr_factor(done - 1)
        log_record(bench, done, record)
    metrics = progress(bench, done)
    if bench.held_out and (last or (train.validate_every and done % train.validate_every == 0)):
        looked = validate(bench)
        metrics |= looked
        if bench.tracker is not None:
            bench.tracker.log_metrics(looked, step=done)
    if last or done % train.checkpoint_every == 0:
        save(bench, done, metrics, wait=last or not train.checkpoint_async)
    elif bench.job.report_every and done % bench.job.report_every == 0:
        bench.session.report(metrics)


def is_recorded(train: TrainConfig, done: int) -> bool:
    """Whether the tracker is told after `done` optimizer steps."""
    return done % train.log_every == 0 or done == train.steps


@torch.no_grad()
def validate(bench: Bench) -> dict[str, float]:
    """Losses on the held-out batches: each by source, and over sources with equal weight."""
    bench.engine.eval()
    found: dict[str, list[float]] = {}
    for number, (source, batch) in enumerate(bench.held_out):
        torch.manual_seed(step_seed(0, number, bench.session.rank))
        for name, value in mean_over_ranks(bench.engine(to_device(batch, bench.engine.device))).items():
            found.setdefault(f"val/{name}/{source}", []).append(value)
    set_training_mode(bench)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    for name in {key.split("/")[1] for key in means}:
        of_sources = [value for key, value in means.items() if key.split("/")[1] == name]
        means[f"val/{name}"] = sum(of_sources) / len(of_sources)
    return means


def log_record(bench: Bench, done: int, record: dict[str, float]) -> None:
    """Numbers to the tracker, one line to the log; rank 0 only."""
    if bench.session.rank:
        return
    logger.info("Stage %s step %d/%d: loss %.4f", bench.job.stage, done, bench.train.steps, record["loss"])
    if bench.tracker is not None:
        bench.tracker.log_metrics(record, step=done)


def save(bench: Bench, done: int, metrics: dict[str, Any], *, wait: bool) -> None:
    """Write this rank's part of a checkpoint and hand it in."""
    job = bench.job
    folder = bench.session.checkpoint_folder()
    checkpoints.save_shards(bench.engine, folder, keep_frozen=bench.train.checkpoint_frozen)
    if bench.average is not None:
        bench.average.save(folder)
    if bench.session.rank == 0:
        checkpoints.Meta(
            stage=job.stage,
            step=done,
            world_size=bench.session.world_size,
            zero_stage=job.run.zero.stage,
            settings_digest=job.settings_digest,
            data_digest=job.data_digest,
            positions=bench.schedule.positions(done * bench.train.accumulation),
            losses=bench.tenths.state,
        ).write(folder)
    bench.session.report(metrics, folder, wait=wait)


def progress(bench: Bench, done: int) -> dict[str, Any]:
    """What the session is told: the step, and the losses of the first and last tenth as far as they are known."""
    return {"step": done, "losses": bench.tenths.summary()}


def finish(bench: Bench, last: Mapping[str, Any]) -> None:
    """Sample pictures to the tracker, and the plain folder."""
    if bench.average is not None:
        bench.average.publish()
    log_pictures(bench, last)
    if not bench.job.export:
        return
    job = bench.job
    card = {
        "run": job.run.name,
        "stage": job.stage,
        "settings": job.run.stage_settings(job.stage),
        "settings_digest": job.settings_digest,
        "data": list(job.run.data),
        "data_digest": job.data_digest,
        "licences": dict(job.kit.licence_counts(job.run.data)),
        "preprocessing": dict(job.kit.preprocessing(job.run.data, job.run.model)),
        "excluded": dict(job.kit.excluded_counts(job.run.data)),
        "losses": bench.tenths.summary(),
        "tracking": None if job.tracker is None else {"uri": job.tracker.uri, "run_id": job.tracker.run_id},
    }
    checkpoints.export_folder(
        bench.model,
        Path(job.model_folder),
        lambda folder: job.kit.save(bench.model, folder, bench.tokenizer, card),
        rank=bench.session.rank,
        sharded=job.run.zero.stage == 3,
    )


def log_pictures(bench: Bench, last: Mapping[str, Any]) -> None:
    """Let the objective draw the last batch of each source; all ranks do, for ZeRO-3 gathers weights in step."""
    draw = getattr(bench.objective, "pictures", None)
    if draw is None:
        return
    autocast = uses_autocast(bench.job.run.zero, use_gpu=bench.job.run.scaling.use_gpu)
    for source, batch in sorted(last.items()):
        torch.manual_seed(bench.train.seed)
        # As the engine computes them; outside of it nobody else would ask for it.
        with torch.no_grad(), torch.autocast(bench.engine.device.type, torch.bfloat16, enabled=autocast):
            pictures = draw(batch)
        if bench.tracker is not None:
            for name, picture in pictures.items():
                bench.tracker.log_picture(f"{source}-{name}", picture)


def step_seed(seed: int, slot: int, rank: int) -> int:
    """Seed of the noise of one forward pass: a resumed run draws what an undisturbed one would have drawn."""
    return (seed * 1_000_003 + slot) * 4096 + rank


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors of a batch on the device of the engine."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def mean_over_ranks(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars averaged over all ranks; the names depend on the source only, so they agree everywhere."""
    names = sorted(losses)
    values = torch.stack([losses[name].detach().float().reshape(()) for name in names])
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(names, values.tolist(), strict=True))


def check_finite(losses: Mapping[str, float], step: int, source: str) -> None:
    """Stop before a broken gradient reaches the weights.

    Raises:
        FloatingPointError: With the step, the source and all losses.
    """
    if not math.isfinite(losses["loss"]):
        raise FloatingPointError(
            f"The loss is not finite at step {step} on source {source!r}: {dict(losses)}. The last checkpoint is "
            "sound; lower TrainConfig.lr or look at the data of that step."
        )


def whole_gradient_norm(engine: Any) -> float | None:
    """Norm over all parameters before clipping, where every rank has the gradients; None under ZeRO."""
    if engine.zero_optimization_stage():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def sharded_gradient_norm(engine: Any) -> float:
    """The same under ZeRO, whose optimizer counts it in its step; 0 before the first update."""
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else 0.0


def _differences(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]
