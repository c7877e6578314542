r"""Train a stage, or all four, from shards to a model folder.

  omnimri train --stage vision|align|multimodal|instruct|all --data DIR... --out RUNDIR

Each stage starts from the model of the one before (or from --init) and leaves in RUNDIR/STAGE

  model/        the plain model folder: parts, tokenizer, preprocessing, card; loads without Ray
  result.json   every loss over the first and the last tenth of the steps
  job.json      the settings that decide what the stage computes

Checkpoints lie in RUNDIR/ray, the record in MLflow (RUNDIR/mlflow.db unless MLFLOW_TRACKING_URI or --tracking-uri names
another). The same command again goes on from the last checkpoint, or returns at once where a stage is complete; other
settings under the same name are refused, unless --fresh discards what is there.

--set changes any field of the run, `--set train.lr=1e-4` in the stages at hand, `--set train.align.lr=1e-4` in one;
`--set @winner.json` takes the overrides of a sweep.

Examples:
  omnimri train --stage all --data runs/demo/shards --out runs/mine
  omnimri train --stage instruct --data shards --out runs/mine --init runs/demo/multimodal/model --workers 2 \
      --set zero.stage=2 --set train.steps=1000
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform.cluster import ensure_ray
from omnimri.platform.overrides import apply_overrides
from omnimri.platform.tracking import Tracker, tracking_uri
from omnimri.platform.training.config import RunConfig, expand_overrides
from omnimri.platform.training.recipes import RECIPES, recipe
from omnimri.platform.training.stages import STAGES
from omnimri.platform.training.trainer import format_results, run_stages


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = job_parser("train", __doc__)
    parser.add_argument("--stage", required=True, choices=[*STAGES, "all"], help="which stage")
    parser.add_argument("--data", nargs="+", required=True, type=Path, metavar="DIR", help="ingested corpora")
    parser.add_argument("--out", required=True, type=Path, metavar="RUNDIR", help="folder of the run")
    parser.add_argument("--preset", default="tiny", choices=list(RECIPES), help="model and recipe (default: tiny)")
    parser.add_argument("--name", help="resume key (default: name of RUNDIR)")
    parser.add_argument("--init", type=Path, metavar="FOLDER", help="model folder to start from")
    parser.add_argument("--workers", type=int, metavar="N", help="Ray Train workers; 0 trains in this process")
    parser.add_argument("--fresh", action="store_true", help="discard what these stages have done so far")
    parser.add_argument("--licences", metavar="POLICY", help="any (default), commercial-ok, or names with commas")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE|@FILE")
    args = parser.parse_args(argv)
    return run_job("train", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    stages = list(STAGES) if args.stage == "all" else [args.stage]
    run = make_run(args, stages)
    uri = tracking_uri(Path(run.out), args.tracking_uri)
    with ensure_ray(), Tracker.start(uri, run.name, params=run, tags={"job": "train"}, resume=True) as parent:
        results = run_stages(stages, run, init=args.init, fresh=args.fresh, parent=parent)
    print(format_results(results))
    print(f"model: {results[-1].model_folder}")
    return 0


def make_run(args: argparse.Namespace, stages: Sequence[str]) -> RunConfig:
    """The recipe of the preset with what the command line changes."""
    run = recipe(args.preset, args.name or args.out.absolute().name, args.data, args.out)
    if args.workers is not None:
        run = replace(run, scaling=replace(run.scaling, num_workers=args.workers))
    if args.licences is not None:
        run = replace(run, licences=args.licences)
    return apply_overrides(run, expand_overrides(read_overrides(args.overrides), stages))


def read_overrides(given: Sequence[str]) -> list[str]:
    """Replace each `@FILE` by the `overrides` in that JSON file.

    Raises:
        ValueError: If a file has none.
    """
    overrides: list[str] = []
    for item in given:
        if not item.startswith("@"):
            overrides.append(item)
            continue
        found = json.loads(Path(item[1:]).read_text()).get("overrides")
        if found is None:
            raise ValueError(f"--set {item}: expected a JSON file with a list `overrides`, as a sweep writes it.")
        overrides += found
    return overrides


if __name__ == "__main__":
    raise SystemExit(main())
