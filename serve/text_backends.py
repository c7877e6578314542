"""How a text replica decodes: with transformers, or with vLLM. Both take a whole prompt as embeddings."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from omnimri.models.detection import Detection, read_detection
from omnimri.models.grammars import detection_grammar
from omnimri.serve.config import TextConfig

if TYPE_CHECKING:
    from omnimri.models.decoding import TextAnswer
    from omnimri.models.engine import Engine, Prompt

RunOnThread = Callable[..., Any]
"""`await run(method, *args, **kwargs)`: blocking work on the replica's model thread."""


class TextBackend(Protocol):
    """What the text deployment needs; options are those of `Engine.generate_text`."""

    detection: Detection
    """How boxes are scored."""

    async def generate(self, prompt: Prompt, **options: Any) -> TextAnswer:
        """The whole answer."""

    def stream(self, prompt: Prompt, **options: Any) -> AsyncIterator[str | TextAnswer]:
        """Pieces of the readable text, then the whole answer."""

    async def score(self, prompt: Prompt, choices: list[str]) -> list[float]:
        """Probability of each of several whole answers; empty where the backend cannot tell."""

    async def check_health(self) -> None:
        """Raises when decoding has died."""


class EngineBackend:
    """The engine's decoding on transformers."""

    def __init__(self, engine: Engine, run: RunOnThread) -> None:
        self.engine = engine
        self.detection = engine.detection
        self.run = run

    async def generate(self, prompt: Prompt, **options: Any) -> TextAnswer:
        """See `TextBackend`."""
        return await self.run(self.engine.generate_text, prompt, **options)

    async def score(self, prompt: Prompt, choices: list[str]) -> list[float]:
        """See `TextBackend`."""
        return (await self.run(self.engine.score_choices, prompt, choices)).tolist()

    async def stream(self, prompt: Prompt, **options: Any) -> AsyncIterator[str | TextAnswer]:
        """The engine's pieces from the model thread; it stops when the caller goes away."""
        loop, gone = asyncio.get_running_loop(), threading.Event()
        queue: asyncio.Queue[str | TextAnswer | None] = asyncio.Queue()

        def put(item: str | TextAnswer | None) -> None:
            if gone.is_set():
                raise asyncio.CancelledError("The caller has gone away.")
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def write() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                try:
                    put(self.engine.generate_text(prompt, on_text=put, **options))
                finally:
                    put(None)

        producing = asyncio.ensure_future(self.run(write))
        try:
            while (item := await queue.get()) is not None:
                yield item
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

        from omnimri.models.tokenizer import load_tokenizer

        backbone = Path(model) / "backbone"
        self.width = json.loads((backbone / "config.json").read_text())["hidden_size"]
        self.tokenizer = load_tokenizer(Path(model) / "tokenizer")
        self.detection = read_detection(model)
        self.engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(backbone),
                enable_prompt_embeds=True,
                enable_prefix_caching=False,
                dtype=config.vllm_dtype,
                max_model_len=config.vllm_max_model_len,
                enforce_eager=config.vllm_eager,
                structured_outputs_config={"backend": "guidance"},  # reads the grammars of `models.grammars`
                disable_log_stats=True,
            )
        )

    async def generate(self, prompt: Prompt, **options: Any) -> TextAnswer:
        """See `TextBackend`."""
        *_, answer = [item async for item in self.stream(prompt, **options)]
        assert not isinstance(answer, str)
        return answer

    async def stream(self, prompt: Prompt, **options: Any) -> AsyncIterator[str | TextAnswer]:
        """See `TextBackend`; vLLM drops the request when the caller goes away."""
        from omnimri.models.decoding import assemble

        token_ids: list[int] = []
        logprobs: list[float] = []
        sampling = self._sampling(prompt.task, **options)
        async for result in self.engine.generate(self._input(prompt), sampling, uuid.uuid4().hex):
            (output,) = result.outputs
            token_ids += output.token_ids
            logprobs += [scores[token].logprob for token, scores in zip(output.token_ids, output.logprobs, strict=True)]
            if output.text:
                yield output.text
        yield assemble(self.tokenizer, prompt.task, token_ids, logprobs)

    async def score(self, prompt: Prompt, choices: list[str]) -> list[float]:  # noqa: ARG002
        """Empty: vLLM gives no log-probabilities of given tokens after a prompt of embeddings."""
        return []

    async def check_health(self) -> None:
        """Raises when vLLM's engine process has died; Serve then replaces the replica."""
        await self.engine.check_health()

    def _sampling(
        self, task: str, *, max_new_tokens: int, temperature: float, seed: int, grammar: str | None = None
    ) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        from omnimri.models.decoding import stop_tokens

        grammar = grammar or (detection_grammar(self.detection.labels) if task == "detect" else None)
        return SamplingParams(
            max_tokens=max_new_tokens, temperature=temperature, seed=seed, logprobs=0,
            stop_token_ids=stop_tokens(self.tokenizer), skip_special_tokens=True,
            output_kind=RequestOutputKind.DELTA,
            structured_outputs=StructuredOutputsParams(grammar=grammar) if grammar else None,
        )  # fmt: skip

    def _input(self, prompt: Prompt) -> dict[str, Any]:
        import torch

        embeds = prompt.embeds
        if embeds.ndim != 2 or embeds.shape[1] != self.width or not np.isfinite(embeds).all():
            raise ValueError(f"Prompt embeddings: expected finite (L, {self.width}), found shape {embeds.shape}.")
        return {"prompt_embeds": torch.tensor(embeds)}
