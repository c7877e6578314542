"""DeepSpeed's configuration from a frozen dataclass, with every default that has moved between releases said aloud."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """How the optimizer state, gradients and parameters are spread, and in which precision they are computed."""

    stage: Literal[0, 1, 2, 3] = 0
    """0 replicates; 1 shards optimizer state, 2 also gradients, 3 also parameters."""
    precision: Literal["float32", "autocast", "auto"] = "float32"
    """`autocast` keeps float32 weights and computes matrix products in bfloat16, but for routers, the flow head and
    data consistency; `auto` does so where the hardware has bfloat16, and computes in float32 elsewhere."""
    offload: Literal["none", "cpu"] = "none"
    """Where the optimizer state lives (stage 1 and above)."""
    gradient_clipping: float = 1.0
    """Largest norm of the gradient over all parameters; 0 does not clip."""
    persistence_threshold: int = 100_000
    """ZeRO-3 keeps parameters with fewer elements whole on every rank."""
    torch_adam: bool = True
    """Use torch's AdamW; DeepSpeed's own is compiled at first use and needs a compiler on the node."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"ZeroConfig.stage must be 0, 1, 2 or 3, found {self.stage}.")
        if self.precision not in ("float32", "autocast", "auto"):
            raise ValueError(f"ZeroConfig.precision: float32, autocast or auto, found {self.precision!r}.")
        if self.offload not in ("none", "cpu"):
            raise ValueError(f"ZeroConfig.offload: none or cpu, found {self.offload!r}.")
        if self.offload == "cpu" and self.stage == 0:
            raise ValueError("ZeroConfig.offload='cpu' needs ZeroConfig.stage 1, 2 or 3; found stage 0.")


def uses_autocast(zero: ZeroConfig, *, use_gpu: bool) -> bool:
    """Whether matrix products are computed in bfloat16 on this machine."""
    if zero.precision == "auto":
        return has_bfloat16(use_gpu=use_gpu)
    return zero.precision == "autocast"


def has_bfloat16(*, use_gpu: bool) -> bool:
    """Whether the hardware multiplies bfloat16 itself: Nvidia's from Ampere on, CPUs with AVX512-BF16."""
    if use_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def deepspeed_config(
    zero: ZeroConfig,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    accumulation: int,
    autocast: bool = False,
    universal: bool = False,
) -> dict[str, Any]:
    """The JSON that `deepspeed.initialize` reads.

    Args:
        zero: Sharding and precision.
        lr: Learning rate of groups that name none.
        betas: Decay of AdamW's two moments.
        weight_decay: Of groups that name none.
        accumulation: Forward passes per optimizer step.
        autocast: Compute matrix products in bfloat16, see `uses_autocast`.
        universal: Resume from a universal checkpoint, as when the number of workers has changed.
    """
    return {
        # Batches come ready from the stream, so DeepSpeed's sample counter counts forward passes.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": zero.gradient_clipping,
        "steps_per_print": 1_000_000_000,
        "bf16": {"enabled": False, "check_grad_overflow": False},
        # Of these modules weights and gradients travel in bfloat16; those of routers and the flow head do not.
        "torch_autocast": {
            "enabled": autocast,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [
                *(f"torch.nn.{name}" for name in ("Linear", "Conv1d", "Conv2d", "Conv3d")),
                "omnimri.models.backbone.AutocastExperts",
            ],
        },
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": lr,
                "betas": list(betas),
                "eps": 1e-8,
                "weight_decay": weight_decay,
                "torch_adam": zero.torch_adam,
            },
        },
        "zero_optimization": _zero_section(zero),
        "checkpoint": {"load_universal": universal},
    }


def _zero_section(zero: ZeroConfig) -> dict[str, Any]:
    # Overlap of reduction and backward gave NaN together with compilation (DeepSpeed #8061): off until proven on GPU.
    section: dict[str, Any] = {"stage": zero.stage, "overlap_comm": False}
    if zero.stage == 3:
        section["stage3_param_persistence_threshold"] = zero.persistence_threshold
    if zero.offload == "cpu":
        section["offload_optimizer"] = {"device": "cpu"}
        if zero.stage == 3:
            section["offload_param"] = {"device": "cpu"}
    return section
