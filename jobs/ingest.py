"""Read MRI files into a corpus of Parquet shards.

  omnimri ingest SRC... --out DIR

SRC are folders, zips or files of DICOM, NIfTI (with JSON sidecars), NRRD, MetaImage, NumPy and MATLAB arrays, ISMRMRD,
and k-space as fastMRI, CC-359, SKM-TEA and CMRxRecon store it; several may be given and their order does not matter.
DIR then holds

  shards/*.parquet   one row per volume (omnimri.platform.data.schema)
  manifest.json      the rows, their splits, and the digest that names this version of the data
  rejects.jsonl      what was not read and why, with pseudonyms of the files
  summary.json       the printed table
  report.html        the same with charts, licences, quality flags and reject reasons

and appears only when it is complete. DIR.rejects.jsonl beside it names the rejected files, the reason and what to do.
The same command again goes on where it was interrupted, or returns at once; for a DIR that holds something else give
--overwrite, or --append to add to it: what the corpus has already is not read again (from a DICOMweb service it is
retrieved again), its rows stay as they are, and a patient who is in it keeps the split. Settings of splits and voxels
must be those that the corpus was made with.

Patients, studies and series get keyed pseudonyms. The key is taken from OMNIMRI_DEID_KEY, else from the file DIR.key,
which is made on first use (mode 0600): keep it apart from the data. Patients are split into train, val and test; the
split depends on --seed and not on the key. With --set split_by=official, patients of a catalogued set stand where its
authors put them.

A file annotations.json beside or above a series adds label maps, boxes, diagnoses and reports
(omnimri.platform.data.intake.annotations); dataset.json or the dataset_description.json of BIDS adds name and licence.

A public data set is read in its own layout when --dataset names it as `omnimri datasets` lists it, or when a file
dataset.json with {"catalogue": NAME} lies in its folder: patients, contrasts, label maps, diagnoses, boxes and reports
then come from its paths and tables, and files that are not part of the layout are refused.

With --tracking-uri (or MLFLOW_TRACKING_URI) the report, the counts and the digest become an MLflow run.

One SRC may be the address of a DICOMweb service, alone; its MR series are found by QIDO-RS, retrieved by WADO-RS to
DIR.dicomweb, which only the owner can read and which goes when DIR stands, and ingested from there. --query
ATTRIBUTE=VALUE, once for each, says which: attributes of patient and study (PatientID, StudyDate, ModalitiesInStudy...)
or of series (SeriesDescription, BodyPartExamined...); `--query Modality=MR,SEG,RTSTRUCT` takes the label objects of the
series along. An interrupted run retrieves only what it does not have; a series that does not come is a line of the
ledger. The service is shown the bearer token in OMNIMRI_DICOMWEB_TOKEN, or OMNIMRI_DICOMWEB_USER with
OMNIMRI_DICOMWEB_PASSWORD; REQUESTS_CA_BUNDLE names the certificate of a private authority. `--set dicomweb.FIELD=VALUE`
sets timeouts, retries, how many series are retrieved at once, and keep_spool.

--set deface=true removes the face from images of heads (needs the extra: pip install 'omnimri[deface]'): what lies in
front of and below a plane 5 mm off the brain becomes zero, the grid stays. The brain is that of the volume's own label
map (grey and white matter, or brain), else a template registered to the image. Volumes that name no body part are taken
for heads. What cannot be defaced (k-space, no brain found, a cut through a lesion or a box) is rejected, or kept under
a flag with --set undefaced=flag. Look at some of the result: forehead, brow, half of the eyes and ears are left.

The exit status is 0 when the corpus stands and holds at least one volume. The last line says how many were rejected.

Examples:
  omnimri ingest corpus/ --out runs/demo/shards
  omnimri ingest study.zip brain.nii.gz --out shards --dataset clinic-a --licence "in-house use"
  omnimri ingest corpus/ --out shards --set split_by=hash --set items_per_shard=32
  omnimri ingest BraTS2021/ --dataset brats-2021 --out shards
  omnimri ingest https://pacs.example/dicom-web --query StudyDate=20240101-20240131 --out january
  omnimri ingest incoming/ --out shards --append
  omnimri ingest heads/ --out shards --set deface=true
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform.cluster import ensure_ray
from omnimri.platform.data.formats.dicom.web import is_service
from omnimri.platform.data.formats.dicom.web_query import parse_query
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.ingest import IngestSummary, ingest
from omnimri.platform.data.intake.mirror import ingest_dicomweb
from omnimri.platform.data.intake.summary import format_summary
from omnimri.platform.overrides import apply_overrides


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = job_parser("ingest", __doc__)
    parser.add_argument("sources", nargs="+", metavar="SRC", help="folder, zip or file, or a DICOMweb service")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="corpus folder to make")
    parser.add_argument(
        "--query", action="append", default=[], metavar="ATTRIBUTE=VALUE", help="which series of a DICOMweb service"
    )
    parser.add_argument("--dataset", metavar="NAME", help="name of the data set, of the catalogue or your own")
    parser.add_argument("--licence", metavar="L", help="licence of the data set")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the split (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace the corpus in DIR")
    parser.add_argument("--append", action="store_true", help="add to the corpus in DIR, or make it")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store (default: MLFLOW_TRACKING_URI, or none)")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="any field of IngestConfig, for example split_fractions=0.8,0.1,0.1",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return run_job("ingest", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    config = IngestConfig(
        dataset=args.dataset, licence=args.licence, seed=args.seed, overwrite=args.overwrite, append=args.append
    )
    config = apply_overrides(config, args.overrides)
    services = [source for source in args.sources if is_service(source)]
    if services and len(args.sources) > 1:
        raise ValueError("A DICOMweb service is ingested alone. Give the other sources an --out of their own.")
    if args.query and not services:
        raise ValueError("--query is for a DICOMweb service. Name one, like https://pacs.example/dicom-web.")
    query = parse_query(args.query)
    with ensure_ray():
        if services:
            summary = ingest_dicomweb(services[0], args.out, query, config)
        else:
            summary = ingest([Path(source) for source in args.sources], args.out, config)
    if uri := args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        _log(uri, summary, config)
    print(format_summary(summary.tables))
    print(_last_line(summary))
    return 0


def _log(uri: str, summary: IngestSummary, config: IngestConfig) -> None:
    # MLflow takes seconds to import, and most ingests do without it.
    from omnimri.platform.data.intake.card import log_corpus
    from omnimri.platform.tracking import Tracker

    with Tracker.start(uri, "ingest", params=config, tags={"job": "ingest"}) as tracker:
        log_corpus(tracker, summary.out)


def _last_line(summary: IngestSummary) -> str:
    done = "already ingested" if summary.reused else "ingested"
    if not summary.reused and summary.num_added < summary.num_volumes:
        done += f", {summary.num_added} of them now"
    rejected = f"{summary.num_rejected} rejected, reasons in {summary.rejects_path}"
    return f"{summary.out}: {summary.num_volumes} volumes {done}; {rejected}"


if __name__ == "__main__":
    raise SystemExit(main())
