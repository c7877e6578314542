"""The two text backends on the same prompts: do they write the same tokens, and how fast."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from omnimri.models.instructions import INSTRUCTIONS
from omnimri.platform.data.schema import FACTS
from omnimri.platform.data.shards import Shards, load_row, row_to_scan
from omnimri.serve.config import TextConfig
from omnimri.serve.text_backends import VllmBackend

if TYPE_CHECKING:
    from omnimri.models.decoding import TextAnswer
    from omnimri.models.engine import Engine, Prompt

TEXT_TASKS = ("detect", "diagnose", "report")


def compare_backends(
    model: Path, shards: Shards, config: TextConfig, *, split: str = "test", limit: int = 100, max_new_tokens: int = 96
) -> dict[str, Any]:
    """Greedy answers of transformers (float32) and of vLLM to held-out prompts with images.

    Args:
        model: Checkpoint folder.
        shards: The corpus.
        config: Of vLLM; with `vllm_dtype="float32"` the tokens should be the same.
        split: Whose volumes are asked about.
        limit: Prompts.
        max_new_tokens: Of an answer.

    Returns:
        `prompts`, `identical`, `differences` (place, token of each, and by how much the logit of the transformers'
        token is above that of the other: near zero is a tie), `largest_logprob_gap` of equal answers, and for
        `transformers` (one prompt after another) and `vllm` (all at once) tokens, seconds and tokens per second.
    """
    from omnimri.models.engine import Engine

    engine = Engine.load(model, parts=("encoder", "text"))
    prompts = list(islice(_prompts(engine, shards, split), limit))
    if not prompts:
        raise ValueError(f"No row is of split {split!r}; known: {', '.join(sorted({r.split for r in shards.rows}))}.")
    started = time.perf_counter()
    ours = [engine.generate_text(prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
    seconds = time.perf_counter() - started
    theirs, vllm_seconds = asyncio.run(_by_vllm(model, config, prompts, max_new_tokens))
    differences = [
        {"prompt": number, "task": prompt.task, **_difference(engine, prompt, own, other)}
        for number, (prompt, own, other) in enumerate(zip(prompts, ours, theirs, strict=True))
        if own.token_ids != other.token_ids
    ]
    gaps = [abs(o.logprob - t.logprob) for o, t in zip(ours, theirs, strict=True) if o.token_ids == t.token_ids]
    return {
        "prompts": len(prompts),
        "identical": len(prompts) - len(differences),
        "differences": differences,
        "largest_logprob_gap": max(gaps, default=None),
        "transformers": _speed(ours, seconds),
        "vllm": _speed(theirs, vllm_seconds),
    }


def _prompts(engine: Engine, shards: Shards, split: str) -> Iterator[Prompt]:
    """Every task on every volume in its first phrasing, then in the second, and so on."""
    refs = sorted(shards.select(split=split).rows, key=lambda ref: ref.row_id)
    for phrasings in zip(*(INSTRUCTIONS[task] for task in TEXT_TASKS), strict=True):
        for ref in refs:
            scan = row_to_scan(load_row(ref, ("image", "affine", *FACTS)))
            yield from (engine.encode(scan, phrase, task) for task, phrase in zip(TEXT_TASKS, phrasings, strict=True))


async def _by_vllm(
    model: Path, config: TextConfig, prompts: Sequence[Prompt], max_new_tokens: int
) -> tuple[list[TextAnswer], float]:
    backend = VllmBackend(str(model), config)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "seed": 0}
    try:
        await backend.generate(prompts[0], **sampling)  # compiles
        started = time.perf_counter()
        answers = await asyncio.gather(*(backend.generate(prompt, **sampling) for prompt in prompts))
        return answers, time.perf_counter() - started
    finally:
        backend.engine.shutdown()


def _speed(answers: Sequence[TextAnswer], seconds: float) -> dict[str, float]:
    tokens = sum(len(answer.token_ids) for answer in answers)
    return {"tokens": tokens, "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1)}


@torch.inference_mode()
def _difference(engine: Engine, prompt: Prompt, own: TextAnswer, other: TextAnswer) -> dict[str, Any]:
    """The first place where two answers part, and the margin between the two tokens there."""
    ends = [engine.tokenizer.eos_token_id]
    first, second = own.token_ids + ends, other.token_ids + ends
    place = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    shared = torch.tensor([own.token_ids[:place]], dtype=torch.long)
    backbone = engine.model.backbone
    embeds = torch.cat([torch.tensor(prompt.embeds)[None], backbone.get_input_embeddings()(shared)], dim=1)
    logits = backbone(inputs_embeds=embeds, logits_to_keep=1).logits[0, -1].float()
    chosen = [engine.tokenizer.decode([token]) for token in (first[place], second[place])]
    margin = float(logits[first[place]] - logits[second[place]])
    return {"place": place, "transformers": chosen[0], "vllm": chosen[1], "margin": margin}
