"""Configuration of a training run: the whole of it is recorded with the run and stands in its checkpoints."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omnimri.models.config import OmniMRIConfig
from omnimri.platform.data.shards import check_flags
from omnimri.platform.data.stream import StreamConfig
from omnimri.platform.training.stages import KINDS, PARTS, STAGES, Stage, stage_named
from omnimri.platform.training.zero import ZeroConfig

DEFAULT_WEIGHTS: Mapping[str, float] = {
    "image": 0.5,
    "image.slices": 0.5,
    "image.labelled": 0.0,
    "image.labelled_slices": 0.0,
    "paired": 1.0,
    "paired.interleaved": 0.0,
    "paired.slices": 0.0,
    "instruct.reconstruct": 1.0,
    "instruct.segment": 1.0,
    "instruct.text": 1.0,
    "instruct.study": 0.0,
}

DEFAULT_EXCLUDED = ("small matrix", "near copy")
"""Thumbnails, and volumes that another patient of the split has already; noise and ghosts are part of the world."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage's optimisation and data mixture."""

    steps: int
    """Optimizer steps."""
    lr: float
    """Largest learning rate, reached after the warm-up."""
    rows_per_step: dict[str, int]
    """Samples per forward pass of each source, summed over all workers."""
    weights: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    """Weight of each source among those of its kind; one that is 0, or not named, is left out."""
    ratio: dict[str, float] | None = None
    """Share of the forward passes by kind of data; None keeps the stage's (Table 2 of the paper)."""
    also_trains: tuple[str, ...] = ()
    """Parts of the model that learn beside those of the stage, for example `vision` in the stages after the first."""
    accumulation: int = 1
    """Forward passes per optimizer step; each has one source, the next may have another."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Factor on the learning rate by part of the model; parts not named have 1."""
    warmup_share: float = 0.05
    """Share of the steps in which the learning rate rises linearly from 0."""
    final_lr_share: float = 0.1
    """Share of `lr` that the cosine ends at."""
    weight_decay: float = 0.05
    """Of matrices; norms, biases, embeddings and routers have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two moments."""
    objective: dict[str, Any] = field(default_factory=dict)
    """Options handed to the stage's objective."""
    seed: int = 0
    """Of the order of the data, the augmentations and the noise."""
    log_every: int = 10
    """Steps between two records in the tracker."""
    checkpoint_every: int = 100
    """Steps between two checkpoints: what a killed worker costs, plus those of the seconds in which Ray takes note."""
    checkpoint_async: bool = True
    """Upload periodic checkpoints while training goes on; the last is always awaited."""
    validate_every: int | None = None
    """Steps between two looks at held-out rows; None never looks."""
    validate_batches: int = 1
    """Batches of each source that a look takes, always the same ones."""
    activation_checkpointing: bool = False
    """Keep only the inputs of each layer and compute the rest again in the backward pass: less memory, a third more
    time, the same gradients."""
    ema_decay: float | None = None
    """Decay of the average of the weights over the steps, of which the model folder is then made; None has none."""
    lora_rank: int | None = None
    """Rank of the updates of the backbone (LoRA), which is frozen but for them and published with them merged; None
    trains all of it. Stages that do not train the backbone have no use for it."""
    checkpoint_frozen: bool = True
    """Keep parameters that do not learn in the checkpoint too; without them it is smaller."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig.{name} must be at least 1, found {getattr(self, name)}.")
        if self.lr <= 0:
            raise ValueError(f"TrainConfig.lr must be positive, found {self.lr}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"TrainConfig.ema_decay must lie in [0, 1) or be none, found {self.ema_decay}.")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"TrainConfig.lora_rank must be 1 or more, or none; found {self.lora_rank}.")
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"TrainConfig.warmup_share must lie in [0, 1), found {self.warmup_share}.")
        if unknown := set(self.also_trains) - set(PARTS):
            raise ValueError(f"TrainConfig.also_trains: unknown parts {sorted(unknown)}; known: {list(PARTS)}.")
        if self.ratio is not None and (unknown := set(self.ratio) - set(KINDS)):
            raise ValueError(f"TrainConfig.ratio: unknown kinds {sorted(unknown)}; known: {list(KINDS)}.")

    @property
    def num_slots(self) -> int:
        """Forward passes of the whole stage on one worker."""
        return self.steps * self.accumulation

    def lr_factor(self, step: int) -> float:
        """Factor on every learning rate at optimizer step `step` (from 0): linear warm-up, then cosine."""
        warmup = round(self.steps * self.warmup_share)
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.final_lr_share + (1 - self.final_lr_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def trained_parts(self, stage: Stage) -> tuple[str, ...]:
        """Parts of the model that learn."""
        return stage.trained_parts(self.also_trains)

    def shares(self, stage: Stage, kinds: Mapping[str, str]) -> dict[str, float]:
        """Share of the forward passes by source.

        Args:
            stage: Whose ratio of the kinds holds unless `ratio` is set.
            kinds: Kind of every known source.
        """
        ratio = stage.ratio if self.ratio is None else self.ratio
        if unknown := sorted(name for name, weight in self.weights.items() if weight and name not in kinds):
            raise ValueError(f"TrainConfig.weights: unknown sources {unknown}; known: {sorted(kinds)}.")
        shares: dict[str, float] = {}
        for kind in KINDS:
            members = {name: w for name, w in self.weights.items() if w and kinds[name] == kind}
            if ratio.get(kind, 0.0) and not members:
                raise ValueError(
                    f"Stage {stage.name!r} wants {ratio[kind]:.0%} {kind} data, but no source of that kind has a "
                    f"weight in TrainConfig.weights; known: {sorted(n for n, k in kinds.items() if k == kind)}."
                )
            shares |= {name: ratio.get(kind, 0.0) * w / sum(members.values()) for name, w in members.items()}
        return {name: share for name, share in shares.items() if share > 0}


@dataclass(frozen=True, kw_only=True)
class StageConfigs:
    """A `TrainConfig` for each stage."""

    vision: TrainConfig
    align: TrainConfig
    multimodal: TrainConfig
    instruct: TrainConfig


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Workers and what each may use."""

    num_workers: int = 1
    """Ray Train workers; 0 trains in the calling process, without Ray Train."""
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    """Logical CPUs that Ray reserves for one worker."""
    threads_per_worker: int | None = None
    """Threads of torch in one worker; None divides the machine's cores among the workers."""
    max_failures: int = 2
    """Times that a run is restarted from its last checkpoint after a worker has died; -1 is without end."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(f"ScalingConfig.num_workers must be 0 or more, found {self.num_workers}.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: the model, the data, and every stage."""

    name: str
    """Resume key: submitting the same name again goes on where the run stopped."""
    model: OmniMRIConfig
    data: tuple[str, ...]
    """Folders of shards, as `omnimri ingest` writes them."""
    out: str
    """Folder of the run: checkpoints, models and results of all stages."""
    train: StageConfigs
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    licences: str = "any"
    """Which volumes may be used: `any`, `commercial-ok`, or licences by name, separated by commas."""
    hold_out: dict[str, Any] = field(default_factory=dict)
    """Patients who have a volume with these values are left out, for example `{"vendor": "Philips"}`."""
    exclude_flags: tuple[str, ...] = DEFAULT_EXCLUDED
    """Volumes that intake flagged so are left out, of `omnimri.platform.data.schema.FLAGS`; what is left out is counted
    in the log and in the model's card."""
    exclude_generated: bool = False
    """Train without what a model wrote about the volumes (`omnimri annotate`), to compare with and without."""
    view: dict[str, Any] = field(default_factory=dict)
    """How samples are drawn from rows: fields of `omnimri.platform.data.views.ViewOptions` that differ from their
    defaults, for example `{"question_share": 0.0, "volumes_per_sequence": 2}`."""
    tokenizer: str | None = None
    """Local folder of a Qwen2.5 checkpoint whose tokenizer a new model takes, with our special tokens in rows of the
    vocabulary that it leaves free; None trains a byte-level BPE on the texts of the training volumes."""
    backbone: str | None = None
    """Local folder of a mixture of experts, as `omnimri upcycle` writes it, whose weights and tokenizer a new model
    takes; None begins with a fresh backbone."""
    vision_weights: str | None = None
    """File of a published MONAI Swin encoder (`model_swinvit.pt`, or a SwinUNETR checkpoint): a new model's encoder
    takes what has its name and shape, and the log says what."""
    pack_length: int | None = None
    """Tokens of a row that several short sequences share, each computed as if alone; None gives each its own row. Only
    speed and memory depend on it."""
    tracking_uri: str | None = None
    """MLflow's; None keeps a database in the run's folder."""

    def __post_init__(self) -> None:
        check_flags(self.exclude_flags)
        if self.pack_length is not None and self.pack_length < 1:
            raise ValueError(f"RunConfig.pack_length must be 1 or more, or none; found {self.pack_length}.")
        if self.tokenizer is not None and self.backbone is not None:
            raise ValueError(
                "RunConfig.tokenizer must be none with RunConfig.backbone, whose folder holds the tokenizer."
            )
        if self.zero.offload == "cpu" and self.zero.stage >= 2:
            accumulating = [name for name in STAGES if self.stage(name).accumulation > 1]
            if accumulating:
                # Measured: with several sources, DeepSpeed 0.19 loses gradients of all but the last forward pass.
                raise ValueError(
                    f"TrainConfig.accumulation must be 1 with ZeroConfig.offload='cpu' at ZeRO stage "
                    f"{self.zero.stage}; found more for {accumulating}. Raise rows_per_step, or use offload='none'."
                )

    def stage(self, name: str) -> TrainConfig:
        """Settings of one stage."""
        return getattr(self.train, stage_named(name).name)

    def folder(self, stage: str) -> Path:
        """Where a stage keeps its model, its result and its record."""
        return Path(self.out).absolute() / stage

    def stage_settings(self, stage: str) -> dict[str, Any]:
        """Everything that decides what a stage computes, and nothing of where it runs."""
        return {
            "model": _model_settings(self.model),
            "train": {
                name: value
                for name, value in _plain(asdict(self.stage(stage))).items()
                if name not in _OPERATIONAL and (name, value) not in _WITHOUT
            },
            "precision": self.zero.precision,
            "gradient_clipping": self.zero.gradient_clipping,
            **({"view": _plain(self.view)} if self.view else {}),
        }


