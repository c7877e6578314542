"""The four stages on the real model at its smallest, and the last of them on two workers under ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omnimri.models.engine import Engine
from omnimri.models.omnimri import OmniMRI
from omnimri.platform.data.shards import Shards, load_row, row_to_scan
from omnimri.platform.training.config import StageConfigs
from omnimri.platform.training.recipes import recipe
from omnimri.platform.training.stages import PARTS, STAGES
from omnimri.platform.training.trainer import StageResult, run_stage, run_stages
from tests.platform.shards_fakes import write_shards
from tests.platform.smallest import SMALLEST, smallest_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "balls")


@pytest.fixture(scope="module")
def four_stages(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[StageResult]:
    """All stages, one after the other, in this process."""
    return run_stages(list(STAGES), smallest_run(data, tmp_path_factory.mktemp("run")))


def test_every_stage_trains_its_parts_and_leaves_the_others(four_stages: list[StageResult]) -> None:
    assert [result.stage for result in four_stages] == list(STAGES)
    for before, after in itertools.pairwise(four_stages):
        moved = {name for name in STAGES[after.stage].trains if _changed(before, after, name)}
        still = {name for name in ("vision", "text_encoder") if name not in STAGES[after.stage].trains}
        assert moved == set(STAGES[after.stage].trains)
        assert not any(_changed(before, after, name) for name in still)


def test_fine_tokens_pass_every_stage_and_the_encoder_learns_where_it_is_asked_to(data: Path, tmp_path: Path) -> None:
    run = smallest_run(data, tmp_path)
    model = replace(SMALLEST, vision=replace(SMALLEST.vision, token_level=2))
    stages = {name: replace(run.stage(name), steps=2) for name in STAGES}
    stages["instruct"] = replace(stages["instruct"], also_trains=("vision",))
    results = run_stages(list(STAGES), replace(run, model=model, train=StageConfigs(**stages)))
    changes = [_changed(before, after, "vision") for before, after in itertools.pairwise(results)]
    assert changes == [False, False, True]


def test_the_first_stage_learns_from_labels(data: Path, tmp_path: Path) -> None:
    """From shards to the model folder, which has no trace of the head that read the labels."""
    run = smallest_run(data, tmp_path)
    stage = replace(run.train.vision, steps=12, lr=3e-3, weights={"image.labelled": 1.0})
    result = run_stage("vision", replace(run, train=replace(run.train, vision=stage)))
    assert result.losses["loss_labels"]["last_tenth"] < 0.8 * result.losses["loss_labels"]["first_tenth"]
    assert set(OmniMRI.load(result.model_folder).parts()) == set(PARTS)


def test_a_decoder_of_volumes_learns_from_patches_and_answers_scans(
    data: Path, four_stages: list[StageResult], tmp_path: Path
) -> None:
    """From the third stage of a run with slices, whose reconstruction goes on."""
    run = smallest_run(data, tmp_path)
    decoder = replace(SMALLEST.image_decoder, segment_dims=3, patch_shape=(4, 24, 24))
    model = replace(SMALLEST, image_decoder=decoder)
    stage = replace(run.train.instruct, weights={"instruct.segment": 1.0})
    run = replace(run, model=model, train=replace(run.train, instruct=stage), view={"patches_per_sample": 3})
    slices, volumes = (OmniMRI.load(four_stages[2].model_folder, config=c).image_decoder for c in (SMALLEST, model))
    for name, value in slices.reconstruct_trunk.state_dict().items():
        assert torch.equal(volumes.reconstruct_trunk.state_dict()[name], value)
    result = run_stage("instruct", run, init=Path(four_stages[2].model_folder))
    assert "loss_segment" in result.losses
    engine = Engine.load(result.model_folder)
    assert engine.model.image_decoder.config == decoder
    row = load_row(Shards.open([str(data)]).rows[0])
    scan = row_to_scan(row)
    prompts = {"lesion": engine.encode(scan, "Segment the lesion.", "segment")}
    assert engine.segment(scan, prompts).masks["lesion"].shape == scan.image.shape


def test_runs_with_slices_are_told_by_the_settings_they_always_had(data: Path, tmp_path: Path) -> None:
    """A run from before there were volumes goes on under this program."""
    run = smallest_run(data, tmp_path)
    assert set(run.stage_settings("instruct")["model"]["image_decoder"]) == {
        "channels", "num_heads", "mask_channels", "recon_noise", "segment_noise", "consistency_weight",
        "consistency_steps",
    }  # fmt: skip
    decoder = replace(SMALLEST.image_decoder, segment_dims=3)
    settings = replace(run, model=replace(SMALLEST, image_decoder=decoder)).stage_settings("instruct")
    assert settings["model"]["image_decoder"]["segment_dims"] == 3


def test_a_part_that_the_model_lacks_cannot_learn() -> None:
    with pytest.raises(ValueError, match=r"also_trains: unknown parts \['eyes'\]"):
        replace(recipe("tiny", "r", [], "out").train.instruct, also_trains=("eyes",))


def test_the_last_model_loads_without_ray(four_stages: list[StageResult]) -> None:
    model = OmniMRI.load(four_stages[-1].model_folder)
    assert set(model.parts()) >= set(STAGES["instruct"].trains)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_held_out_rows_are_looked_at(data: Path, four_stages: list[StageResult], tmp_path: Path) -> None:
    reports = []
    run = smallest_run(data, tmp_path)
    stage = replace(run.train.multimodal, steps=2, validate_every=1)
    run = replace(run, train=replace(run.train, multimodal=stage))
    run_stage("multimodal", run, init=Path(four_stages[1].model_folder), report_every=1, on_report=reports.append)
    assert [report["step"] for report in reports] == [1, 2]
    assert {"val/loss_text", "val/loss_visual", "val/loss_text/paired", "val/loss_text/instruct.text"} <= set(
        reports[0]
    )


@pytest.mark.parametrize("zero", [2, 3])
def test_a_flow_head_that_runs_twice_a_step_learns_the_same_under_zero(
    data: Path, four_stages: list[StageResult], tmp_path: Path, zero: int
) -> None:
    """Its second run, with other states and without gradients, is a floor that `loss_visual` is compared with."""
    start, plain = four_stages[1:3]
    result = run_stage("multimodal", smallest_run(data, tmp_path, zero=zero), init=Path(start.model_folder))
    for name in ("loss", "loss_text", "loss_visual", "visual_shuffled", "visual_copied"):
        assert result.losses[name] == pytest.approx(plain.losses[name], rel=1e-4), name
    for part in STAGES["multimodal"].trains:
        old, other, new = (load_file(Path(r.model_folder) / part / "model.safetensors") for r in (start, plain, result))
        moved = max(float((other[name] - old[name]).abs().max()) for name in old)
        apart = max(float((other[name] - new[name]).abs().max()) for name in old)
        assert apart < 0.01 * moved, part


@pytest.mark.parametrize("zero", [2, 3])
def test_two_workers_run_the_last_stage(
    data: Path, four_stages: list[StageResult], tmp_path: Path, ray_cluster: None, zero: int
) -> None:
    run = smallest_run(data, tmp_path, workers=2, zero=zero)
    result = run_stage("instruct", run, init=Path(four_stages[2].model_folder))
    assert {"loss", "loss_text"} <= set(result.losses)
    model = OmniMRI.load(result.model_folder)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert _changed(four_stages[2], result, "image_decoder")
    assert not _changed(four_stages[2], result, "vision")


@pytest.mark.parametrize("zero", [1, 3])
def test_bfloat16_products_and_recomputed_activations_leave_a_float32_model(
    data: Path, four_stages: list[StageResult], tmp_path: Path, zero: int
) -> None:
    run = smallest_run(data, tmp_path, zero=zero)
    stage = replace(run.train.instruct, activation_checkpointing=True, ema_decay=0.9)
    run = replace(run, train=replace(run.train, instruct=stage), zero=replace(run.zero, precision="autocast"))
    result = run_stage("instruct", run, init=Path(four_stages[2].model_folder))
    plain = four_stages[3].losses["loss"]["first_tenth"]
    assert result.losses["loss"]["first_tenth"] == pytest.approx(plain, rel=0.05)
    for part in ("backbone", "image_decoder"):
        assert _changed(four_stages[2], result, part)
        for value in load_file(Path(result.model_folder) / part / "model.safetensors").values():
            assert value.dtype == torch.float32
            assert value.ndim < 2 or not value.any() or not torch.equal(value, value.bfloat16().float())


@pytest.mark.parametrize("zero", [0, 3])
def test_low_rank_updates_are_published_merged(
    data: Path, four_stages: list[StageResult], tmp_path: Path, zero: int
) -> None:
    run = smallest_run(data, tmp_path, zero=zero)
    run = replace(run, train=replace(run.train, instruct=replace(run.train.instruct, lora_rank=2)))
    result = run_stage("instruct", run, init=Path(four_stages[2].model_folder))
    before, after = (
        load_file(Path(r.model_folder) / "backbone" / "model.safetensors") for r in (four_stages[2], result)
    )
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in moved)
    assert all("self_attn" in name or "shared_expert." in name for name in moved)
    for name in moved:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2
    assert _changed(four_stages[2], result, "image_decoder")


def _changed(before: StageResult, after: StageResult, part: str) -> bool:
    old, new = (load_file(Path(r.model_folder) / part / "model.safetensors") for r in (before, after))
    return any(not torch.equal(old[name], new[name]) for name in old)
