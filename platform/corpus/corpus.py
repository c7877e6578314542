"""The built-in corpus: simulated patients, written as the files that scanners and data sets give.

Simulated from one averaged brain (MNI152 as nilearn ships it): it shows that the platform works, not how well a model
does on patients.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

from omnimri.models.vocabulary import CONTRASTS
from omnimri.platform.cluster import quiet_ray_data
from omnimri.platform.corpus.acquisition import Received, ideal_image, receive, relaxation
from omnimri.platform.corpus.anatomy import Template, load_template
from omnimri.platform.corpus.language import Case, describe, write_report
from omnimri.platform.corpus.patient import SERIES, WORDS, Patient, Simulated, simulate
from omnimri.platform.corpus.series import SeriesHeader
from omnimri.platform.corpus.signal import signal
from omnimri.platform.corpus.truth import LABEL_NAMES, Lesion
from omnimri.platform.corpus.writers import FORMATS, Written, save_nifti, write_series

logger = logging.getLogger(__name__)

CORPUS_VERSION = 1
NAME = "omnimri-simulated-brain"
NOTICE = "Simulated from one averaged brain (MNI152). Not evidence of clinical performance."
LICENCE = "Apache-2.0; anatomy from ICBM 152 2009a, copyright 1993-2009 Louis Collins, McConnell Brain Imaging Centre"


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """How many patients, and how they are scanned."""

    num_patients: int
    first: int = 0
    """Index of the first patient: another range of the same seed holds patients that the first has not."""
    seed: int = 0
    """Patient i of a seed is the same in a corpus of any size."""
    num_slices: int = 24
    matrix: tuple[int, int] = (112, 96)
    """In-plane voxels, Y and X; phase encoding along X."""
    spacing_mm: tuple[float, float, float] = (6.0, 2.0, 2.0)
    """Slice thickness, which is also the slice distance, and in-plane voxel edges y, x."""
    num_coils: int = 4

    def __post_init__(self) -> None:
        if self.num_patients < 1 or self.first < 0:
            raise ValueError(
                "CorpusConfig: num_patients must be at least 1 and first at least 0, "
                f"found {self.num_patients} and {self.first}."
            )
        if self.num_coils < 1 or self.num_slices < 1 or min(self.matrix) < 16 or any(n % 2 for n in self.matrix):
            raise ValueError(
                f"CorpusConfig: found num_coils={self.num_coils}, num_slices={self.num_slices}, matrix={self.matrix}; "
                "expected at least one coil, one slice and an even matrix of 16 x 16 or more."
            )
        if min(self.spacing_mm) <= 0:
            raise ValueError(f"CorpusConfig.spacing_mm must be positive, found {self.spacing_mm}.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(Z, Y, X)`."""
        return self.num_slices, *self.matrix


@dataclass(frozen=True)
class CorpusSummary:
    """What stands in the folder afterwards."""

    out: Path
    participants: list[dict[str, Any]]
    """One row per patient, as in participants.tsv."""
    num_written: int
    """Patients made now; the others were there."""
    seconds: float

    @property
    def num_series(self) -> int:
        """One for each contrast of each patient."""
        return len(self.participants) * len(CONTRASTS)

    def counts(self, column: str) -> dict[Any, int]:
        """Patients by a column of participants.tsv."""
        return dict(sorted(Counter(row[column] for row in self.participants).items()))


