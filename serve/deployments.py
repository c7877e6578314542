"""The three model deployments: encoder, text, image. Each loads only its parts of the checkpoint.

What crosses between them is numpy and plain values: a `Scan` (by reference, through the object store), the `Prompt`
the encoder makes of it, and dictionaries of results. Model work runs on one thread per replica, so the event loop
stays free for health checks, queueing and streaming.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from ray import serve
from ray.serve import metrics

from omnimri.serve.config import EncoderConfig, ImageConfig, ReplicaConfig, TextConfig

if TYPE_CHECKING:
    from omnimri.models.engine import Engine, Prompt
    from omnimri.models.scan import Scan

Result = TypeVar("Result")
EngineLoader = Callable[[tuple[str, ...]], "Engine"]
"""Takes the names of the parts a deployment needs and returns an engine that holds them."""

SECONDS_BUCKETS = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0]


def load_engine(folder: str, parts: tuple[str, ...]) -> Engine:
    """The engine of a saved model with the parts asked for."""
    # The ingress imports this module and needs none of the model.
    from transformers.utils.logging import disable_progress_bar

    from omnimri.models.engine import Engine

    disable_progress_bar()  # A bar per replica, redrawn in a log, is noise.
    return Engine.load(folder, parts=parts)


class ModelReplica:
    """One replica of a model deployment: its engine, its thread, its metrics."""

    PARTS: tuple[str, ...] = ()
    NAME = ""

    def __init__(self, load: EngineLoader, config: ReplicaConfig) -> None:
        torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
        started = time.perf_counter()
        self.engine = load(self.PARTS)
        self.load_seconds = time.perf_counter() - started
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=self.NAME)
        self._seconds = metrics.Histogram(
            "omnimri_model_seconds",
            description="Seconds of model work per call, waiting excluded.",
            boundaries=SECONDS_BUCKETS,
            tag_keys=("stage", "method"),
        )

    async def run(self, method: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run blocking model work on this replica's thread and time it."""
        work = functools.partial(self._timed, method, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _timed(self, method: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        started = time.perf_counter()
        result = method(*args, **kwargs)
        self.observe(method.__name__, time.perf_counter() - started)
        return result

    def observe(self, method: str, seconds: float) -> None:
        """Record the seconds of one call."""
        self._seconds.observe(seconds, tags={"stage": self.NAME, "method": method})

    def check_health(self) -> None:
        """Serve replaces a replica whose GPU has been lost; CPU replicas are healthy while they answer."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@serve.deployment(name="encoder", **EncoderConfig().options())
class Encoder(ModelReplica):
    """Vision encoder, alignment and tokenizer; the backbone runs here only to make image queries."""

    PARTS = ("encoder",)
    NAME = "encoder"

    async def encode(self, scan: Scan, instruction: str, task: str) -> Prompt:
        """The prompt of one instruction about one scan."""
        return await self.run(self.engine.encode, scan, instruction, task)

    async def encode_each(self, scan: Scan, instructions: dict[str, str], task: str) -> dict[str, Prompt]:
        """One prompt per instruction, under the same keys."""
        return {key: await self.encode(scan, instruction, task) for key, instruction in instructions.items()}


@serve.deployment(name="text", **TextConfig().options())
class Text(ModelReplica):
    """Text decoding with the engine's own `generate`, or with vLLM."""

    PARTS = ("text",)
    NAME = "text"

    def __init__(self, load: EngineLoader, config: TextConfig, model: str) -> None:
        super().__init__(load, config)
        self.vllm = None
        if config.backend == "vllm":
            from omnimri.serve.vllm_backend import VllmBackend  # vLLM is an extra.

            self.vllm = VllmBackend(model, config)

    async def answer(self, prompt: Prompt, *, choices: Sequence[str] = (), **sampling: Any) -> dict[str, Any]:
        """Text with its mean token log-probability and, for `choices`, their probabilities.

        Args:
            prompt: From the encoder.
            choices: Closed answers to score.
            sampling: `max_new_tokens`, `temperature`, `seed`.
        """
        if self.vllm is not None:
            text, logprob = await self.vllm.generate(prompt, **sampling)
        else:
            result = await self.run(self.engine.generate_text, prompt, **sampling)
            text, logprob = result.text, result.logprob
        scores = (await self.run(self.engine.score_choices, prompt, list(choices))).tolist() if choices else []
        return {"text": text, "logprob": float(logprob), "scores": scores, "warnings": list(prompt.warnings)}

    async def stream(self, prompt: Prompt, **sampling: Any) -> AsyncIterator[str | dict[str, Any]]:
        """Pieces of text as they come, then one dictionary like that of `answer`, with the whole text."""
        source = self.vllm.stream(prompt, **sampling) if self.vllm else self._stream_engine(prompt, **sampling)
        pieces: list[str] = []
        async for piece in source:
            pieces.append(piece)
            yield piece
        yield {"text": "".join(pieces), "logprob": None, "scores": [], "warnings": list(prompt.warnings)}

    async def _stream_engine(self, prompt: Prompt, **sampling: Any) -> AsyncIterator[str]:
        """The engine's blocking iterator, moved to the model thread; stops when the caller goes away."""
        loop, queue, gone = asyncio.get_running_loop(), asyncio.Queue[str | None](), threading.Event()

        def produce() -> None:
            started = time.perf_counter()
            try:
                for piece in self.engine.stream_text(prompt, **sampling):
                    if gone.is_set():
                        break
                    loop.call_soon_threadsafe(queue.put_nowait, piece)
            finally:
                loop.call_soon_threadsafe(queue.put_nowait, None)
                self.observe("stream_text", time.perf_counter() - started)

        producing = loop.run_in_executor(self._thread, produce)
        try:
            while (piece := await queue.get()) is not None:
                yield piece
            await producing
        finally:
            gone.set()


@serve.deployment(name="image", **ImageConfig().options())
class Image(ModelReplica):
    """Diffusion decoding: reconstruction with data consistency, and segmentation."""

    PARTS = ("image",)
    NAME = "image"

    async def reconstruct(self, scan: Scan, prompt: Prompt, **options: Any) -> dict[str, Any]:
        """Magnitude and uncertainty `(Z, Y, X)` float32, and the residual against the measured k-space.

        Args:
            scan: With undersampled k-space.
            prompt: From the encoder.
            options: `num_steps`, `num_samples`, `seed`.
        """
        result = await self.run(self.engine.reconstruct, scan, prompt, **options)
        return {
            "magnitude": result.magnitude,
            "uncertainty": result.uncertainty,
            "residual": float(result.residual),
            "warnings": list(prompt.warnings),
        }

    async def segment(self, scan: Scan, prompts: dict[str, Prompt], **options: Any) -> dict[str, Any]:
        """Masks (bool) and probabilities (float32) per structure, each `(Z, Y, X)` on the native grid.

        Args:
            scan: The volume.
            prompts: From the encoder, by structure.
            options: `num_steps`, `seed`.
        """
        result = await self.run(self.engine.segment, scan, prompts, **options)
        warnings = dict.fromkeys(warning for prompt in prompts.values() for warning in prompt.warnings)
        return {"masks": result.masks, "probabilities": result.probabilities, "warnings": list(warnings)}
