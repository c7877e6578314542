"""The three model deployments: encoder, text, image. Each loads only its parts of the checkpoint.

What crosses between them is numpy and plain values: a `Scan` (by reference, through the object store), the `Prompt`
the encoder makes of it, and dictionaries of results. Model work runs on one thread per replica, so the event loop
stays free for health checks, queueing and streaming.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from ray import serve
from ray.serve import metrics

from omnimri.platform.language.outline import drawn_outline, outlined
from omnimri.serve.config import EncoderConfig, ImageConfig, ReplicaConfig, TextConfig
from omnimri.serve.text_backends import EngineBackend, TextBackend, VllmBackend

if TYPE_CHECKING:
    from omnimri.models.decoding import TextAnswer
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
    """One replica of a model deployment: its thread and its metrics; sub-classes load their parts."""

    PARTS: tuple[str, ...] = ()

    def __init__(self, config: ReplicaConfig) -> None:
        torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._seconds = metrics.Histogram(
            "omnimri_model_seconds",
            description="Seconds of model work per call, waiting excluded.",
            boundaries=SECONDS_BUCKETS,
            tag_keys=("method",),
        )

    async def run(self, method: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run blocking model work on this replica's thread and time it."""
        work = functools.partial(self._timed, method, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _timed(self, method: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        started = time.perf_counter()
        result = method(*args, **kwargs)
        # Serve itself tags its metrics with deployment and replica.
        self._seconds.observe(time.perf_counter() - started, tags={"method": method.__name__})
        return result

    async def check_health(self) -> None:
        """Serve replaces a replica whose GPU has been lost; CPU replicas are healthy while they answer."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@serve.deployment(name="encoder", **EncoderConfig().options())
class Encoder(ModelReplica):
    """Vision encoder, alignment and tokenizer; the backbone runs here only to make image queries."""

    PARTS = ("encoder",)

    def __init__(self, load: EngineLoader, config: EncoderConfig) -> None:
        super().__init__(config)
        self.engine = load(self.PARTS)

    async def encode(self, scan: Scan, instruction: str, task: str, outline: str = "") -> Prompt:
        """The prompt of one instruction about one scan, of which `outline` tells what was drawn."""
        return await self.run(self.engine.encode, outlined(scan, outline) if outline else scan, instruction, task)

    async def encode_each(self, scan: Scan, instructions: dict[str, str], task: str) -> dict[str, Prompt]:
        """One prompt per instruction, under the same keys."""
        return {key: await self.encode(scan, instruction, task) for key, instruction in instructions.items()}


@serve.deployment(name="text", **TextConfig().options())
class Text(ModelReplica):
    """Text decoding with transformers, or with vLLM."""

    PARTS = ("text",)

    def __init__(self, load: EngineLoader, config: TextConfig, model: str) -> None:
        super().__init__(config)
        if config.backend == "vllm":  # Holds weights of its own, so the engine is not loaded.
            self.backend: TextBackend = VllmBackend(model, config)
        else:
            self.backend = EngineBackend(load(self.PARTS), self.run)

    async def answer(self, prompt: Prompt, *, choices: Sequence[str] = (), **options: Any) -> dict[str, Any]:
        """Text, the scores of its boxes, whether the scores are calibrated, and for `choices` their probabilities.

        Args:
            prompt: From the encoder.
            choices: Closed answers to score.
            options: `max_new_tokens`, `temperature`, `seed`, `grammar`.
        """
        written = await self.backend.generate(prompt, **options)
        scores = await self.backend.score(prompt, list(choices)) if choices else []
        return self._result(prompt, written, scores)

    async def stream(self, prompt: Prompt, **options: Any) -> AsyncIterator[str | dict[str, Any]]:
        """Pieces of text as they come, then one dictionary like that of `answer`."""
        async for item in self.backend.stream(prompt, **options):
            yield item if isinstance(item, str) else self._result(prompt, item, [])

    def _result(self, prompt: Prompt, written: TextAnswer, scores: list[float]) -> dict[str, Any]:
        detection = self.backend.detection
        cut = [] if written.finished else ["The answer was cut at max_new_tokens."]
        return {
            "text": written.text,
            "box_scores": [detection.score(logprob) for logprob in written.box_logprobs],
            "calibrated": detection.calibration is not None,
            "scores": scores,
            "warnings": [*prompt.warnings, *cut],
        }

    async def check_health(self) -> None:
        """Also asks the backend."""
        await super().check_health()
        await self.backend.check_health()


@serve.deployment(name="image", **ImageConfig().options())
class Image(ModelReplica):
    """Diffusion decoding: reconstruction with data consistency, and segmentation."""

    PARTS = ("image",)

    def __init__(self, load: EngineLoader, config: ImageConfig) -> None:
        super().__init__(config)
        self.engine = load(self.PARTS)

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
            options: `num_steps`.
        """
        result = await self.run(self.engine.segment, scan, prompts, **options)
        warnings = dict.fromkeys(warning for prompt in prompts.values() for warning in prompt.warnings)
        return {"masks": result.masks, "probabilities": result.probabilities, "warnings": list(warnings)}

    async def outline(self, scan: Scan, prompts: dict[str, Prompt]) -> str:
        """What is drawn of the volume for `outline_instructions`, in words for the prompt of a text task."""
        result = await self.run(self.engine.segment, scan, prompts, num_steps=1)
        return await asyncio.to_thread(drawn_outline, scan, result.probabilities, self.engine.preprocess)
