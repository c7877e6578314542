"""HTTP routes, error answers, and the gate that every request passes before its body is read."""

from __future__ import annotations

import hmac
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from ray.exceptions import RayError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import omnimri
from omnimri.models.prompts import task_of
from omnimri.models.vocabulary import RESEARCH_NOTICE
from omnimri.serve.artifacts import media_type
from omnimri.serve.bounds import MB
from omnimri.serve.config import AppArgs, is_loopback
from omnimri.serve.schemas import (
    Answer,
    ErrorAnswer,
    InstructForm,
    ModelList,
    Readiness,
    ReconstructForm,
    RequestError,
    SegmentForm,
    TextForm,
)

if TYPE_CHECKING:
    from omnimri.serve.ingress import Ingress

PAGE = Path(__file__).parent / "static" / "index.html"
OPEN_PATHS = ("/healthz", "/readyz", "/")
"""Answered without a token: they say nothing but that the server is there."""
MULTIPART_OVERHEAD = 64 * 1024
"""Bytes of boundaries and plain fields that may come on top of the files."""
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in {
        401: "No or a wrong token", 413: "Upload too large", 422: "Input that cannot be used, with one sentence why",
        429: "Decoder busy; see Retry-After", 503: "Not ready; see Retry-After", 504: "Took too long",
    }.items()
}  # fmt: skip


def build_routes(ingress: Ingress) -> FastAPI:
    """The FastAPI application of one ingress replica."""
    app = FastAPI(
        title="OmniMRI",
        version=omnimri.__version__,
        description=f"MRI reconstruction, segmentation, detection, diagnosis and reports. **{RESEARCH_NOTICE}**",
        # The gate below checks the token, before the body is read; this only documents it and gives /docs its button.
        dependencies=[Depends(HTTPBearer(auto_error=False, description="Needed where the server was given a token."))],
    )
    add_task_routes(app, ingress)
    add_state_routes(app, ingress)
    add_error_answers(app)
    app.add_middleware(Gate, args=ingress.args)
    return app


def add_task_routes(app: FastAPI, ingress: Ingress) -> None:
    """The five tasks and the free instruction."""

    def post(path: str, summary: str) -> Any:
        return app.post(
            path, summary=summary, response_model=Answer, response_model_exclude_none=True, responses=ERRORS,
            tags=["tasks"],
        )  # fmt: skip

    @post("/v1/reconstruct", "Image from undersampled k-space")
    async def reconstruct(form: Annotated[ReconstructForm, Form(media_type="multipart/form-data")]) -> Any:
        return await ingress.reconstruct(form)

    @post("/v1/segment", "Label map of named structures")
    async def segment(form: Annotated[SegmentForm, Form(media_type="multipart/form-data")]) -> Any:
        return await ingress.segment(form)

    @post("/v1/detect", "Boxes around abnormalities")
    async def detect(form: Annotated[TextForm, Form(media_type="multipart/form-data")]) -> Any:
        return await text_answer(ingress, "detect", form)

    @post("/v1/diagnose", "Most likely diagnosis")
    async def diagnose(form: Annotated[TextForm, Form(media_type="multipart/form-data")]) -> Any:
        return await text_answer(ingress, "diagnose", form)

    @post("/v1/report", "Report of the examination")
    async def report(form: Annotated[TextForm, Form(media_type="multipart/form-data")]) -> Any:
        return await text_answer(ingress, "report", form)

    @post("/v1/instruct", "Any task, asked for in words")
    async def instruct(form: Annotated[InstructForm, Form(media_type="multipart/form-data")]) -> Any:
        task = form.task or task_from(form.instruction)
        if task == "reconstruct":
            return await ingress.reconstruct(narrowed(form, ReconstructForm))
        if task == "segment":
            return await ingress.segment(narrowed(form, SegmentForm))
        return await text_answer(ingress, task, narrowed(form, TextForm))


def add_state_routes(app: FastAPI, ingress: Ingress) -> None:
    """What is served, whether it is ready, results, and the page."""

    @app.get("/v1/models", summary="What is served", responses={401: ERRORS[401]}, tags=["state"])
    async def models() -> ModelList:
        return ModelList(data=[ingress.model_card()])

    @app.get("/healthz", summary="The server answers", tags=["state"])
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Every deployment is ready", responses={503: {"model": Readiness}}, tags=["state"])
    async def readyz() -> JSONResponse:
        readiness = await ingress.readiness()
        headers = {} if readiness.ready else {"Retry-After": str(ingress.args.retry_after_s)}
        return JSONResponse(readiness.model_dump(), 200 if readiness.ready else 503, headers)

    @app.get(
        "/v1/artifacts/{request_id}/{name}",
        summary="A file of an answer",
        response_class=FileResponse,
        responses={404: {"model": ErrorAnswer}, 401: ERRORS[401]},
        tags=["results"],
    )
    async def artifact(request_id: str, name: str) -> FileResponse:
        path = ingress.store.find(request_id, name)
        if path is None:
            raise RequestError(404, "no_artifact", "There is no such artifact; results are kept for a limited time.")
        return FileResponse(path, media_type=media_type(name), headers={"Cache-Control": "private, no-store"})

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))


