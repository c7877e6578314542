"""A run that is given an upcycled backbone begins with its weights and its tokenizer, and refuses another shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from omnimri.models.omnimri import OmniMRI
from omnimri.models.upcycling import UpcycleConfig, upcycle
from omnimri.platform.training.config import RunConfig
from omnimri.platform.training.trainer import run_stage
from tests.models.qwen_fakes import write_dense
from tests.platform.shards_fakes import write_shards
from tests.platform.smallest import smallest_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]


def run_on_upcycled(tmp_path: Path) -> tuple[Qwen2ForCausalLM, RunConfig]:
    dense = write_dense(tmp_path / "dense")
    shape = upcycle(tmp_path / "dense", tmp_path / "moe", UpcycleConfig(num_experts=4, expert_width=32))
    run = smallest_run(write_shards(tmp_path / "balls"), tmp_path / "out")
    return dense, replace(run, model=replace(run.model, backbone=shape), backbone=str(tmp_path / "moe"))


def test_the_first_stage_leaves_the_dense_function_for_the_later_ones(tmp_path: Path) -> None:
    dense, run = run_on_upcycled(tmp_path)
    result = run_stage("vision", run)
    model = OmniMRI.load(result.model_folder)
    ids = torch.tensor([[5, 300, 17, 17, 2, 401, 90, 33]])
    with torch.no_grad():
        assert torch.equal(model.backbone.eval()(input_ids=ids).logits, dense(input_ids=ids).logits)
    with pytest.raises(ValueError, match="settings"):
        run_stage("vision", replace(run, backbone=None))


def test_a_backbone_of_another_shape_is_refused_with_the_settings_that_fit(tmp_path: Path) -> None:
    _, run = run_on_upcycled(tmp_path)
    backbone = replace(run.model.backbone, num_layers=3, rope_theta=1e4)
    with pytest.raises(ValueError, match=r"--set model.backbone.num_layers=2 --set model.backbone.rope_theta=1000000"):
        run_stage("vision", replace(run, model=replace(run.model, backbone=backbone)))


def test_a_dense_checkpoint_is_sent_to_upcycling(tmp_path: Path) -> None:
    _, run = run_on_upcycled(tmp_path)
    with pytest.raises(ValueError, match="omnimri upcycle"):
        run_stage("vision", replace(run, backbone=str(tmp_path / "dense")))


def test_backbone_and_tokenizer_are_not_given_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whose folder holds the tokenizer"):
        replace(smallest_run(tmp_path, tmp_path), backbone="moe", tokenizer="qwen")
