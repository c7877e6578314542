"""The five-level description of a volume, with the paper's keys (arXiv 2508.17524, Figure 2) written in one place.

Every field is a short phrase; an empty one is unknown, which is not the same as absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Origin = Literal["header", "label", "report", "generated"]
"""Where a field comes from: facts and measures of the row; label maps, boxes and classes; the report; a model."""


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, json_schema_serialization_defaults_required=True
    )


class ImageModalitySequence(_Strict):
    """What was acquired, and how well."""

    modality: str = ""
    sequence: str = ""
    plane: str = ""
    acquisition_quality_or_artifacts: str = ""


class VisibleAnatomicalStructures(_Strict):
    """What of the body is seen."""

    bony_structures: str = ""
    articular_structures: str = ""
    soft_tissues_and_musculature: str = ""
    organs_or_central_structures: str = ""
    neurovascular_or_connective_structures: str = ""
    spaces_or_cavities_or_joint_compartments: str = ""


class TissueSignalCharacteristics(_Strict):
    """How tissue shows."""

    normal_signal_appearance: str = ""
    abnormal_signal_patterns: str = ""
    symmetry_and_structural_integrity: str = ""


class PathologicalFindings(_Strict):
    """What is not as it should be."""

    structural_abnormalities: str = ""
    signal_abnormalities_or_fluid_collections: str = ""
    masses_or_suspicious_lesions: str = ""


class DiagnosticImpression(_Strict):
    """What it means."""

    suggestive_of: str = ""
    severity_or_grading: str = ""
    recommendation: str = ""


class Description(_Strict):
    """The five levels, in the paper's order."""

    image_modality_sequence: ImageModalitySequence = ImageModalitySequence()
    visible_anatomical_structures: VisibleAnatomicalStructures = VisibleAnatomicalStructures()
    tissue_signal_characteristics: TissueSignalCharacteristics = TissueSignalCharacteristics()
    pathological_findings: PathologicalFindings = PathologicalFindings()
    diagnostic_impression: DiagnosticImpression = DiagnosticImpression()

    @classmethod
    def from_fields(cls, fields: Mapping[str, str]) -> Description:
        """Inverse of `filled`, from `level.key` to phrase.

        Raises:
            pydantic.ValidationError: A ValueError: a key is none of the paper's.
        """
        levels: dict[str, dict[str, str]] = {}
        for field, phrase in fields.items():
            level, _, key = field.partition(".")
            levels.setdefault(level, {})[key] = phrase
        return cls.model_validate(levels)

    def filled(self) -> Iterator[tuple[str, str]]:
        """`level.key` and phrase of every field that is known, in the paper's order."""
        for level, fields in self.model_dump().items():
            for key, phrase in fields.items():
                if phrase:
                    yield f"{level}.{key}", phrase

    def answer(self) -> str:
        """Every key in the paper's order on one line, as `grammars.json_grammar` of the schema decodes it."""
        return json.dumps(self.model_dump(), ensure_ascii=False)


def description_schema() -> dict[str, Any]:
    """JSON schema in which every key is required and none may be added, for constrained generation."""
    return Description.model_json_schema(mode="serialization")
