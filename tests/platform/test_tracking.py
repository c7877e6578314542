"""Runs, data and models are found again in MLflow as they were recorded."""

import math
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from omnimri.jobs.register import main as register_job
from omnimri.platform import registry
from omnimri.platform.errors import TrackingError
from omnimri.platform.tracking import Tracker, connect, tracking_uri


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    lr: float = 1e-4
    weights: dict[str, float] = field(default_factory=lambda: {"paired": 0.8, "instruction": 0.2})
    note: str = "first"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests of this file, as one run folder has; making it takes seconds."""
    return tracking_uri(tmp_path_factory.mktemp("run"), given=None)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "backbone").mkdir(parents=True)
    (folder / "omnimri.json").write_text('{"version": "demo"}')
    (folder / "backbone" / "model.safetensors").write_bytes(np.arange(16, dtype=np.float32).tobytes())
    return folder


def test_store_is_the_one_given_or_that_of_the_environment_or_of_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(tmp_path) == "http://127.0.0.1:5000"
    assert tracking_uri(tmp_path, "sqlite:////other.db") == "sqlite:////other.db"


def test_a_pipeline_is_one_parent_with_a_child_for_each_stage(uri: str) -> None:
    with Tracker.start(uri, "pipeline") as parent:
        children = [parent.child(stage) for stage in ("vision", "align", "multimodal", "instruct")]
        for child in children:
            child.finish()
    where = parent.run.info.experiment_id
    found = MlflowClient(uri).search_runs([where], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert {run.info.run_id for run in found} == {child.run_id for child in children}
    assert {run.info.run_name for run in found} == {"vision", "align", "multimodal", "instruct"}
    assert parent.run.info.status == "FINISHED"
    assert parent.run.data.tags["omnimri_version"]


def test_an_exception_marks_the_run_failed_and_is_not_swallowed(uri: str) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), Tracker.start(uri, "failing") as tracker:
        raise RuntimeError("out of memory")
    assert tracker.run.info.status == "FAILED"


def test_config_is_recorded_flat_and_whole(uri: str) -> None:
    tracker = Tracker.start(uri, "config", params=StageConfig(note="n" * 7000))
    params = tracker.run.data.params
    assert params["lr"] == "0.0001"
    assert params["weights.instruction"] == "0.2"
    assert params["note"] == "n" * 6000
    kept = MlflowClient(uri).download_artifacts(tracker.run_id, "config.json")
    assert "n" * 7000 in Path(kept).read_text()


def test_more_parameters_than_one_request_takes(uri: str) -> None:
    tracker = Tracker.start(uri, "many", params={f"p{i}": i for i in range(250)})
    tracker.log_metrics({f"m{i}": i for i in range(250)})
    assert len(tracker.run.data.params) == 250
    assert tracker.run.data.metrics["m249"] == 249.0


def test_a_resumed_run_goes_on_and_says_what_changed(uri: str) -> None:
    parent = Tracker.start(uri, "resumed-pipeline", resume=True)
    first = parent.child("align", params=StageConfig(), resume=True)
    first.log_metrics({"loss": 2.0}, step=1)
    first.finish("FAILED")
    again = Tracker.start(uri, "resumed-pipeline", resume=True).child("align", params=StageConfig(lr=2e-4), resume=True)
    again.log_metrics({"loss": 1.0}, step=2)
    assert again == first
    assert again.run.info.status == "RUNNING"
    assert again.run.data.params["lr"] == "0.0001"
    assert again.run.data.tags["changed.lr"] == "0.0002"
    history = MlflowClient(uri).get_metric_history(first.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (2, 1.0)]
    assert parent.child("align") != first


def test_numbers_of_any_name_and_size_are_kept(uri: str) -> None:
    tracker = Tracker.start(uri, "numbers")
    tracker.log_metrics({"dice@0.5": np.float32(0.5), "loss": math.nan, "psnr": math.inf, "absent": None}, step=3)
    metrics = tracker.run.data.metrics
    assert set(metrics) == {"dice_0.5", "loss", "psnr"}
    assert metrics["dice_0.5"] == 0.5
    assert math.isnan(metrics["loss"])


def test_data_and_pictures_stand_with_the_run(uri: str) -> None:
    tracker = Tracker.start(uri, "data")
    tracker.log_dataset("corpus", "d" * 64, "shards/corpus", "train")
    tracker.log_picture("reconstruct-target", np.array([[0.0, 0.5], [1.0, 7.0]], dtype=np.float32))
    (given,) = tracker.run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("corpus", "d" * 36)
    assert {tag.key: tag.value for tag in given.tags} == {"mlflow.data.context": "train"}
    kept = MlflowClient(uri).download_artifacts(tracker.run_id, "pictures/reconstruct-target.png")
    assert np.asarray(Image.open(kept)).tolist() == [[0, 128], [255, 255]]


def test_tracker_travels_between_processes_and_leaves_no_global_state(uri: str) -> None:
    before = mlflow.get_tracking_uri()
    tracker = Tracker.start(uri, "travelling")
    code = "import pickle, sys; pickle.loads(sys.stdin.buffer.read()).log_metrics({'loss': 0.5}, step=7)"
    root = Path(__file__).parents[2]
    variables = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(tracker), env=variables, check=True, timeout=120)
    assert tracker.run.data.metrics == {"loss": 0.5}
    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() == before


def test_an_address_without_a_store_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, and long enough not to be taken for an empty one" * 20)
    with pytest.raises(TrackingError, match="No MLflow store answers at sqlite:"):
        connect(tracking_uri(tmp_path, f"sqlite:///{tmp_path}/mlflow.db"))


def test_registered_folder_comes_back_by_alias(
    uri: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with Tracker.start(uri, "trained") as tracker:
        first = registry.register(uri, checkpoint, "back", run_id=tracker.run_id, metrics={"dice": 0.75})
    assert (first.version, first.aliases, first.run_id) == (1, ("candidate",), tracker.run_id)
    found, folder = registry.resolve(uri, "models:/back@candidate", tmp_path / "served")
    assert found == first
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files == {p.relative_to(checkpoint): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
    model = MlflowClient(uri).get_logged_model(first.model_id)
    assert {metric.key: metric.value for metric in model.metrics} == {"dice": 0.75}
    assert model.source_run_id == tracker.run_id
    version = MlflowClient(uri).get_model_version("back", "1")
    assert version.source == f"models:/{first.model_id}"
    assert list(here.iterdir()) == [], "MLflow made a store of its own in the working directory"


def test_promotion_moves_the_champion_and_remembers_the_former(uri: str, checkpoint: Path) -> None:
    for _ in range(2):
        registry.register(uri, checkpoint, "promoted")
    assert registry.promote(uri, "promoted", 1).aliases == ("champion",)
    assert registry.promote(uri, "promoted", 2).aliases == ("candidate", "champion")
    assert registry.resolve(uri, "models:/promoted@previous")[0].version == 1
    assert registry.resolve(uri, "models:/promoted@champion")[0].version == 2
    with pytest.raises(TrackingError, match="No model 'promoted' with version 9"):
        registry.promote(uri, "promoted", 9)
    assert registry.resolve(uri, "models:/promoted@champion")[0].version == 2
    assert registry.resolve(uri, "models:/promoted@previous")[0].version == 1


def test_changed_files_are_not_served(uri: str, checkpoint: Path) -> None:
    registry.register(uri, checkpoint, "tampered")
    _, folder = registry.resolve(uri, "models:/tampered/1")
    (folder / "backbone" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(TrackingError, match="the files have changed"):
        registry.resolve(uri, "models:/tampered/1")


def test_what_is_no_checkpoint_is_refused(uri: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a checkpoint folder with omnimri\.json"):
        registry.register(uri, tmp_path / "nothing", "refused")
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="this file could run code"):
        registry.register(uri, checkpoint, "refused")


def test_an_unknown_model_lists_the_known_ones(uri: str, checkpoint: Path) -> None:
    registry.register(uri, checkpoint, "known")
    with pytest.raises(TrackingError, match=r"No model 'unknown' with @champion .*known \(@candidate -> 1\)"):
        registry.resolve(uri, "models:/unknown@champion")
    with pytest.raises(ValueError, match="expected models:/NAME@ALIAS"):
        registry.resolve(uri, "known@champion")


def test_register_job_finds_the_store_of_the_run_folder(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert register_job(["--checkpoint", str(checkpoint)]) == 1
    assert "omnimri register: error: no mlflow.db in" in capsys.readouterr().err
    connect(f"sqlite:///{checkpoint.parent}/mlflow.db")
    assert register_job(["--checkpoint", str(checkpoint), "--name", "job", "--promote"]) == 0
    assert capsys.readouterr().out.startswith("models:/job/1 @candidate @champion sha256 ")
