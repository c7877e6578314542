"""Phantoms on disk, and an engine that knows their truth, for the tests of the evaluation.

The engine has the methods of `omnimri.models.engine.Engine` and no network: it answers from the truth of the row that
it recognises by its echo time, and like a model without eyes when the image is blank.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from omnimri.models import physics
from omnimri.models.boxes import Box
from omnimri.models.config import preset
from omnimri.models.decoding import TextAnswer
from omnimri.models.detection import Detection, read_detection
from omnimri.models.preprocess import Preprocess
from omnimri.models.scan import Scan
from omnimri.models.vocabulary import DIAGNOSES, LESION, TISSUES
from omnimri.platform.data.schema import SCHEMA, SCHEMA_VERSION, pack_array
from omnimri.platform.data.shards import Shards
from omnimri.platform.evaluation.baselines import reference_magnitude

SHAPE = (8, 48, 40)
LABELS = {1: TISSUES[0], 2: TISSUES[1], 3: TISSUES[2], 4: "old infarct"}
HEALTHY_REPORT = "No haemorrhage, mass or infarct."


def phantom_affine(tilt: float = 0.1) -> np.ndarray:
    """Axial, columns towards the patient's left, rows towards the back (as scanners store it), tilted about x."""
    rotation = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-4.0, -4.0, 6.0])
    affine[:3, 3] = 80, 96, -24
    return affine


def phantom_row(index: int, *, split: str, patient: int, kspace: bool = True) -> dict[str, Any]:
    """A head of three nested tissues; odd patients have an infarct on the patient's left, which is high columns."""
    rng = np.random.default_rng(index)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij")
    radius = np.sqrt(z**2 * 0.3 + (y / 0.85) ** 2 + (x / 0.8) ** 2)
    label_map = np.select([radius < 0.35, radius < 0.65, radius < 0.9], [1, 3, 2], default=0).astype(np.uint8)
    lesion = np.zeros(SHAPE, bool)
    if patient % 2:
        lesion[2:5, 20:26, 27:32] = True
        label_map[lesion] = 4
    clean = np.choose(label_map, [0.0, 0.2, 0.6, 1.0, 0.1]).astype(np.float32)
    coils = np.stack(
        [np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 3) for cx, cy in ((-1, -1), (-1, 1), (1, -1), (1, 1))], 1
    )
    coil_images = torch.from_numpy((clean[:, None] * coils).astype(np.complex64))
    noise = rng.standard_normal((2, *coil_images.shape), dtype=np.float32)
    measured = (physics.fft2c(coil_images).numpy() + 0.01 * (noise[0] + 1j * noise[1])).astype(np.complex64)
    image = physics.root_sum_of_squares(physics.ifft2c(torch.from_numpy(measured))).numpy()
    boxes = [{"label": "old infarct", "side": "left", "box_voxel": [2, 20, 27, 5, 26, 32]}] if patient % 2 else []
    return {
        "row_id": f"row-{index:03d}", "dataset": "phantom", "licence": "CC0", "simulated": True, "split": split,
        "patient_id": f"patient-{patient}", "study_id": f"study-{patient}", "series_id": f"series-{index}",
        "source_format": "nifti", "image": image, "affine": phantom_affine().ravel().tolist(),
        "spacing_mm": [6.0, 4.0, 4.0], "shape": list(SHAPE), "kspace": measured if kspace else None, "mask": None,
        "label_map": label_map, "label_names": list(LABELS.items()), "boxes": boxes,
        "classes": ["old infarct" if patient % 2 else "normal"],
        "report": "Old infarct in the left hemisphere. No haemorrhage." if patient % 2 else HEALTHY_REPORT,
        "contrast": ("T1w", "T2w")[index % 2], "plane": "axial", "body_part": "brain",
        "vendor": ("Siemens", "GE")[patient % 2], "field_strength_t": 3.0, "te_ms": float(index),
        "sex": "FM"[patient % 2], "age_years": 30.0 + 10 * patient,
    }  # fmt: skip


