"""One simulated patient: who is scanned on what, and everything that is true of the head."""

# Z Y X voxels of the acquisition

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omnimri.models.vocabulary import DIAGNOSES, TISSUES
from omnimri.platform.corpus.acquisition import Receiver, draw_receiver, draw_tissue_scale
from omnimri.platform.corpus.anatomy import CLASSES, Build, Template, draw_build, draw_head
from omnimri.platform.corpus.geometry import Grid, draw_geometry
from omnimri.platform.corpus.lesions import LesionPlan, draw_lesions, plan_lesions
from omnimri.platform.corpus.scanners import Protocol, Scanner, draw_protocols, draw_scanner
from omnimri.platform.corpus.truth import Lesion, find_lesions, label_map

_AGES = {
    "normal": (18, 85),
    "old infarct": (45, 88),
    "demyelinating disease": (20, 55),
    "oedematous mass": (30, 80),
    "haemorrhage": (40, 88),
}
"""Range of ages by diagnosis."""

# Streams of random numbers of one patient; what is drawn in one does not disturb the others.
_WHO, _ORDER, _HEAD, _SCAN, SERIES, WORDS = range(6)


@dataclass(frozen=True, kw_only=True)
class Patient:
    """Who is scanned on what, drawn before anything is computed."""

    index: int
    seed: int
    sex: str
    age_years: int
    scanner: Scanner
    protocols: dict[str, Protocol]
    diagnosis: str

    @property
    def participant_id(self) -> str:
        """BIDS name."""
        return f"sub-{self.index + 1:04d}"

    def rng(self, stream: int, *names: int) -> np.random.Generator:
        """This patient's own generator for one purpose."""
        return np.random.default_rng([self.seed, self.index, stream, *names])

    @classmethod
    def draw(cls, index: int, seed: int) -> Patient:
        """The i-th patient of a seed; every five patients in a row from a multiple of five hold every diagnosis."""
        num = len(DIAGNOSES)
        order = np.random.default_rng([seed, index // num, _ORDER]).permutation(num)
        diagnosis = DIAGNOSES[order[index % num]]
        rng = np.random.default_rng([seed, index, _WHO])
        low, high = _AGES[diagnosis]
        sex, age_years, scanner = str(rng.choice(("F", "M"))), int(rng.integers(low, high + 1)), draw_scanner(rng)
        return cls(
            index=index, seed=seed, sex=sex, age_years=age_years, scanner=scanner,
            protocols=draw_protocols(scanner, rng), diagnosis=diagnosis,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A patient's head as the slices see it."""

    patient: Patient
    build: Build
    plan: LesionPlan
    grid: Grid
    shares: dict[str, np.ndarray]
    """Tissue class or part of a lesion to its share `(Z, Y, X)` of each voxel, averaged through the slice."""
    labels: np.ndarray
    """Uint8 `(Z, Y, X)`, values of `truth.LABEL_NAMES`."""
    lesions: list[Lesion]
    receiver: Receiver
    tissue_scale: dict[str, float]


def simulate(
    patient: Patient, template: Template, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float],
    num_coils: int,
) -> Simulated:  # fmt: skip
    """Draw a patient's head, lesions, slices and coils.

    Args:
        patient: Who.
        template: The unwarped head.
        shape: `(Z, Y, X)` of the acquisition.
        spacing_mm: `(z, y, x)`.
        num_coils: Receive coils.
    """
    rng = patient.rng(_HEAD)
    grid, pose = draw_geometry(rng, shape, spacing_mm, patient.sex)
    build = draw_build(rng, patient.age_years)
    plan = plan_lesions(template, patient.diagnosis, rng)
    head = draw_head(template, build, pose, grid, rng, plan.push)
    drawn = draw_lesions(plan, head, grid, rng)
    taken = np.clip(sum(drawn.parts.values(), np.zeros(grid.fine_shape, np.float32)), 0, 1)
    tissues = grid.average(head.tissues * (1 - taken))
    # Where a lesion only stains tissue (the halo of a bleed), the label stays that of the tissue.
    healthy = grid.average(head.tissues[: len(TISSUES)])
    labels = label_map(healthy, grid.average(drawn.labelled(grid.fine_shape)), drawn.finding)
    lesions = find_lesions(labels, grid.average(head.mni_mm), grid.spacing_mm)
    parts = {name: grid.average(share) for name, share in drawn.parts.items()}
    scan_rng = patient.rng(_SCAN)
    return Simulated(
        patient=patient, build=build, plan=plan, grid=grid, shares=dict(zip(CLASSES, tissues, strict=True)) | parts,
        labels=labels, lesions=lesions, tissue_scale=draw_tissue_scale(scan_rng),
        receiver=draw_receiver(grid, num_coils, patient.scanner.field_strength_t, scan_rng),
    )  # fmt: skip
