"""The HTTP contract: what a request may say, and the one JSON shape of every answer."""

from __future__ import annotations

from typing import Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from omnimri.models.vocabulary import RESEARCH_NOTICE, STRUCTURES, TISSUES

Task = Literal["reconstruct", "segment", "detect", "diagnose", "report"]


class ModelName(BaseModel):
    """Which model answered."""

    name: str
    version: str = Field(description="Checkpoint the weights came from.")


class Finding(BaseModel):
    """One detected abnormality."""

    label: str
    side: str | None = Field(None, description="left, right or midline of the patient.")
    box_voxel: list[int] = Field(description="[z1, y1, x1, z2, y2, x2] on the native grid, half-open.")
    box_mm: list[float] = Field(
        description="[x_min, y_min, z_min, x_max, y_max, z_max], RAS mm, the upright hull of the voxel box."
    )
    score: float = Field(description="Probability that the box is right, 0 to 1.")
    calibrated: bool = Field(
        False, description="Whether the score was calibrated on held-out patients; else that of the box's tokens."
    )


class Measurement(BaseModel):
    """One number with its unit."""

    name: str
    label: str | None = Field(None, description="The structure or diagnosis that the number belongs to.")
    label_value: int | None = Field(None, description="Its value in masks.nii.gz.")
    value: float
    unit: str = Field(description="mL, mm, or 1 for a plain ratio.")


class ArtifactLink(BaseModel):
    """A file that can be downloaded."""

    name: str
    media_type: str
    href: str


class Preprocessing(BaseModel):
    """What was done to the input before the model saw it."""

    version: str
    steps: list[str]


class Answer(BaseModel):
    """The answer of every task route."""

    id: str
    task: Task
    instruction: str
    model: ModelName
    text: str | None = None
    findings: list[Finding] | None = None
    measurements: list[Measurement] | None = None
    artifacts: list[ArtifactLink] = []
    warnings: list[str] = []
    preprocessing: Preprocessing
    notice: str = RESEARCH_NOTICE


class ErrorBody(BaseModel):
    """What went wrong."""

    code: str
    message: str = Field(description="One sentence for a person.")


class ErrorAnswer(BaseModel):
    """The answer of every route that could not do what was asked."""

    error: ErrorBody


class ModelCard(BaseModel):
    """One entry of /v1/models, in the field names OpenAI clients expect plus our own."""

    id: str
    object: Literal["model"] = "model"
    owned_by: str = "omnimri"
    version: str
    tasks: list[Task]
    text_backend: str
    preprocessing: Preprocessing
    notice: str = RESEARCH_NOTICE


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Readiness(BaseModel):
    """Whether every deployment is ready."""

    ready: bool
    deployments: dict[str, str] = Field(description="Deployment to its state as Ray Serve reports it.")


class UploadForm(BaseModel):
    """Fields of every multipart request."""

    model_config = ConfigDict(extra="forbid")

    file: list[UploadFile] = Field(
        min_length=1, description="A zip of a DICOM series, DICOM files, a NIfTI, or a k-space HDF5 (fastMRI, ISMRMRD)."
    )
    instruction: str | None = Field(
        None, min_length=1, max_length=2000, description="Asked in your own words; default: the task's usual sentence."
    )
    series: str | None = Field(
        None, max_length=64, description="Which series to use when the upload holds several: 1, 2, ... or a contrast."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything random.")


class ReconstructForm(UploadForm):
    """Reconstruction from k-space."""

    num_steps: int = Field(1, ge=1, le=8, description="Steps of the diffusion bridge.")
    num_samples: int = Field(1, ge=1, le=8, description="Samples; more than one adds an uncertainty map.")
    acceleration: int | None = Field(
        None, ge=2, le=16, description="Undersample a fully sampled file by this factor first, to try the model out."
    )


class SegmentForm(UploadForm):
    """Segmentation."""

    structures: str | None = Field(
        None,
        max_length=500,
        description=f"Comma separated; known: {', '.join(STRUCTURES)}. Default: those the instruction names, "
        f"else {', '.join(TISSUES)}.",
    )
    num_steps: int = Field(1, ge=1, le=8, description="Steps of the mask bridge.")


class TextForm(UploadForm):
    """Detection, diagnosis and report."""

    max_new_tokens: int | None = Field(None, ge=1, le=2048, description="192 unless given; 600 of a description.")
    temperature: float = Field(0.0, ge=0.0, le=2.0, description="0 always takes the likeliest token.")
    format: Literal["text", "description"] = Field(
        "text", description="Of a report: text, or the five-level description as JSON."
    )
    stream: bool = Field(False, description="Answer as text/event-stream: `token` events, then one `answer`.")


class InstructForm(TextForm):
    """A free instruction; the task is read from it unless given."""

    instruction: str = Field(min_length=1, max_length=2000)
    task: Task | None = Field(None, description="Which task is meant, where the sentence leaves it open.")
    structures: str | None = Field(None, max_length=500)
    num_steps: int | None = Field(None, ge=1, le=8)
    num_samples: int = Field(1, ge=1, le=8)
    acceleration: int | None = Field(None, ge=2, le=16)


class RequestError(HTTPException):
    """A request that cannot be served, with the status and the sentence the caller gets.

    It is an `HTTPException` because FastAPI turns any other error during the reading of a form into a plain 400.
    """

    def __init__(self, status: int, code: str, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(status, message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, dict[str, str]]:
        """The JSON of the answer."""
        return {"error": {"code": self.code, "message": self.message}}
