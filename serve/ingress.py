"""The ingress deployment: admission, reading the upload, calling encoder and decoders, building the answer.

It holds no weights. Encoder output never passes through here: the response of the encoder is handed on unawaited, so
that the prompt goes through the object store from one replica to the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve import metrics
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from omnimri.models.grammars import json_grammar
from omnimri.models.instructions import is_question
from omnimri.models.prompts import diagnosis_choices, instruction_for
from omnimri.models.scan import Scan
from omnimri.platform.language.description import description_schema
from omnimri.platform.language.outline import outline_instructions
from omnimri.serve.admission import Admission, busy
from omnimri.serve.answers import (
    Draft,
    reconstruction_draft,
    segmentation_draft,
    structure_instructions,
    text_draft,
    wanted_structures,
)
from omnimri.serve.artifacts import ArtifactStore, media_type, new_request_id
from omnimri.serve.checkpoint import read_contract
from omnimri.serve.config import AppArgs, IngressConfig
from omnimri.serve.deployments import SECONDS_BUCKETS
from omnimri.serve.intake import Intake, read_upload, ready_for_reconstruction
from omnimri.serve.routes import build_routes
from omnimri.serve.schemas import (
    Answer,
    ArtifactLink,
    ModelCard,
    ModelName,
    Readiness,
    ReconstructForm,
    RequestError,
    SegmentForm,
    TextForm,
    UploadForm,
)

logger = logging.getLogger("ray.serve")  # The one logger that Serve writes to a replica's log file.

TEXT_TASKS = ("detect", "diagnose", "report")
NOT_OUTLINED = "The image deployment was too busy to draw lesions first, so the text was written without."


@serve.deployment(name="ingress", **IngressConfig().options())
@serve.ingress()
class Ingress:
    """Everything between HTTP and the model deployments."""

    def __init__(
        self, args: AppArgs, encoder: DeploymentHandle, text: DeploymentHandle, image: DeploymentHandle
    ) -> None:
        self.args = args
        self.encoder, self.text, self.image = encoder, text, image
        self.contract = read_contract(Path(args.model))
        self.store = ArtifactStore(
            args.artifacts_dir, max_requests=args.max_artifact_requests, max_age_s=args.max_artifact_age_s
        )
        self.admission = Admission(
            {"text": args.serving.text.capacity, "image": args.serving.image.capacity}, retry_after_s=args.retry_after_s
        )
        self._requests = metrics.Counter(
            "omnimri_requests", description="Requests by task and status.", tag_keys=("task", "status")
        )
        self._seconds = metrics.Histogram(
            "omnimri_request_seconds",
            description="Seconds per request, upload reading included.",
            boundaries=SECONDS_BUCKETS,
            tag_keys=("task",),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's hook: called once per replica, after the constructor."""
        return build_routes(self)

    # Tasks

    async def reconstruct(self, form: ReconstructForm) -> Answer:
        """Image from undersampled k-space."""

        async def work() -> Draft:
            intake = await self._read(form, needs_kspace=True)
            intake = await asyncio.to_thread(ready_for_reconstruction, intake, form.acceleration, form.seed)
            scan = intake.scan
            instruction = form.instruction or instruction_for("reconstruct")
            reference = await asyncio.to_thread(ray.put, scan)
            prompt = self.encoder.encode.remote(reference, instruction, "reconstruct")
            result = await self._result(
                self.image.reconstruct.remote(
                    reference, prompt, num_steps=form.num_steps, num_samples=form.num_samples, seed=form.seed
                ),
                "image",
            )
            return await asyncio.to_thread(reconstruction_draft, intake, instruction, result)

        return await self._answer("reconstruct", "image", work)

    async def segment(self, form: SegmentForm) -> Answer:
        """Label map of the structures asked for."""
        structures = wanted_structures(form.structures, form.instruction)

        async def work() -> Draft:
            intake = await self._read(form)
            instructions = structure_instructions(structures, form.instruction)
            reference = await asyncio.to_thread(ray.put, intake.scan)
            prompts = self.encoder.encode_each.remote(reference, instructions, "segment")
            result = await self._result(
                self.image.segment.remote(reference, prompts, num_steps=form.num_steps), "image"
            )
            instruction = form.instruction or " ".join(instructions.values())
            return await asyncio.to_thread(segmentation_draft, intake, instruction, result)

        return await self._answer("segment", "image", work)

    async def write(self, task: str, form: TextForm) -> Answer:
        """A task answered in text: detect, diagnose or report."""

        async def work() -> Draft:
            intake = await self._read(form)
            instruction = form.instruction or _usual_instruction(task, form)
            prompt, warnings = await self._prompt(intake.scan, instruction, task)
            choices = diagnosis_choices() if task == "diagnose" and not is_question(instruction) else []
            result = await self._result(
                self.text.answer.remote(prompt, choices=choices, **_options(task, form)), "text"
            )
            result["warnings"] += warnings
            if choices and not result["scores"]:
                result["warnings"].append("Probabilities need text.backend=transformers, so only the text is given.")
            return await asyncio.to_thread(text_draft, task, intake, instruction, result, self.contract.preprocess)

        return await self._answer(task, "text", work)

    async def stream(self, task: str, form: TextForm) -> AsyncIterator[str | Answer]:
        """Pieces of the text as they are decoded, then the whole answer."""
        started = time.perf_counter()
        request_id = new_request_id()
        with self.admission.slot("text"), self._counted(task, request_id):
            intake = await self._read(form)
            instruction = form.instruction or _usual_instruction(task, form)
            prompt, warnings = await self._prompt(intake.scan, instruction, task)
            pieces = self.text.options(stream=True).stream.remote(prompt, **_options(task, form))
            with self._model_errors("text"):
                async for piece in pieces:
                    if isinstance(piece, str):
                        yield piece
                    else:
                        piece["warnings"] += warnings
                        draft = text_draft(task, intake, instruction, piece, self.contract.preprocess)
                        yield await self._publish(request_id, task, draft)
        self._seconds.observe(time.perf_counter() - started, tags={"task": task})

    # State

    async def readiness(self) -> Readiness:
        """State of the deployments, as Serve's controller sees them."""
        status = await asyncio.to_thread(serve.status)
        application = status.applications[serve.get_replica_context().app_name]
        states = {name: str(deployment.status.value) for name, deployment in application.deployments.items()}
        return Readiness(ready=all(state == "HEALTHY" for state in states.values()), deployments=states)

    def model_card(self) -> ModelCard:
        """What is being served."""
        return ModelCard(
            id=self.args.name,
            version=self.contract.version,
            tasks=["reconstruct", "segment", *TEXT_TASKS],
            text_backend=self.args.serving.text.backend,
            preprocessing=self.contract.preprocessing,
        )

    # Parts of a request

    async def _read(self, form: UploadForm, *, needs_kspace: bool = False) -> Intake:
        uploads = [(part.filename or "", part.file) for part in form.file]
        intake = await asyncio.to_thread(
            read_upload, uploads, self.args.serving.limits, series=form.series, needs_kspace=needs_kspace
        )
        if needs_kspace:
            return intake
        # The other tasks look at the image only; k-space is many times its size.
        return replace(intake, scan=replace(intake.scan, kspace=None, mask=None))

    async def _prompt(self, scan: Scan, instruction: str, task: str) -> tuple[Any, list[str]]:
        """The encoder's response for a text task, unawaited, and warnings."""
        reference = await asyncio.to_thread(ray.put, scan)
        outline, warnings = await self._outline(reference)
        return self.encoder.encode.remote(reference, instruction, task, outline), warnings

    async def _outline(self, reference: ray.ObjectRef) -> tuple[str, list[str]]:
        """What the image deployment draws of a scan; nothing, and a warning, where it is too busy to."""
        if not self.args.serving.text.outline:
            return "", []
        prompts = self.encoder.encode_each.remote(reference, outline_instructions(), "segment")
        drawn = self._result(self.image.outline.remote(reference, prompts), "image")
        try:
            return await asyncio.wait_for(drawn, self.args.serving.text.outline_timeout_s), []
        except TimeoutError:
            return "", [NOT_OUTLINED]
        except RequestError as error:
            if error.status_code not in (429, 503):
                raise
            return "", [NOT_OUTLINED]

    async def _answer(self, task: str, decoder: str, work: Callable[[], Awaitable[Draft]]) -> Answer:
        """Run a task within its decoder's limits and the time limit, and publish what it made."""
        started = time.perf_counter()
        request_id = new_request_id()
        with self.admission.slot(decoder), self._counted(task, request_id):
            try:
                draft = await asyncio.wait_for(work(), self.args.request_timeout_s)
            except TimeoutError as error:
                message = f"The request took longer than {self.args.request_timeout_s:g} s and was stopped."
                raise RequestError(504, "timeout", message) from error
            answer = await self._publish(request_id, task, draft)
        self._seconds.observe(time.perf_counter() - started, tags={"task": task})
        return answer

    async def _publish(self, request_id: str, task: str, draft: Draft) -> Answer:
        """Store the files and fill the one JSON shape."""
        files = draft.files or {}
        if files:
            await asyncio.to_thread(self.store.write, request_id, files)
        return Answer(
            id=request_id,
            task=task,
            instruction=draft.instruction,
            model=ModelName(name=self.args.name, version=self.contract.version),
            text=draft.text,
            findings=draft.findings,
            measurements=draft.measurements,
            artifacts=[
                ArtifactLink(name=name, media_type=media_type(name), href=f"/v1/artifacts/{request_id}/{name}")
                for name in files
            ],
            warnings=list(dict.fromkeys(draft.warnings)),
            preprocessing=self.contract.preprocessing,
        )

    async def _result(self, response: Awaitable[Any], deployment: str) -> Any:
        with self._model_errors(deployment):
            return await response

    @contextlib.contextmanager
    def _model_errors(self, deployment: str) -> Iterator[None]:
        """Errors of a deployment as answers: full queue, no replica, input that the model cannot take."""
        try:
            yield
        except BackPressureError as error:
            raise busy(deployment, self.args.retry_after_s) from error
        except DeploymentUnavailableError as error:
            raise RequestError(
                503, "unavailable", f"The {deployment} deployment is not available.", self.args.retry_after_s
            ) from error
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise RequestError(422, "unprocessable", str(error.cause)) from error
            raise

    @contextlib.contextmanager
    def _counted(self, task: str, request_id: str) -> Iterator[None]:
        """Count and log one request; the log names the task, the id and the outcome, never the input."""
        status = "500"
        try:
            yield
            status = "200"
        except RequestError as error:
            status = str(error.status_code)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            status = "499"
            raise
        finally:
            self._requests.inc(tags={"task": task, "status": status})
            logger.info("request %s task %s status %s", request_id, task, status)


_USUAL_TOKENS = {"text": 192, "description": 600}
"""Length of an answer by its form, where the request says nothing."""


def _usual_instruction(task: str, form: TextForm) -> str:
    """What is asked where the request says nothing: of a description, what training asks for one."""
    return instruction_for("describe" if form.format == "description" else task)


def _options(task: str, form: TextForm) -> dict[str, Any]:
    """How the text deployment decodes.

    Raises:
        RequestError: 422 for a description of a task that is no report.
    """
    limit = form.max_new_tokens or _USUAL_TOKENS[form.format]
    options = {"max_new_tokens": limit, "temperature": form.temperature, "seed": form.seed}
    if form.format == "text":
        return options
    if task != "report":
        raise RequestError(422, "unknown_format", f"format=description is for reports; the task is {task}.")
    return options | {"grammar": json_grammar(description_schema())}
