r"""Say what a run of a preset needs on given hardware, before anything is started.

  omnimri plan --preset 7b --gpus 64 [--gpu-memory 80] [--zero 3] [--offload cpu] [--stage instruct]

Prints the parameters of each part, the model states on each GPU under every stage of ZeRO, activations with and without
checkpointing, the largest batch, and the work per step with the throughput that follows from a stated share of the
GPU's peak. No weights are made. What does not fit ends with status 1 and one line that names the option to change.

Examples:
  omnimri plan --preset 7b --gpus 64
  omnimri plan --preset base --gpus 2 --gpu-memory 40 --zero 2 --set text_tokens=1024
  omnimri plan --preset 7b --gpus 64 --set peak_tflops=989 --set utilisation=0.4
  omnimri plan --preset 7b --gpus 64 --set also_trains=vision
  omnimri plan --preset 7b --gpus 8 --set lora_rank=16
"""

from __future__ import annotations

import argparse

from omnimri.jobs.command import job_parser, run_job
from omnimri.models.config import PRESETS
from omnimri.platform.overrides import apply_overrides
from omnimri.platform.training.plan import PlanConfig, check_fits, format_plan, make_plan
from omnimri.platform.training.stages import STAGES


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    default = PlanConfig(gpus=1)
    parser = job_parser("plan", __doc__)
    parser.add_argument("--preset", required=True, choices=list(PRESETS), help="model")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="GPUs in all")
    parser.add_argument(
        "--gpu-memory", type=float, default=default.gpu_memory_gb, metavar="GIB", help="of one (default: %(default)g)"
    )
    parser.add_argument("--zero", type=int, default=default.zero, metavar="STAGE", help="0 to 3 (default: %(default)s)")
    parser.add_argument("--offload", default=default.offload, choices=["none", "cpu"], help="(default: %(default)s)")
    parser.add_argument("--stage", default=default.stage, choices=list(STAGES), help="(default: %(default)s)")
    parser.add_argument(
        "--micro-batch", type=int, default=default.micro_batch, metavar="N", help="per GPU (default: %(default)s)"
    )
    parser.add_argument("--no-checkpointing", action="store_true", help="keep activations")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="any field of PlanConfig"
    )
    args = parser.parse_args(argv)
    return run_job("plan", lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    settings = PlanConfig(
        gpus=args.gpus,
        gpu_memory_gb=args.gpu_memory,
        zero=args.zero,
        offload=args.offload,
        stage=args.stage,
        micro_batch=args.micro_batch,
        checkpointing=not args.no_checkpointing,
    )
    plan = make_plan(args.preset, apply_overrides(settings, args.overrides))
    print(format_plan(plan), flush=True)
    check_fits(plan)


if __name__ == "__main__":
    raise SystemExit(main())
