"""Whole runs by name: model, stages and hardware. `--set` changes single fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omnimri.models.config import preset
from omnimri.platform.data.stream import StreamConfig
from omnimri.platform.training.config import DEFAULT_WEIGHTS, RunConfig, ScalingConfig, StageConfigs, TrainConfig
from omnimri.platform.training.zero import ZeroConfig

Folder = Path | str


def tiny(name: str, data: Sequence[Folder], out: Folder) -> RunConfig:
    """All four stages on two CPU cores, in minutes; for the built-in corpus.

    Command: `omnimri train --stage all --preset tiny --data DIR --out RUNDIR`
    """
    rows: dict[str, int] = {
        "image": 2,
        "image.slices": 4,
        "image.labelled": 2,
        "image.labelled_slices": 2,
        "paired": 8,
        "paired.interleaved": 3,
        "paired.slices": 4,
        "instruct.reconstruct": 2,
        "instruct.segment": 2,
        "instruct.text": 6,
        "instruct.study": 3,
    }
    # Volumes cost four times what slices cost; masks and images need more steps than words.
    weights: dict[str, float] = {
        "image": 0.3,
        "image.slices": 0.7,
        "image.labelled": 0.0,
        "image.labelled_slices": 0.0,
        "paired": 1.0,
        "paired.interleaved": 0.0,
        "paired.slices": 0.0,
        "instruct.reconstruct": 0.34,
        "instruct.segment": 0.51,
        "instruct.text": 0.15,
        "instruct.study": 0.0,
    }
    common: dict[str, Any] = {"rows_per_step": rows, "weights": weights, "log_every": 10, "checkpoint_every": 100}
    return RunConfig(
        name=name,
        model=preset("tiny"),
        data=_absolute(data),
        out=_absolute([out])[0],
        train=StageConfigs(
            vision=TrainConfig(steps=40, lr=1e-3, **common),
            align=TrainConfig(steps=100, lr=5e-4, weight_decay=0.1, **common),
            multimodal=TrainConfig(steps=60, lr=1e-3, weight_decay=0.1, **(common | {"weights": weights | _ONLY_TEXT})),
            instruct=TrainConfig(steps=520, lr=1e-3, lr_scale={"connector": 2.0, "image_decoder": 2.0}, **common),
        ),
    )


def tiny_long(name: str, data: Sequence[Folder], out: Folder) -> RunConfig:
    """All four stages on two CPU cores, in under two hours; for the built-in corpus with 200 patients or more.

    Command: `omnimri train --stage all --preset tiny-long --data DIR --out RUNDIR`
    """
    short = tiny(name, data, out)

    def longer(stage: TrainConfig, steps: int, **changes: Any) -> TrainConfig:
        return replace(stage, steps=steps, log_every=20, checkpoint_every=500, **changes)

    # Labels decide what the encoder tells of lesions: self-supervision sees too little of them in this time.
    vision = {"image": 0.05, "image.slices": 0.05, "image.labelled": 0.5, "image.labelled_slices": 0.4}
    instruct = {"instruct.reconstruct": 0.4, "instruct.segment": 0.35, "instruct.text": 0.25}
    return replace(
        short,
        model=preset("tiny-long"),
        train=StageConfigs(
            vision=longer(short.train.vision, 5000, lr=2e-3, weights=short.train.vision.weights | vision),
            align=longer(short.train.align, 200),
            multimodal=longer(short.train.multimodal, 200),
            instruct=longer(short.train.instruct, 1500, weights=short.train.instruct.weights | instruct),
        ),
        scaling=ScalingConfig(num_workers=2),
        view={"patches_per_sample": 8, "accelerations": (4, 8)},
    )


_ONLY_TEXT = {"instruct.reconstruct": 0.0, "instruct.segment": 0.0, "instruct.text": 1.0}
"""Stage 3 has no image decoder: its instructions are those with answers in text."""


def small(name: str, data: Sequence[Folder], out: Folder) -> RunConfig:
    """Qwen2.5-0.5B shape on one 24 GB GPU, ZeRO-1 with the optimizer's state on the CPU.

    Command: `omnimri train --stage all --preset small --data DIR --out RUNDIR`
    """
    return _large(name, "small", data, out, ZeroConfig(stage=1, precision="auto", offload="cpu"), workers=1)


def base(name: str, data: Sequence[Folder], out: Folder) -> RunConfig:
    """Qwen2.5-1.5B shape on two 80 GB GPUs, ZeRO-2.

    Command: `omnimri train --stage all --preset base --data DIR --out RUNDIR`
    """
    return _large(name, "base", data, out, ZeroConfig(stage=2, precision="auto"), workers=2)


def seven_b(name: str, data: Sequence[Folder], out: Folder) -> RunConfig:
    """Qwen2.5-7B shape on eight 80 GB GPUs, ZeRO-3.

    Command: `omnimri train --stage all --preset 7b --data DIR --out RUNDIR`
    """
    return _large(name, "7b", data, out, ZeroConfig(stage=3, precision="auto"), workers=8)


RECIPES: dict[str, Callable[[str, Sequence[Folder], Folder], RunConfig]] = {
    "tiny": tiny,
    "tiny-long": tiny_long,
    "small": small,
    "base": base,
    "7b": seven_b,
}


def recipe(preset_name: str, name: str, data: Sequence[Folder], out: Folder) -> RunConfig:
    """The run of a preset.

    Raises:
        ValueError: With the known presets.
    """
    if preset_name not in RECIPES:
        raise ValueError(f"Preset {preset_name!r} is unknown; known: {', '.join(RECIPES)}.")
    return RECIPES[preset_name](name, data, out)


def _large(
    name: str, preset_name: str, data: Sequence[Folder], out: Folder, zero: ZeroConfig, workers: int
) -> RunConfig:
    """A GPU run; learning rates and steps follow the reference systems (SimMIM, CLIP, LLaVA, MetaQuery)."""
    rows: dict[str, int] = {
        "image": 8 * workers,
        "image.slices": 8 * workers,
        "image.labelled": 2 * workers,
        "image.labelled_slices": 2 * workers,
        "paired": 16 * workers,
        "paired.interleaved": 4 * workers,
        "paired.slices": 4 * workers,
        "instruct.reconstruct": 4 * workers,
        "instruct.segment": 4 * workers,
        "instruct.text": 8 * workers,
        "instruct.study": 4 * workers,
    }
    common: dict[str, Any] = {
        "rows_per_step": rows,
        "log_every": 20,
        "checkpoint_every": 1000,
        "activation_checkpointing": True,
    }
    return RunConfig(
        name=name,
        model=preset(preset_name),
        data=_absolute(data),
        out=_absolute([out])[0],
        train=StageConfigs(
            vision=TrainConfig(steps=100_000, lr=4e-4, **common),
            align=TrainConfig(steps=20_000, lr=1e-3, weight_decay=0.1, lr_scale={"text_encoder": 0.01}, **common),
            multimodal=TrainConfig(
                steps=80_000,
                lr=1e-4,
                weight_decay=0.1,
                lr_scale={"backbone": 0.2},
                warmup_share=0.03,
                weights=dict(DEFAULT_WEIGHTS) | _ONLY_TEXT,
                **common,
            ),
            instruct=TrainConfig(
                steps=70_000, lr=1e-4, weight_decay=0.1, lr_scale={"backbone": 0.2}, warmup_share=0.03, **common
            ),
        ),
        zero=zero,
        view={"accelerations": list(range(2, 13)), "random_mask_share": 0.5},
        scaling=ScalingConfig(num_workers=workers, use_gpu=True, cpus_per_worker=4.0, max_failures=5),
        stream=StreamConfig(num_tasks=6, cpus_per_task=1.0, slots_per_segment=96, memory_mb=4096),
    )


def _absolute(folders: Sequence[Folder]) -> tuple[str, ...]:
    """Workers have another working directory."""
    return tuple(str(Path(folder).absolute()) for folder in folders)
