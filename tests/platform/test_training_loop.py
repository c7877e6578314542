"""The training loop in one process: it learns, it resumes exactly, and it refuses what does not fit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from omnimri.platform.tracking import Tracker, connect
from omnimri.platform.training.checkpoints import Meta
from omnimri.platform.training.config import RunConfig, TrainConfig, expand_overrides
from omnimri.platform.training.loop import train_stage
from omnimri.platform.training.optimizer import parameter_groups, train_only
from omnimri.platform.training.session import LocalSession
from omnimri.platform.training.stages import PARTS, STAGES, stage_named
from omnimri.platform.training.trainer import StageResult, make_job, run_stage
from omnimri.platform.training.zero import ZeroConfig, deepspeed_config
from tests.platform.training_fakes import FakeKit, FakeModel, FakeObjective, fake_run

pytestmark = [
    # DeepSpeed imports torch's compiler, which warns of itself, and calls collectives by their former names.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]


class InterruptedRunError(Exception):
    """Stands for the end of a process."""


class DyingSession(LocalSession):
    """Ends the run at a report, before its checkpoint is kept."""

    def __init__(self, folder: Path, at_step: int) -> None:
        super().__init__(folder)
        self._at_step = at_step

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None, *, wait: bool = True) -> None:
        if metrics["step"] == self._at_step:
            raise InterruptedRunError
        super().report(metrics, checkpoint, wait=wait)


def weights(result: StageResult) -> dict[str, torch.Tensor]:
    return load_file(Path(result.model_folder) / "model.safetensors")


def first_stage(out: Path) -> Path:
    return Path(run_stage("vision", fake_run(out), kit=FakeKit()).model_folder)


def test_the_stages_are_those_of_table_2() -> None:
    ratios = [tuple(stage.ratio[kind] for kind in ("image", "paired", "instruction")) for stage in STAGES.values()]
    assert ratios == [(1, 0, 0), (0, 1, 0), (0, 0.8, 0.2), (0, 0, 1)]
    assert [stage.number for stage in STAGES.values()] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="known stages: vision, align, multimodal, instruct"):
        stage_named("pretrain")


def test_a_stage_learns_and_leaves_model_result_and_record(tmp_path: Path) -> None:
    run = fake_run(tmp_path, steps=60, lr=3e-2, objective={"noise": 0.0})
    result = run_stage("vision", run, kit=FakeKit())
    loss = result.losses["loss"]
    assert loss["last_tenth"] < 0.8 * loss["first_tenth"]
    assert {"loss", "loss/image", "loss/image.slices", "loss_square"} <= set(result.losses)
    assert StageResult.read(tmp_path / "vision") == result
    card = json.loads((tmp_path / "vision" / "model" / "card.json").read_text())
    assert card["settings"]["train"]["lr"] == 3e-2
    assert card["data_digest"] == "fake-memory"
    assert (card["preprocessing"], card["excluded"]) == ({"contract": "fake", "rows": {"fake": 64}}, {})


def test_only_the_parts_of_the_stage_move(tmp_path: Path) -> None:
    start = first_stage(tmp_path / "before")
    result = run_stage("instruct", fake_run(tmp_path / "after"), kit=FakeKit(), init=start)
    before, after = load_file(start / "model.safetensors"), weights(result)
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(STAGES["instruct"].trains)


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_resumed_run_ends_bit_identical(tmp_path: Path, zero: int, ema_decay: float | None) -> None:
    start = first_stage(tmp_path / "before")
    whole = fake_run(tmp_path / "whole", zero=zero, ema_decay=ema_decay)
    whole = run_stage("instruct", whole, kit=FakeKit(), init=start)
    run = fake_run(tmp_path / "broken", zero=zero, ema_decay=ema_decay)
    interrupted(run, start)
    with LocalSession(tmp_path / "broken" / "ray" / "fake-instruct").last_checkpoint() as checkpoint:
        assert checkpoint is not None
        assert Meta.read(checkpoint).step == 4
    resumed = run_stage("instruct", run, kit=FakeKit(), init=start)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    assert resumed.losses == whole.losses


def interrupted(run: RunConfig, start: Path) -> None:
    """Leave a run with its checkpoint at step 4."""
    job = make_job("instruct", run, kit=FakeKit(), init=start, tracker=None, report_every=None)
    with pytest.raises(InterruptedRunError):
        train_stage(job, DyingSession(Path(run.out) / "ray" / "fake-instruct", at_step=8))


def test_a_checkpoint_of_another_zero_stage_is_converted(tmp_path: Path) -> None:
    start = first_stage(tmp_path / "before")
    whole = run_stage("instruct", fake_run(tmp_path / "whole"), kit=FakeKit(), init=start)
    interrupted(fake_run(tmp_path / "broken", zero=2), start)
    resumed = run_stage("instruct", fake_run(tmp_path / "broken", zero=1), kit=FakeKit(), init=start)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, rtol=0, atol=1e-6)


def test_a_checkpoint_that_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    start = first_stage(tmp_path / "before")
    interrupted(fake_run(tmp_path / "broken", zero=3), start)
    with pytest.raises(ValueError, match=r"made with ZeRO stage 3, this run has 0.*--set zero.stage=3"):
        run_stage("instruct", fake_run(tmp_path / "broken"), kit=FakeKit(), init=start)


@pytest.mark.parametrize(
    ("zero", "offload", "accumulation"), [(1, "none", 2), (2, "none", 1), (3, "none", 2), (3, "cpu", 1)]
)
def test_every_zero_stage_computes_the_same_update(tmp_path: Path, zero: int, offload: str, accumulation: int) -> None:
    # Sources with heads of their own: DeepSpeed 0.19 kept the unused head's former gradient (see forget_gradients).
    start = first_stage(tmp_path / "before")
    plain = fake_run(tmp_path / "plain", accumulation=accumulation)
    sharded = fake_run(tmp_path / "sharded", zero=zero, accumulation=accumulation)
    sharded = replace(sharded, zero=replace(sharded.zero, offload=offload))
    expected = weights(run_stage("instruct", plain, kit=FakeKit(), init=start))
    found = weights(run_stage("instruct", sharded, kit=FakeKit(), init=start))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_accumulation_equals_one_larger_step(tmp_path: Path) -> None:
    rows = dict.fromkeys(FakeKit().kinds(), 8)
    whole = fake_run(tmp_path / "whole", rows_per_step=rows, weights={"image": 1.0}, objective={"noise": 0.0})
    halves = fake_run(tmp_path / "halves", accumulation=2, weights={"image": 1.0}, objective={"noise": 0.0})
    expected = weights(run_stage("vision", whole, kit=FakeKit()))
    for name, value in weights(run_stage("vision", halves, kit=FakeKit())).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_autocast_keeps_float32_weights(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "autocast")
    result = run_stage("vision", replace(run, zero=ZeroConfig(stage=1, precision="autocast")), kit=FakeKit())
    assert weights(result)["members.vision.weight"].dtype == torch.float32


@pytest.mark.parametrize(("zero", "threshold"), [(0, 0), (1, 0), (2, 0), (3, 0), (3, 10**6)])
def test_the_published_model_is_the_average_of_the_weights(tmp_path: Path, zero: int, threshold: int) -> None:
    """Against the average of every step's checkpoint, kept by hand."""
    start = first_stage(tmp_path / "before")
    seen = [flat(load_file(start / "model.safetensors"))]
    # One source and a constant rate: a shorter run is the beginning of a longer one.
    same: dict[str, Any] = {"weights": {"instruct.text": 1.0}, "warmup_share": 0.0, "final_lr_share": 1.0}
    for steps in range(1, 5):
        run = fake_run(tmp_path / f"first-{steps}", steps=steps, **same)
        seen.append(flat(weights(run_stage("instruct", run, kit=FakeKit(), init=start))))
    expected = seen[0]
    for step, after in enumerate(seen[1:]):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * after
    run = fake_run(tmp_path / "whole", zero=zero, steps=4, ema_decay=0.3, **same)
    run = replace(run, zero=replace(run.zero, persistence_threshold=threshold))
    found = flat(weights(run_stage("instruct", run, kit=FakeKit(), init=start)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - seen[-1]).abs().max() > 1e-4


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_the_same_name_again_returns_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = fake_run(tmp_path)
    first = run_stage("vision", run, kit=FakeKit())
    with caplog.at_level("INFO"):
        assert run_stage("vision", run, kit=FakeKit()) == first
    assert "complete already" in caplog.text


def test_other_settings_under_the_same_name_are_refused(tmp_path: Path) -> None:
    run_stage("vision", fake_run(tmp_path), kit=FakeKit())
    with pytest.raises(ValueError, match=r"settings.train.lr: 0.01 before, 0.05 now.*--fresh"):
        run_stage("vision", fake_run(tmp_path, lr=0.05), kit=FakeKit())
    again = run_stage("vision", fake_run(tmp_path, lr=0.05), kit=FakeKit(), fresh=True)
    assert again.settings_digest != run_stage("vision", fake_run(tmp_path / "x"), kit=FakeKit()).settings_digest


def test_how_often_it_logs_does_not_count_as_another_setting(tmp_path: Path) -> None:
    first = run_stage("vision", fake_run(tmp_path), kit=FakeKit())
    assert run_stage("vision", fake_run(tmp_path, log_every=1), kit=FakeKit()) == first


def test_a_stage_without_its_predecessor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Stage 'align' starts from the model of stage 'vision'.*--init"):
        run_stage("align", fake_run(tmp_path), kit=FakeKit())


def test_rows_that_do_not_divide_among_the_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows_per_step\['image'\] is 4, which does not divide among 3 workers"):
        run_stage("vision", fake_run(tmp_path, workers=3), kit=FakeKit())


def test_a_source_without_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Source 'image': no training row in memory fits it"):
        run_stage("vision", fake_run(tmp_path), kit=FakeKit(num_rows=0))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"not finite at step 0 on source 'image.*lower TrainConfig.lr"):
        run_stage("vision", fake_run(tmp_path, objective={"noise": float("inf")}), kit=FakeKit())


