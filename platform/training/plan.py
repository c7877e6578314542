"""What a run of a preset needs on given hardware: parameters, memory per worker, work per step; and whether it fits.

Model states are counted as our training holds them: float32 weights, gradients, a master copy that DeepSpeed keeps,
and AdamW's two moments. `estimate_zero2_model_states_mem_needs` and its like of ZeRO-3 count 16-bit weights, which is
the only difference. Activations and work are estimates: matrix products, attention and what autograd keeps of them.
"""

# H backbone width, L its layers, S tokens of a sequence, E experts

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from omnimri.models.backbone import add_adapters
from omnimri.models.config import OmniMRIConfig, preset
from omnimri.models.omnimri import OmniMRI
from omnimri.platform.training.stages import PARTS, stage_named

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2
OPTIMIZER_BYTES = 12
"""Per parameter that learns: the master copy and AdamW's two moments."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Hardware, and how it is used."""

    gpus: int
    gpus_per_node: int = 8
    gpu_memory_gb: float = 80.0
    """Memory of one GPU in GiB."""
    zero: int = 3
    offload: Literal["none", "cpu"] = "none"
    """`cpu` keeps the optimizer's state, under ZeRO-3 the weights too, in the host's memory."""
    stage: str = "instruct"
    also_trains: tuple[str, ...] = ()
    """Parts that learn beside those of the stage, as `TrainConfig.also_trains` has them."""
    lora_rank: int | None = None
    """As `TrainConfig.lora_rank`: the backbone is frozen but for adapters of this rank."""
    micro_batch: int = 4
    """Sequences per forward pass on one GPU."""
    text_tokens: int = 512
    """Of one sequence, beside the visual tokens of its volume."""
    checkpointing: bool = True
    """Activations are computed again in the backward pass."""
    reserve: float = 0.1
    """Share of the memory left for the allocator, the libraries and the buckets of communication."""
    segment_dims: Literal[2, 3] = 2
    """Of the image decoder that segments (`ImageDecoderConfig.segment_dims`)."""
    peak_tflops: float = 312.0
    """Dense bfloat16 products of one GPU: 312 of an A100, 989 of an H100."""
    utilisation: float = 0.35
    """Share of the peak that training reaches: an assumption, measure it."""

    def __post_init__(self) -> None:
        stage_named(self.stage)
        if unknown := set(self.also_trains) - set(PARTS):
            raise ValueError(f"PlanConfig.also_trains: unknown parts {sorted(unknown)}; known: {list(PARTS)}.")
        for name in ("gpus", "gpus_per_node", "micro_batch", "text_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"PlanConfig.{name} must be at least 1, found {getattr(self, name)}.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"PlanConfig.lora_rank must be 1 or more, or none; found {self.lora_rank}.")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"PlanConfig.zero must be 0, 1, 2 or 3, found {self.zero}.")
        if self.offload == "cpu" and self.zero == 0:
            raise ValueError("PlanConfig.offload='cpu' needs PlanConfig.zero 1, 2 or 3, found 0.")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"PlanConfig.utilisation must lie in (0, 1], found {self.utilisation}.")

    @property
    def learning(self) -> tuple[str, ...]:
        """Parts of the model that hold gradients and optimizer state."""
        return stage_named(self.stage).trained_parts(self.also_trains)

    @property
    def is_adapted(self) -> bool:
        """Whether adapters learn in the place of the backbone."""
        return self.lora_rank is not None and "backbone" in self.learning


@dataclass(frozen=True)
class Counts:
    """Parameters of a model."""

    parts: Mapping[str, int]
    active: int
    """Of the backbone, that one token goes through."""
    largest: int
    """Of the largest module that ZeRO-3 gathers at once: of a layer with experts all of them."""
    adapters: int
    """Of the backbone's adapters, for each rank."""

    def added(self, plan: PlanConfig) -> int:
        """Parameters of adapters."""
        return self.adapters * (plan.lora_rank or 0) if plan.is_adapted else 0

    def learning(self, plan: PlanConfig) -> int:
        """Parameters that hold gradients and optimizer state."""
        whole = sum(self.parts[name] for name in plan.learning if not (plan.is_adapted and name == "backbone"))
        return whole + self.added(plan)


