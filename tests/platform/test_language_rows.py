"""Ingest fills the description of a row where the annotation brings none, and leaves it alone where it does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnimri.models.scan import Scan
from omnimri.platform.corpus.anatomy import load_template
from omnimri.platform.corpus.corpus import CorpusConfig, write_patient
from omnimri.platform.corpus.patient import Patient
from omnimri.platform.data.formats.readers import WorkItem
from omnimri.platform.data.formats.records import SeriesRecord
from omnimri.platform.data.intake.annotations import Annotation, parse_sidecars
from omnimri.platform.data.intake.config import IngestConfig
from omnimri.platform.data.intake.former import kept_settings
from omnimri.platform.data.intake.ingest import result_settings
from omnimri.platform.data.intake.writer import PlannedItem, Row, make_row
from omnimri.platform.data.views import description_text
from omnimri.platform.language.description import Description

SHAPE = (6, 40, 36)


def row_of(annotation: Annotation | None, config: IngestConfig | None = None, **record: Any) -> Row:
    """The row of one small brain with an infarct on the patient's left."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[:, :, 1:-1] = 1
    labels[2:4, 10:20, 4:12] = 2
    scan = Scan(
        image=np.where(labels == 2, 300.0, 100.0).astype(np.float32), affine=np.diag([3.0, 3.0, 5.0, 1.0]),
        facts={"contrast": "T2w", "plane": "axial", "acquisition_type": "2D"},
    )  # fmt: skip
    series = SeriesRecord(
        source="a.nii", source_format="nifti", patient_key="p", study_key="s", series_key="t", scan=scan,
        label_map=labels, label_names={1: "white matter", 2: "old infarct"}, **record,
    )  # fmt: skip
    plan = PlannedItem(
        item=WorkItem(kind="nifti", container=".", names=("a.nii",), source="a.nii", num_bytes=0),
        dataset="x", licence=None, simulated=False, split="train", patient_id="p", study_id="s", series_id="t",
        person_id="q", item_id="i", annotation=annotation,
    )  # fmt: skip
    return make_row(series, plan, config or IngestConfig())


def test_a_row_without_description_gets_one_that_follows_from_it() -> None:
    values = row_of(None).values
    description = Description.model_validate_json(values["description"])
    assert description.image_modality_sequence.sequence == "2D T2-weighted"
    assert description.pathological_findings.structural_abnormalities == (
        "old infarct: 1 lesion, left, 30 mm along image axes, 7.2 mL, surrounded mostly by white matter"
    )
    assert description.tissue_signal_characteristics.abnormal_signal_patterns == (
        "old infarct hyperintense to white matter"
    )
    assert set(json.loads(values["description_origin"])) == {key for key, _ in description.filled()}
    assert "old infarct: 1 lesion, left" in description_text(values["description"])


def test_it_can_be_switched_off() -> None:
    values = row_of(None, IngestConfig(describe=False)).values
    assert values["description"] is None
    assert values["description_origin"] is None
    assert result_settings(IngestConfig()) != result_settings(IngestConfig(describe=False))
    assert kept_settings(IngestConfig()) != kept_settings(IngestConfig(describe=False))


def test_a_description_that_was_given_stays_to_the_letter() -> None:
    given = {"diagnostic_impression": {"suggestive_of": "tumour"}}
    annotation = Annotation(description=given, description_origin={"diagnostic_impression.suggestive_of": "report"})
    rows = [row_of(annotation, IngestConfig(describe=describe)) for describe in (True, False)]
    assert rows[0] == rows[1]
    assert json.loads(rows[0].values["description"]) == given


def test_the_impression_is_taken_from_a_report_without_what_identifies_the_patient() -> None:
    report = "Findings: Normal for Doe. Impression: Old infarct in Doe. No mass."
    values = row_of(Annotation(report=report), identifiers=("Doe",)).values
    description = Description.model_validate_json(values["description"])
    assert description.diagnostic_impression.suggestive_of == "Old infarct in [removed]"
    assert json.loads(values["description_origin"])["diagnostic_impression.suggestive_of"] == "report"
    assert "Doe" not in values["description"]


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patient(
        Patient.draw(0, 3), load_template(), tmp_path_factory.mktemp("corpus"), CorpusConfig(num_patients=1)
    )


def test_rows_of_the_built_in_corpus_are_the_same_with_it_and_without(patient: Path) -> None:
    sidecars, errors = parse_sidecars({"annotations.json": (patient / "annotations.json").read_bytes()}, "")
    assert not errors
    assert len(sidecars.series) == 4
    for name in sidecars.series:
        annotation = replace(sidecars.find((name,)), label_map="", boxes=None)
        assert annotation.description
        described, plain = (row_of(annotation, IngestConfig(describe=describe)) for describe in (True, False))
        assert described.digest == plain.digest
        assert described.values == plain.values
