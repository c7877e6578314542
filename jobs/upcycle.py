r"""Make a mixture of experts of a local Qwen2 or Qwen2.5 checkpoint that computes the same function.

  omnimri upcycle SRC --out DIR [--experts 8] [--top-k 2] [--mode shared|copies]

SRC is a folder with config.json, safetensors and a tokenizer, as it is published. DIR is then a folder that training
(--set backbone=DIR), vLLM and transformers read; its tokenizer has our special tokens in rows that nothing used.
Weights pass tensor by tensor: memory for one output file (--set max_shard_mb) is enough for a checkpoint of any size.

  shared   the dense network becomes the shared expert; routed experts of any width add nothing yet. Logits are those
           of SRC to the last bit in float32.
  copies   each expert is the whole dense network; logits are those of SRC up to rounding, memory grows E times.

Examples:
  omnimri upcycle Qwen2.5-0.5B --out runs/moe-small
  omnimri upcycle Qwen2.5-7B --out /shared/moe-7b --experts 16 --top-k 4 --set expert_width=2560 --set noise=0.01
  omnimri train --stage all --preset small --data shards --out runs/mine --set backbone=runs/moe-small
"""

from __future__ import annotations

import argparse
from pathlib import Path

from omnimri.jobs.command import job_parser, run_job
from omnimri.models.config import PRESETS
from omnimri.models.tokenizer import has_tokenizer
from omnimri.models.upcycling import UpcycleConfig, shape_overrides, upcycle
from omnimri.platform.overrides import apply_overrides


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    default = UpcycleConfig()
    parser = job_parser("upcycle", __doc__)
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of a Qwen2 or Qwen2.5 checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--experts", type=int, default=default.num_experts, metavar="E", help="(default: %(default)s)")
    parser.add_argument(
        "--top-k", type=int, default=default.experts_per_token, metavar="K",
        help="experts per token (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--mode", default=default.mode, help="shared (default) or copies")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="any field of UpcycleConfig"
    )
    args = parser.parse_args(argv)
    return run_job("upcycle", lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    config = UpcycleConfig(num_experts=args.experts, experts_per_token=args.top_k, mode=args.mode)
    upcycle(args.source, args.out, apply_overrides(config, args.overrides))
    print(f"backbone: {args.out}")
    if not has_tokenizer(args.out):
        print(f"{args.source} has no tokenizer: put one beside the weights before you train.")
    print(f"train it: {training_options(args.out)}")


def training_options(folder: Path) -> str:
    """Options of `omnimri train` for that backbone, from the preset that is nearest to its shape."""
    changes = {name: shape_overrides(folder, build().backbone) for name, build in PRESETS.items()}
    nearest = min(changes, key=lambda name: len(changes[name]))
    return " ".join([f"--preset {nearest}", *(f"--set {s}" for s in (f"backbone={folder}", *changes[nearest]))])


if __name__ == "__main__":
    raise SystemExit(main())
