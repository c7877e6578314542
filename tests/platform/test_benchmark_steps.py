"""Where a training step's time goes: parts add up, and each operator counts for the module that asked for it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from omnimri.jobs import benchmark as job
from omnimri.platform.benchmark import steps
from omnimri.platform.data.stream import SampleMaker, SourceRows
from omnimri.platform.training.schedule import build_schedule
from omnimri.platform.training.stages import PARTS
from tests.platform.shards_fakes import write_shards
from tests.platform.smallest import smallest_run
from tests.platform.training_fakes import FakeKit, fake_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]


@dataclass
class Event:
    """As much of a profiler's event as is read."""

    name: str
    own: float
    cpu_children: list[Event] = field(default_factory=list)
    sequence_nr: int = -1
    start: float = 0.0
    cpu_parent: Event | None = None
    self_device_time_total: float = 0.0

    def __post_init__(self) -> None:
        self.self_cpu_time_total = self.own
        self.time_range = SimpleNamespace(start=self.start)
        for child in self.cpu_children:
            child.cpu_parent = self


def _flat(events: list[Event]) -> list[Event]:
    return [found for event in events for found in (event, *_flat(event.cpu_children))]


def test_a_trace_of_known_times_is_shared_out() -> None:
    inner = Event("omnimri: vision: Attention", 5, [Event("aten::mm", 10, sequence_nr=7)])
    forward = Event("omnimri: vision: Swin", 10, [Event("aten::add", 5, sequence_nr=6), inner], start=2)
    backward = [
        Event("autograd::engine::evaluate_function: MmBackward0", 1, [Event("aten::mm", 19)], sequence_nr=7, start=3),
        Event("autograd::engine::evaluate_function: AccumulateGrad", 10, start=4),
    ]
    data = Event("omnimri: data", 20, [Event("aten::add", 10)], start=1)
    optimizer = Event("Optimizer.step#AdamW.step", 4, [Event("aten::add", 6)], start=5)
    found = steps.hot_spots(_flat([*backward, optimizer, forward, data]))
    assert found["model"] == {"vision": 0.5, "data": 0.3, "optimizer": 0.1, "elsewhere": 0.1}
    assert found["modules"]["vision: Attention"] == 0.35
    assert found["operators"]["aten::mm"] == 0.29
    assert found["operators"]["data"] == 0.3
    assert found["operators"]["Python"] == 0.19
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found.values())


class _Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class _Objective(nn.Module):
    """Three layers of one part, one of another, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {"vision": nn.Linear(4, 4).requires_grad_(False), "backbone": _Backbone(), "flow_head": nn.Linear(4, 4)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts["flow_head"](self.parts["backbone"](self.parts["vision"](x))).square().sum()


def test_backward_operators_count_for_the_module_of_their_forward_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a trace of torch, with one unit for each derivative of a linear layer instead of its time."""
    monkeypatch.setattr(steps, "_own_us", lambda event: float(event.name == f"{steps._BACKWARD}AddmmBackward0"))
    objective = _Objective()
    with (
        steps.named_modules(objective, dict(objective.parts.items())),
        profile(activities=[ProfilerActivity.CPU]) as trace,
    ):
        objective(torch.ones(2, 4)).backward()
    found = steps.hot_spots(trace.events())
    assert found["modules"]["backbone: _Backbone"] == 0.75
    assert found["modules"]["flow_head: Linear"] == 0.25
    assert found["model"]["vision"] == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in objective.modules())


def _row(row: int) -> dict[str, Any]:
    return {"row": row}


def _sample(row: dict[str, Any], _: np.random.Generator) -> dict[str, Any]:
    return row


