"""Configuration of every part of the model, and the presets. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Swin Transformer over volumes; a slice is a volume of depth one (MONAI `SwinTransformer`)."""

    embed_dim: int
    """Channels after patch embedding; doubles at each of the three mergings."""
    depths: tuple[int, int, int, int]
    num_heads: tuple[int, int, int, int]
    window_size: tuple[int, int, int]
    """Attention window in tokens, `z y x`."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Voxels per patch, `z y x`."""
    token_level: Literal[1, 2, 4] = 4
    """Map of the pyramid whose places become visual tokens. 4 is the coarsest; at 2 a token has half its edge, at 1 a
    quarter, and holds the coarsest map's features of its place beside its own."""

    def __post_init__(self) -> None:
        if self.token_level not in (1, 2, 4):
            raise ValueError(f"VisionConfig.token_level must be 1, 2 or 4, found {self.token_level}.")

    @property
    def token_dim(self) -> int:
        coarsest = 8 * self.embed_dim
        return coarsest if self.token_level == 4 else coarsest + 2**self.token_level * self.embed_dim

    @property
    def token_stride(self) -> tuple[int, int, int]:
        """Voxels per visual token: patch size times the mergings before its map, which are three at most."""
        z, y, x = self.patch_size
        merged = 2 ** min(self.token_level, 3)
        return merged * z, merged * y, merged * x


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """`Qwen2MoeForCausalLM`: Qwen2.5 attention with mixture-of-experts feed-forward layers."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    shared_width: int
    """Feed-forward width of the shared expert (the dense width of the Qwen2.5 it may be upcycled from)."""
    num_experts: int
    experts_per_token: int
    expert_width: int
    vocab_size: int
    max_positions: int = 4096
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    """Base of the rotary positions; Qwen2.5 has a million."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMS norm."""

    def __post_init__(self) -> None:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token ({self.experts_per_token}) exceeds num_experts ({self.num_experts}); "
                "lower the first or raise the second."
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads}).")


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Small `Qwen2Model` that embeds text in stage 2."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    width: int


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """Turns the backbone's hidden states at the query tokens into the image decoder's condition."""

    num_queries: int
    num_layers: int
    dim: int
    """Width of one condition token, the cross-attention width of the image decoder."""


@dataclass(frozen=True, kw_only=True)
class ImageDecoderConfig:
    """Conditional U-Nets with bridges: reconstruction slice by slice, segmentation in two or three dimensions."""

    channels: tuple[int, ...]
    """Channels per level; the first works at the image's resolution."""
    num_heads: int
    """Of the cross-attention to the prompt at the coarsest level."""
    mask_channels: int = 8
    """Feature maps that the masks of several prompts about one slice share."""
    segment_dims: Literal[2, 3] = 2
    """2 segments slice by slice; 3 segments volumes, in windows that slide over them."""
    patch_shape: tuple[int, int, int] | None = None
    """Of a window, and of a patch in training: slices as they are, and pixels at the slice spacing; None takes 8 whole
    slices (`OmniMRIConfig.patch_shape`)."""
    patch_overlap: float = 0.5
    """Share of a window that the next one covers too."""
    flat_levels: int = 1
    """Finest levels whose convolutions and poolings stay in plane, since slices are thicker than pixels are wide:
    nnU-Net's rule is as many as it takes until they are less than twice as thick."""
    recon_noise: float = 0.05
    """Standard deviation s of the reconstruction bridge, in units of the slice's maximum."""
    segment_noise: float = 0.5
    """Standard deviation s of the segmentation bridge; masks live in [-1, 1]."""
    consistency_weight: float = 0.05
    """Regularisation of conjugate-gradient data consistency; larger trusts the network more."""
    consistency_steps: int = 4
    """Conjugate-gradient iterations inside each sampling step."""

    def __post_init__(self) -> None:
        if self.segment_dims not in (2, 3):
            raise ValueError(f"ImageDecoderConfig.segment_dims must be 2 or 3, found {self.segment_dims}.")
        if self.patch_shape is not None and (len(self.patch_shape) != 3 or min(self.patch_shape) < 1):
            raise ValueError(f"ImageDecoderConfig.patch_shape must be three sizes `z y x`, found {self.patch_shape}.")
        if not 0 <= self.patch_overlap < 1:
            raise ValueError(f"ImageDecoderConfig.patch_overlap must lie in [0, 1), found {self.patch_overlap}.")
        if self.segment_dims == 3 and not 1 <= self.flat_levels < len(self.channels):
            raise ValueError(
                f"ImageDecoderConfig.flat_levels must be 1 to {len(self.channels) - 1} (levels of `channels` but the "
                f"coarsest), found {self.flat_levels}."
            )