class PatientWriter:
    """Writes patients; an actor of Ray Data keeps one, so that the template is read once per process."""

    def __init__(self, out: str, config: CorpusConfig) -> None:
        self._out, self._config, self._template = Path(out), config, load_template()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write the patient with the index `row["index"]`."""
        start = time.monotonic()
        path = write_patient(
            Patient.draw(int(row["index"]), self._config.seed), self._template, self._out, self._config
        )
        return {"participant_id": path.name, "seconds": time.monotonic() - start}


def write_corpus(out: Path, config: CorpusConfig) -> CorpusSummary:
    """Make a corpus folder, or complete one: patients that are there already are kept.

    Ray must be running. On a cluster, `out` lies on a file system that all nodes share.

    Args:
        out: Folder; made if needed.
        config: What is in it.

    Raises:
        ValueError: If the folder holds a corpus with other settings, or something else.
    """
    start = time.monotonic()
    out = Path(out).resolve()
    _claim(out, config)
    patients = [Patient.draw(index, config.seed) for index in range(config.first, config.first + config.num_patients)]
    missing = [patient.index for patient in patients if not (out / patient.participant_id).is_dir()]
    for done, row in enumerate(_stream(missing, out, config), start=1):
        if done % max(1, len(missing) // 10) == 0:
            logger.info("%d of %d patients written (%s in %.1f s)", done, len(missing), row["participant_id"],
                        row["seconds"])  # fmt: skip
    participants = [_participant(patient) for patient in patients]
    _write_table(participants, out / "participants.tsv")
    return CorpusSummary(out, participants, len(missing), time.monotonic() - start)


def _stream(indices: list[int], out: Path, config: CorpusConfig) -> Iterator[dict[str, Any]]:
    """Write patients on all CPUs of the cluster; yields a small row for each that is done."""
    if not indices:
        return
    # A local Ray has more logical CPUs than there are cores; the template and a patient take 0.5 GB a worker.
    num_cores = (os.cpu_count() or 1) * sum(node["Alive"] for node in ray.nodes())
    workers = max(1, min(len(indices), int(ray.cluster_resources().get("CPU", 1)) // 2, num_cores))
    with quiet_ray_data():
        dataset = ray.data.from_items([{"index": index} for index in indices], override_num_blocks=len(indices))
        written = dataset.map(
            PatientWriter,
            fn_constructor_args=(str(out), config),
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
        )
        yield from written.iter_rows()


def _claim(out: Path, config: CorpusConfig) -> None:
    """Write the card of a new corpus, or check that the one that is there is of the same make."""
    card = _card(config)
    path = out / "dataset.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if found.get("recipe") != card["recipe"]:
            raise ValueError(
                f"{out} holds a corpus with other settings ({found.get('recipe')}); asked for {card['recipe']}. "
                "Name another folder, or remove that one."
            )
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} holds files that are no corpus. Name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    _write_new(path, json.dumps(card, indent=1))


def _write_new(path: Path, text: str) -> None:
    """Write a file unless it says that already: ingest would take a newer file for another corpus."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _card(config: CorpusConfig) -> dict[str, Any]:
    """The contents of dataset.json; `recipe` is what decides how patient i looks."""
    recipe = {name: value for name, value in asdict(config).items() if name not in ("num_patients", "first")}
    return {
        "name": NAME,
        "licence": LICENCE,
        "simulated": True,
        "notice": NOTICE,
        "version": CORPUS_VERSION,
        "seed": config.seed,
        "num_patients": config.num_patients,
        "first": config.first,
        "spacing_mm": list(config.spacing_mm),
        "body_part": "brain",
        "recipe": json.loads(json.dumps(recipe)) | {"code": _code_digest()},
    }


