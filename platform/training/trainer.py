"""Run one stage from the driver: check the plan, train on Ray, keep the result; the same name again resumes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import pickle
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from omnimri.platform.cluster import ensure_ray, worker_environment
from omnimri.platform.errors import OmniMRIError
from omnimri.platform.tracking import Tracker
from omnimri.platform.training.bench import StageJob, plan_data
from omnimri.platform.training.checkpoints import Meta
from omnimri.platform.training.config import RunConfig, digest
from omnimri.platform.training.kit import Kit
from omnimri.platform.training.loop import train_loop, train_stage
from omnimri.platform.training.meters import LossTenths
from omnimri.platform.training.session import LocalSession
from omnimri.platform.training.stages import stage_named

logger = logging.getLogger(__name__)

RESULT = "result.json"
RECORD = "job.json"
MODEL = "model"


class TrainingError(OmniMRIError):
    """A worker failed for good."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage left behind; `result.json` in its folder."""

    stage: str
    model_folder: str
    steps: int
    seconds: float
    """Wall time of the last start, with everything that comes before the first step."""
    losses: dict[str, dict[str, float]]
    """Mean of each loss over the first and the last tenth of the steps."""
    settings_digest: str
    data_digest: str
    licences: dict[str, int]
    """Training volumes by licence."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """`contract` of the model's input, and training `rows` by how their voxels were made of the files."""
    excluded: dict[str, int] = field(default_factory=dict)
    """Volumes left out for their quality, by flag."""

    def write(self, folder: Path) -> None:
        """Write `result.json` to the folder."""
        (folder / RESULT).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> StageResult | None:
        """The result of a stage's folder, or None if the stage has not been completed."""
        path = folder / RESULT
        return cls(**json.loads(path.read_text())) if path.is_file() else None


def run_stage(
    stage: str,
    run: RunConfig,
    *,
    kit: Kit | None = None,
    init: Path | None = None,
    fresh: bool = False,
    tracker: Tracker | None = None,
    report_every: int | None = None,
    on_report: Callable[[dict[str, Any]], None] | None = None,
    callbacks: Sequence[Any] = (),
    export: bool = True,
) -> StageResult:
    """Train one stage, or go on where it stopped, or return at once what it has already given.

    Args:
        stage: Name in `STAGES`.
        run: The whole configuration; its name and folder are the resume key.
        kit: Builder of model and samples; None takes OmniMRI's.
        init: Model folder to start from; None takes that of the stage before.
        fresh: Discard what this stage has done so far.
        tracker: This stage's run in the tracker; None records nothing.
        report_every: Steps between two reports to `on_report` or the callbacks; None reports with checkpoints.
        on_report: Told of every report when the stage trains in this process (`ScalingConfig.num_workers` 0).
        callbacks: Of Ray Train, otherwise.
        export: Write the model folder at the end.

    Raises:
        ValueError: If the plan cannot work, or the folder holds the same stage under other settings.
        TrainingError: If the workers failed more often than `ScalingConfig.max_failures` allows.
    """
    if fresh:
        discard(stage, run)
    job = make_job(stage, run, kit=kit or default_kit(run), init=init, tracker=tracker, report_every=report_every)
    job = replace(job, export=export)
    claim(job)
    if (done := completed(job)) is not None:
        logger.info("Stage %s of run %s is complete already: %s", stage, run.name, done.model_folder)
        return done
    plan_data(job, max(1, run.scaling.num_workers))
    start = time.monotonic()
    with ensure_ray() if run.scaling.num_workers or run.stream.num_tasks else contextlib.nullcontext():
        losses = fit(job, callbacks) if run.scaling.num_workers else fit_here(job, on_report)
    result = StageResult(
        stage=stage,
        model_folder=job.model_folder,
        steps=run.stage(stage).steps,
        seconds=round(time.monotonic() - start, 1),
        losses=losses,
        settings_digest=job.settings_digest,
        data_digest=job.data_digest,
        licences=dict(job.kit.licence_counts(run.data)),
        preprocessing=dict(job.kit.preprocessing(run.data, run.model)),
        excluded=dict(job.kit.excluded_counts(run.data)),
    )
    result.write(run.folder(stage))
    return result


def run_stages(
    stages: Sequence[str],
    run: RunConfig,
    *,
    kit: Kit | None = None,
    init: Path | None = None,
    fresh: bool = False,
    parent: Tracker | None = None,
) -> list[StageResult]:
    """Train stages one after the other, each from the model of the one before, each recorded as a child of `parent`.

    Args:
        stages: Names, in order.
        run: The whole configuration.
        kit: Builder of model and samples; None takes OmniMRI's.
        init: Model folder that the first of the stages starts from.
        fresh: Discard what these stages have done so far.
        parent: Run of the pipeline in the tracker; None records nothing.
    """
    results = []
    for position, stage in enumerate(stages):
        options: dict[str, Any] = {"kit": kit, "init": init if position == 0 else None, "fresh": fresh}
        if parent is None:
            results.append(run_stage(stage, run, **options))
            continue
        with parent.child(stage, params=run, tags={"stage": stage}, resume=True) as tracker:
            results.append(run_stage(stage, run, tracker=tracker, **options))
            record_result(tracker, run, results[-1])
    return results


