"""A folder as that of a Qwen2.5 checkpoint, with few words, with or without weights."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from omnimri.models.special_tokens import SPECIAL_TOKENS
from omnimri.models.tokenizer import train_tokenizer

QWEN_ADDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
"""Behind its words, in this order, with ids from 151,643 to 151,664; those from `<tool_call>` on are not special."""

FREE_ROWS = 151_936 - 151_665
WORDS = ("Old infarct in the left parietal lobe.", "No haemorrhage, no mass.", "Lésion de 12 mm à gauche") * 4


def write_qwen(folder: Path) -> Path:
    """Its tokenizer, and a configuration whose embedding is padded as Qwen2.5's."""
    own = train_tokenizer(WORDS, 500).backend_tokenizer
    model = json.loads(own.to_str())["model"]
    words = [word for word in sorted(model["vocab"], key=model["vocab"].get) if word not in SPECIAL_TOKENS]
    tokenizer = Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=None,
    )
    tokenizer.add_tokens([AddedToken(token, special=i < 14, normalized=False) for i, token in enumerate(QWEN_ADDED)])
    tokenizer.save_pretrained(folder)
    rows = len(words) + len(QWEN_ADDED) + FREE_ROWS
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": rows}))
    return folder


def write_dense(folder: Path, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """The same with weights: two layers, biases that are not zero, Qwen2.5's base of the rotary positions."""
    rows = json.loads((write_qwen(folder) / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=rows, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB")
    return model.eval()
