"""What the training loop works with, built at the start of a stage or restored from a checkpoint.

The only file that starts DeepSpeed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omnimri.platform.data.stream import SampleMaker, StreamConfig, stream_batches
from omnimri.platform.tracking import Tracker
from omnimri.platform.training import checkpoints
from omnimri.platform.training.average import WeightAverage
from omnimri.platform.training.config import RunConfig, TrainConfig
from omnimri.platform.training.kit import Kit
from omnimri.platform.training.meters import LossTenths
from omnimri.platform.training.optimizer import parameter_groups, train_only
from omnimri.platform.training.schedule import Schedule, build_schedule
from omnimri.platform.training.session import Session
from omnimri.platform.training.stages import Stage, stage_named
from omnimri.platform.training.zero import deepspeed_config, uses_autocast

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """Everything that a worker needs to know; travels to it by pickle."""

    stage: str
    run: RunConfig
    kit: Kit
    init: str | None
    """Model folder to start from; None makes a new model."""
    tokenizer: str
    """Folder of the tokenizer."""
    model_folder: str
    """Where the plain folder goes at the end."""
    settings_digest: str
    data_digest: str
    tracker: Tracker | None = None
    """The stage's run in the tracker; None records nothing."""
    report_every: int | None = None
    """Steps between two reports to the session (a sweep's scheduler listens); None reports with checkpoints only."""
    export: bool = True
    """Write the plain folder at the end."""


@dataclass(kw_only=True)
class Bench:
    """What the loop works with, made once per start."""

    job: StageJob
    session: Session
    train: TrainConfig
    schedule: Schedule
    maker: SampleMaker
    tokenizer: Any
    model: nn.Module
    objective: nn.Module
    engine: Any
    base_lrs: list[float]
    average: WeightAverage | None
    """Of the weights over the steps."""
    tenths: LossTenths
    held_out: list[tuple[str, Any]]
    """Source and batch of every look at held-out rows."""
    tracker: Tracker | None


def open_bench(job: StageJob, session: Session, checkpoint: Path | None) -> tuple[Bench, int]:
    """Build or restore everything; returns the bench and the optimizer step to go on with."""
    stage, train = stage_named(job.stage), job.run.stage(job.stage)
    meta = None if checkpoint is None else checkpoints.Meta.read(checkpoint)
    if meta is not None:
        checkpoints.check_resumable(
            meta, stage=job.stage, settings_digest=job.settings_digest, data_digest=job.data_digest
        )
    tokenizer = job.kit.load_tokenizer(Path(job.tokenizer))
    model, objective = build_modules(job, stage, tokenizer)
    groups = parameter_groups(objective, job.kit.parts(model), train)
    universal = meta is not None and checkpoints.needs_universal(meta, session.world_size, job.run.zero.stage)
    engine = start_engine(job, objective, groups, universal=universal)
    average = None if train.ema_decay is None else WeightAverage(objective, train.ema_decay)
    if checkpoint is not None and meta is not None:
        restore(job, session, engine, checkpoint, universal=universal)
        if average is not None:
            average.load(checkpoint)
        logger.info("Stage %s goes on at step %d of %d", job.stage, meta.step, train.steps)
    schedule, maker = plan_data(job, session.world_size)
    bench = Bench(
        job=job,
        session=session,
        train=train,
        schedule=schedule,
        maker=maker,
        tokenizer=tokenizer,
        model=model,
        objective=objective,
        engine=engine,
        base_lrs=[group["lr"] for group in groups],
        average=average,
        tenths=LossTenths(train.steps, meta.losses if meta else None),
        held_out=held_out_batches(job, session, tokenizer, model),
        tracker=None if session.rank else job.tracker,
    )
    return bench, meta.step if meta else 0