def test_offload_with_accumulation_is_refused(tmp_path: Path) -> None:
    run = fake_run(tmp_path, accumulation=2)
    with pytest.raises(ValueError, match="accumulation must be 1"):
        replace(run, zero=ZeroConfig(stage=3, offload="cpu"))


def test_the_run_is_recorded(tmp_path: Path) -> None:
    tracker = Tracker.start(f"sqlite:///{tmp_path / 'mlflow.db'}", "vision")
    run_stage("vision", fake_run(tmp_path), kit=FakeKit(), tracker=tracker)
    metrics = tracker.run.data.metrics
    assert {"loss", "loss_square", "lr", "gradient_norm", "samples_per_s", "tokens_per_s", "time/data_ms"} <= set(
        metrics
    )
    history = connect(tracker.uri).get_metric_history(tracker.run_id, "loss")
    assert [point.step for point in history] == [4, 8, 12]
    pictures = connect(tracker.uri).list_artifacts(tracker.run_id, "pictures")
    assert {Path(p.path).name for p in pictures} == {"image-input.png", "image.slices-input.png"}


def test_the_recorded_gradient_norm_is_that_before_clipping_sharded_or_not(tmp_path: Path) -> None:
    """Without ZeRO it had been recorded as 0."""
    norms = []
    for stage in (0, 1):
        tracker = Tracker.start(f"sqlite:///{tmp_path / f'{stage}.db'}", "vision")
        run = replace(fake_run(tmp_path / str(stage)), zero=ZeroConfig(stage=stage, gradient_clipping=0.01))
        run_stage("vision", run, kit=FakeKit(), tracker=tracker)
        norms.append([p.value for p in connect(tracker.uri).get_metric_history(tracker.run_id, "gradient_norm")])
    assert min(norms[0]) > 0.01
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)


