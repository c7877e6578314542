"""The typed description: the paper's keys, its JSON, and the schema for constrained generation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from omnimri.platform.language.description import Description, description_schema

ROOT = Path(__file__).parents[2]

PAPER = {
    "image_modality_sequence": ["modality", "sequence", "plane", "acquisition_quality_or_artifacts"],
    "visible_anatomical_structures": [
        "bony_structures", "articular_structures", "soft_tissues_and_musculature", "organs_or_central_structures",
        "neurovascular_or_connective_structures", "spaces_or_cavities_or_joint_compartments",
    ],
    "tissue_signal_characteristics": [
        "normal_signal_appearance", "abnormal_signal_patterns", "symmetry_and_structural_integrity",
    ],
    "pathological_findings": [
        "structural_abnormalities", "signal_abnormalities_or_fluid_collections", "masses_or_suspicious_lesions",
    ],
    "diagnostic_impression": ["suggestive_of", "severity_or_grading", "recommendation"],
}  # fmt: skip
"""Figure 2 of arXiv 2508.17524, typed off the paper."""


def test_keys_are_those_of_the_paper_in_its_order() -> None:
    assert {level: list(fields) for level, fields in Description().model_dump().items()} == PAPER
    assert list(Description().model_dump()) == list(PAPER)


def test_the_row_gives_back_what_it_was_given() -> None:
    fields = {"diagnostic_impression.suggestive_of": "œdème, grade ½", "image_modality_sequence.plane": "axial"}
    description = Description.from_fields(fields)
    assert Description.model_validate_json(description.model_dump_json()) == description
    assert dict(description.filled()) == fields
    assert [key for key, _ in description.filled()] == sorted(fields, reverse=True)


def test_rows_with_some_of_the_keys_are_read_and_what_is_missing_is_unknown() -> None:
    description = Description.model_validate_json(
        json.dumps({"diagnostic_impression": {"suggestive_of": "old infarct"}})
    )
    assert dict(description.filled()) == {"diagnostic_impression.suggestive_of": "old infarct"}


@pytest.mark.parametrize(
    "row",
    [
        {"diagnosis": {}},
        {"diagnostic_impression": {"suggestive": "x"}},
        {"diagnostic_impression": {"suggestive_of": None}},
        {"diagnostic_impression": {"suggestive_of": 3}},
        {"diagnostic_impression": "x"},
    ],
)
def test_other_keys_and_values_are_refused(row: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="diagnos"):
        Description.model_validate_json(json.dumps(row))


def test_the_schema_accepts_whole_descriptions_only() -> None:
    schema = description_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    valid = Description().model_dump()
    jsonschema.validate(valid, schema)
    for level, keys in PAPER.items():
        for key in keys:
            without = {**valid, level: {k: v for k, v in valid[level].items() if k != key}}
            with pytest.raises(jsonschema.ValidationError, match="required"):
                jsonschema.validate(without, schema)
    with pytest.raises(jsonschema.ValidationError, match="Additional"):
        jsonschema.validate({**valid, "more": ""}, schema)


def test_no_other_file_declares_the_keys() -> None:
    """A key may be used by its name; a list of them stands in one file."""
    others = [path for path in (ROOT / "platform").rglob("*.py") if path.name != "description.py"]
    for path in others:
        quoted = set(re.findall(r'"(\w+)"', path.read_text(encoding="utf-8")))
        assert not set(PAPER) <= quoted, path
