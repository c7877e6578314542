"""Tiny random vision-language models in the files of real ones, a server that misbehaves on purpose, small corpora."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from omnimri.platform.annotation.ask import SIGNALS_LEVEL, STRUCTURES_LEVEL
from omnimri.platform.annotation.terms import TERMS
from omnimri.platform.language.description import Description

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}PICTURE"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = [term for keys in TERMS.values() for terms in keys.values() for term in terms]


def save_tiny_qwen2_vl(folder: Path) -> Path:
    """A Qwen2-VL of 0.3 M parameters; needs torchvision."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
    config = Qwen2VLConfig(
        text_config={**_text_config(tokenizer), "rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    _save(Qwen2VLForConditionalGeneration(config), tokenizer, folder)
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(), tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_tiny_llava(folder: Path) -> Path:
    """A LLaVA of 0.3 M parameters; its pictures are resized without torchvision."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = _tokenizer()
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "projection_dim": 64,
    }  # fmt: skip
    config = LlavaConfig(
        text_config={"model_type": "qwen2", **_text_config(tokenizer)}, vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"), tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    _save(LlavaForConditionalGeneration(config), tokenizer, folder)
    edge = {"height": 56, "width": 56}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=edge), tokenizer=tokenizer,
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<|image_pad|>", chat_template=CHAT_TEMPLATE.replace("PICTURE", "<|image_pad|>"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.save_pretrained(folder)


def _text_config(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8192,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }  # fmt: skip


def _tokenizer() -> PreTrainedTokenizerBase:
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=700, special_tokens=list(SPECIAL), initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(_WORDS, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL[1:])})
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def true_answer(structures: str = "brainstem", abnormal: str = "") -> dict[str, Any]:
    """An answer of the form that is asked for."""
    empty = Description().model_dump()
    answer: dict[str, Any] = {
        STRUCTURES_LEVEL: {key: [] for key in empty[STRUCTURES_LEVEL]},
        SIGNALS_LEVEL: dict(empty[SIGNALS_LEVEL]),
    }
    answer[STRUCTURES_LEVEL]["organs_or_central_structures"] = [structures] if structures else []
    answer[SIGNALS_LEVEL]["abnormal_signal_patterns"] = abnormal
    return answer


Reply = Callable[[dict[str, Any], int], tuple[int, Any]]
"""From a request and its number to status and body."""


@contextlib.contextmanager
def chat_server(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An HTTP server on loopback; gives its address and the requests that it got."""
    requests: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append({"path": self.path, "token": self.headers.get("Authorization"), **request})
                number = len(requests)
            status, body = reply(request, number)
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(answer: Any) -> dict[str, Any]:
    """A chat completion with an answer."""
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return {
        "choices": [{"message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20},
    }
