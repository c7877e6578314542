"""The real model at its smallest, and a run of it on CPU."""

from dataclasses import replace
from pathlib import Path

from omnimri.models.config import (
    BackboneConfig,
    ConnectorConfig,
    FlowHeadConfig,
    ImageDecoderConfig,
    InputConfig,
    OmniMRIConfig,
    TextEncoderConfig,
    VisionConfig,
)
from omnimri.platform.data.stream import StreamConfig
from omnimri.platform.training.config import RunConfig, ScalingConfig, StageConfigs
from omnimri.platform.training.recipes import recipe
from omnimri.platform.training.stages import STAGES
from omnimri.platform.training.zero import ZeroConfig

SMALLEST = OmniMRIConfig(
    preset="smallest",
    vision=VisionConfig(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), window_size=(2, 2, 2)),
    backbone=BackboneConfig(
        hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, shared_width=64, num_experts=4, experts_per_token=2,
        expert_width=32, vocab_size=512,
    ),
    text_encoder=TextEncoderConfig(hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, width=32),
    connector=ConnectorConfig(num_queries=4, num_layers=1, dim=32),
    image_decoder=ImageDecoderConfig(channels=(8, 16), num_heads=2),
    flow_head=FlowHeadConfig(width=32, depth=1),
    inputs=InputConfig(volume_shape=(8, 32, 32), volume_spacing_mm=(12.0, 4.0, 4.0), slice_spacing_mm=4.0),
    embedding_dim=16,
)  # fmt: skip


def smallest_run(data: Path, out: Path, *, workers: int = 0, zero: int = 0) -> RunConfig:
    run = recipe("tiny", "smallest", [data], out)
    stages = {
        name: replace(
            run.stage(name), steps=6, rows_per_step=dict.fromkeys(run.stage(name).rows_per_step, 2), log_every=3
        )
        for name in STAGES
    }
    return replace(
        run,
        model=SMALLEST,
        train=StageConfigs(**stages),
        zero=ZeroConfig(stage=zero, persistence_threshold=0),  # type: ignore[arg-type]
        scaling=ScalingConfig(num_workers=workers, threads_per_worker=1),
        stream=StreamConfig(num_tasks=0, prefetch=1),
    )