def build_modules(job: StageJob, stage: Stage, tokenizer: Any) -> tuple[nn.Module, nn.Module]:
    """The model with the stage's parts trainable and the rest frozen, and the objective around it."""
    torch.manual_seed(job.run.stage(stage.name).seed)
    if job.init is None:
        model = job.kit.create(job.run.model, tokenizer)
    else:
        model = job.kit.load(Path(job.init), job.run.model)
    train = job.run.stage(stage.name)
    learning = train.trained_parts(stage)
    train_only(job.kit.parts(model), learning)
    if train.lora_rank is not None and "backbone" in learning:
        job.kit.add_adapters(model, train.lora_rank)
    if train.activation_checkpointing:
        job.kit.checkpoint_activations(model)
    objective = job.kit.objective(stage.objective, model, train.objective)
    return model, objective


def start_engine(job: StageJob, objective: nn.Module, groups: list[dict[str, Any]], *, universal: bool) -> Any:
    """Hand the objective to DeepSpeed, with the parameters that learn and no others."""
    import deepspeed
    import deepspeed.ops

    # Its shared-memory all-reduce is compiled at first use and needs a compiler on the node; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    train = job.run.stage(job.stage)
    config = deepspeed_config(
        job.run.zero,
        lr=train.lr,
        betas=train.betas,
        weight_decay=train.weight_decay,
        accumulation=train.accumulation,
        autocast=uses_autocast(job.run.zero, use_gpu=job.run.scaling.use_gpu),
        universal=universal,
    )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    engine, *_ = deepspeed.initialize(
        model=objective, model_parameters=[dict(group) for group in groups], config=config, dist_init_required=False
    )
    return engine


def restore(job: StageJob, session: Session, engine: Any, checkpoint: Path, *, universal: bool) -> None:
    """Load the engine's state, through a universal checkpoint where the shards were cut for other workers."""
    if universal:
        target = job.run.folder(job.stage) / "universal"
        if session.rank == 0:
            checkpoints.convert_universal(checkpoint, target)
        session.barrier()
        checkpoint = target / checkpoint.name
    checkpoints.load_shards(engine, checkpoint)


def plan_data(job: StageJob, world_size: int) -> tuple[Schedule, SampleMaker]:
    """The source of every step, and the maker of their samples.

    Raises:
        ValueError: If a source has no rows, or its rows per step do not divide among the workers.
    """
    train, data = job.run.stage(job.stage), job.run.data
    shares = train.shares(stage_named(job.stage), job.kit.kinds())
    schedule = build_schedule(shares, train.rows_per_step, train.num_slots, train.seed)
    sources = {source: job.kit.source_rows(source, data, job.run.model, "train") for source in schedule.sources}
    for source, rows in zip(schedule.sources, schedule.rows, strict=True):
        if rows % world_size:
            raise ValueError(
                f"TrainConfig.rows_per_step[{source!r}] is {rows}, which does not divide among {world_size} workers; "
                "choose a multiple."
            )
        if not sources[source].rows:
            raise ValueError(f"Source {source!r}: no training row in {', '.join(data)} fits it.")
    return schedule, SampleMaker(sources=sources, seed=train.seed)


def held_out_batches(job: StageJob, session: Session, tokenizer: Any, model: nn.Module) -> list[tuple[str, Any]]:
    """This rank's batches of rows that no stage trains on, from every source that the stage may mix."""
    train, stage = job.run.stage(job.stage), stage_named(job.stage)
    if train.validate_every is None:
        return []
    shares = replace(train, ratio=None).shares(stage, job.kit.kinds())
    schedule = build_schedule(dict.fromkeys(shares, 1.0), train.rows_per_step, train.validate_batches * len(shares), 0)
    bound = {name: job.kit.source_rows(name, job.run.data, job.run.model, "val") for name in shares}
    if empty := sorted(name for name, rows in bound.items() if not rows.rows):
        logger.warning("Stage %s: no held-out rows for %s; they are not validated.", stage.name, ", ".join(empty))
    slots = [slot for slot in schedule.slots() if bound[slot.source].rows]
    batches = stream_batches(
        slots,
        SampleMaker(sources=bound, seed=0),
        lambda samples: job.kit.collate(samples, tokenizer, model),
        rank=session.rank,
        world_size=session.world_size,
        config=StreamConfig(num_tasks=0, prefetch=0),
    )
    return [(slot.source, batch) for slot, batch in zip(slots, batches, strict=True)]
