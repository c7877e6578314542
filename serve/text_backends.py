"""How a text replica decodes: with the engine's own loop, or with vLLM. Both take a whole prompt as embeddings."""

from __future__ import annotations

import asyncio
import json
import math
import os
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from omnimri.serve.config import TextConfig

if TYPE_CHECKING:
    from omnimri.models.engine import Engine, Prompt

RunOnThread = Callable[..., Any]
"""`await run(method, *args, **kwargs)`: blocking work on the replica's model thread."""


class TextBackend(Protocol):
    """What the text deployment needs."""

    async def generate(
        self, prompt: Prompt, *, max_new_tokens: int, temperature: float, seed: int
    ) -> tuple[str, float]:
        """Text with its special tokens, and its mean token log-probability."""

    def stream(self, prompt: Prompt, *, max_new_tokens: int, temperature: float, seed: int) -> AsyncIterator[str]:
        """Pieces of the readable text."""

    async def score(self, prompt: Prompt, choices: list[str]) -> list[float]:
        """Probability of each of several whole answers; empty where the backend cannot tell."""

    async def check_health(self) -> None:
        """Raises when decoding has died."""


class EngineBackend:
    """The engine's decoding loop on transformers."""

    def __init__(self, engine: Engine, run: RunOnThread) -> None:
        self.engine = engine
        self.run = run

    async def generate(self, prompt: Prompt, **sampling: Any) -> tuple[str, float]:
        """See `TextBackend`."""
        answer = await self.run(self.engine.generate_text, prompt, **sampling)
        return answer.text, float(answer.logprob)

    async def score(self, prompt: Prompt, choices: list[str]) -> list[float]:
        """See `TextBackend`."""
        return (await self.run(self.engine.score_choices, prompt, choices)).tolist()

    async def stream(self, prompt: Prompt, **sampling: Any) -> AsyncIterator[str]:
        """The engine's blocking iterator, moved to the model thread; it stops when the caller goes away."""
        loop, queue, gone = asyncio.get_running_loop(), asyncio.Queue[str | None](), threading.Event()

        def stream_text() -> None:
            try:
                for piece in self.engine.stream_text(prompt, **sampling):
                    if gone.is_set():
                        break
                    loop.call_soon_threadsafe(queue.put_nowait, piece)
            finally:
                loop.call_soon_threadsafe(queue.put_nowait, None)

        producing = asyncio.ensure_future(self.run(stream_text))
        try:
            while (piece := await queue.get()) is not None:
                yield piece
            await producing
        finally:
            gone.set()

    async def check_health(self) -> None:
        """Nothing can die here alone."""


class VllmBackend:
    """vLLM on the checkpoint's backbone folder, fed with prompt embeddings.

    Prefix caching is off: with embeddings its key leaves out the mask of what was embedded (vLLM issue 56655).
    Embeddings of a wrong shape can crash the engine (vllm/config/model.py), so they are checked before they go in.
    """

    def __init__(self, model: str, config: TextConfig) -> None:
        if config.vllm_cpu_cache_gib is not None:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.vllm_cpu_cache_gib)
        # vLLM is an extra, and reads its environment when it is imported.
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from omnimri.models.special_tokens import TURN_END
        from omnimri.models.tokenizer import load_tokenizer

        backbone = Path(model) / "backbone"
        self.width = json.loads((backbone / "config.json").read_text())["hidden_size"]
        self.end = load_tokenizer(Path(model) / "tokenizer").convert_tokens_to_ids(TURN_END)
        self.engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(backbone),
                enable_prompt_embeds=True,
                enable_prefix_caching=False,
                dtype=config.vllm_dtype,
                max_model_len=config.vllm_max_model_len,
                enforce_eager=config.vllm_eager,
                disable_log_stats=True,
            )
        )

    async def generate(
        self, prompt: Prompt, *, max_new_tokens: int, temperature: float, seed: int
    ) -> tuple[str, float]:
        """See `TextBackend`."""
        from vllm.sampling_params import RequestOutputKind

        sampling = self._sampling(max_new_tokens, temperature, seed, RequestOutputKind.FINAL_ONLY, readable=False)
        async for result in self.engine.generate(self._input(prompt), sampling, uuid.uuid4().hex):
            output = result.outputs[0]
        steps = zip(output.token_ids, output.logprobs, strict=True)
        logprobs = [scores[token].logprob for token, scores in steps if token != self.end]
        return output.text, math.fsum(logprobs) / max(1, len(logprobs))

    async def stream(self, prompt: Prompt, *, max_new_tokens: int, temperature: float, seed: int) -> AsyncIterator[str]:
        """See `TextBackend`; vLLM drops the request when the caller goes away."""
        from vllm.sampling_params import RequestOutputKind

        sampling = self._sampling(max_new_tokens, temperature, seed, RequestOutputKind.DELTA, readable=True)
        async for result in self.engine.generate(self._input(prompt), sampling, uuid.uuid4().hex):
            if result.outputs[0].text:
                yield result.outputs[0].text

    async def score(self, prompt: Prompt, choices: list[str]) -> list[float]:  # noqa: ARG002
        """Empty: vLLM gives no log-probabilities of given tokens after a prompt of embeddings."""
        return []

    async def check_health(self) -> None:
        """Raises when vLLM's engine process has died; Serve then replaces the replica."""
        await self.engine.check_health()

    def _sampling(self, max_new_tokens: int, temperature: float, seed: int, kind: Any, *, readable: bool) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=max_new_tokens, temperature=temperature, seed=seed, logprobs=None if readable else 0,
            stop_token_ids=[self.end], skip_special_tokens=readable, output_kind=kind,
        )  # fmt: skip

    def _input(self, prompt: Prompt) -> dict[str, Any]:
        import torch

        embeds = prompt.embeds
        if embeds.ndim != 2 or embeds.shape[1] != self.width or not np.isfinite(embeds).all():
            raise ValueError(f"Prompt embeddings: expected finite (L, {self.width}), found shape {embeds.shape}.")
        return {"prompt_embeds": torch.tensor(embeds)}
