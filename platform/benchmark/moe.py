"""Forward and backward pass of one mixture-of-experts layer in each implementation that transformers has."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from transformers import Qwen2MoeForCausalLM

from omnimri.models.backbone import build_backbone, moe_config
from omnimri.models.config import preset

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GATHERED_BYTES = 4 * 2**30
"""`batched_mm` copies the weights of every token's experts; above that it is left out."""


def benchmark_moe(presets: dict[str, int], *, repeats: int = 5) -> dict[str, Any]:
    """Time the layer of presets, at their true width.

    Args:
        presets: Tokens of the pass by preset.
        repeats: The fastest counts.

    Returns:
        `milliseconds` of a forward and backward pass by preset, number type and implementation; `transformers` is the
        library's own layer as it comes; `used`: the implementation that training runs.
    """
    found: dict[str, Any] = {}
    for name, tokens in presets.items():
        config = replace(preset(name).backbone, num_layers=1, vocab_size=8)
        torch.manual_seed(0)
        backbone = build_backbone(config)
        plain = Qwen2MoeForCausalLM(moe_config(config)).model.layers[0].mlp
        states = torch.randn(1, tokens, config.hidden_size)
        gathered = 4 * 3 * tokens * config.experts_per_token * config.expert_width * config.hidden_size
        kinds = [kind for kind in IMPLEMENTATIONS if kind != "batched_mm" or gathered <= GATHERED_BYTES]
        for products, dtype in PRODUCTS.items():
            times = {"transformers": pass_ms(plain, states, dtype, repeats)}
            for kind in kinds:
                backbone.set_experts_implementation(kind)
                times[kind] = pass_ms(backbone.model.layers[0].mlp, states, dtype, repeats)
            found[f"{name}, {tokens} tokens, {products}"] = times
    used = build_backbone(replace(preset("tiny").backbone, num_layers=1, vocab_size=8)).config._experts_implementation
    return {"milliseconds": found, "used": used, "threads": torch.get_num_threads()}


def pass_ms(layer: torch.nn.Module, states: torch.Tensor, dtype: torch.dtype, repeats: int) -> float:
    """Fastest forward and backward pass in milliseconds, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        layer.zero_grad(set_to_none=True)
        started = time.perf_counter()
        with torch.autocast(states.device.type, dtype, enabled=dtype != torch.float32):
            loss = layer(states).float().square().mean()
        loss.backward()
        times.append(time.perf_counter() - started)
    return round(1000 * min(times[1:]), 2)