_OPERATIONAL = {
    "log_every", "checkpoint_every", "checkpoint_async", "checkpoint_frozen", "validate_every", "validate_batches",
    "activation_checkpointing",
}  # fmt: skip
"""Fields of `TrainConfig` that may change between a start and a resume."""

_WITHOUT: tuple[tuple[str, Any], ...] = (("ema_decay", None), ("lora_rank", None), ("also_trains", []))
"""Fields that say nothing where they are not used: settings from before there was such a field compare equal."""


_OF_VOLUMES = ("segment_dims", "patch_shape", "patch_overlap", "flat_levels")
"""Fields of `ImageDecoderConfig` that say nothing of a decoder of two dimensions, as all once were."""


def _model_settings(model: OmniMRIConfig) -> dict[str, Any]:
    settings = _plain(asdict(model))
    decoder = settings.get("image_decoder", {})
    if decoder.get("segment_dims") == 2:
        settings["image_decoder"] = {name: value for name, value in decoder.items() if name not in _OF_VOLUMES}
    return settings


def expand_overrides(assignments: Sequence[str], stages: Sequence[str]) -> list[str]:
    """Write `train.lr=1e-4` out for each of the stages at hand, and `data.licences=any` as `licences=any`."""
    expanded = []
    for assignment in assignments:
        head, _, rest = assignment.partition(".")
        if head == "data" and rest:  # the settings of the data stand at the top
            expanded.append(rest)
        elif head == "train" and rest.partition(".")[0] not in STAGES:
            expanded += [f"train.{stage}.{rest}" for stage in stages]
        else:
            expanded.append(assignment)
    return expanded


def digest(settings: Any) -> str:
    """Short hash of plain settings; equal settings, equal hash."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _plain(values: Any) -> Any:
    """Tuples as lists, so that settings compare equal with their JSON."""
    return json.loads(json.dumps(values, default=str))
