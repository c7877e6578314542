"""Make the built-in corpus: simulated brain MRI with lesions, as files of DICOM, NIfTI, fastMRI and ISMRMRD.

  omnimri corpus --out DIR --patients N [--seed S]

Each patient gets four contrasts (T1w, T2w, FLAIR, PD), two as images and two as raw multi-coil k-space, with label
maps, boxes, a diagnosis, a five-level description and a report that are true of what was simulated. Patient i of a seed
is the same in a corpus of any size. The same command again returns at once.

The anatomy is ONE averaged brain (MNI152), warped. Numbers made on this corpus show that the platform works; they are
not evidence of clinical performance.

Example:
  omnimri corpus --out runs/corpus --patients 48
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform.cluster import ensure_ray
from omnimri.platform.corpus.corpus import NOTICE, CorpusConfig, write_corpus
from omnimri.platform.overrides import apply_overrides


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = job_parser("corpus", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--patients", type=int, default=48, metavar="N", help="patients (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
                        help="any field of CorpusConfig, for example num_coils=8")  # fmt: skip
    args = parser.parse_args(argv)
    return run_job("corpus", lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    config = apply_overrides(CorpusConfig(num_patients=args.patients, seed=args.seed), args.overrides)
    with ensure_ray():
        summary = write_corpus(args.out, config)
    counts = Counter(row["diagnosis"] for row in summary.participants)
    print(", ".join(f"{count} {diagnosis}" for diagnosis, count in sorted(counts.items())))
    print(f"{summary.out}: {len(summary.participants)} patients, {summary.num_series} series in {summary.seconds:.0f} s.")
    print(NOTICE)


if __name__ == "__main__":
    raise SystemExit(main())
