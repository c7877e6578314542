"""What was run, on which data, with which result, in MLflow.

Everything goes through a client with an explicit address and run id, so that nothing depends on the process, the
thread or the working directory. One parent run stands for a pipeline, and one child for each stage or trial. Numbers,
digests and pictures go here; identities of patients never do. Only this file and `registry.py` import mlflow.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from sqlalchemy.exc import SQLAlchemyError

import omnimri
from omnimri.platform.cluster import submitted_job
from omnimri.platform.errors import TrackingError
from omnimri.platform.overrides import flatten

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

EXPERIMENT = "omnimri"

# Limits of MLflow's stores; a longer value is cut, the whole config is kept as an artifact.
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 5000
MAX_DIGEST_LENGTH = 36
BATCH_SIZE = 100


def tracking_uri(folder: Path, given: str | None = None) -> str:
    """Address of the tracking store: the one given, else `MLFLOW_TRACKING_URI`, else a database in the run's folder."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(folder).absolute() / 'mlflow.db'}"


@functools.cache
def connect(uri: str) -> MlflowClient:
    """Client of a tracking store and of its model registry; a database file is made when it is not there.

    Raises:
        TrackingError: The store does not answer, or belongs to another version of MLflow.
    """
    # The making of a database is announced table by table.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if (database := _database(uri)) is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError) as error:
        reason = str(error).partition("\n")[0]
        raise TrackingError(f"No MLflow store answers at {uri}: {reason}") from error
    return client