def write_phantoms(folder: Path, rows: Sequence[dict[str, Any]]) -> Shards:
    """Rows as an ingested corpus holds them."""
    (folder / "shards").mkdir(parents=True)
    packed = [
        {name: pack_array(value) if isinstance(value, np.ndarray) else value for name, value in row.items()}
        for row in rows
    ]
    with pq.ParquetWriter(folder / "shards" / "all.parquet", SCHEMA) as writer:
        for row in packed:
            full = {name: row.get(name) for name in SCHEMA.names}
            writer.write_table(pa.Table.from_pylist([full], schema=SCHEMA), row_group_size=1)
    entries = [_entry(row, group) for group, row in enumerate(rows)]
    manifest = {"schema_version": SCHEMA_VERSION, "dataset": "phantom", "rows": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Shards.open(folder)


def _entry(row: dict[str, Any], group: int) -> dict[str, Any]:
    scalars = {name: value for name, value in row.items() if not isinstance(value, (np.ndarray, list))}
    return scalars | {
        "file": "all.parquet", "row_group": group, "digest": row["row_id"], "shape": row["shape"],
        "spacing_mm": row["spacing_mm"], "has_kspace": row["kspace"] is not None,
        "fully_sampled": row["kspace"] is not None, "has_labels": True, "has_boxes": True, "has_classes": True,
        "has_report": True, "has_description": False, "flags": [],
    }  # fmt: skip


@dataclass(frozen=True)
class FakePrompt:
    task: str
    instruction: str
    row: dict[str, Any] | None
    """None for a blank image."""


def _answer(text: str) -> TextAnswer:
    return TextAnswer(text=text, token_ids=[], logprob=-1.0)


@dataclass(frozen=True)
class KnowingEngine:
    """Answers with the truth of a row, or with `garbled` text."""

    rows: dict[float, dict[str, Any]]
    garbled: bool = False
    version: str = "fake-1"
    detection: Detection = field(default_factory=Detection)
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(preset("tiny").inputs))

    def encode(self, scan: Scan, instruction: str, task: str) -> FakePrompt:
        blank = bool(np.ptp(scan.image) == 0)
        return FakePrompt(task, instruction, None if blank else self.rows[scan.facts["te_ms"]])

    def generate_text(self, prompt: FakePrompt, **_: Any) -> TextAnswer:
        if self.garbled:
            return _answer("Haemorrhage on the right. Haem")
        if prompt.task == "report":
            return _answer(f"<response>{prompt.row['report'] if prompt.row else HEALTHY_REPORT}</response>")
        return _answer(json.dumps(prompt.row["boxes"] if prompt.row else []))

    def sample_texts(self, prompt: FakePrompt, count: int, **_: Any) -> list[TextAnswer]:
        """The truth and, surer in a healthy head, a box in the corner."""
        corner = {"label": "old infarct", "side": "right", "box_voxel": [0, 0, 0, 1, 4, 4]}
        return [self.generate_text(prompt), _answer(json.dumps([corner]))][:count]

    def boxes(self, answer: TextAnswer, _: Scan) -> list[Box]:
        found = json.loads(answer.text)
        return [
            Box(**{**box, "box_voxel": tuple(box["box_voxel"])}, logprob=logprob, score=self.detection.score(logprob))
            for box in found
            for logprob in [-2.0 if box["side"] == "left" else -6.0]
        ]

    def candidates(self, answers: Sequence[TextAnswer], scan: Scan) -> list[Box]:
        readable = [answer for answer in answers if answer.text.startswith("[")]
        found = {box.box_voxel: box for answer in readable for box in self.boxes(answer, scan)}
        return sorted(found.values(), key=lambda box: -(box.score or 0.0))

    def score_choices(self, prompt: FakePrompt, choices: Sequence[str]) -> np.ndarray:
        probabilities = np.full(len(choices), 0.1)
        if prompt.row and not self.garbled:
            probabilities[DIAGNOSES.index(prompt.row["classes"][0])] = 0.6
        return probabilities / probabilities.sum()

    def reconstruct(self, scan: Scan, _: FakePrompt, **__: Any) -> SimpleNamespace:
        """The truth with an error that it knows, or for a garbled engine the image it was given and no doubt."""
        if self.garbled:
            return SimpleNamespace(image=scan.image.astype(np.complex64), uncertainty=np.zeros_like(scan.image))
        row = self.rows[scan.facts["te_ms"]]
        truth = reference_magnitude(replace(scan, image=row["image"], kspace=row["kspace"], mask=None))
        start = (len(truth) - len(scan.image)) // 2
        truth = truth[start : start + len(scan.image)]
        return SimpleNamespace(image=(truth * 1.001).astype(np.complex64), uncertainty=0.001 * truth)

    def segment(self, scan: Scan, prompts: dict[str, FakePrompt], **_: Any) -> SimpleNamespace:
        masks = {name: self._mask(scan, name, prompt) for name, prompt in prompts.items()}
        return SimpleNamespace(
            masks=masks, probabilities={name: mask.astype(np.float32) for name, mask in masks.items()}
        )

    def _mask(self, scan: Scan, name: str, prompt: FakePrompt) -> np.ndarray:
        if prompt.row is None or self.garbled:
            return np.zeros(scan.image.shape, bool)
        value = 4 if name == LESION else 1 + TISSUES.index(name)
        return prompt.row["label_map"] == value


@dataclass(frozen=True)
class KnowingLoader:
    """Stands in for `Engine.load`."""

    rows: Sequence[dict[str, Any]]
    garbled: bool = False

    def __call__(self, folder: Path) -> KnowingEngine:
        engine = KnowingEngine({row["te_ms"]: row for row in self.rows}, detection=read_detection(folder))
        return replace(engine, garbled=self.garbled)