def record_result(tracker: Tracker, run: RunConfig, result: StageResult) -> None:
    """The data, and what the stage gained, in the tracker."""
    tracker.log_dataset(run.name, result.data_digest, ",".join(run.data), "train")
    tracker.set_tags(
        {
            "licences": json.dumps(result.licences),
            "preprocessing": json.dumps(result.preprocessing),
            "excluded": json.dumps(result.excluded),
            "settings_digest": result.settings_digest,
            "model_folder": result.model_folder,
        }
    )
    flat = {f"{tenth}/{name}": value for name, tenths in result.losses.items() for tenth, value in tenths.items()}
    tracker.log_metrics({**flat, "seconds": result.seconds}, step=result.steps)


def format_results(results: Sequence[StageResult]) -> str:
    """A table: every loss of every stage over the first and the last tenth of its steps."""
    lines = [f"{'stage':<12}{'steps':>7}{'seconds':>9}  {'loss':<28}{'first tenth':>12}{'last tenth':>12}"]
    for result in results:
        head = f"{result.stage:<12}{result.steps:>7}{result.seconds:>9.0f}  "
        for name, tenths in result.losses.items():
            lines.append(f"{head}{name:<28}{tenths['first_tenth']:>12.4f}{tenths['last_tenth']:>12.4f}")
            head = " " * len(head)
    return "\n".join(lines)


def default_kit(run: RunConfig) -> Kit:
    """The kit of OmniMRI itself."""
    from omnimri.platform.training.omnimri_kit import OmniMRIKit

    return OmniMRIKit(
        licences=run.licences,
        hold_out=run.hold_out,
        exclude_flags=run.exclude_flags,
        exclude_generated=run.exclude_generated,
        view=run.view,
        tokenizer=run.tokenizer,
        backbone=None if run.backbone is None else str(Path(run.backbone).absolute()),  # workers stand elsewhere
        vision_weights=None if run.vision_weights is None else str(Path(run.vision_weights).absolute()),
        pack_length=run.pack_length,
    )


def make_job(
    stage: str,
    run: RunConfig,
    *,
    kit: Kit,
    init: Path | None,
    tracker: Tracker | None,
    report_every: int | None,
) -> StageJob:
    """Find the model and tokenizer to start from, and settle what the stage's results depend on."""
    start = starting_folder(stage, run, init)
    settings = {**run.stage_settings(stage), "init": None if start is None else folder_digest(start)}
    if start is None and run.backbone is not None:
        settings["backbone"] = folder_digest(Path(run.backbone))
    if start is None and run.vision_weights is not None:
        settings["vision_weights"] = hashlib.sha256(Path(run.vision_weights).read_bytes()).hexdigest()[:16]
    return StageJob(
        stage=stage,
        run=run,
        kit=kit,
        init=None if start is None else str(start),
        tokenizer=str(find_tokenizer(run, kit, start)),
        model_folder=str(run.folder(stage) / MODEL),
        settings_digest=digest(settings),
        data_digest=kit.data_digest(run.data),
        tracker=tracker,
        report_every=report_every,
    )


def new_model(run: RunConfig, folder: Path, *, kit: Kit | None = None) -> Path:
    """Write the model that the first stage begins with to `folder`, before it has learnt anything; returns `folder`."""
    kit = kit or default_kit(run)
    tokenizer = kit.load_tokenizer(find_tokenizer(run, kit, None))
    torch.manual_seed(run.stage("vision").seed)
    card = {"run": run.name, "stage": "untrained", "settings_digest": digest(asdict(run.model))}
    kit.save(kit.create(run.model, tokenizer), folder, tokenizer, card)
    return folder


def starting_folder(stage: str, run: RunConfig, init: Path | None) -> Path | None:
    """Model folder that the stage loads; None for a new model.

    Raises:
        ValueError: If there is none and the stage needs one.
    """
    if init is not None:
        if not init.is_dir():
            raise ValueError(f"{init}: expected a model folder to start from, found none there (--init).")
        return init.absolute()
    before = stage_named(stage).starts_from
    if before is None:
        return None
    folder = run.folder(before) / MODEL
    if not folder.is_dir():
        raise ValueError(
            f"Stage {stage!r} starts from the model of stage {before!r}, which is not at {folder}. Run that stage "
            "first, or name a model folder with --init."
        )
    return folder


def find_tokenizer(run: RunConfig, kit: Kit, start: Path | None) -> Path:
    """The tokenizer of the model to start from, or the run's own, made now if there is none yet."""
    if start is not None and (start / "tokenizer").is_dir():
        return start / "tokenizer"
    folder = Path(run.out).absolute() / "tokenizer"
    if not folder.is_dir():
        partial = folder.with_name(".tokenizer")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        kit.build_tokenizer(run.data, run.model, partial)
        partial.rename(folder)
    return folder


