"""A small model, two sources and a corpus in memory, behind the seam that training uses."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omnimri.platform.data.stream import SourceRows, StreamConfig
from omnimri.platform.training.config import RunConfig, ScalingConfig, StageConfigs, TrainConfig
from omnimri.platform.training.stages import PARTS
from omnimri.platform.training.zero import ZeroConfig


@dataclass(frozen=True)
class FakeBackboneConfig:
    """A setting that a sweep searches; the fake model has no experts."""

    num_experts: int = 4


@dataclass(frozen=True)
class FakeModelConfig:
    """Width of every part."""

    dim: int = 8
    backbone: FakeBackboneConfig = field(default_factory=FakeBackboneConfig)


class FakeModel(nn.Module):
    """One linear map per part, so that every stage has something to learn."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.members = nn.ModuleDict({name: nn.Linear(dim, dim) for name in PARTS})


class FakeObjective(nn.Module):
    """Regression of a known linear map through two of the parts; the head depends on the source."""

    def __init__(self, model: FakeModel, heads: Sequence[str], noise: float) -> None:
        super().__init__()
        self.model = model
        self.heads = tuple(heads)
        self.noise = noise

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        head = self.heads[int(batch["head"]) % len(self.heads)]
        given = batch["x"] + self.noise * torch.randn_like(batch["x"])
        error = self.model.members[head](self.model.members[self.heads[0]](given)) - batch["y"]
        loss = error.square().mean()
        return {"loss": loss + 0 * error.sum(), "loss_square": loss.detach()}

    def pictures(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        return {"input": batch["x"].numpy()}


def _load(row: int) -> dict[str, Any]:
    return {"row": row}


@dataclass(frozen=True)
class _Make:
    dim: int
    head: int

    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        x = rng.standard_normal(self.dim).astype(np.float32)
        return {"x": x, "y": np.roll(x, 1 + self.head), "row": row["row"], "head": self.head}


@dataclass(frozen=True)
class FakeKit:
    """See `omnimri.platform.training.kit.Kit`."""

    num_rows: int = 12
    kill_marker: str | None = None
    """File that one worker makes just before it kills itself, once."""
    kill_at_batch: int = 0
    kill_after: str | None = None
    """File of Ray Train's that must name two checkpoints before the worker kills itself."""
    steps_log: str | None = None
    """File to which every collated batch of rank 0 adds a line."""
    heads: Mapping[str, Sequence[str]] = field(
        default_factory=lambda: {
            "vision": ("vision", "ssl_heads"),
            "align": ("align", "clip_head"),
            "multimodal": ("backbone", "flow_head"),
            "instruct": ("backbone", "connector", "image_decoder"),
        }
    )

    def kinds(self) -> Mapping[str, str]:
        return {
            "image": "image",
            "image.slices": "image",
            "paired": "paired",
            "instruct.reconstruct": "instruction",
            "instruct.segment": "instruction",
            "instruct.text": "instruction",
        }

    def data_digest(self, data: Sequence[str]) -> str:
        return "fake-" + "-".join(data)

    def licence_counts(self, data: Sequence[str]) -> Mapping[str, int]:
        return {"CC0-1.0": 64}

    def preprocessing(self, data: Sequence[str], config: Any) -> Mapping[str, Any]:
        return {"contract": "fake", "rows": {"fake": 64}}

    def excluded_counts(self, data: Sequence[str]) -> Mapping[str, int]:
        return {}

    def source_rows(self, source: str, data: Sequence[str], config: Any, split: str) -> SourceRows:
        rows = list(range(self.num_rows if split == "train" else 3))
        return SourceRows(rows=rows, load=_load, make=_Make(config.dim, sorted(self.kinds()).index(source)))

    def build_tokenizer(self, data: Sequence[str], config: Any, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")

    def load_tokenizer(self, folder: Path) -> Any:
        assert (folder / "tokenizer.json").is_file()
        return folder

    def create(self, config: Any, tokenizer: Any) -> nn.Module:
        return FakeModel(config.dim)

    def load(self, folder: Path, config: Any) -> nn.Module:
        model = FakeModel(config.dim)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model

    def objective(self, name: str, model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
        assert isinstance(model, FakeModel)
        return FakeObjective(model, self.heads[name], options.get("noise", 0.1))

    def collate(self, samples: list[dict[str, Any]], tokenizer: Any, model: nn.Module) -> dict[str, Any]:
        self._maybe_die()
        x, y = (torch.from_numpy(np.stack([s[key] for s in samples])) for key in ("x", "y"))
        return {"x": x, "y": y, "head": samples[0]["head"], "num_tokens": torch.tensor(x.numel())}

    def add_adapters(self, model: nn.Module, rank: int) -> None:
        raise AssertionError("the fake model has no adapters")

    def checkpoint_activations(self, model: nn.Module) -> None:
        raise AssertionError("the fake model keeps its activations")

    def parts(self, model: nn.Module) -> Mapping[str, nn.Module]:
        return dict(model.members.items())

    def save(self, model: nn.Module, folder: Path, tokenizer: Any, card: Mapping[str, Any]) -> None:
        (folder / "tokenizer").mkdir(parents=True)
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")
        (folder / "card.json").write_text(json.dumps(dict(card)))
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")

    def _maybe_die(self) -> None:
        if self.steps_log is None or torch.distributed.get_rank() != 0:
            return
        with Path(self.steps_log).open("a") as log:
            log.write("batch\n")
        if self.kill_marker is None or Path(self.kill_marker).exists():
            return
        if len(Path(self.steps_log).read_text().splitlines()) == self.kill_at_batch:
            while self.kill_after and _num_checkpoints(Path(self.kill_after)) < 2:
                pass
            Path(self.kill_marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)


def _num_checkpoints(snapshot: Path) -> int:
    """Checkpoints that Ray Train's controller has taken note of; 0 while it is writing."""
    try:
        return len(json.loads(snapshot.read_text())["checkpoint_results"])
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def fake_run(out: Path, *, workers: int = 0, zero: int = 0, **train: Any) -> RunConfig:
    """A run of a few steps on the fake model, the same settings for each stage."""
    settings = {
        "steps": 12,
        "lr": 1e-2,
        "rows_per_step": dict.fromkeys(FakeKit().kinds(), 4),
        "log_every": 4,
        "checkpoint_every": 4,
        "checkpoint_async": False,
    }
    stage = TrainConfig(**{**settings, **train})
    return RunConfig(
        name="fake",
        model=FakeModelConfig(),  # type: ignore[arg-type]
        data=("memory",),
        out=str(out),
        train=StageConfigs(vision=stage, align=stage, multimodal=stage, instruct=stage),
        zero=ZeroConfig(stage=zero, persistence_threshold=0),  # type: ignore[arg-type]
        scaling=ScalingConfig(num_workers=workers, threads_per_worker=1),
        stream=StreamConfig(num_tasks=0, prefetch=0),
    )
