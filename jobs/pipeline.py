"""Run everything in order: ingest, four training stages, a sweep, evaluation, registration.

  omnimri pipeline SRC... --out RUNDIR [--preset tiny]

SRC are the files and folders that `omnimri ingest` takes; without any, the built-in corpus is made in RUNDIR/corpus.
RUNDIR then holds

  shards/       the ingested corpus, with its manifest, summary and reject ledger
  STAGE/        model and result of each training stage; instruct/model is the finished model
  sweep/        trials, plot and winner (unless --trials 0)
  evaluation/   index.html and summary.json
  mlflow.db     one parent run with the stages, the trials and the evaluation, and the model registry

The same command again goes on where it stopped. On a cluster:

  ray job submit --address http://HEAD:8265 --working-dir . -- python -m omnimri.jobs.pipeline SRC --out SHARED/RUNDIR

--set changes any field: run.train.instruct.steps=1000, ingest.split_by=hash, sweep.steps=100, evaluate.max_volumes=8.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform.cluster import ensure_ray
from omnimri.platform.corpus.corpus import CorpusConfig, write_corpus
from omnimri.platform.data.intake.summary import format_summary
from omnimri.platform.evaluation.summary import format_table
from omnimri.platform.overrides import apply_overrides
from omnimri.platform.pipeline import EVALUATION, SHARDS, PipelineConfig, PipelineResult, run_pipeline
from omnimri.platform.tracking import Tracker, tracking_uri
from omnimri.platform.training.config import expand_overrides
from omnimri.platform.training.recipes import RECIPES, recipe
from omnimri.platform.training.stages import STAGES
from omnimri.platform.training.trainer import format_results
from omnimri.platform.tuning import SweepConfig, format_trials


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = job_parser("pipeline", __doc__)
    parser.add_argument("sources", nargs="*", type=Path, metavar="SRC", help="folder, zip or file")
    parser.add_argument("--out", required=True, type=Path, metavar="RUNDIR", help="folder of the run")
    parser.add_argument("--preset", default="tiny", choices=list(RECIPES), help="model and recipe (default: tiny)")
    parser.add_argument("--patients", type=int, default=40, metavar="N", help="of the built-in corpus (default: 40)")
    parser.add_argument("--trials", type=int, default=0, metavar="N", help="trials of the sweep (default: none)")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store (default: RUNDIR/mlflow.db)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    args = parser.parse_args(argv)
    return run_job("pipeline", lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    config = make_config(args.out, args.preset, args.trials, args.overrides)
    uri = tracking_uri(args.out.absolute(), args.tracking_uri)
    with ensure_ray(), Tracker.start(uri, config.run.name, params=config, tags={"job": "pipeline"}, resume=True) as run:
        sources = args.sources
        if not sources:
            sources = [write_corpus(args.out / "corpus", CorpusConfig(num_patients=args.patients)).out]
        result = run_pipeline(sources, config, run, command=command_line(args))
    print_result(result, args.out)


def make_config(out: Path, preset: str, trials: int, overrides: Sequence[str]) -> PipelineConfig:
    """The configuration of a run folder."""
    run = recipe(preset, out.absolute().name, [out / SHARDS], out)
    sweep = SweepConfig(num_trials=trials) if trials else None
    config = PipelineConfig(run=run, sweep=sweep)
    stages = list(STAGES)
    of_run = [item.removeprefix("run.") for item in overrides if item.startswith("run.")]
    rest = [item for item in overrides if not item.startswith("run.")]
    config = replace(config, run=apply_overrides(config.run, expand_overrides(of_run, stages)))
    return apply_overrides(config, rest)


def command_line(args: argparse.Namespace) -> str:
    """The command as it can be typed again."""
    sets = [part for item in args.overrides for part in ("--set", item)]
    sources = [str(source) for source in args.sources]
    trials = ["--trials", str(args.trials)] if args.trials else []
    return shlex.join(
        ["omnimri", "pipeline", *sources, "--out", str(args.out), "--preset", args.preset, *trials, *sets]
    )


def print_result(result: PipelineResult, out: Path) -> None:
    """Tables of every step, and where things lie."""
    print(format_summary(result.ingest.tables))
    print(f"{result.ingest.num_volumes} volumes; {result.ingest.num_rejected} rejected: {result.ingest.rejects_path}\n")
    print(format_results(result.stages), "\n")
    if result.trials:
        print(format_trials(result.trials), "\n")
    print(format_table(result.summary))
    aliases = " ".join(f"@{alias}" for alias in result.registered.aliases)
    print(f"\nmodel   {result.model_folder}  ({result.registered.uri} {aliases})")
    print(f"page    {out / EVALUATION / 'index.html'}")
    print(f"numbers {out / EVALUATION / 'summary.json'}")
    print(f"mlflow  mlflow ui --backend-store-uri sqlite:///{(out / 'mlflow.db').absolute()}")


if __name__ == "__main__":
    raise SystemExit(main())