def _code_digest() -> str:
    """Of the sources that make the corpus: another code, another corpus."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def write_patient(patient: Patient, template: Template, out: Path, config: CorpusConfig) -> Path:
    """Simulate one patient and write its series, label maps and annotations; the folder appears when it is complete."""
    simulated = simulate(patient, template, config.shape, config.spacing_mm, config.num_coils)
    folder, partial = out / patient.participant_id, out / f".{patient.participant_id}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    series = dict(_write_one(simulated, number, partial) for number in range(len(CONTRASTS)))
    who = {"participant_id": patient.participant_id, "sex": patient.sex, "age_years": patient.age_years}
    (partial / "annotations.json").write_text(json.dumps({"patient": who, "series": series}, indent=1))
    return partial.rename(folder)


def _write_one(simulated: Simulated, number: int, folder: Path) -> tuple[str, dict[str, Any]]:
    """Write one contrast; returns its path below the folder and its annotation."""
    patient = simulated.patient
    protocol = patient.protocols[CONTRASTS[number]]
    field, scale = patient.scanner.field_strength_t, simulated.tissue_scale
    rng = patient.rng(SERIES, number)
    image = ideal_image(simulated.shares, protocol.sequence, field, scale)
    white = simulated.shares["white matter"]
    received = receive(image, white, simulated.receiver, simulated.grid, patient.scanner, rng)
    header = SeriesHeader(
        participant_id=patient.participant_id, uid_seed=f"{NAME}/{CORPUS_VERSION}/{patient.seed}/{patient.index}",
        sex=patient.sex, age_years=patient.age_years, scanner=patient.scanner, protocol=protocol, number=number + 1,
        spacing_mm=simulated.grid.spacing_mm,
    )  # fmt: skip
    source_format = list(FORMATS)[(number + patient.index) % len(FORMATS)]
    written = write_series(source_format, header, received, simulated.grid, folder, rng)
    labels = folder / "labels" / f"{patient.participant_id}_{protocol.contrast}_dseg.nii.gz"
    save_nifti(simulated.labels[:, ::-1] if written.rows_turned else simulated.labels, written.affine, labels)
    annotation = {"label_map": labels.relative_to(folder).as_posix(), **_annotate(simulated, number, received, written)}
    return written.path.relative_to(folder).as_posix(), annotation


def _annotate(simulated: Simulated, number: int, received: Received, written: Written) -> dict[str, Any]:
    """The truth about one series, as annotations.json holds it."""
    patient = simulated.patient
    case = _case(simulated, CONTRASTS[number], received.snr)
    rng = patient.rng(WORDS, number)
    report = write_report(case, rng)
    description, origin = describe(case, rng)
    return {
        "label_names": {str(value): name for value, name in LABEL_NAMES.items()},
        "boxes": [_box(lesion, simulated.labels.shape[1], written.rows_turned) for lesion in simulated.lesions],
        "classes": [patient.diagnosis],
        "report": report,
        "description": description.model_dump(),
        "description_origin": origin,
    }


def _box(lesion: Lesion, num_rows: int, rows_turned: bool) -> dict[str, Any]:
    """A lesion's box on the grid of its file."""
    z1, y1, x1, z2, y2, x2 = lesion.box_voxel
    if rows_turned:
        y1, y2 = num_rows - y2, num_rows - y1
    return {"label": lesion.label, "side": lesion.side, "box_voxel": [z1, y1, x1, z2, y2, x2]}


def _case(simulated: Simulated, contrast: str, snr: float) -> Case:
    """What may be said of one series."""
    patient = simulated.patient
    field, sequence = patient.scanner.field_strength_t, patient.protocols[contrast].sequence
    value = {name: signal(relaxation(name, field, simulated.tissue_scale), sequence) for name in simulated.shares}
    return Case(
        diagnosis=patient.diagnosis, lesions=simulated.lesions, contrast=contrast, sequence_kind=sequence.kind,
        field_strength_t=field, brightness={name: v / value["white matter"] for name, v in value.items()}, snr=snr,
        has_wide_ventricles=simulated.build.is_wide, pushes_brain=simulated.plan.push is not None,
    )  # fmt: skip


def _participant(patient: Patient) -> dict[str, Any]:
    return {
        "participant_id": patient.participant_id,
        "sex": patient.sex,
        "age": patient.age_years,
        "vendor": patient.scanner.vendor,
        "field_strength_t": patient.scanner.field_strength_t,
        "diagnosis": patient.diagnosis,
    }


def _write_table(rows: list[dict[str, Any]], path: Path) -> None:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write_new(path, table.getvalue())
