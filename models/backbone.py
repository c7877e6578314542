"""Backbone: `Qwen2MoeForCausalLM` as transformers ships it, and what its router is told and asked."""

# B batch, T tokens, H hidden width, L layers, E experts

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import Qwen2Config, Qwen2Model, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeTopKRouter

from omnimri.models.config import BackboneConfig, TextEncoderConfig


def moe_config(config: BackboneConfig) -> Qwen2MoeConfig:
    """The configuration that transformers and vLLM read."""
    return Qwen2MoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.shared_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        num_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        moe_intermediate_size=config.expert_width,
        shared_expert_intermediate_size=config.shared_width,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.norm_eps,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def build_backbone(config: BackboneConfig) -> Qwen2MoeForCausalLM:
    """A freshly initialised backbone; its saved folder is served by vLLM as it is.

    In float32 it computes what transformers' own does, bit by bit; under autocast its routers stay in float32, and its
    experts, whose products autocast does not know, do not.
    """
    backbone = Qwen2MoeForCausalLM(moe_config(config))
    for module in backbone.modules():
        if isinstance(module, Qwen2MoeTopKRouter):
            module.__class__ = Float32Router  # parameters, names and initial values are those of the original
        elif isinstance(module, Qwen2MoeExperts):
            module.__class__ = AutocastExperts
    return backbone


_ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_adapters(backbone: Qwen2MoeForCausalLM, rank: int) -> None:
    """Freeze the backbone but for low-rank updates of attention and shared experts (LoRA, arXiv 2106.09685).

    The updates begin at zero. Routed experts, routers, norms and embeddings stay as they are.
    """
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_ADAPTED), backbone)


def merge_adapters(backbone: Qwen2MoeForCausalLM) -> None:
    """Add the updates to the weights, and leave the plain model that transformers and vLLM read."""
    for path, layer in [(path, module) for path, module in backbone.named_modules() if isinstance(module, LoraLayer)]:
        layer.merge()
        parent, _, name = path.rpartition(".")
        setattr(backbone.get_submodule(parent), name, layer.get_base_layer())


class Float32Router(Qwen2MoeTopKRouter):
    """Router whose logits are float32 under autocast too: rounded, they change which experts are chosen."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `(B * T, E)`, weights and numbers of the chosen experts `(B * T, k)` of states `(..., H)`."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(hidden_states.float())


class AutocastExperts(Qwen2MoeExperts):
    """Experts in autocast's number type; grouped products are not on its list."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """States `(B * T, H)` of the tokens' chosen experts, weighted and summed."""
        device = hidden_states.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        dtype = torch.get_autocast_dtype(device)
        rounded = copy.copy(self)
        rounded._parameters = {name: value.to(dtype) for name, value in self._parameters.items()}
        with torch.autocast(device, enabled=False):
            return Qwen2MoeExperts.forward(rounded, hidden_states.to(dtype), top_k_index, top_k_weights.to(dtype))


def build_text_encoder(config: TextEncoderConfig, vocab_size: int) -> Qwen2Model:
    """The light text tower of stage 2."""
    return Qwen2Model(
        Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def router_statistics(router_logits: tuple[Tensor, ...], top_k: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """How the router spreads the chosen tokens, layer by layer.

    Args:
        router_logits: Per layer `(B * T, E)`.
        top_k: Experts per token.
        tokens: Bool `(B, T)`, the tokens that count (padding and the other modality left out).

    Returns:
        `load` `(L, E)`: share of tokens sent to each expert, summing to `top_k`; and `probability` `(L, E)`: mean
        router probability, summing to one.
    """
    chosen = tokens.reshape(-1)
    loads, probabilities = [], []
    for logits in router_logits:
        softmax = logits.float().softmax(-1)[chosen]
        experts = softmax.topk(top_k, dim=-1).indices
        one_hot = torch.zeros_like(softmax).scatter_(1, experts, 1.0)
        count = max(1, softmax.shape[0])
        loads.append(one_hot.sum(0) / count)
        probabilities.append(softmax.sum(0) / count)
    return torch.stack(loads), torch.stack(probabilities)


def balance_loss(load: Tensor, probability: Tensor, top_k: int) -> Tensor:
    """`E / k * sum_e f_e P_e`, averaged over layers: one when balanced, E / k when collapsed.

    Switch Transformer eq. 4 (arXiv 2101.03961) per layer. transformers' own version pools the layers, and so does
    not see layers that collapse on different experts.
    """
    return (load.detach() * probability).sum(-1).mean() * load.shape[-1] / top_k


def router_z_loss(router_logits: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
    """Mean squared log-sum-exp of the router logits (ST-MoE, arXiv 2202.08906, eq. 5) over the chosen tokens.

    Args:
        router_logits: Per layer `(B * T, E)`.
        tokens: Bool `(B, T)`, the tokens that count: how a batch is padded must not change its loss.
    """
    chosen = tokens.reshape(-1)
    return torch.stack([logits.float()[chosen].logsumexp(-1).square().mean() for logits in router_logits]).mean()
