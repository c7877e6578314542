"""Score a model on held-out patients, beside its baselines and floors.

  omnimri evaluate --model DIR --data DIR --out DIR

DIR of --model is a checkpoint folder, DIR of --data an ingested corpus. The folder of --out then holds

  index.html     the page: numbers first, then pictures, then where they come from; one file, no network
  summary.json   every number: task -> condition -> method -> metric -> value, 95 % interval over patients, n
  cases.jsonl    one line per method and volume, from which the numbers can be made again
  figures/       one PNG for each image task
  pictures/      the arrays of the cases on the page

Reconstruction stands beside zero-filled, CG-SENSE and compressed sensing (both tuned on the validation split) by
fastMRI's definitions; segmentation, detection, diagnosis and reports beside the same model on a blank image, the last
three also beside its answers about another patient; diagnosis beside the commonest diagnosis in training too. The
table printed at the end says plainly what does not beat its floor.

With --set calibrate=true the scores of boxes are first fitted on the validation split; the fit is kept in the
checkpoint folder (detection.json), where serving finds it.

With --tracking-uri (or MLFLOW_TRACKING_URI) the numbers, the page and summary.json become an MLflow run, a child of
--parent-run where that is given.

Examples:
  omnimri evaluate --model runs/demo/instruct/model --data runs/demo/shards --out runs/demo/evaluation
  omnimri evaluate --model M --data D --out O --set tasks=reconstruct --set accelerations=4 --set center_fractions=0.08
  omnimri evaluate --model M --data D --out O --set max_volumes=12 --set max_slices=8
"""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform.cluster import ensure_ray
from omnimri.platform.data.shards import Shards
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.evaluate import evaluate, log_evaluation
from omnimri.platform.evaluation.summary import format_table
from omnimri.platform.overrides import apply_overrides
from omnimri.platform.tracking import Tracker


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = job_parser("evaluate", __doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, nargs="+", metavar="DIR", help="ingested corpora")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--split", default="test", help="split to score (default: %(default)s)")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store (default: MLFLOW_TRACKING_URI, or none)")
    parser.add_argument("--parent-run", metavar="ID", help="MLflow run that this evaluation belongs to")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="any field of EvaluateConfig, for example max_volumes=12",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return run_job("evaluate", lambda: _run(args, _command_line(args, argv)))


def _run(args: argparse.Namespace, command: str) -> int:
    uri = args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if args.parent_run and not uri:
        raise ValueError("--parent-run needs the store that the run lies in: give --tracking-uri.")
    config = apply_overrides(EvaluateConfig(split=args.split), args.overrides)
    shards = Shards.open(args.data)
    if not args.model.is_dir():
        raise ValueError(f"--model {args.model}: expected a checkpoint folder, found none. Run `omnimri train` first.")
    with ensure_ray():
        summary = evaluate(args.model.absolute(), shards, args.out, config, command=command)
    if uri:
        parent = Tracker(uri, args.parent_run) if args.parent_run else None
        with Tracker.start(uri, "evaluate", parent=parent, params=config) as tracker:
            log_evaluation(tracker, summary, args.out, source=", ".join(map(str, args.data)))
    print(format_table(summary))
    print(f"\npage {args.out / 'index.html'}\nnumbers {args.out / 'summary.json'}")
    return 0


def _command_line(args: argparse.Namespace, argv: list[str] | None) -> str:
    """The command as it can be typed again; a call from Python is written out from its options."""
    if argv is not None:
        return shlex.join(["omnimri", "evaluate", *argv])
    data = [str(folder) for folder in args.data]
    sets = [part for assignment in args.overrides for part in ("--set", assignment)]
    options = ["--model", str(args.model), "--data", *data, "--out", str(args.out), "--split", args.split]
    return shlex.join(["omnimri", "evaluate", *options, *sets])


if __name__ == "__main__":
    raise SystemExit(main())
