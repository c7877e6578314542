"""Identifiers planted wherever a file can hold them are found in nothing that ingest leaves behind."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from omnimri.platform.data.deid import REMOVED, header_identifiers, scrub
from omnimri.platform.data.formats.readers import read_path
from tests.conftest import ROOT
from tests.platform.intake_fakes import (
    coil_kspace,
    dicom_slices,
    ismrmrd_header,
    oblique_affine,
    random_image,
    rescalable,
    save_dicom,
    save_fastmri,
    save_ismrmrd,
    save_nifti,
)  # fmt: skip
from tests.platform.report_fakes import CUBIC_MM, VOLUME, make_report, measured, of_images

SECRETS = (
    "Zwirnlein", "Quastenflosser", "QZ-4711-88", "1931-07-23", "19310723", "23.07.1931", "Oberhinterwald",
    "ACC99887766", "1.2.826.0.1.3680043.9.7777",
)  # fmt: skip
NAME, OTHER, NUMBER, _, BIRTH, _, PLACE, ACCESSION, UID = SECRETS
REPORT = f"{NAME.upper()}, born 23.07.1931, {NUMBER}, seen at {PLACE} ({ACCESSION}). An old infarct on the left."


def planted_series(image: np.ndarray, seed: int) -> list[Dataset]:
    """A DICOM series with identifiers in standard, private and nested elements, comments and an overlay."""
    slices = dicom_slices(
        image, oblique_affine(), seed=seed, PatientName=f"{NAME}^{OTHER}", PatientID=NUMBER, PatientBirthDate=BIRTH,
        AccessionNumber=ACCESSION, InstitutionName=PLACE, ReferringPhysicianName=OTHER, StudyDate=BIRTH,
        ImageComments=f"{NAME} {PLACE}", PatientComments=NUMBER, SeriesDescription=f"{NAME} T1 brain",
        StudyDescription=f"{PLACE} head {NUMBER}", ProtocolName=f"{OTHER} mprage", StationName=PLACE,
        ManufacturerModelName=f"Skyra^{NAME}", OperatorsName=OTHER,
    )  # fmt: skip
    for dataset in slices:
        nested, deeper = Dataset(), Dataset()
        deeper.PatientName, deeper.StudyInstanceUID = NAME, f"{UID}.5"
        nested.ReferencedStudySequence, nested.TextValue = Sequence([deeper]), f"{NAME} {BIRTH}"
        dataset.RequestAttributesSequence = Sequence([nested])
        dataset.private_block(0x0029, f"{PLACE} PRIVATE", create=True).add_new(0x01, "LO", f"{NAME} {NUMBER}")
    return slices


def plant_report(path: Path, slices: list[Dataset]) -> None:
    """A measurement report with identifiers in its header, observer, tracking identifier, codes and comments."""
    code, tracking = Code(NUMBER, f"99{NAME}"[:16], f"{NAME} {BIRTH}"), sr.TrackingIdentifier(UID, NAME)
    numbers = [measured(VOLUME, 41.0, CUBIC_MM), measured(code, 1.0, CUBIC_MM), measured(VOLUME, 1.0, code)]
    evaluations = [sr.QualitativeEvaluation(codes.SCT.Hemorrhage, codes.SCT.Present)]
    said = {"tracking_identifier": tracking, "finding_type": code, "finding_sites": [sr.FindingSite(code)]}
    group = of_images(**said, measurements=numbers, qualitative_evaluations=evaluations)
    report = make_report(slices, [group])
    for item in report.ContentSequence:
        if item.ValueType == "PNAME":
            item.PersonName = f"{NAME}^{OTHER}"
    report.PatientComments, report.SeriesDescription = f"{NAME} {PLACE}", f"{OTHER} {ACCESSION}"
    report.save_as(path)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Files of every kind, good and broken, in folders and a zip that are called by the patient's name."""
    root = tmp_path / "in" / NAME
    image = rescalable(random_image(1, (5, 32, 24)))
    slices = planted_series(image, seed=1)
    for dataset in slices:
        dataset.PatientSex, dataset.StudyTime, dataset.StudyID = "F", "120000", "1"
    save_dicom(slices, root / f"{NUMBER}_{BIRTH}")
    plant_report(root / "report.dcm", slices)
    annotation = {"patient": {"participant_id": NAME}, "series": {f"{NUMBER}_{BIRTH}": {"report": REPORT}}}
    (root / "annotations.json").write_text(json.dumps(annotation))
    other = rescalable(random_image(7, (5, 32, 24)))
    nifti = save_nifti(root / f"sub-{NAME}_T1w.nii", other, oblique_affine())
    header = nib.load(nifti, mmap=False)
    header.header["descrip"], header.header["db_name"] = f"{NAME} {NUMBER}".encode(), PLACE.encode()[:18]
    nib.save(header, nifti)
    nifti.with_suffix(".json").write_text(json.dumps({"PatientName": NAME, "SeriesDescription": f"{NAME} T1"}))
    (root / f"{NAME}_broken.nii.gz").write_bytes(gzip.compress(NAME.encode()))
    (root / f"{NUMBER}.dcm").write_bytes(b"\0" * 128 + b"DICM" + NAME.encode() * 20)
    (root / f"{NAME}.par").write_text(f"{NAME}")
    [broken, *_] = planted_series(image, seed=2)
    broken.PixelSpacing = None
    save_dicom([broken], root / f"{OTHER}")
    with zipfile.ZipFile(tmp_path / "in" / f"{NAME}.zip", "w") as archive:
        archive.writestr(f"{NAME}/{NUMBER}.txt", NAME)
        archive.writestr(f"{NAME}/{NUMBER}_{PLACE}.nii.gz", b"no image")
    return tmp_path / "in"


