"""The whole platform on this machine: corpus, pipeline at the tiny preset, a served model, one request per task.

  omnimri demo [--out runs/demo]

Makes the built-in corpus, ingests it together with real files that Python packages ship (and a few that must be
rejected), trains the four stages, sweeps, evaluates on held-out patients, registers the model, serves it on the
loopback interface, and asks each of the five routes about a patient that was in no split. Answers are kept in
RUNDIR/answers. The same command again goes on where it stopped.

The corpus is simulated from one averaged brain. Research use only, not for diagnosis.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydicom.data import get_testdata_file

from omnimri.jobs.command import job_parser, run_job
from omnimri.jobs.pipeline import make_config, print_result
from omnimri.models.vocabulary import NORMAL, STRUCTURES, TASKS
from omnimri.platform.cluster import ensure_ray, environment
from omnimri.platform.corpus.corpus import CorpusConfig, Patient, write_corpus
from omnimri.platform.data.deid import KEY_VARIABLE
from omnimri.platform.pipeline import run_pipeline
from omnimri.platform.tracking import Tracker, tracking_uri
from omnimri.serve.app import running_app
from omnimri.serve.client import ask
from omnimri.serve.config import AppArgs

REAL_DICOM = ("examples_overlay.dcm", "MR_small.dcm")
REFUSED_DICOM = ("CT_small.dcm", "MR_truncated.dcm")


LIMITS = (
    "sweep.steps=12", "sweep.grace_steps=6", "sweep.report_every=6",
    "evaluate.max_volumes=16", "evaluate.max_image_volumes=6", "evaluate.max_new_tokens=120", "evaluate.calibrate=true",
)  # fmt: skip
"""What keeps the demo short; `--set` still overrides."""

PUBLIC_KEY = "simulated patients have no secret"
"""Pseudonym key unless OMNIMRI_DEID_KEY names one; a new key would train and score in another order."""


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = job_parser("demo", __doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="RUNDIR", help="default: %(default)s")
    parser.add_argument("--patients", type=int, default=40, metavar="N", help="simulated patients (default: 40)")
    parser.add_argument("--trials", type=int, default=2, metavar="N", help="trials of the sweep (default: 2)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
                        help="any field, as in `omnimri pipeline`")  # fmt: skip
    args = parser.parse_args(argv)
    return run_job("demo", lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    started, out = time.monotonic(), args.out.absolute()
    config = make_config(out, "tiny", args.trials, [*LIMITS, *args.overrides])
    key = {KEY_VARIABLE: os.environ.get(KEY_VARIABLE, PUBLIC_KEY)}
    with environment(key), ensure_ray():
        corpus = write_corpus(out / "corpus", CorpusConfig(num_patients=args.patients)).out
        sources = [corpus, *collect_real_files(out / "real_files")]
        with Tracker.start(tracking_uri(out), "demo", params=config, tags={"job": "demo"}, resume=True) as tracker:
            result = run_pipeline(sources, config, tracker, command="omnimri demo")
        patient = write_unseen_patient(out / "unseen", args.patients)
        arguments = AppArgs(model=str(result.model_folder), artifacts_dir=str(out / "artifacts"))
        with running_app(arguments) as url:
            answers = dict(ask_everything(url, patient, out / "answers"))
    print_result(result, args.out)
    print_answers(answers, args.out)
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")


def collect_real_files(out: Path) -> list[Path]:
    """Real MR files of pydicom and nibabel, and files that ingest must refuse, each group in a folder.

    Files that are there already stay untouched: ingest would take a newer one for another corpus.
    """
    read, refused = out / "read", out / "refused"
    wanted = {
        folder / name: Path(str(get_testdata_file(name, download=False)))
        for folder, names in ((read, REAL_DICOM), (refused, REFUSED_DICOM))
        for name in names
    }
    nibabel = importlib.util.find_spec("nibabel")
    assert nibabel is not None
    assert nibabel.origin is not None
    wanted[read / "example4d.nii.gz"] = Path(nibabel.origin).parent / "tests" / "data" / "example4d.nii.gz"
    for target, source in wanted.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy(source, target)
    notes = refused / "notes.nii.gz"
    if not notes.exists():
        notes.write_text("This is a text file with the name of an image.\n")
    return [read, refused]


def write_unseen_patient(out: Path, num_patients: int) -> Path:
    """The first patient after those of the corpus that has a lesion; returns the patient's folder."""
    index = next(i for i in range(num_patients, num_patients + 10) if Patient.draw(i, 0).diagnosis != NORMAL)
    return write_corpus(out, CorpusConfig(num_patients=1, first=index)).out / Patient.draw(index, 0).participant_id


def ask_everything(url: str, patient: Path, out: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One request per task: raw k-space to reconstruct, a DICOM zip for the others."""
    out.mkdir(parents=True, exist_ok=True)
    (series,) = (patient / "dicom").iterdir()
    archive = out / f"{patient.name}_{series.name}_dicom.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in sorted(series.iterdir()):
            zipped.write(path, path.name)
    raw = next(path for path in sorted((patient / "raw").iterdir()) if not path.name.endswith(".mrd.h5"))
    for task in TASKS:
        fields: dict[str, Any] = {"structures": ",".join(STRUCTURES)} if task == "segment" else {}
        if task == "reconstruct":
            fields = {"acceleration": 4}
        yield task, ask(url, task, raw if task == "reconstruct" else archive, out / task, **fields)


def print_answers(answers: dict[str, dict[str, Any]], out: Path) -> None:
    """One line per task."""
    print("\nAnswers about a patient that was in no split:")
    for task, answer in answers.items():
        measured = ", ".join(
            f"{m.get('label', m['name'])} {m['value']:.3g} {m['unit']}" for m in answer.get("measurements", [])[:5]
        )
        print(f"  {task:<12} {(answer.get('text') or measured or 'see artifacts')[:150]}")
    print(f"  kept in {out / 'answers'}")


if __name__ == "__main__":
    raise SystemExit(main())