def task_from(instruction: str) -> str:
    """The task that a free instruction asks for."""
    try:
        return task_of(instruction)
    except ValueError as error:
        raise RequestError(422, "unknown_task", f"{error} Or set the field task.") from error


def narrowed(form: InstructForm, kind: type[Any]) -> Any:
    """The fields of a free instruction that its task knows; what was left open takes the task's default."""
    fields = {name: getattr(form, name) for name in kind.model_fields if hasattr(form, name)}
    return kind(**{name: value for name, value in fields.items() if value is not None})


async def text_answer(ingress: Ingress, task: str, form: TextForm) -> Answer | StreamingResponse:
    """A text task, whole or as server-sent events."""
    if not form.stream:
        return await ingress.write(task, form)
    events = ingress.stream(task, form)
    first = await anext(events)  # What is wrong with the request shows here, while there is still a status to set.
    return StreamingResponse(
        server_sent(first, events), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def server_sent(first: str | Answer, rest: AsyncIterator[str | Answer]) -> AsyncIterator[str]:
    """`token` events with pieces of text, then one `answer` event, or an `error` event where the model failed."""
    yield _event(first)
    try:
        async for item in rest:
            yield _event(item)
    except RequestError as error:
        yield f"event: error\ndata: {json.dumps(error.body())}\n\n"
    except RayError:
        yield f"event: error\ndata: {json.dumps(_internal().body())}\n\n"


def _event(item: str | Answer) -> str:
    if isinstance(item, str):
        return f"event: token\ndata: {json.dumps({'text': item})}\n\n"
    return f"event: answer\ndata: {item.model_dump_json(exclude_none=True)}\n\n"


def add_error_answers(app: FastAPI) -> None:
    """Every error has the one shape and repeats nothing of the input."""

    @app.exception_handler(RequestError)
    async def refused(_request: Request, error: RequestError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(RequestError(422, "invalid_request", validation_sentence(error)))

    @app.exception_handler(HTTPException)
    async def plain(_request: Request, error: HTTPException) -> JSONResponse:
        return error_response(RequestError(error.status_code, "http_error", f"{error.detail}."))

    @app.exception_handler(Exception)
    async def failed(_request: Request, _error: Exception) -> JSONResponse:
        return error_response(_internal())


def _internal() -> RequestError:
    return RequestError(500, "internal", "The model failed on this request; the server's log has the details.")


def error_response(error: RequestError) -> JSONResponse:
    """The answer to a refused request."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.status_code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status_code, headers)


def validation_sentence(error: RequestValidationError) -> str:
    """The first problem of a form in one sentence, without the value that was sent."""
    problem = error.errors()[0]
    field = str(problem["loc"][-1])
    if field == "file":
        return "Send the scan as at least one multipart part named file (curl: -F file=@scan.zip)."
    if problem["type"] == "extra_forbidden":
        return f"The field {field} is not known to this route; see /docs."
    return f"The field {field} is not valid: {problem['msg'][0].lower()}{problem['msg'][1:]}."


class Gate:
    """Access and size, checked before a byte of the body is kept.

    FastAPI reads a form before it runs dependencies, so a dependency would let strangers fill the disk first. Without
    a token only this machine is answered, under its own name: a page elsewhere cannot reach in by DNS rebinding.
    """

    def __init__(self, app: ASGIApp, args: AppArgs) -> None:
        self.app = app
        self.token = args.token.get_secret_value() if args.token else None
        self.max_bytes = int(args.serving.limits.max_upload_mb * MB) + MULTIPART_OVERHEAD
        self.max_mb = args.serving.limits.max_upload_mb

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or hand on with the body counted."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._admit(Request(scope))
            await self.app(scope, self._bounded(receive), send)
        except RequestError as error:
            await error_response(error)(scope, receive, send)

    def _admit(self, request: Request) -> None:
        if self.token is None:
            client = request.client.host if request.client else ""
            if not (is_loopback(client) and is_loopback(request.url.hostname or "")):
                raise RequestError(403, "local_only", "This server answers its own machine only; it has no token set.")
        elif request.url.path not in OPEN_PATHS:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self.token.encode()):
                raise RequestError(401, "unauthorised", "Send the server's token: Authorization: Bearer TOKEN.")
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        received = 0

        async def count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise self._too_large()
            return message

        return count

    def _too_large(self) -> RequestError:
        return RequestError(413, "too_large", f"The upload is larger than {self.max_mb:g} MB; send one series.")