def folder_digest(folder: Path) -> str:
    """Hash of a model folder: names and sizes of all files, and the contents of the small ones.

    The model card among the small ones carries the digest of the settings that made the weights.
    """
    seen = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        seen.update(f"{path.relative_to(folder)}:{size}\n".encode())
        if size < 2**20:
            seen.update(path.read_bytes())
    return seen.hexdigest()[:16]


def discard(stage: str, run: RunConfig) -> None:
    """Delete what the stage has done so far under this name; the first stage takes the tokenizer with it."""
    folders = [run.folder(stage), ray_folder(stage, run)]
    if stage_named(stage).starts_from is None:
        folders.append(Path(run.out).absolute() / "tokenizer")
    for folder in folders:
        if folder.is_dir():
            shutil.rmtree(folder)


def claim(job: StageJob) -> None:
    """Record what this stage is about to compute, and refuse a folder in which it computed something else.

    Raises:
        ValueError: With the settings that differ.
    """
    folder = job.run.folder(job.stage)
    record = {
        "settings": job.run.stage_settings(job.stage),
        "init": job.init,
        "settings_digest": job.settings_digest,
        "data_digest": job.data_digest,
    }
    path = folder / RECORD
    if path.is_file():
        before = json.loads(path.read_text())
        if any(before[key] != record[key] for key in ("settings_digest", "data_digest")):
            found = differences(before, record) or ["the model to start from has changed"]
            raise ValueError(
                f"{folder} holds stage {job.stage!r} of a run with other settings ({'; '.join(found)}). Choose "
                "another --name and --out, or pass --fresh to discard it."
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values that differ, each with the former and the present value."""
    found = []
    for key in sorted(set(before) | set(now)):
        old, new, name = before.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{name}.")
        elif old != new and key != "settings_digest":
            found.append(f"{name}: {old} before, {new} now")
    return found


def completed(job: StageJob) -> StageResult | None:
    """The stage's result, if it stands for these settings and its model is there."""
    result = StageResult.read(job.run.folder(job.stage))
    if result is None or result.settings_digest != job.settings_digest or result.data_digest != job.data_digest:
        return None
    return result if Path(result.model_folder).is_dir() or not job.export else None


def ray_folder(stage: str, run: RunConfig) -> Path:
    """Where Ray Train keeps, and finds again, the checkpoints of a stage."""
    return Path(run.out).absolute() / "ray" / f"{run.name}-{stage}"


def fit_here(job: StageJob, on_report: Callable[[dict[str, Any]], None] | None) -> dict[str, dict[str, float]]:
    """Train in this process; returns the losses of the first and last tenth."""
    session = LocalSession(ray_folder(job.stage, job.run), on_report)
    train_stage(job, session)
    with session.last_checkpoint() as checkpoint:
        assert checkpoint is not None  # the last step always leaves one
        return _tenths(job, checkpoint)


def fit(job: StageJob, callbacks: Sequence[Any] = ()) -> dict[str, dict[str, float]]:
    """Train on Ray workers; returns the losses of the first and last tenth.

    Raises:
        TrainingError: With the message of the worker that failed first.
    """
    import ray.train
    from ray.train.torch import TorchConfig

    scaling, folder = job.run.scaling, ray_folder(job.stage, job.run)
    resources = {"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})}
    trainer = _trainer_class()(
        train_loop,
        train_loop_config={"job": pickle.dumps(job)},
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers, use_gpu=scaling.use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=ray.train.FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": worker_environment(use_gpu=scaling.use_gpu)},
            callbacks=list(callbacks),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingError(f"Stage {job.stage!r} of run {job.run.name!r} failed: {_cause(error)}") from error
    with result.checkpoint.as_directory() as folder:
        return _tenths(job, Path(folder))


def _trainer_class() -> Any:
    """`TorchTrainer`, on a Ray without dashboard minus a watcher that cannot work there.

    `PlacementGroupCleaner` asks the dashboard every second whether the controller is alive, and warns every second
    that it had no answer. A local Ray, the only one without dashboard, ends with its driver anyway.
    """
    from ray._private.worker import get_dashboard_url
    from ray.train.torch import TorchTrainer

    if get_dashboard_url():
        return TorchTrainer

    class LocalClusterTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]

    return LocalClusterTrainer


def _tenths(job: StageJob, checkpoint: Path) -> dict[str, dict[str, float]]:
    return LossTenths(job.run.stage(job.stage).steps, Meta.read(checkpoint).losses).summary()


def _cause(error: Exception) -> str:
    """Message of the first worker's exception, or the whole."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        lines = [line for line in str(failure).strip().splitlines() if line.strip()]
        return f"worker {rank}: {lines[-1] if lines else type(failure).__name__}"
    return str(error)
