"""Number types under autocast, and activations that are computed again: what must stay equal does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2MoeForCausalLM

from omnimri.models.backbone import (
    AutocastExperts,
    Float32Router,
    add_adapters,
    build_backbone,
    merge_adapters,
    moe_config,
)
from omnimri.models.collate import collate
from omnimri.models.config import preset
from omnimri.models.engine import sequence_builder
from omnimri.models.flow_head import FlowHead
from omnimri.models.objectives import build_objective
from omnimri.models.omnimri import OmniMRI
from omnimri.models.tokenizer import train_tokenizer
from tests.models.test_objectives import image_samples, segment_samples, text_samples, volume_fields

IDS = torch.tensor([[5, 300, 17, 17, 2, 301, 90, 33]])


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def vision_samples(count: int) -> list[dict[str, Any]]:
    return [{"volume": volume_fields(i)["volume"], "attributes": torch.tensor([i, 0, 0]).numpy()} for i in range(count)]


def paired_samples(count: int) -> list[dict[str, Any]]:
    return [volume_fields(i) | {"text": f"report {i}", "image_first": i == 0, "text_group": i} for i in range(count)]


def losses_of(stage: str, samples: list[dict[str, Any]], *, checkpointed: bool = False) -> tuple[OmniMRI, dict]:
    torch.manual_seed(0)
    model = OmniMRI(preset("tiny")).train()
    if checkpointed:
        model.checkpoint_activations()
    tokenizer = train_tokenizer(["Provide your diagnosis of this MRI volume. old infarct in the left lobe"] * 3, 400)
    batch = collate(samples, sequence_builder(model.config, tokenizer))
    torch.manual_seed(1)
    return model, build_objective(stage, model)(batch)


CASES: list[tuple[str, Callable[[int], list[dict[str, Any]]]]] = [
    ("vision", vision_samples),
    ("align", paired_samples),
    ("multimodal", paired_samples),
    ("instruct", text_samples),
    ("instruct", image_samples),
    ("instruct", segment_samples),
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "samples"), CASES)
def test_checkpointing_changes_no_loss_and_no_gradient(stage: str, samples: Callable[[int], list]) -> None:
    kept, losses = losses_of(stage, samples(2))
    again, recomputed = losses_of(stage, samples(2), checkpointed=True)
    assert {name: value.item() for name, value in losses.items()} == {n: v.item() for n, v in recomputed.items()}
    losses["loss"].backward()
    recomputed["loss"].backward()
    expected = {name: p.grad for name, p in kept.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in again.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("stage", "samples"), [("vision", vision_samples), ("instruct", image_samples)])
def test_checkpointing_keeps_less(stage: str, samples: Callable[[int], list]) -> None:
    def kept_bytes(checkpointed: bool) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model, losses = losses_of(stage, samples(2), checkpointed=checkpointed)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert losses["loss"].requires_grad
        return sum(size for place, size in seen.items() if place not in weights)

    assert kept_bytes(True) < 0.7 * kept_bytes(False)


def test_the_backbone_is_transformers_own_in_float32() -> None:
    config = preset("tiny").backbone
    torch.manual_seed(0)
    own = build_backbone(config)
    torch.manual_seed(0)
    plain = Qwen2MoeForCausalLM(moe_config(config))
    outputs = [model(input_ids=IDS, labels=IDS, output_router_logits=True) for model in (own, plain)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert all(torch.equal(a, b) for a, b in zip(outputs[0].router_logits, outputs[1].router_logits, strict=True))
    for output in outputs:
        output.loss.backward()
    for (name, a), (_, b) in zip(own.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_routers_stay_in_float32_and_experts_do_not() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(preset("tiny").backbone)
    seen: dict[str, list[torch.dtype]] = {"router": [], "experts": [], "attention": []}
    inputs: list[torch.Tensor] = []
    for module in backbone.modules():
        if isinstance(module, Float32Router):
            module.register_forward_hook(lambda _, given, out: seen["router"].append(out[0].dtype))
            module.register_forward_hook(lambda _, given, out: inputs.append(given[0]))
        if isinstance(module, AutocastExperts):
            module.register_forward_hook(lambda _, given, out: seen["experts"].append(out.dtype))
    backbone.model.layers[0].self_attn.register_forward_hook(lambda _, g, out: seen["attention"].append(out[0].dtype))
    with bfloat16():
        output = backbone(input_ids=IDS, labels=IDS, output_router_logits=True)
    assert set(seen["router"]) == {torch.float32}
    assert set(seen["experts"]) == set(seen["attention"]) == {torch.bfloat16}
    router = backbone.model.layers[0].mlp.gate
    assert torch.equal(output.router_logits[0], F.linear(inputs[0].reshape(-1, 256).float(), router.weight))
    output.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in backbone.parameters())


def test_the_flow_head_computes_the_same_under_autocast() -> None:
    config = preset("tiny")
    torch.manual_seed(0)
    head = FlowHead(config.flow_head, 192, 256)
    torch.nn.init.normal_(head.output[1].weight)
    tokens, hidden, found = torch.randn(8, 192), torch.randn(8, 256), []
    for context in (bfloat16(), torch.autocast("cpu", enabled=False)):
        torch.manual_seed(1)
        with context:
            found.append(head.loss(tokens, hidden))
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], found[1])


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "samples"), CASES)
def test_every_loss_is_close_to_its_float32_value(stage: str, samples: Callable[[int], list]) -> None:
    _, expected = losses_of(stage, samples(2))
    with bfloat16():
        model, found = losses_of(stage, samples(2))
    assert found["loss"].dtype == torch.float32
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.05)
    found["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert found["loss"].item() != expected["loss"].item()


def test_adapters_begin_at_nothing_and_merge_into_the_plain_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(preset("tiny").backbone)
    names, frozen = set(backbone.state_dict()), {n: p.detach().clone() for n, p in backbone.named_parameters()}
    before = backbone(input_ids=IDS).logits
    add_adapters(backbone, rank=4)
    assert torch.equal(backbone(input_ids=IDS).logits, before)
    learning = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in learning)
    assert sum(p.numel() for p in learning.values()) < 0.1 * sum(p.numel() for p in frozen.values())
    optimizer = torch.optim.SGD(learning.values(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        backbone(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    learned = backbone(input_ids=IDS).logits
    assert (learned - before).abs().max() > 1e-3
    merge_adapters(backbone)
    assert set(backbone.state_dict()) == names
    torch.testing.assert_close(backbone(input_ids=IDS).logits, learned, rtol=1e-4, atol=1e-5)
    backbone.save_pretrained(tmp_path)
    loaded = Qwen2MoeForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    torch.testing.assert_close(loaded(input_ids=IDS).logits, learned, rtol=1e-4, atol=1e-5)
    moved = {name for name, p in backbone.named_parameters() if not torch.equal(p, frozen[name])}
    assert moved
    assert not any(".experts." in name or "embed_tokens" in name or ".gate." in name for name in moved)