def everything_written(folder: Path) -> str:
    """Text of all files below a folder; Parquet values unpacked, and packed bytes as they lie."""
    texts = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        texts += [str(path.relative_to(folder)), path.read_bytes().decode("latin-1")]
        if path.suffix == ".parquet":
            columns = [name for name in pq.read_schema(path).names if name not in ("image", "kspace")]
            texts.append(json.dumps(pq.read_table(path, columns=columns).to_pylist(), default=str))
    return "\n".join(texts)


@pytest.mark.slow
def test_no_identifier_leaves_the_files(planted: Path, tmp_path: Path) -> None:
    out, ray_folder = tmp_path / "corpus" / "shards", Path("/tmp") / f"omnimri-privacy-{os.getpid()}"
    ray_folder.mkdir()
    environment = {**os.environ, "RAY_TMPDIR": str(ray_folder), "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    command = [
        sys.executable,
        "-m",
        "omnimri.jobs.ingest",
        str(planted / NAME),
        str(planted / f"{NAME}.zip"),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 volumes ingested; 6 rejected" in done.stdout
    logs = everything_written(ray_folder / "session_latest" / "logs")
    seen = {"stdout": done.stdout, "stderr": done.stderr, "corpus": everything_written(out), "logs of Ray": logs}
    # The command line itself names the folder of the patient, and Ray keeps it.
    seen = {place: text.replace(f"{planted}/{NAME}", "") for place, text in seen.items()}
    assert [(place, s) for place, text in seen.items() for s in SECRETS if s.lower() in text.lower()] == []
    assert "An old infarct on the left." in seen["corpus"]
    assert '"measurements": [{"name": "volume", "value": 41.0, "unit": "mm3", "finding": null' in seen["corpus"]
    assert '"classes": ["hemorrhage"]' in seen["corpus"]
    ledger = out.with_name("shards.rejects.jsonl")
    assert ledger.stat().st_mode & 0o077 == 0
    assert NUMBER in ledger.read_text()


def test_text_loses_what_the_header_says_of_person_place_and_day() -> None:
    [header, *_] = planted_series(rescalable(random_image(3, (5, 32, 24))), seed=3)
    cleaned = scrub({"findings": [REPORT]}, header_identifiers(header))["findings"][0]
    assert not any(secret.lower() in cleaned.lower() for secret in SECRETS)
    assert cleaned.endswith("An old infarct on the left.")
    assert cleaned.count(REMOVED) == 5


@pytest.mark.parametrize("layout", ["fastmri", "ismrmrd"])
def test_names_in_headers_of_raw_data_are_looked_for_too(tmp_path: Path, layout: str) -> None:
    kspace = coil_kspace(rescalable(random_image(4, (2, 16, 12))))
    if layout == "fastmri":
        save_fastmri(tmp_path / "a.h5", kspace, ismrmrd_header((2, 16, 12), (4.0, 1.0, 1.0)), patient_id=NUMBER)
    else:
        save_ismrmrd(tmp_path / "a.h5", kspace, oblique_affine())
    [record], _ = read_path(tmp_path / "a.h5")
    cleaned = scrub(f"Jane Doe, {'P-001' if layout == 'ismrmrd' else NUMBER}: an axial scan.", record.identifiers)
    assert cleaned == f"{REMOVED} {REMOVED}, {REMOVED}: an axial scan."


def test_words_that_only_contain_an_identifier_stay() -> None:
    assert scrub("The leeward side, Lee said.", ("Lee",)) == f"The leeward side, {REMOVED} said."
    assert scrub("text", ()) == "text"