@dataclass(frozen=True, kw_only=True)
class FlowHeadConfig:
    """Per-token flow-matching head that predicts the next visual token in stage 3."""

    width: int
    depth: int
    repeats: int = 4
    """Draws of (t, noise) per token and step (MAR, arXiv 2406.11838)."""


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Grids the model sees; part of the preprocessing contract that every checkpoint carries."""

    volume_shape: tuple[int, int, int]
    """Voxels `z y x` of the volume that becomes visual tokens."""
    volume_spacing_mm: tuple[float, float, float]
    """Spacing `z y x`; widened where a volume would not fit."""
    slice_spacing_mm: float
    """In-plane spacing of the slices that the image decoder segments."""
    clip_percentiles: tuple[float, float] = (0.5, 99.5)
    """Foreground percentiles that bound the intensities before standardising."""
    sens_maps: Literal["acs", "espirit"] = "acs"
    """Coil maps of reconstruction, in training and in use (`physics.SENS_MAPS`). `espirit` takes 0.3 s for a slice of
    128 x 128 and 8 coils on two cores, but half a minute for 320 x 320 and 16: compress coils first."""

    @property
    def slice_shape(self) -> tuple[int, int]:
        """Pixels of a slice on the grid that rows of any matrix share: the volume's extent at the slice's spacing."""
        height, width = (
            round(size * mm / self.slice_spacing_mm)
            for size, mm in zip(self.volume_shape[1:], self.volume_spacing_mm[1:], strict=True)
        )
        return height, width


@dataclass(frozen=True, kw_only=True)
class OmniMRIConfig:
    """The whole model."""

    preset: str
    vision: VisionConfig
    backbone: BackboneConfig
    text_encoder: TextEncoderConfig
    connector: ConnectorConfig
    image_decoder: ImageDecoderConfig
    flow_head: FlowHeadConfig
    inputs: InputConfig
    embedding_dim: int = field(default=128)
    """Width of the joint image-text space of stage 2."""

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """Voxels `z y x` that the image decoder sees at once where it segments volumes."""
        return self.image_decoder.patch_shape or (8, *self.inputs.slice_shape)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OmniMRIConfig:
        """Rebuild from `asdict`, with lists (as JSON gives them) made tuples again."""
        parts = {name: part(**_tuples(values[name])) for name, part in _PARTS.items()}
        return cls(**{**values, **parts})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_PARTS = {
    "vision": VisionConfig,
    "backbone": BackboneConfig,
    "text_encoder": TextEncoderConfig,
    "connector": ConnectorConfig,
    "image_decoder": ImageDecoderConfig,
    "flow_head": FlowHeadConfig,
    "inputs": InputConfig,
}


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def tiny() -> OmniMRIConfig:
    """About 9 M parameters: four stages in minutes on two CPU cores."""
    return OmniMRIConfig(
        preset="tiny",
        vision=VisionConfig(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 8), window_size=(4, 4, 4)),
        backbone=BackboneConfig(
            hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, shared_width=512,
            num_experts=4, experts_per_token=2, expert_width=128, vocab_size=2048,
        ),
        text_encoder=TextEncoderConfig(hidden_size=128, num_layers=2, num_heads=2, num_kv_heads=2, width=256),
        connector=ConnectorConfig(num_queries=16, num_layers=1, dim=128),
        image_decoder=ImageDecoderConfig(channels=(16, 32, 48, 64, 96), num_heads=4),
        flow_head=FlowHeadConfig(width=128, depth=2),
        inputs=InputConfig(volume_shape=(24, 56, 48), volume_spacing_mm=(6.0, 4.0, 4.0), slice_spacing_mm=2.0),
    )  # fmt: skip


def tiny_long() -> OmniMRIConfig:
    """`tiny` with visual tokens of half the edge, seven times as many: meant for text that tells of lesions."""
    model = tiny()
    return replace(model, preset="tiny-long", vision=replace(model.vision, token_level=2))


def small() -> OmniMRIConfig:
    """Qwen2.5-0.5B shape: about 1.2 B parameters, one 24 GB GPU."""
    return OmniMRIConfig(
        preset="small",
        vision=VisionConfig(embed_dim=48, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=(4, 7, 7)),
        backbone=BackboneConfig(
            hidden_size=896, num_layers=24, num_heads=14, num_kv_heads=2, shared_width=4864,
            num_experts=8, experts_per_token=2, expert_width=1280, vocab_size=151_936, max_positions=32_768,
            rope_theta=1e6,
        ),
        text_encoder=TextEncoderConfig(hidden_size=896, num_layers=12, num_heads=14, num_kv_heads=2, width=4864),
        connector=ConnectorConfig(num_queries=32, num_layers=4, dim=512),
        image_decoder=ImageDecoderConfig(channels=(48, 96, 192, 384, 512), num_heads=8, mask_channels=32),
        flow_head=FlowHeadConfig(width=512, depth=3),
        inputs=InputConfig(volume_shape=(32, 192, 192), volume_spacing_mm=(5.0, 1.25, 1.25), slice_spacing_mm=1.0),
        embedding_dim=512,
    )  # fmt: skip


def base() -> OmniMRIConfig:
    """Qwen2.5-1.5B shape: about 4 B parameters, one or two 80 GB GPUs."""
    return OmniMRIConfig(
        preset="base",
        vision=VisionConfig(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), window_size=(4, 7, 7)),
        backbone=BackboneConfig(
            hidden_size=1536, num_layers=28, num_heads=12, num_kv_heads=2, shared_width=8960,
            num_experts=8, experts_per_token=2, expert_width=2304, vocab_size=151_936, max_positions=32_768,
            rope_theta=1e6,
        ),
        text_encoder=TextEncoderConfig(hidden_size=896, num_layers=24, num_heads=14, num_kv_heads=2, width=4864),
        connector=ConnectorConfig(num_queries=64, num_layers=6, dim=768),
        image_decoder=ImageDecoderConfig(channels=(64, 128, 256, 512, 768), num_heads=12, mask_channels=64),
        flow_head=FlowHeadConfig(width=1024, depth=3),
        inputs=InputConfig(volume_shape=(32, 224, 224), volume_spacing_mm=(5.0, 1.0, 1.0), slice_spacing_mm=0.8),
        embedding_dim=512,
    )  # fmt: skip


def seven_b() -> OmniMRIConfig:
    """Qwen2.5-7B shape: about 14 B parameters, eight 80 GB GPUs under ZeRO-3."""
    return OmniMRIConfig(
        preset="7b",
        vision=VisionConfig(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=(4, 7, 7)),
        backbone=BackboneConfig(
            hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4, shared_width=18_944,
            num_experts=8, experts_per_token=2, expert_width=2560, vocab_size=152_064, max_positions=32_768,
            tie_embeddings=False, rope_theta=1e6,
        ),
        text_encoder=TextEncoderConfig(hidden_size=1536, num_layers=28, num_heads=12, num_kv_heads=2, width=8960),
        connector=ConnectorConfig(num_queries=64, num_layers=12, dim=1024),
        image_decoder=ImageDecoderConfig(channels=(96, 192, 384, 768, 1024), num_heads=16, mask_channels=128),
        flow_head=FlowHeadConfig(width=1536, depth=6),
        inputs=InputConfig(volume_shape=(48, 256, 256), volume_spacing_mm=(3.5, 0.9, 0.9), slice_spacing_mm=0.7),
        embedding_dim=512,
    )  # fmt: skip


PRESETS = {"tiny": tiny, "tiny-long": tiny_long, "small": small, "base": base, "7b": seven_b}


def preset(name: str) -> OmniMRIConfig:
    """The model configuration of that name.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"Preset {name!r} is unknown; known: {', '.join(PRESETS)}.")
    return PRESETS[name]()
