"""The built-in corpus: simulated patients, written as the files that scanners and data sets give.

Simulated from one averaged brain (MNI152 as nilearn ships it): it shows that the platform works, not how well a model
does on patients.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
from ray.data import ActorPoolStrategy

from omnimri.models.vocabulary import DIAGNOSES
from omnimri.platform.corpus.acquisition import LABEL_NAMES, Grid, Sampled, ideal_image, prescribe, sample, scan
from omnimri.platform.corpus.anatomy import Template, draw_head, load_template
from omnimri.platform.corpus.language import describe, find_lesions, write_report
from omnimri.platform.corpus.lesions import draw_lesions
from omnimri.platform.corpus.signal import PROTOCOLS, Protocol
from omnimri.platform.corpus.writers import WRITERS, Scanner, Series, save_nifti

logger = logging.getLogger(__name__)

CORPUS_VERSION = 1
NAME = "omnimri-simulated-brain"
NOTICE = "Simulated from one averaged brain (MNI152). Not evidence of clinical performance."
LICENCE = "Apache-2.0; anatomy: ICBM152 2009a, copyright McConnell Brain Imaging Centre, MNI, McGill University"

SCANNERS = (
    Scanner(manufacturer="SIEMENS", model="MAGNETOM Skyra", field_strength_t=3.0),
    Scanner(manufacturer="Siemens Healthineers", model="MAGNETOM Aera", field_strength_t=1.5),
    Scanner(manufacturer="GE MEDICAL SYSTEMS", model="DISCOVERY MR750", field_strength_t=3.0),
    Scanner(manufacturer="GE MEDICAL SYSTEMS", model="SIGNA Artist", field_strength_t=1.5),
    Scanner(manufacturer="Philips Medical Systems", model="Ingenia", field_strength_t=3.0),
    Scanner(manufacturer="Philips", model="Achieva", field_strength_t=1.5),
)


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
    """Slice thickness, Y, X."""
    num_coils: int = 4
    snr_3t: float = 30.0
    """Signal to noise of the combined image at 3 T; at 1.5 T it is two thirds of it."""

    def __post_init__(self) -> None:
        if self.num_patients < 1 or self.first < 0:
            raise ValueError(f"CorpusConfig: num_patients >= 1 and first >= 0 expected, found {self}.")
        if self.num_coils < 1 or self.num_slices < 1 or min(self.matrix) < 16:
            raise ValueError("CorpusConfig: at least one coil, one slice and a 16 x 16 matrix are needed.")


@dataclass(frozen=True)
class CorpusSummary:
    """What was written."""

    out: Path
    participants: list[dict[str, Any]]
    """One row per patient, as in participants.tsv."""
    seconds: float

    @property
    def num_series(self) -> int:
        return len(self.participants) * len(PROTOCOLS)


@dataclass(frozen=True, kw_only=True)
class Patient:
    """Who is scanned on what, drawn before anything is computed."""

    index: int
    participant_id: str
    sex: str
    age_years: int
    scanner: Scanner
    diagnosis: str

    @classmethod
    def draw(cls, index: int, seed: int) -> Patient:
        """The i-th patient of a seed; every run of five patients holds every diagnosis once."""
        rng = np.random.default_rng([seed, index, 0])
        order = np.random.default_rng([seed, index // len(DIAGNOSES), 1]).permutation(len(DIAGNOSES))
        return cls(
            index=index,
            participant_id=f"sub-{index + 1:04d}",
            sex=("F", "M")[int(rng.integers(2))],
            age_years=int(rng.integers(20, 86)),
            scanner=SCANNERS[int(rng.integers(len(SCANNERS)))],
            diagnosis=DIAGNOSES[order[index % len(DIAGNOSES)]],
        )

    def as_row(self) -> dict[str, Any]:
        return {
            "participant_id": self.participant_id,
            "sex": self.sex,
            "age": self.age_years,
            "vendor": self.scanner.manufacturer,
            "field_strength_t": self.scanner.field_strength_t,
            "diagnosis": self.diagnosis,
        }


class PatientWriter:
    """Writes patients; an actor of Ray Data keeps one, so that the template is read once per process."""

    def __init__(self, out: str, config: CorpusConfig) -> None:
        self.out, self.config, self.template = Path(out), config, load_template()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = [write_patient(int(index), self.template, self.out, self.config) for index in batch["id"]]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]} | {"index": batch["id"]}


def write_patient(index: int, template: Template, out: Path, config: CorpusConfig) -> dict[str, Any]:
    """Simulate one patient and write its four series, label maps and annotations; returns its row of the table."""
    patient = Patient.draw(index, config.seed)
    rng = np.random.default_rng([config.seed, index, 2])
    head = draw_head(template, rng, patient.age_years)
    lesions = draw_lesions(head, patient.diagnosis, rng)
    grid = prescribe(rng, num_slices=config.num_slices, matrix=config.matrix, spacing_mm=config.spacing_mm)
    sampled = sample(head, lesions, grid)
    folder = out / patient.participant_id
    formats = list(WRITERS)
    series: dict[str, Any] = {}
    for number, protocol in enumerate(PROTOCOLS.values()):
        written = _write_series(patient, number, protocol, grid, sampled, config)
        path = WRITERS[formats[(number + index) % len(formats)]](written, folder)
        labels = folder / "labels" / f"{patient.participant_id}_{protocol.contrast}_dseg.nii.gz"
        save_nifti(sampled.label_map, grid.affine, labels)
        annotation = _annotate(patient, number, protocol, sampled, grid, config)
        series[str(path.relative_to(folder))] = {"label_map": str(labels.relative_to(folder)), **annotation}
    who = {"participant_id": patient.participant_id, "sex": patient.sex, "age_years": patient.age_years}
    (folder / "annotations.json").write_text(json.dumps({"patient": who, "series": series}, indent=1))
    return patient.as_row()


def _write_series(
    patient: Patient, number: int, protocol: Protocol, grid: Grid, sampled: Sampled, config: CorpusConfig
) -> Series:
    field = patient.scanner.field_strength_t
    rng = np.random.default_rng([config.seed, patient.index, 3, number])
    snr = config.snr_3t * (1.0 if field > 2 else 2 / 3)
    acquisition = scan(ideal_image(sampled, protocol, field), rng, num_coils=config.num_coils, snr=snr)
    return Series(
        participant_id=patient.participant_id,
        uid_seed=f"{NAME}/{config.seed}/{patient.index}",
        sex=patient.sex,
        age_years=patient.age_years,
        scanner=patient.scanner,
        protocol=protocol,
        number=number + 1,
        grid=grid,
        acquisition=acquisition,
    )


def _annotate(
    patient: Patient, number: int, protocol: Protocol, sampled: Sampled, grid: Grid, config: CorpusConfig
) -> dict[str, Any]:
    """The truth about one series, as annotations.json holds it."""
    lesions = find_lesions(sampled, grid)
    rng = np.random.default_rng([config.seed, patient.index, 4, number])
    description, origin = describe(lesions, protocol, patient.scanner.field_strength_t)
    return {
        "label_names": {str(value): name for value, name in LABEL_NAMES.items()},
        "boxes": [lesion.as_box() for lesion in lesions],
        "classes": [patient.diagnosis],
        "report": write_report(lesions, protocol, patient.scanner.field_strength_t, rng),
        "description": description,
        "description_origin": origin,
    }


def write_corpus(out: Path, config: CorpusConfig) -> CorpusSummary:
    """Write the whole corpus through Ray Data; the folder is complete when `dataset.json` stands in it.

    Raises:
        ValueError: If the folder already holds a corpus of other settings.
    """
    out = out.absolute()
    card = {
        "name": NAME,
        "licence": LICENCE,
        "simulated": True,
        "notice": NOTICE,
        "version": CORPUS_VERSION,
        "code": _code_digest(),
        **asdict(config),
    }
    card = json.loads(json.dumps(card))
    if (out / "dataset.json").is_file():
        if json.loads((out / "dataset.json").read_text()) != card:
            raise ValueError(f"{out} holds a corpus of other settings; choose another folder or delete it.")
        return CorpusSummary(out, _read_table(out / "participants.tsv"), 0.0)
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    workers = max(1, min(config.num_patients, int(ray.cluster_resources().get("CPU", 1)) // 2))
    rows = (
        ray.data.from_items([{"id": config.first + i} for i in range(config.num_patients)],
                            override_num_blocks=config.num_patients)
        .map_batches(PatientWriter, fn_constructor_args=(str(out), config), batch_size=1, num_cpus=1,
                     compute=ActorPoolStrategy(size=workers))
        .take_all()
    )  # fmt: skip
    participants = [{k: v for k, v in row.items() if k != "index"} for row in sorted(rows, key=lambda r: r["index"])]
    _write_table(participants, out / "participants.tsv")
    (out / "dataset.json").write_text(json.dumps(card, indent=1))
    return CorpusSummary(out, participants, time.monotonic() - start)


def _code_digest() -> str:
    """Of the sources that make the corpus: another code, another corpus."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _write_table(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def _read_table(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))
