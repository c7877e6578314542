"""Search the data ratio of stage 3 and the mixture-of-experts settings: many short runs of the one training loop.

Trials are compared by losses on held-out rows, averaged over sources with equal weight: training losses of different
mixtures are losses on different data.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omnimri.platform.overrides import apply_overrides
from omnimri.platform.tracking import Tracker
from omnimri.platform.training.config import RunConfig
from omnimri.platform.training.kit import Kit
from omnimri.platform.training.trainer import run_stage

logger = logging.getLogger(__name__)

STAGE = "multimodal"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What is searched, and how long."""

    num_trials: int = 6
    steps: int = 40
    """Optimizer steps of a trial that is not stopped early."""
    report_every: int = 10
    """Steps between two looks at held-out rows; the scheduler decides after each."""
    grace_steps: int = 10
    """Steps that every trial gets."""
    reduction_factor: int = 2
    """ASHA keeps one in this many at each rung."""
    paired_share: tuple[float, float] = (0.5, 0.95)
    """Bounds of the share of paired data; the rest is instruction data."""
    num_experts: tuple[int, ...] = (2, 4, 8)
    balance: tuple[float, float] = (1e-3, 1e-1)
    """Bounds of the weight of the router's balance loss, searched on a logarithmic scale."""
    metrics: tuple[str, ...] = ("val/loss_text", "val/loss_visual")
    """Held-out losses whose sum is minimised."""
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    max_concurrent: int | None = None
    """Trials at a time; None takes what the cluster holds, one less than it when the driver shares it."""
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.paired_share
        if not 0 <= low < high <= 1:
            raise ValueError(f"SweepConfig.paired_share: expected 0 <= low < high <= 1, found {self.paired_share}.")
        if self.grace_steps > self.steps:
            raise ValueError(f"SweepConfig.grace_steps ({self.grace_steps}) exceeds steps ({self.steps}).")


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One line of the table."""

    trial: str
    paired_share: float
    num_experts: int
    balance: float
    steps: int
    """Steps done; fewer than the sweep's where the scheduler stopped the trial."""
    score: float | None
    """Sum of the held-out losses at the last look; None where the trial failed before one."""
    losses: dict[str, float] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    """The trial's settings as `--set` takes them."""
    status: str = "completed"


def trial_overrides(point: Mapping[str, Any], run: RunConfig) -> list[str]:
    """A point of the search space as overrides of a run, whose other loss weights stay."""
    objective = {**run.stage(STAGE).objective, "balance": point["balance"]}
    ratio = {"paired": round(point["paired_share"], 6), "instruction": round(1 - point["paired_share"], 6)}
    return [
        f"train.{STAGE}.ratio={json.dumps(ratio)}",
        f"train.{STAGE}.objective={json.dumps(objective)}",
        f"model.backbone.num_experts={int(point['num_experts'])}",
    ]


def trial_run(run: RunConfig, sweep: SweepConfig, point: Mapping[str, Any], out: Path) -> RunConfig:
    """The run of one trial: the given run, shorter, in this process, at a point of the search space."""
    run = apply_overrides(run, trial_overrides(point, run))
    stage = replace(
        run.stage(STAGE),
        steps=sweep.steps,
        validate_every=sweep.report_every,
        log_every=sweep.report_every,
        checkpoint_every=sweep.report_every,
    )
    return replace(
        run,
        name=out.name,
        out=str(out),
        train=replace(run.train, **{STAGE: stage}),
        scaling=replace(run.scaling, num_workers=0),
        # A trial's own Ray tasks would wait for CPUs that the other trials hold.
        stream=replace(run.stream, num_tasks=0),
    )


def train_trial(
    point: dict[str, Any],
    *,
    run: RunConfig,
    sweep: SweepConfig,
    init: Path,
    out: Path,
    kit: Kit | None,
    parent: Tracker | None,
) -> None:
    """Body of a Tune trial; goes on from its last checkpoint when the sweep is resumed."""
    from ray import tune

    trial = tune.get_context().get_trial_id()
    tracker = None if parent is None else parent.child(f"trial-{trial}", params=point, resume=True)

    def on_report(metrics: dict[str, Any]) -> None:
        report = {name: metrics[name] for name in sweep.metrics if name in metrics}
        if len(report) == len(sweep.metrics):
            tune.report({**report, "step": metrics["step"], "score": sum(report.values())})

    run_stage(
        STAGE,
        trial_run(run, sweep, point, out / "trials" / trial),
        kit=kit,
        init=init,
        tracker=tracker,
        report_every=sweep.report_every,
        on_report=on_report,
        export=False,
    )