def count(config: OmniMRIConfig) -> Counts:
    """Count the parameters of the model, which is built without memory (on the meta device)."""
    with torch.device("meta"):
        model = OmniMRI(config)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts().items()}
    experts = sum(p.numel() for name, p in model.backbone.named_parameters() if ".experts." in name)
    idle = experts * (config.backbone.num_experts - config.backbone.experts_per_token) // config.backbone.num_experts
    layer = sum(p.numel() for p in model.backbone.model.layers[0].mlp.parameters())
    embedding = model.backbone.get_input_embeddings().weight.numel()
    add_adapters(model.backbone, rank=1)
    adapters = sum(p.numel() for p in model.backbone.parameters()) - parts["backbone"]
    return Counts(parts, parts["backbone"] - idle, max(layer, embedding), adapters)


def model_states(
    total: int, learning: int, largest: int, *, zero: int, workers: int, offload: bool = False,
    weight_bytes: int = FLOAT32,
) -> dict[str, float]:  # fmt: skip
    """Bytes of weights, gradients and optimizer state on one GPU.

    Args:
        total: Parameters of the model.
        learning: Those that the stage trains.
        largest: Those of the largest module that is gathered at once.
        zero: Stage of ZeRO: 1 spreads the optimizer's state, 2 the gradients too, 3 the weights too.
        workers: GPUs.
        offload: Optimizer state, under ZeRO-3 the weights too, in the host's memory.
        weight_bytes: Of a weight, and of its gradient.
    """
    sharded = {name: zero >= stage for name, stage in (("optimizer", 1), ("gradients", 2), ("weights", 3))}
    share = {name: 1 / workers if is_sharded else 1.0 for name, is_sharded in sharded.items()}
    # Without ZeRO, float32 weights are their own master copy.
    optimizer = OPTIMIZER_BYTES if zero else OPTIMIZER_BYTES - FLOAT32
    states = {
        "weights": weight_bytes * total * share["weights"],
        "gradients": weight_bytes * learning * share["gradients"],
        "optimizer": optimizer * learning * share["optimizer"],
        "gathered layer": float(FLOAT32 * largest) if zero == 3 else 0.0,
    }
    if offload:
        states["optimizer"] = 0.0
        if zero == 3:
            states["weights"] = 0.0
    return states