def test_rows_return_after_the_first_steps() -> None:
    schedule = build_schedule({"image": 0.5, "paired": 0.5}, {"image": 2, "paired": 8}, 12, seed=0)
    rows = SourceRows(rows=list(range(20)), load=_row, make=_sample)
    bench = SimpleNamespace(schedule=schedule, maker=SampleMaker(sources={"image": rows, "paired": rows}, seed=3))
    assert steps.let_rows_return(bench, 3) == {"image": 3, "paired": 2}
    seen: dict[str, list[set[int]]] = {"image": [], "paired": []}
    for slot in schedule.slots():
        seen[slot.source].append({bench.maker(slot.source, i)["row"] for i in slot.sample_indices(0, 1)})
    new, returned = set.union(*seen["image"][:3]), set.union(*seen["image"][3:])
    assert len(new) == 6
    assert returned == new


def test_parts_of_a_step_add_up_for_every_source_of_every_stage(tmp_path: Path) -> None:
    kit = FakeKit(steps_log=str(tmp_path / "log"))
    measured = steps.benchmark_steps(fake_run(tmp_path / "run", accumulation=2, validate_every=1), repeats=2, kit=kit)
    sources = {stage: set(found["sources"]) for stage, found in measured["stages"].items()}
    instructions = {"instruct.reconstruct", "instruct.segment", "instruct.text"}
    assert sources == {
        "vision": {"image", "image.slices"},
        "align": {"paired"},
        "multimodal": {"paired", *instructions},
        "instruct": instructions,
    }
    for found in measured["stages"].values():
        assert sum(source["share"] for source in found["sources"].values()) == pytest.approx(1, abs=1e-3)
        mixture = sum(source["share"] * source["step_ms"] for source in found["sources"].values())
        assert found["mixture_ms"] == pytest.approx(mixture, abs=0.2)
        for source in found["sources"].values():
            assert set(source["parts"]) == {"data", "forward", "backward", "optimizer"}
            assert sum(source["parts"].values()) == pytest.approx(source["step_ms"], abs=0.1)
            for kind in ("model", "modules", "operators", "functions"):
                assert sum(source[kind].values()) == pytest.approx(1, abs=1e-3)
    stage = measured["stages"]["align"]["sources"]["paired"]
    assert stage["first_epoch"]["step_ms"] > 0  # 12 rows, 4 in a step: one of them new after the warm-up
    assert {"align", "clip_head", "data", "optimizer"} <= set(stage["model"])
    batches = Path(kit.steps_log or "").read_text().count("batch")
    assert batches == (steps.WARMUP + 2 * 2 + 1) * sum(map(len, sources.values()))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_encoder_costs_nothing_where_it_is_frozen_and_has_seen_the_volumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the job, on the real model at its smallest: what was not called is not in the profile."""
    data, out = write_shards(tmp_path / "balls"), tmp_path / "steps.json"
    monkeypatch.setattr(job, "recipe", lambda preset, name, folders, run: smallest_run(folders[0], run))
    sets = ["--set", "train.rows_per_step.paired=1", "--set", "train.rows_per_step.instruct.text=1"]
    assert job.main(["steps", str(data), "--repeats", "1", "--out", str(out), *sets]) == 0
    measured = json.loads(out.read_text())
    profiles = {
        (stage, source): found["model"]
        for stage, stage_found in measured["stages"].items()
        for source, found in stage_found["sources"].items()
    }
    others = {"data", "optimizer", "objective", "elsewhere"}
    assert all(set(found) - others <= set(PARTS) for found in profiles.values())
    assert profiles["vision", "image"]["vision"] > 0
    assert "vision" not in profiles["align", "paired"]
    assert "vision" not in profiles["instruct", "instruct.text"]
    assert {"vision", "image_decoder", "backbone"} <= set(profiles["instruct", "instruct.reconstruct"])
    assert "image_decoder" not in profiles["instruct", "instruct.text"]


def test_no_steps_and_settings_that_are_not_there_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main(["steps", str(tmp_path), "--repeats", "0"]) == 1
    assert "repeats must be 1 or more, found 0" in capsys.readouterr().err
    assert job.main(["steps", str(tmp_path), "--set", "train.speed=9"]) == 1
    assert "unknown key" in capsys.readouterr().err
