"""Search the data ratio and the mixture-of-experts settings of stage 3.

  omnimri sweep --data DIR... --init FOLDER --out SWEEPDIR

Every trial is a short run of the multimodal stage from the stage-2 model in FOLDER, at another share of paired data,
number of experts and weight of the balance loss; ASHA stops the weak ones. Trials are compared by held-out losses,
sources weighing the same, whatever mixture they trained on. SWEEPDIR then holds

  results.json   every trial, best first      results.png   score against the share of paired data
  winner.json    overrides for `omnimri train --set @SWEEPDIR/winner.json`

and MLflow one run with a child per trial. The same command again goes on with a sweep that was interrupted. Where the
number of experts differs from that of FOLDER, the expert layers start afresh.

Examples:
  omnimri sweep --data runs/demo/shards --init runs/demo/align/model --out runs/demo/sweep
  omnimri sweep --data shards --init runs/mine/align/model --out sweep --trials 20 --set sweep.steps=400
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform.cluster import ensure_ray
from omnimri.platform.overrides import apply_overrides
from omnimri.platform.tracking import Tracker, tracking_uri
from omnimri.platform.training.config import RunConfig, expand_overrides
from omnimri.platform.training.recipes import RECIPES, recipe
from omnimri.platform.tuning import STAGE, SweepConfig, format_trials, run_sweep


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """What `--set` can change: `sweep.steps=...`, `run.train.lr=...`."""

    sweep: SweepConfig
    run: RunConfig


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = job_parser("sweep", __doc__)
    parser.add_argument("--data", nargs="+", required=True, type=Path, metavar="DIR", help="ingested corpora")
    parser.add_argument("--init", required=True, type=Path, metavar="FOLDER", help="model folder of stage 2")
    parser.add_argument("--out", required=True, type=Path, metavar="SWEEPDIR", help="folder of the sweep")
    parser.add_argument("--preset", default="tiny", choices=list(RECIPES), help="model and recipe (default: tiny)")
    parser.add_argument("--trials", type=int, metavar="N", help="number of trials")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    args = parser.parse_args(argv)
    return run_job("sweep", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    config = SweepRun(sweep=SweepConfig(), run=recipe(args.preset, args.out.absolute().name, args.data, args.out))
    run_overrides = [item.removeprefix("run.") for item in args.overrides if not item.startswith("sweep.")]
    config = replace(config, run=apply_overrides(config.run, expand_overrides(run_overrides, [STAGE])))
    config = apply_overrides(config, [item for item in args.overrides if item.startswith("sweep.")])
    if args.trials is not None:
        config = replace(config, sweep=replace(config.sweep, num_trials=args.trials))
    if not args.init.is_dir():
        raise ValueError(f"{args.init}: expected the model folder of stage 2, found none (--init).")
    uri = tracking_uri(args.out, args.tracking_uri)
    with ensure_ray(), Tracker.start(uri, config.run.name, params=config, tags={"job": "sweep"}, resume=True) as parent:
        results = run_sweep(config.run, config.sweep, init=args.init, out=args.out, parent=parent)
    print(format_trials(results))
    print(f"winner: {args.out / 'winner.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