def sequence_tokens(config: OmniMRIConfig, plan: PlanConfig) -> int:
    """Visual and text tokens of one sequence."""
    shape, stride = config.inputs.volume_shape, config.vision.token_stride
    return math.prod(-(-size // step) for size, step in zip(shape, stride, strict=True)) + plan.text_tokens


def layer_activations(config: OmniMRIConfig, value_bytes: int = BFLOAT16) -> int:
    """Bytes per token that autograd keeps of one layer of the backbone, attention without its matrix of scores.

    Args:
        config: Of the model.
        value_bytes: Of what goes into a product; the residual stream and its norms are float32.
    """
    c = config.backbone
    kv = c.hidden_size // c.num_heads * c.num_kv_heads
    products = 2 * c.hidden_size + 2 * (c.hidden_size + kv) + 2 * c.hidden_size  # into and out of attention, rotated
    products += c.hidden_size + 4 * c.shared_width
    products += c.experts_per_token * (2 * c.hidden_size + 4 * c.expert_width)
    return value_bytes * products + FLOAT32 * 6 * c.hidden_size


def activations(config: OmniMRIConfig, plan: PlanConfig) -> dict[str, float]:
    """Bytes of activations on one GPU, by part."""
    c, tokens = config.backbone, plan.micro_batch * sequence_tokens(config, plan)
    found: dict[str, float] = {}
    if plan.stage in ("multimodal", "instruct"):
        layer = layer_activations(config) * tokens
        kept = c.num_layers * FLOAT32 * c.hidden_size * tokens + layer if plan.checkpointing else c.num_layers * layer
        found["backbone"] = kept
        # Logits in bfloat16, in float32 and their gradient, of the text alone.
        found["logits"] = plan.micro_batch * plan.text_tokens * c.vocab_size * (BFLOAT16 + 2 * FLOAT32)
    if plan.stage == "instruct":
        # Two blocks of two convolutions at each level, one of them twice as wide; input, normed and output of each.
        maps = [14 * channels * places for channels, places, _ in trunk_levels(config)]
        found["image decoder"] = plan.micro_batch * FLOAT32 * (max(maps) if plan.checkpointing else sum(maps))
    if "vision" in plan.learning:
        inputs = sum(width * places * depth for width, places, depth in _swin_levels(config))
        blocks = [30 * width * places * depth for width, places, depth in _swin_levels(config)]
        values = inputs + max(blocks) if plan.checkpointing else sum(blocks)
        views = 2 if plan.stage == "vision" else 1
        found["vision"] = views * plan.micro_batch * FLOAT32 * values
    return found


def _swin_levels(config: OmniMRIConfig) -> list[tuple[int, float, int]]:
    """Channels, places and blocks of each level of the encoder."""
    c = config.vision
    places = math.prod(size / patch for size, patch in zip(config.inputs.volume_shape, c.patch_size, strict=True))
    return [(c.embed_dim * 2**level, places / 8**level, depth) for level, depth in enumerate(c.depths)]


def trunk_levels(config: OmniMRIConfig) -> list[tuple[int, float, int]]:
    """Channels, places and voxels of a kernel at each level of the image decoder's larger trunk."""
    c = config.image_decoder
    if c.segment_dims == 2:
        places = math.prod(config.inputs.slice_shape)
        return [(channels, places / 4**level, 9) for level, channels in enumerate(c.channels)]
    places = math.prod(config.patch_shape)
    return [
        (channels, places / 4**level / 2 ** max(0, level - c.flat_levels), 9 if level < c.flat_levels else 27)
        for level, channels in enumerate(c.channels)
    ]


def step_flops(config: OmniMRIConfig, counts: Counts, plan: PlanConfig) -> float:
    """Floating-point operations of one sequence in training: two per weight and product, backward twice forward."""
    c, tokens = config.backbone, sequence_tokens(config, plan)
    passes = 4 if plan.checkpointing else 3
    swin = sum(2 * 12 * width**2 * places * depth for width, places, depth in _swin_levels(config))
    if plan.stage == "vision":
        return 2 * passes * swin
    if "vision" in plan.learning:
        swin *= passes
    if plan.stage == "align":
        return swin + 3 * 2 * (counts.parts["align"] * (tokens - plan.text_tokens)
                               + counts.parts["text_encoder"] * plan.text_tokens)  # fmt: skip
    lookup = c.vocab_size * c.hidden_size * (not c.tie_embeddings)
    attention = 4 * c.num_layers * c.hidden_size * tokens / 2  # per token, causal
    # Of frozen weights there is no gradient; it still flows through them.
    weights = (passes - plan.is_adapted) * 2 * (counts.active - lookup) + passes * 2 * counts.added(plan)
    total = swin + tokens * (weights + passes * attention)
    if plan.stage == "instruct":
        levels = trunk_levels(config)
        total += passes * sum(2 * 5 * taps * channels**2 * places for channels, places, taps in levels)
    return total


@dataclass(frozen=True)
class Plan:
    """What a run needs."""

    config: OmniMRIConfig
    settings: PlanConfig
    counts: Counts

    @property
    def memory(self) -> dict[str, float]:
        """Bytes on one GPU, by what they hold."""
        return self.states(self.settings.zero) | {
            f"activations, {name}": size for name, size in activations(self.config, self.settings).items()
        }

    def states(self, zero: int) -> dict[str, float]:
        """Bytes of model states on one GPU under a stage of ZeRO."""
        counts, settings = self.counts, self.settings
        total = sum(counts.parts.values()) + counts.added(settings)
        return model_states(total, counts.learning(settings), counts.largest, zero=zero, workers=settings.gpus,
                            offload=settings.offload == "cpu" and zero > 0)  # fmt: skip

    @property
    def needed(self) -> float:
        """Bytes on one GPU, in all."""
        return sum(self.memory.values())

    @property
    def usable(self) -> float:
        """Bytes that one GPU has for them."""
        return (1 - self.settings.reserve) * self.settings.gpu_memory_gb * GIB

    @property
    def fits(self) -> bool:
        return self.needed <= self.usable


def make_plan(preset_name: str, settings: PlanConfig) -> Plan:
    """The plan of a preset, whether it fits or not.

    Raises:
        ValueError: If there is no such preset.
    """
    config = preset(preset_name)
    config = replace(config, image_decoder=replace(config.image_decoder, segment_dims=settings.segment_dims))
    return Plan(config, settings, count(config))


def check_fits(plan: Plan) -> None:
    """Refuse a plan that does not fit.

    Raises:
        ValueError: With what is too large, and the first single change that makes it fit.
    """
    if plan.fits:
        return
    changes = (change for change, other in _changes(plan) if other.fits)
    largest = max(plan.memory, key=lambda name: plan.memory[name])
    raise ValueError(
        f"{plan.needed / GIB:.1f} GiB are needed on each GPU (most of it: {largest}, "
        f"{plan.memory[largest] / GIB:.1f} GiB), {plan.usable / GIB:.1f} GiB can be used of --gpu-memory "
        f"{plan.settings.gpu_memory_gb:g}. {next(changes, 'No single change helps: a smaller --preset.')}"
    )


def _changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Changes of one setting, what costs least first."""
    settings = plan.settings
    if not settings.checkpointing:
        yield "Leave out --no-checkpointing.", replace(plan, settings=replace(settings, checkpointing=True))
    for zero in range(settings.zero + 1, 4):
        yield f"Take --zero {zero}.", replace(plan, settings=replace(settings, zero=zero))
    for micro in sorted({1, settings.micro_batch // 2} - {0, settings.micro_batch}, reverse=True):
        yield f"Take --micro-batch {micro}.", replace(plan, settings=replace(settings, micro_batch=micro))
    for gpus in (settings.gpus * 2**n for n in range(1, 7)):
        yield f"Take --gpus {gpus}.", replace(plan, settings=replace(settings, gpus=gpus))
    if settings.zero and settings.offload == "none":
        yield "Take --offload cpu.", replace(plan, settings=replace(settings, offload="cpu"))
    for memory in (24, 40, 80, 141, 192):
        if memory > settings.gpu_memory_gb:
            yield f"Take --gpu-memory {memory}.", replace(plan, settings=replace(settings, gpu_memory_gb=memory))


def largest_micro_batch(plan: Plan) -> int:
    """Sequences per GPU that just fit; 0 if not one does."""
    fixed = sum(plan.states(plan.settings.zero).values())
    one = sum(activations(plan.config, replace(plan.settings, micro_batch=1)).values())
    return max(0, int((plan.usable - fixed) // one)) if one else plan.settings.micro_batch


def format_plan(plan: Plan) -> str:
    """The plan as text."""
    settings, counts = plan.settings, plan.counts
    total = sum(counts.parts.values()) + counts.added(settings)
    trains = [name for name in settings.learning if not (settings.is_adapted and name == "backbone")]
    tokens = sequence_tokens(plan.config, settings)
    flops = step_flops(plan.config, counts, settings)
    per_second = settings.gpus * settings.utilisation * settings.peak_tflops * 1e12 / flops
    lines = [
        f"{plan.config.preset}: stage {settings.stage}, {settings.gpus} GPUs of {settings.gpu_memory_gb:g} GiB, "
        f"ZeRO-{settings.zero}, offload {settings.offload}, activation checkpointing "
        f"{'on' if settings.checkpointing else 'off'}",
        "",
        "parameters in millions (* learn in this stage)",
    ]
    lines += [f"  {name + ('*' if name in trains else ''):<28}{n / 1e6:>12,.1f}" for name, n in counts.parts.items()]
    if adapters := counts.added(settings):
        lines.append(f"  {'adapters* (backbone frozen)':<28}{adapters / 1e6:>12,.1f}")
    lines += [f"  {'in all':<28}{total / 1e6:>12,.1f}",
              f"  {'backbone, active per token':<28}{counts.active / 1e6:>12,.1f}", ""]  # fmt: skip
    lines += ["model states on each GPU, GiB"]
    for zero in range(4):
        states = plan.states(zero)
        shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in states.items() if size)
        lines.append(f"  ZeRO-{zero}{sum(states.values()) / GIB:>10.1f}   {shown}")
    lines += ["", "activations on each GPU, GiB (estimate)"]
    for checkpointing in (True, False):
        found = activations(plan.config, replace(settings, checkpointing=checkpointing))
        shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in found.items())
        name = "checkpointed" if checkpointing else "kept"
        lines.append(f"  {name:<14}{sum(found.values()) / GIB:>6.1f}   {shown}")
    host = min(settings.gpus, settings.gpus_per_node) * FLOAT32 * total / GIB
    lines += [
        "",
        f"this plan: {plan.needed / GIB:.1f} of {plan.usable / GIB:.1f} GiB usable on each GPU",
        f"host memory of a node while the workers build the model: {host:.0f} GiB",
        f"batch: {settings.micro_batch} sequences on each GPU (at most {largest_micro_batch(plan)}), "
        f"{settings.micro_batch * settings.gpus} per step, {tokens} tokens each",
        f"work: {flops / 1e12:.1f} TFLOP per sequence; at {settings.utilisation:.0%} of {settings.peak_tflops:g} "
        f"TFLOP/s (assumed) {per_second:,.1f} sequences/s, {per_second * tokens:,.0f} tokens/s, "
        f"{settings.micro_batch * settings.gpus / per_second:.2f} s per step",
    ]
    return "\n".join(lines)
