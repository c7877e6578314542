"""Ablations of the smallest run: what a variant lacks, and that all answer the same cases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omnimri.models.omnimri import OmniMRI
from omnimri.platform.benchmark.ablation import UNTRAINED, AblationConfig, benchmark_ablation, train_variant
from omnimri.platform.data.shards import Shards
from omnimri.platform.evaluation.cases import MODEL
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.training.config import StageConfigs
from omnimri.platform.training.stages import STAGES
from tests.platform.shards_fakes import write_shards
from tests.platform.smallest import smallest_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]

SCORING = EvaluateConfig(
    split="val", tuning_split="test", tasks=("segment", "diagnose"), blank_tasks=(), max_volumes=2,
    bootstrap_samples=20, cases_per_task=1, num_workers=1,
)  # fmt: skip


def test_a_variant_lacks_what_it_is_named_after_and_answers_the_same_cases(tmp_path: Path) -> None:
    data, out = write_shards(tmp_path / "balls"), tmp_path / "out"
    run = smallest_run(data, tmp_path / "run")
    run = replace(run, train=StageConfigs(**{name: replace(run.stage(name), steps=1) for name in STAGES}))
    config = AblationConfig(run=run, evaluate=SCORING, variants=("without_vision", "dense"))
    summary = benchmark_ablation(config, Shards.open([str(data)]), out)

    def encoder(folder: Path) -> torch.Tensor:
        return load_file(folder / "vision" / "model.safetensors")["swin.patch_embed.proj.weight"]

    model = out / "without_vision" / "instruct" / "model"
    assert torch.equal(encoder(model), encoder(out / UNTRAINED))
    assert not torch.equal(encoder(model), encoder(tmp_path / "run" / "instruct" / "model"))
    assert {path.parent.name for path in (out / "dense").glob("*/result.json")} == {"multimodal", "instruct"}
    dense = OmniMRI.load(out / "dense" / "instruct" / "model").config.backbone
    assert dense.num_experts == dense.experts_per_token == run.model.backbone.experts_per_token

    scored = summary.tasks["segment"]["volume"]
    assert {scored[name]["dice_tissues"].n for name in (MODEL, *config.variants)} == {2}
    assert set(config.variants) <= {v.baseline for v in summary.verdicts if v.metric == "dice_tissues"}
    assert "OmniMRI without stage 1" in (out / "table.md").read_text()

    before = (out / "dense" / "instruct" / "result.json").stat().st_mtime_ns
    train_variant("dense", run, out)
    assert (out / "dense" / "instruct" / "result.json").stat().st_mtime_ns == before
