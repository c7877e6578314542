"""Look into the embeddings of a checkpoint: what they cluster by, and which texts they find.

  omnimri probe --model DIR --data DIR --out DIR

DIR of --model is the folder of any stage, DIR of --data an ingested corpus. The folder of --out then holds

  index.html       figures and t-SNE pictures; one file, no network
  probe.json       kNN and linear probes, silhouette by contrast, plane, diagnosis and vendor; whether single visual
                   tokens know what label their place holds; retrieval R@1 and R@5
  embeddings.npz   of the scored volumes

An encoder for many scanners should know contrast, plane and diagnosis better than vendor. With --tracking-uri (or
MLFLOW_TRACKING_URI) the figures become an MLflow run.

Examples:
  omnimri probe --model runs/demo/align/model --data runs/demo/shards --out runs/demo/probe
"""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform.cluster import ensure_ray
from omnimri.platform.data.shards import Shards
from omnimri.platform.evaluation.probe import ProbeConfig, format_probe, log_probe, probe
from omnimri.platform.overrides import apply_overrides
from omnimri.platform.tracking import Tracker


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = job_parser("probe", __doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, nargs="+", metavar="DIR", help="ingested corpora")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--split", default="test", help="split to score (default: %(default)s)")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store (default: MLFLOW_TRACKING_URI, or none)")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="any field of ProbeConfig, for example neighbours=10",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return run_job("probe", lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    config = apply_overrides(ProbeConfig(split=args.split), args.overrides)
    shards = Shards.open(args.data)
    folders = [f"--model {args.model}", f"--data {shlex.join(map(str, args.data))}", f"--out {args.out}"]
    with ensure_ray():
        result = probe(args.model.absolute(), shards, args.out, config, command=f"omnimri probe {' '.join(folders)}")
    if uri := args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        with Tracker.start(uri, "probe", params=config) as tracker:
            log_probe(tracker, result, args.out)
    print(format_probe(result))
    print(f"\npage {args.out / 'index.html'}\nnumbers {args.out / 'probe.json'}")


if __name__ == "__main__":
    raise SystemExit(main())
