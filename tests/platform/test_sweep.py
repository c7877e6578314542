"""The sweep: points of the search space become runs, trials become a table, and a stopped search goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omnimri.jobs.train import read_overrides
from omnimri.platform.overrides import apply_overrides
from omnimri.platform.tracking import Tracker, connect
from omnimri.platform.training.recipes import RECIPES, recipe
from omnimri.platform.training.trainer import run_stage
from omnimri.platform.tuning import SweepConfig, format_trials, run_sweep, trial_overrides, trial_run
from tests.platform.training_fakes import FakeKit, fake_run

POINT = {"paired_share": 0.7, "num_experts": 8, "balance": 0.03}


def test_a_point_becomes_a_run(tmp_path: Path) -> None:
    run = recipe("tiny", "x", [tmp_path], tmp_path)
    trial = trial_run(run, SweepConfig(steps=30, report_every=5), POINT, tmp_path / "trials" / "t1")
    stage = trial.stage("multimodal")
    assert stage.ratio == pytest.approx({"paired": 0.7, "instruction": 0.3})
    assert stage.objective == {"balance": 0.03}
    assert trial.model.backbone.num_experts == 8
    assert (stage.steps, stage.validate_every) == (30, 5)
    assert trial.scaling.num_workers == 0 == trial.stream.num_tasks


def test_a_winner_can_be_taken_over_by_a_training_run(tmp_path: Path) -> None:
    run = recipe("tiny", "x", [tmp_path], tmp_path)
    path = tmp_path / "winner.json"
    path.write_text(json.dumps({"overrides": trial_overrides(POINT, run)}))
    changed = apply_overrides(run, read_overrides([f"@{path}", "train.multimodal.lr=0.5"]))
    assert changed.model.backbone.num_experts == 8
    assert changed.stage("multimodal").lr == 0.5
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected a JSON file with a list `overrides`"):
        read_overrides([f"@{path}"])


def test_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="paired_share: expected 0 <= low < high <= 1"):
        SweepConfig(paired_share=(0.9, 0.5))
    with pytest.raises(ValueError, match="grace_steps"):
        SweepConfig(grace_steps=100, steps=10)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_is_a_whole_run(name: str, tmp_path: Path) -> None:
    run = recipe(name, "x", [tmp_path / "shards"], tmp_path)
    assert run.model.preset == name
    assert Path(run.data[0]).is_absolute()
    with pytest.raises(ValueError, match="known: tiny, tiny-long, small, base, 7b"):
        recipe("huge", "x", [tmp_path], tmp_path)


@pytest.mark.slow
def test_a_sweep_finds_a_winner_and_records_every_trial(tmp_path: Path, ray_cluster: None) -> None:
    run = fake_run(tmp_path / "run")
    init = Path(run_stage("vision", run, kit=FakeKit()).model_folder)
    sweep = SweepConfig(
        num_trials=3,
        steps=8,
        report_every=2,
        grace_steps=2,
        metrics=("val/loss",),
        cpus_per_trial=0.5,
        max_concurrent=2,
    )
    parent = Tracker.start(f"sqlite:///{tmp_path / 'mlflow.db'}", "sweep")
    results = run_sweep(run, sweep, init=init, out=tmp_path / "sweep", kit=FakeKit(), parent=parent)
    assert len(results) == 3
    assert all(result.status == "completed" and result.score is not None for result in results)
    assert [r.score for r in results] == sorted(r.score for r in results)
    assert max(result.steps for result in results) == 8
    assert results[0].trial in format_trials(results)
    winner = json.loads((tmp_path / "sweep" / "winner.json").read_text())
    assert winner["overrides"] == results[0].overrides
    assert (tmp_path / "sweep" / "results.png").stat().st_size > 1000
    children = connect(parent.uri).search_runs(
        [parent.run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    )
    assert {child.info.status for child in children} == {"FINISHED"}
    assert len(children) == 3
    again = run_sweep(run, sweep, init=init, out=tmp_path / "sweep", kit=FakeKit(), parent=parent)
    assert [r.score for r in again] == [r.score for r in results]