def run_sweep(
    run: RunConfig,
    sweep: SweepConfig,
    *,
    init: Path,
    out: Path,
    kit: Kit | None = None,
    parent: Tracker | None = None,
) -> list[TrialResult]:
    """Search, or go on with a search that stopped; writes `results.json`, `results.png` and `winner.json` to `out`.

    Args:
        run: Settings that are not searched.
        sweep: The search.
        init: Model folder of stage 2 that every trial starts from.
        out: Folder of the sweep.
        kit: Builder of model and samples; None takes OmniMRI's.
        parent: The sweep's run in the tracker; every trial is a child.

    Returns:
        Trials, best first.
    """
    out = out.absolute()
    fixed = {"run": run, "sweep": sweep, "init": init.absolute(), "out": out, "kit": kit, "parent": parent}
    grid = make_tuner(fixed, sweep, out).fit()
    results = sorted((_trial_result(result, run) for result in grid), key=lambda r: (r.score is None, r.score or 0.0))
    if parent is not None:
        _finish_children(parent, results)
    write_results(results, sweep, out, parent)
    return results


def make_tuner(fixed: dict[str, Any], sweep: SweepConfig, out: Path) -> Any:
    """A new Tuner, or the one that was interrupted in this folder."""
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    resources = {"CPU": sweep.cpus_per_trial, **({"GPU": sweep.gpus_per_trial} if sweep.gpus_per_trial else {})}
    trainable = tune.with_resources(tune.with_parameters(train_trial, **fixed), resources)
    storage = out / "ray" / "sweep"
    if tune.Tuner.can_restore(str(storage)):
        logger.info("The sweep in %s goes on.", out)
        return tune.Tuner.restore(str(storage), trainable, resume_unfinished=True, resume_errored=True)
    at_once = sweep.max_concurrent or max(1, int(ray.cluster_resources().get("CPU", 1) / sweep.cpus_per_trial) - 1)
    return tune.Tuner(
        trainable,
        param_space={
            "paired_share": tune.uniform(*sweep.paired_share),
            "num_experts": tune.choice(list(sweep.num_experts)),
            "balance": tune.loguniform(*sweep.balance),
        },
        tune_config=tune.TuneConfig(
            metric="score",
            mode="min",
            num_samples=sweep.num_trials,
            max_concurrent_trials=at_once,
            search_alg=OptunaSearch(seed=sweep.seed),
            scheduler=ASHAScheduler(
                time_attr="step",
                max_t=sweep.steps,
                grace_period=sweep.grace_steps,
                reduction_factor=sweep.reduction_factor,
            ),
        ),
        run_config=tune.RunConfig(name=storage.name, storage_path=str(storage.parent), verbose=0),
    )


def _trial_result(result: Any, run: RunConfig) -> TrialResult:
    metrics = result.metrics or {}
    losses = {name: value for name, value in metrics.items() if name.startswith("val/")}
    return TrialResult(
        trial=metrics.get("trial_id", Path(result.path).name),
        **{key: result.config[key] for key in ("paired_share", "num_experts", "balance")},
        steps=metrics.get("step", 0),
        score=metrics.get("score"),
        losses=losses,
        overrides=trial_overrides(result.config, run),
        status="completed" if result.error is None else f"failed: {type(result.error).__name__}",
    )


def _finish_children(parent: Tracker, results: Sequence[TrialResult]) -> None:
    """End the trials' runs: the scheduler stops a trial without letting it do so itself."""
    for result in results:
        child = parent.child(f"trial-{result.trial}", resume=True)
        if result.score is not None:
            child.log_metrics({"score": result.score, **result.losses}, step=result.steps)
        child.finish("FINISHED" if result.status == "completed" else "FAILED")


def write_results(results: Sequence[TrialResult], sweep: SweepConfig, out: Path, parent: Tracker | None) -> None:
    """The table, the plot, and the winner's overrides; the same to the tracker."""
    from matplotlib.figure import Figure

    (out / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    scored = [result for result in results if result.score is not None]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    points = axes.scatter(
        [r.paired_share for r in scored],
        [r.score or 0.0 for r in scored],
        c=[r.num_experts for r in scored],
        s=[20 + 60 * r.steps / sweep.steps for r in scored],
    )
    axes.set(xlabel="share of paired data", ylabel=" + ".join(sweep.metrics), title="Stage 3: dot size = steps done")
    if scored:
        figure.colorbar(points, label="experts")
    figure.savefig(out / "results.png", dpi=120)
    if scored:
        best = scored[0]
        winner = {"trial": best.trial, "score": best.score, "steps": best.steps, "overrides": best.overrides}
        (out / "winner.json").write_text(json.dumps(winner, indent=1))
    if parent is not None:
        for name in ("results.json", "results.png", "winner.json"):
            if (out / name).is_file():
                parent.log_artifact(out / name)


def format_trials(results: Sequence[TrialResult]) -> str:
    """The table, best first."""
    lines = [f"{'trial':<16}{'paired':>8}{'experts':>9}{'balance':>10}{'steps':>7}{'score':>10}  status"]
    for r in results:
        score = "-" if r.score is None else f"{r.score:.4f}"
        lines.append(
            f"{r.trial:<16}{r.paired_share:>8.3f}{r.num_experts:>9}{r.balance:>10.4f}{r.steps:>7}{score:>10}"
            f"  {r.status}"
        )
    return "\n".join(lines)