def _database(uri: str) -> Path | None:
    """File of a store that is a database file, None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def experiment_id(uri: str, name: str = EXPERIMENT) -> str:
    """Id of an experiment, which is made when it is not there; beside a database file its artifacts lie in a folder."""
    client, database = connect(uri), _database(uri)
    if (experiment := client.get_experiment_by_name(name)) is None:
        location = None if database is None else (database.parent / "artifacts").as_uri()
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was first
                raise
            experiment = client.get_experiment_by_name(name)
    return experiment.experiment_id


@dataclass(frozen=True)
class Tracker:
    """One run in the tracking store. Address and id are all it holds, so it travels between processes.

    As a context manager it ends the run: `FINISHED`, or `FAILED` when an exception leaves the block.
    """

    uri: str
    run_id: str

    @classmethod
    def start(
        cls,
        uri: str,
        name: str,
        *,
        parent: Tracker | None = None,
        params: object = None,
        tags: Mapping[str, str] | None = None,
        experiment: str = EXPERIMENT,
        resume: bool = False,
    ) -> Self:
        """Start a run, or go on with it.

        Args:
            uri: Address of the store, see `tracking_uri`.
            name: Name of the run.
            parent: Run of the pipeline that this stage or trial belongs to.
            params: A config (dataclass) or a mapping; recorded flat and, as it is, as `config.json`.
            tags: More to find the run by; where the code and the submission come from is added.
            experiment: Name of the experiment; a child is always in that of its parent.
            resume: Go on with the latest run of this name under this parent, if there is one.
        """
        client = connect(uri)
        where = parent.run.info.experiment_id if parent else experiment_id(uri, experiment)
        former = _latest(client, where, name, parent) if resume else None
        if former is not None:
            tracker = cls(uri, former.info.run_id)
            client.update_run(tracker.run_id, status="RUNNING")
        else:
            all_tags = {**lineage_tags(), **(tags or {})}
            if parent is not None:
                all_tags[MLFLOW_PARENT_RUN_ID] = parent.run_id
            run = client.create_run(where, run_name=name, tags={k: str(v) for k, v in all_tags.items()})
            tracker = cls(uri, run.info.run_id)
        if params is not None:
            tracker.log_params(params)
        return tracker

    def child(self, name: str, **options: Any) -> Tracker:
        """Start a stage or a trial of this run; the options are those of `start`."""
        return Tracker.start(self.uri, name, parent=self, **options)

    @property
    def run(self) -> Run:
        """The run as the store holds it now."""
        return connect(self.uri).get_run(self.run_id)

    def log_params(self, params: object) -> None:
        """Record a config flat, by dotted names, and as `config.json`.

        The store keeps the first value of a parameter for ever. A resumed run may have changed one: then the new value
        becomes the tag `changed.NAME`.
        """
        flat = {key: _as_text(value) for key, value in flatten(params).items()}
        former = self.run.data.params
        new = [Param(key, value[:MAX_PARAM_LENGTH]) for key, value in flat.items() if key not in former]
        changed = {k: v for k, v in flat.items() if k in former and former[k] != v[:MAX_PARAM_LENGTH]}
        for chunk in _chunks(new, BATCH_SIZE):
            connect(self.uri).log_batch(self.run_id, params=chunk)
        self.set_tags({f"changed.{key}": value for key, value in changed.items()})
        text = json.dumps(flat, indent=2, sort_keys=True)
        self.set_tags({"config_sha256": hashlib.sha256(text.encode()).hexdigest()})
        self.log_text(text, "config.json")

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run; a value of former times is replaced."""
        entities = [RunTag(key, str(value)[:MAX_TAG_LENGTH]) for key, value in tags.items()]
        for chunk in _chunks(entities, BATCH_SIZE):
            connect(self.uri).log_batch(self.run_id, tags=chunk)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record numbers at a step; None is left out, names lose what the store does not take."""
        now_ms = int(time.time() * 1000)
        entities = [Metric(_metric_name(k), float(v), now_ms, step) for k, v in metrics.items() if v is not None]
        for chunk in _chunks(entities, BATCH_SIZE):
            connect(self.uri).log_batch(self.run_id, metrics=chunk)

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Record which data the run read.

        Args:
            name: Of the data set.
            digest: Version of its content; the store keeps 36 characters.
            source: Where it lies.
            context: What it was used for: `train`, `validation` or `test`.
        """
        dataset = Dataset(name, digest[:MAX_DIGEST_LENGTH], "local", json.dumps({"uri": source}))
        entry = DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])
        connect(self.uri).log_inputs(self.run_id, [entry])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file, or a folder with all that it holds, with the run."""
        client = connect(self.uri)
        log = client.log_artifacts if Path(path).is_dir() else client.log_artifact
        log(self.run_id, str(path), folder)

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as a file of the run."""
        connect(self.uri).log_text(self.run_id, text, name)

    def log_figure(self, figure: Figure, name: str) -> None:
        """Keep a figure as a file of the run; the ending of the name chooses the format."""
        connect(self.uri).log_figure(self.run_id, figure, name)

    def log_picture(self, name: str, picture: np.ndarray | Tensor) -> None:
        """Keep a picture as `pictures/NAME.png`.

        Args:
            name: Without ending.
            picture: `(Y, X)` or `(Y, X, 3)`, floats in 0..1 (clipped) or uint8.
        """
        pixels = np.asarray(picture)
        if pixels.dtype != np.uint8:
            pixels = (np.nan_to_num(pixels).clip(0, 1) * 255).round().astype(np.uint8)
        connect(self.uri).log_image(self.run_id, pixels, artifact_file=f"pictures/{name}.png")

    def finish(self, status: str = "FINISHED") -> None:
        """End the run: `FINISHED`, `FAILED` or `KILLED`."""
        connect(self.uri).set_terminated(self.run_id, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish("FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED")


def _latest(client: MlflowClient, experiment: str, name: str, parent: Tracker | None) -> Run | None:
    """The youngest run of a name, under the same parent or none."""
    quoted = name.replace("'", "")
    condition = f"tags.`{MLFLOW_RUN_NAME}` = '{quoted}'"
    if parent is not None:
        condition += f" and tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.run_id}'"
    runs = client.search_runs([experiment], condition, order_by=["attributes.start_time DESC"])
    return next((run for run in runs if parent or MLFLOW_PARENT_RUN_ID not in run.data.tags), None)


def lineage_tags() -> dict[str, str]:
    """Where a run comes from: version of the package, commit of the checkout, Ray's submission."""
    tags = {"omnimri_version": omnimri.__version__, **_commit()}
    if submission := submitted_job().get("metadata", {}).get("job_submission_id"):
        tags["ray_submission_id"] = submission
    return tags


@functools.cache
def _commit() -> dict[str, str]:
    """Commit of the checkout that the package runs from, and whether files differ from it; empty outside a checkout."""
    root = Path(omnimri.__file__).parents[1]
    if not (root / ".git").exists():
        return {}
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True, timeout=20).stdout
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git_commit": commit.strip(), "git_dirty": str(bool(changes.strip())).lower()}


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _metric_name(name: str) -> str:
    """Letters, digits, `_ - . / :` and blanks are what the store takes; `@` and the like become `_`."""
    return "".join(character if character.isalnum() or character in "_-. /:" else "_" for character in name)
