"""Make the built-in corpus: simulated brain MRI with lesions, as DICOM, NIfTI, fastMRI and ISMRMRD files.

  omnimri corpus --out DIR --patients N [--seed S] [--set KEY=VALUE ...]

Each patient gets four contrasts (T1w, T2w, FLAIR, PD), two as images and two as raw multi-coil k-space, with label
maps, boxes, a diagnosis, a five-level description and a report that are true of what was simulated. Five patients hold
every diagnosis: normal, old infarct, demyelinating disease, oedematous mass, haemorrhage. The formats rotate, so that
every contrast comes in every format.

Patient i of a seed is the same in a corpus of any size. The same command again makes nothing new; with a larger N, or
after an interruption, it adds the patients that are missing. A patient takes about a second of one core and 27 MB.

DIR then holds dataset.json (name, licence, notice, settings), participants.tsv, and a folder for each patient:
  sub-0001/dicom/T1w/IM0001.dcm ...       sub-0001/anat/sub-0001_FLAIR.nii.gz and .json
  sub-0001/raw/sub-0001_T2w.h5            fastMRI layout; the attribute affine_ras holds the geometry
  sub-0001/raw/sub-0001_PD.mrd.h5         ISMRMRD
  sub-0001/labels/*_dseg.nii.gz           label map on the grid of its series
  sub-0001/annotations.json               what `omnimri ingest` reads

The anatomy is ONE averaged brain (MNI152), warped, in a schematic head. Numbers made on this corpus show that the
platform works; they are not evidence of clinical performance.

Examples:
  omnimri corpus --out corpus --patients 48
  omnimri corpus --out corpus --patients 10 --seed 7 --set num_coils=8 --set num_slices=16
"""

from __future__ import annotations

import argparse
from pathlib import Path

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform.cluster import ensure_ray
from omnimri.platform.corpus.corpus import NOTICE, CorpusConfig, CorpusSummary, write_corpus
from omnimri.platform.overrides import apply_overrides


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = job_parser("corpus", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="corpus folder to make or complete")
    parser.add_argument("--patients", type=int, required=True, metavar="N", help="how many patients it shall hold")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed (default: 0)")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="any field of CorpusConfig, for example num_coils=8",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return run_job("corpus", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    config = apply_overrides(CorpusConfig(num_patients=args.patients, seed=args.seed), args.overrides)
    with ensure_ray():
        summary = write_corpus(args.out, config)
    print(_table(summary))
    kept = len(summary.participants) - summary.num_written
    print(
        f"{summary.out}: {len(summary.participants)} patients ({kept} were there), {summary.num_series} series, "
        f"{summary.seconds:.0f} s"
    )
    print(NOTICE)
    return 0


def _table(summary: CorpusSummary) -> str:
    """Patients by diagnosis, vendor, field strength and sex, a line each."""
    columns = {"diagnosis": "diagnosis", "vendor": "vendor", "field_strength_t": "field strength (T)", "sex": "sex"}
    return "\n".join(
        f"{title:<20}" + ", ".join(f"{value}: {count}" for value, count in summary.counts(column).items())
        for column, title in columns.items()
    )


if __name__ == "__main__":
    raise SystemExit(main())