def test_learning_rate_warms_up_and_decays() -> None:
    train = TrainConfig(steps=100, lr=1.0, rows_per_step={}, warmup_share=0.1, final_lr_share=0.1)
    factors = [train.lr_factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0) == factors[9]
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=0.01)


def test_shares_follow_the_stage_and_the_weights() -> None:
    kinds = FakeKit().kinds()
    train = TrainConfig(
        steps=1, lr=1.0, rows_per_step={}, weights={"paired": 1.0, "instruct.text": 3, "instruct.segment": 1}
    )
    shares = train.shares(STAGES["multimodal"], kinds)
    assert shares == pytest.approx({"paired": 0.8, "instruct.text": 0.15, "instruct.segment": 0.05})
    changed = replace(train, ratio={"paired": 0.5, "instruction": 0.5}).shares(STAGES["multimodal"], kinds)
    assert changed["paired"] == 0.5
    with pytest.raises(ValueError, match="no source of that kind has a weight"):
        train.shares(STAGES["vision"], kinds)
    with pytest.raises(ValueError, match=r"unknown sources \['speech'\]"):
        replace(train, weights={"speech": 1.0}).shares(STAGES["vision"], kinds)


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    model = FakeModel(4)
    model.members["vision"] = torch.nn.Sequential(
        torch.nn.Embedding(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)
    )
    parts = dict(model.members.items())
    train_only(parts, ("vision",))
    train = TrainConfig(steps=1, lr=1.0, rows_per_step={}, lr_scale={"vision": 0.1})
    groups = parameter_groups(FakeObjective(model, PARTS, 0.0), parts, train)
    decays = {group["weight_decay"] > 0: sum(p.numel() for p in group["params"]) for group in groups}
    assert decays == {True: 16, False: 12 + 8 + 4}
    assert {group["lr"] for group in groups} == {0.1}


def test_deepspeed_config_states_what_has_silent_defaults() -> None:
    config = deepspeed_config(ZeroConfig(stage=3), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1, accumulation=2)
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"]["check_grad_overflow"] is False
    assert config["zero_optimization"]["overlap_comm"] is False
    assert config["optimizer"]["params"]["torch_adam"] is True
    with pytest.raises(ValueError, match=r"needs ZeroConfig\.stage 1, 2 or 3"):
        ZeroConfig(offload="cpu")


def test_an_override_without_stage_means_the_stages_at_hand() -> None:
    assert expand_overrides(["train.lr=1e-4", "zero.stage=2"], ["vision", "align"]) == [
        "train.vision.lr=1e-4", "train.align.lr=1e-4", "zero.stage=2",
    ]  # fmt: skip
    assert expand_overrides(["train.align.lr=1e-4"], ["vision"]) == ["train.align.lr=1e-4"]


def test_the_environment_is_left_as_it_was(tmp_path: Path) -> None:
    before = os.environ.get("LOCAL_RANK")
    run: RunConfig = fake_run(tmp_path)
    run_stage("vision", run, kit=FakeKit())
    assert os.environ.get("LOCAL_RANK") == before
