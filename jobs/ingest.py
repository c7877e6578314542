"""Read MRI files into a corpus of Parquet shards.

  omnimri ingest SRC... --out DIR

SRC are folders, zips or files of DICOM, NIfTI (with JSON sidecars), NRRD, MetaImage, NumPy arrays, ISMRMRD, and k-space
as fastMRI, CC-359, SKM-TEA and CMRxRecon store it; several may be given and their order does not matter. DIR then holds

  shards/*.parquet   one row per volume (omnimri.platform.data.schema)
  manifest.json      the rows, their splits, and the digest that names this version of the data
  rejects.jsonl      what was not read and why, with pseudonyms of the files
  summary.json       the printed table
  report.html        the same with charts, licences, quality flags and reject reasons

and appears only when it is complete. DIR.rejects.jsonl beside it names the rejected files, the reason and what to do.
The same command again goes on where it was interrupted, or returns at once; for a DIR that holds something else give
--overwrite.

Patients, studies and series get keyed pseudonyms. The key is taken from OMNIMRI_DEID_KEY, else from the file DIR.key,
which is made on first use (mode 0600): keep it apart from the data. Patients are split into train, val and test; the
split depends on --seed and not on the key.

A file annotations.json beside or above a series adds label maps, boxes, diagnoses and reports
(omnimri.platform.data.intake.annotations); dataset.json or the dataset_description.json of BIDS adds name and licence.

A public data set is read in its own layout when --dataset names it as `omnimri datasets` lists it, or when a file
dataset.json with {"catalogue": NAME} lies in its folder: patients, contrasts, label maps, diagnoses, boxes and reports
then come from its paths and tables, and files that are not part of the layout are refused.

--set deface=true removes the face from images of heads (needs the extra: pip install 'omnimri[deface]'): what lies in
front of and below a plane 5 mm off the brain becomes zero, the grid stays. The brain is that of the volume's own label
map (grey and white matter, or brain), else a template registered to the image. Volumes that name no body part are taken
for heads. What cannot be defaced (k-space, no brain found, a cut through a lesion or a box) is rejected, or kept under
a flag with --set undefaced=flag. Look at some of the result: eyelids and brow may be left, and ears are.

The exit status is 0 when at least one volume was ingested. The last line says how many were rejected.

Examples:
  omnimri ingest corpus/ --out runs/demo/shards
  omnimri ingest study.zip brain.nii.gz --out shards --dataset clinic-a --licence "in-house use"
  omnimri ingest corpus/ --out shards --set split_by=hash --set items_per_shard=32
  omnimri ingest BraTS2021/ --dataset brats-2021 --out shards
  omnimri ingest heads/ --out shards --set deface=true
"""

from __future__ import annotations

import argparse
from pathlib import Path

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform.cluster import ensure_ray
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.ingest import IngestSummary, ingest
from omnimri.platform.data.intake.summary import format_summary
from omnimri.platform.overrides import apply_overrides


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = job_parser("ingest", __doc__)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SRC", help="folder, zip or file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="corpus folder to make")
    parser.add_argument("--dataset", metavar="NAME", help="name of the data set, of the catalogue or your own")
    parser.add_argument("--licence", metavar="L", help="licence of the data set")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the split (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace the corpus in DIR")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="any field of IngestConfig, for example split_fractions=0.8,0.1,0.1",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return run_job("ingest", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    config = IngestConfig(dataset=args.dataset, licence=args.licence, seed=args.seed, overwrite=args.overwrite)
    config = apply_overrides(config, args.overrides)
    with ensure_ray():
        summary = ingest(args.sources, args.out, config)
    print(format_summary(summary.tables))
    print(_last_line(summary))
    return 0


def _last_line(summary: IngestSummary) -> str:
    done = "already ingested" if summary.reused else "ingested"
    rejected = f"{summary.num_rejected} rejected, reasons in {summary.rejects_path}"
    return f"{summary.out}: {summary.num_volumes} volumes {done}; {rejected}"


if __name__ == "__main__":
    raise SystemExit(main())
