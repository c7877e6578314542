"""Training on two Ray workers: the result of one process, through a killed worker and on fewer workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omnimri.platform.training.checkpoints import Meta, needs_universal
from omnimri.platform.training.config import RunConfig
from omnimri.platform.training.trainer import StageResult, TrainingError, run_stage
from tests.platform.training_fakes import FakeKit, fake_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]

STEPS, EVERY = 12, 4


def quiet(run: RunConfig) -> RunConfig:
    """Without the noise that differs between ranks, so that runs on any number of workers can be compared."""
    stage = replace(run.train.instruct, objective={"noise": 0.0}, steps=STEPS, checkpoint_every=EVERY)
    return replace(run, train=replace(run.train, vision=stage, instruct=stage))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = quiet(fake_run(tmp_path_factory.mktemp("start")))
    return Path(run_stage("vision", run, kit=FakeKit()).model_folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, start: Path) -> StageResult:
    """The stage in one process, undisturbed."""
    return run_stage("instruct", quiet(fake_run(tmp_path_factory.mktemp("alone"))), kit=FakeKit(), init=start)


def assert_same_weights(found: StageResult, expected: StageResult) -> None:
    weights = load_file(Path(found.model_folder) / "model.safetensors")
    for name, value in load_file(Path(expected.model_folder) / "model.safetensors").items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)


def killing_kit(folder: Path) -> FakeKit:
    """Rank 0 kills itself once, at its tenth batch: two steps after the second checkpoint, which is safe by then."""
    return FakeKit(
        kill_marker=str(folder / "killed"),
        kill_at_batch=2 * EVERY + 2,
        kill_after=str(folder / "ray" / "fake-instruct" / "checkpoint_manager_snapshot.json"),
        steps_log=str(folder / "batches.log"),
    )


@pytest.mark.parametrize("zero", [2, 3])
def test_two_workers_compute_what_one_process_computes(
    tmp_path: Path, start: Path, alone: StageResult, zero: int
) -> None:
    found = run_stage("instruct", quiet(fake_run(tmp_path, workers=2, zero=zero)), kit=FakeKit(), init=start)
    assert_same_weights(found, alone)
    assert found.losses["loss"] == pytest.approx(alone.losses["loss"], abs=1e-5)


def averaged(run: RunConfig) -> RunConfig:
    return replace(run, train=replace(run.train, instruct=replace(run.train.instruct, ema_decay=0.8)))


@pytest.mark.parametrize("zero", [2, 3])
def test_two_workers_publish_the_average_that_one_process_publishes(
    tmp_path: Path, start: Path, alone: StageResult, zero: int
) -> None:
    expected = run_stage("instruct", averaged(quiet(fake_run(tmp_path / "alone"))), kit=FakeKit(), init=start)
    run = averaged(quiet(fake_run(tmp_path / "two", workers=2, zero=zero)))
    assert_same_weights(run_stage("instruct", run, kit=FakeKit(), init=start), expected)
    with pytest.raises(AssertionError):
        assert_same_weights(alone, expected)


def test_an_average_is_resumed_on_another_number_of_workers(tmp_path: Path, start: Path) -> None:
    expected = run_stage("instruct", averaged(quiet(fake_run(tmp_path / "alone"))), kit=FakeKit(), init=start)
    run = averaged(quiet(fake_run(tmp_path / "two", workers=2, zero=2)))
    once = replace(run, scaling=replace(run.scaling, max_failures=0))
    with pytest.raises(TrainingError):
        run_stage("instruct", once, kit=killing_kit(tmp_path / "two"), init=start)
    fewer = replace(run, scaling=replace(run.scaling, num_workers=1))
    assert_same_weights(run_stage("instruct", fewer, kit=killing_kit(tmp_path / "two"), init=start), expected)


def test_a_killed_worker_costs_at_most_the_steps_since_the_last_checkpoint(
    tmp_path: Path, start: Path, alone: StageResult
) -> None:
    run = quiet(fake_run(tmp_path, workers=2, zero=2))
    found = run_stage("instruct", run, kit=killing_kit(tmp_path), init=start)
    assert (tmp_path / "killed").exists()
    made = len((tmp_path / "batches.log").read_text().splitlines())
    assert STEPS < made <= STEPS + EVERY
    assert_same_weights(found, alone)


def test_submitting_again_resumes_on_another_number_of_workers(tmp_path: Path, start: Path, alone: StageResult) -> None:
    run = quiet(fake_run(tmp_path, workers=2, zero=2))
    once = replace(run, scaling=replace(run.scaling, max_failures=0))
    with pytest.raises(TrainingError, match="Stage 'instruct' of run 'fake' failed"):
        run_stage("instruct", once, kit=killing_kit(tmp_path), init=start)
    made = len((tmp_path / "batches.log").read_text().splitlines())
    fewer = replace(run, scaling=replace(run.scaling, num_workers=1))
    found = run_stage("instruct", fewer, kit=killing_kit(tmp_path), init=start)
    assert len((tmp_path / "batches.log").read_text().splitlines()) - made <= EVERY
    assert_same_weights(found, alone)


def test_zero_3_is_not_resumed_on_another_number_of_workers() -> None:
    meta = Meta(
        stage="instruct", step=8, world_size=2, zero_stage=3, settings_digest="", data_digest="", positions={},
        losses={},
    )  # fmt: skip
    assert not needs_universal(meta, world_size=2, zero_stage=3)
    with pytest.raises(ValueError, match="resume with --workers 2"):
        needs_universal(meta, world_size=1, zero_stage=3)
