"""Everything in order: files to shards, four stages, a sweep, the evaluation, the registry; under one MLflow run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omnimri.platform import registry
from omnimri.platform.data.intake.card import log_corpus
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.ingest import IngestSummary, ingest
from omnimri.platform.data.shards import Shards
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.evaluate import evaluate, log_evaluation
from omnimri.platform.evaluation.summary import Summary
from omnimri.platform.tracking import Tracker
from omnimri.platform.training.config import RunConfig
from omnimri.platform.training.stages import STAGES
from omnimri.platform.training.trainer import StageResult, run_stages
from omnimri.platform.tuning import SweepConfig, TrialResult, run_sweep

logger = logging.getLogger(__name__)

SHARDS, SWEEP, EVALUATION = "shards", "sweep", "evaluation"
SWEEP_STARTS_FROM = "align"


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """A whole run from files to a registered model."""

    run: RunConfig
    ingest: IngestConfig = field(default_factory=IngestConfig)
    sweep: SweepConfig | None = None
    """None leaves the sweep out."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    model_name: str = "omnimri"
    """Name in the registry; the new version gets the alias `candidate`, and `champion` where there is none yet."""


@dataclass(frozen=True, kw_only=True)
class PipelineResult:
    """What each step gave."""

    ingest: IngestSummary
    stages: list[StageResult]
    trials: list[TrialResult]
    summary: Summary
    registered: registry.Registered

    @property
    def model_folder(self) -> Path:
        return Path(self.stages[-1].model_folder)


def run_pipeline(
    sources: Sequence[Path], config: PipelineConfig, tracker: Tracker, command: str = ""
) -> PipelineResult:
    """Run or resume every step; what is complete already is not done again.

    Args:
        sources: Files and folders to ingest.
        config: Whose `run.out` is the folder of everything and `run.data` the shards in it.
        tracker: The parent run; stages, trials and the evaluation become its children.
        command: Command line, for the record.
    """
    out = Path(config.run.out)
    logger.info("1/5 ingest: %s", ", ".join(map(str, sources)))
    taken = ingest(sources, out / SHARDS, config.ingest)
    log_corpus(tracker, taken.out)
    logger.info("2/5 train: %s", ", ".join(STAGES))
    stages = run_stages(list(STAGES), config.run, parent=tracker)
    logger.info("3/5 sweep: %s", f"{config.sweep.num_trials} trials" if config.sweep else "left out")
    trials = _sweep(config, out, stages, tracker)
    logger.info("4/5 evaluate: split %s", config.evaluate.split)
    model = Path(stages[-1].model_folder)
    summary = evaluate(model, Shards.open(out / SHARDS), out / EVALUATION, config.evaluate, command=command)
    with tracker.child(EVALUATION, params=config.evaluate, resume=True) as child:
        log_evaluation(child, summary, out / EVALUATION, source=str(out / SHARDS))
    logger.info("5/5 register: %s", config.model_name)
    registered = _register(config, model, summary, tracker)
    return PipelineResult(ingest=taken, stages=stages, trials=trials, summary=summary, registered=registered)


def _sweep(config: PipelineConfig, out: Path, stages: list[StageResult], tracker: Tracker) -> list[TrialResult]:
    if config.sweep is None:
        return []
    start = next(Path(stage.model_folder) for stage in stages if stage.stage == SWEEP_STARTS_FROM)
    with tracker.child(SWEEP, params=config.sweep, resume=True) as child:
        return run_sweep(config.run, config.sweep, init=start, out=out / SWEEP, parent=child)


def _register(config: PipelineConfig, model: Path, summary: Summary, tracker: Tracker) -> registry.Registered:
    made = registry.register(tracker.uri, model, config.model_name, run_id=tracker.run_id, metrics=summary.flat())
    if registry.has_alias(tracker.uri, config.model_name, registry.CHAMPION):
        return made
    return registry.promote(tracker.uri, config.model_name, made.version)
