"""Write instruction-response pairs for every row of a corpus, with a table of what was made.

  omnimri instruct SHARDS [SHARDS ...] --out DIR

Every row gives what its labels can answer: reconstruct (fully sampled k-space), segment (a label map), detect (boxes,
or findings of a label map), diagnose (classes), report (as written, else made of labels), and up to
`questions_per_row` questions: yes or no, one of several options, boxes of one kind of finding (there or not), a
differential before the most likely diagnosis, and questions about another part of the body, which are refused. The
functions are those that training draws its samples with. DIR then holds

  pairs.jsonl     one pair a line: row_id, dataset, split, anatomy, task, kind, topic, instruction, context (plane,
                  contrast, acceleration, history), answer, verdict (its short form), labels (column of the row to what
                  of it the answer follows from), weight
  skipped.jsonl   rows that gave nothing, and why
  summary.json    settings, digest of the data, and pairs by task, anatomy, kind, topic and answer, as printed

Answers of yes and no, and of boxes and none, are left out until there are as many of both for each topic and anatomy
(--set balance=false keeps all). `weight` is one on average; drawn by it, tasks, anatomies in a task, topics and answers
come up equally often, so that a part of the body with few volumes repeats. The same seed gives the same file; an
interrupted run goes on where it was, and a finished DIR of the same settings and data is left as it is.

Boxes are integers 0-999 on the grid of the model that --preset names; they change with it.

Examples:
  omnimri instruct runs/demo/shards --out runs/demo/instructions
  omnimri instruct brats clinic-a --out pairs --split train --preset small --set questions_per_row=16
"""

from __future__ import annotations

import argparse
from pathlib import Path

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform.cluster import ensure_ray
from omnimri.platform.data.shards import Shards
from omnimri.platform.language.instruction_set import (
    PAIRS_NAME,
    SKIPPED_NAME,
    InstructConfig,
    format_table,
    make_instruction_set,
)
from omnimri.platform.overrides import apply_overrides


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = job_parser("instruct", __doc__)
    parser.add_argument("data", type=Path, nargs="+", metavar="SHARDS", help="ingested corpora")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--split", metavar="NAME", help="only rows of this split (default: all)")
    parser.add_argument("--preset", default="tiny", help="model whose grid boxes count in (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of what is drawn (default: 0)")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="any field of InstructConfig, for example questions_per_row=16",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return run_job("instruct", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    config = InstructConfig(seed=args.seed, split=args.split, preset=args.preset)
    config = apply_overrides(config, args.overrides)
    shards = Shards.open(args.data)
    with ensure_ray():
        summary = make_instruction_set(shards, args.out, config)
    print(format_table(summary))
    print(
        f"{args.out / PAIRS_NAME}: {summary['pairs']} pairs of {summary['rows']} rows, "
        f"{summary['left_out_to_balance']} left out to balance answers; "
        f"{summary['rows_without_pairs']} rows gave nothing, reasons in {args.out / SKIPPED_NAME}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
