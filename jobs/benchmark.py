r"""Measure speed and coverage on this machine, beside what people use otherwise.

  omnimri benchmark ingest [SRC...]       read files: ingest, a plain pydicom/nibabel loop, MONAI
  omnimri benchmark sequences [FILE]      sequence rules on a Parquet table of DICOM headers
  omnimri benchmark annotate DIR --model M    an ingested corpus: vLLM, and transformers with xgrammar
  omnimri benchmark quality DIR... --model M --out OUT    a checkpoint beside specialists of one task each

Prints one line per number with the machine and the date, and writes all of them to --out. Without SRC, the built-in
corpus is made first (--patients). Without FILE, the index of the package idc-index-data is read.

quality trains, on the split `train` of ingested corpora, a U-Net and a VarNet to reconstruct, a U-Net to segment and a
CNN to diagnose, each for --minutes (by default as long as all stages of the checkpoint's run took); boxes and a
template report follow from the last two. All methods answer the same held-out cases. OUT then holds what
`omnimri evaluate` writes, with the specialists beside the model and their learning curves (index.html, summary.json,
cases.jsonl, figures/), the table as Markdown (table.md), and the networks (specialists/), which are not trained again.
Without --model the specialists stand beside the classical baselines alone.

Examples:
  omnimri benchmark ingest runs/demo/corpus --out ingest.json
  omnimri benchmark sequences --out sequences.json
  omnimri benchmark annotate shards --model Qwen/Qwen2.5-VL-7B-Instruct --limit 200
  omnimri benchmark annotate shards --model tiny-vl --set pictures.slices=1 --set dtype=float32
  omnimri benchmark quality shards --model runs/mine/instruct/model --out runs/mine/quality
  omnimri benchmark quality shards --out quality --minutes 3 --set evaluate.max_volumes=16
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform.annotation.config import AnnotateConfig, Backend
from omnimri.platform.benchmark.annotate import benchmark_annotate
from omnimri.platform.benchmark.ingest import benchmark_ingest
from omnimri.platform.benchmark.quality import (
    TABLE_NAME,
    QualityConfig,
    benchmark_quality,
    quality_table,
    training_seconds,
)
from omnimri.platform.benchmark.sequences import benchmark_sequences, default_headers
from omnimri.platform.cluster import ensure_ray
from omnimri.platform.corpus.corpus import CorpusConfig, write_corpus
from omnimri.platform.data.shards import Shards
from omnimri.platform.overrides import apply_overrides
from omnimri.platform.specialists.specialists import SpecialistsConfig


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = job_parser("benchmark", __doc__)
    parser.add_argument("what", choices=["ingest", "sequences", "annotate", "quality"], help="what to measure")
    parser.add_argument("sources", nargs="*", type=Path, metavar="SRC", help="files to read, or corpora")
    parser.add_argument("--patients", type=int, default=24, metavar="N", help="of the built-in corpus (default: 24)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="the fastest of N counts (default: 1)")
    parser.add_argument("--model", metavar="M", help="of annotate: name or local folder; of quality: checkpoint")
    parser.add_argument("--limit", type=int, metavar="N", help="of annotate: only the first N volumes")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="any field of AnnotateConfig, or of QualityConfig, for example evaluate.max_volumes=12",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, metavar="N", help="of quality: training time of each specialist")
    parser.add_argument("--data", type=Path, nargs="+", default=[], metavar="DIR", help="of quality: the same as SRC")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for every number; of quality: a folder")
    args = parser.parse_args(argv)
    if args.what == "quality":
        command = ["omnimri", "benchmark", *(sys.argv[1:] if argv is None else argv)]
        return run_job("benchmark", lambda: _quality(args, shlex.join(command)))
    return run_job("benchmark", lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    measured = {"benchmark": args.what, "machine": machine(), "date": datetime.date.today().isoformat()}
    measured |= {"ingest": _ingest, "sequences": _sequences, "annotate": _annotate}[args.what](args)
    print("\n".join(_lines(measured)))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        print(f"all numbers: {args.out}")


def _ingest(args: argparse.Namespace) -> dict[str, Any]:
    with TemporaryDirectory(prefix="omnimri-benchmark-") as folder, ensure_ray(num_cpus=os.cpu_count()):
        sources = args.sources or [write_corpus(Path(folder) / "corpus", CorpusConfig(num_patients=args.patients)).out]
        return benchmark_ingest(sources, repeats=args.repeats)


def _sequences(args: argparse.Namespace) -> dict[str, Any]:
    if len(args.sources) > 1:
        raise ValueError(f"benchmark sequences takes one table of headers, found {len(args.sources)}.")
    return benchmark_sequences(args.sources[0] if args.sources else default_headers())


def _annotate(args: argparse.Namespace) -> dict[str, Any]:
    if len(args.sources) != 1 or not args.model:
        raise ValueError("benchmark annotate takes one ingested corpus and --model.")
    backends: tuple[Backend, ...] = ("vllm", "transformers")
    configs = [apply_overrides(AnnotateConfig(backend=name, model=args.model), args.overrides) for name in backends]
    with ensure_ray():
        return benchmark_annotate(args.sources[0], configs, limit=args.limit)


def _quality(args: argparse.Namespace, command: str) -> None:
    folders = [*args.sources, *args.data]
    if not folders or not args.out:
        raise ValueError("benchmark quality takes ingested corpora and --out, the folder for its results.")
    model = Path(args.model).absolute() if args.model else None
    if model and not model.is_dir():
        raise ValueError(f"--model {args.model}: expected a checkpoint folder, found none. Run `omnimri train` first.")
    seconds = 60 * args.minutes if args.minutes else training_seconds(model)
    if seconds is None:
        raise ValueError("benchmark quality: how long the model was trained is not known here; give --minutes.")
    config = apply_overrides(
        QualityConfig(specialists=SpecialistsConfig().with_budget(seconds=seconds)), args.overrides
    )
    with ensure_ray():
        summary = benchmark_quality(model, Shards.open(folders), args.out, config, command=command)
    print(f"{machine()}, {datetime.date.today().isoformat()}\n\n{quality_table(summary)}")
    print(f"\npage {args.out / 'index.html'}\ntable {args.out / TABLE_NAME}\nnumbers {args.out / 'summary.json'}")


def machine() -> str:
    """Processor architecture, cores and Python, as documents quote it."""
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _lines(measured: dict[str, Any], prefix: str = "") -> list[str]:
    """Every number on a line of its own; of long tables the first ten entries."""
    lines = []
    for name, value in measured.items():
        if isinstance(value, dict):
            lines += _lines(dict(list(value.items())[:10]), f"{prefix}{name} / ")
        elif isinstance(value, list):
            lines += [f"{prefix}{name}: {entry}" for entry in value[:10]]
        else:
            lines.append(f"{prefix}{name}: {value}")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
