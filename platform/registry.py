"""Which model serves: versions of a name in MLflow's registry, and aliases that move between them.

A checkpoint is a folder of safetensors and JSON, and goes in as it is, without one of MLflow's model flavours (those
pickle). `candidate` is what was registered last, `champion` what is served, `previous` the champion before it.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow.artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from omnimri.platform.cluster import environment
from omnimri.platform.errors import TrackingError
from omnimri.platform.tracking import EXPERIMENT, Tracker, connect

logger = logging.getLogger(__name__)

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
INDEX_FILE = "omnimri.json"
"""Present in every checkpoint folder."""


@dataclass(frozen=True, kw_only=True)
class Registered:
    """One version of a registered model."""

    name: str
    version: int
    aliases: tuple[str, ...]
    model_id: str
    """Of the logged model that holds the files and the metrics."""
    run_id: str
    """Of the run that made it."""
    digest: str
    """SHA-256 of the files, see `folder_digest`."""

    @property
    def uri(self) -> str:
        """Address by which `resolve` and MLflow find exactly this version."""
        return f"models:/{self.name}/{self.version}"


def register(
    uri: str,
    folder: Path,
    name: str,
    *,
    alias: str = CANDIDATE,
    run_id: str | None = None,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
    experiment: str = EXPERIMENT,
) -> Registered:
    """Put a checkpoint folder into the registry as the next version of a name.

    Args:
        uri: Address of the tracking store and registry.
        folder: Checkpoint folder, as `OmniMRI.save` writes it.
        name: Name of the registered model.
        alias: Moves to the new version.
        run_id: Run that made the checkpoint; the model is kept in its experiment. None starts a run for the entry.
        metrics: Numbers of an evaluation, kept with the run and with the model.
        tags: More to find the version by.
        experiment: Of the run that is started.

    Raises:
        ValueError: The folder is not a checkpoint, or holds pickles.
        TrackingError: The store does not answer or does not know the run.
    """
    digest = folder_digest(folder)
    client = connect(uri)
    if run_id is None:
        with Tracker.start(uri, f"register {name}", experiment=experiment) as tracker:
            run_id = tracker.run_id
    try:
        where = client.get_run(run_id).info.experiment_id
    except MlflowException as error:
        raise TrackingError(f"{uri} does not know the run {run_id}: {error.message}") from error
    all_tags = {"sha256": digest, **(tags or {})}
    model = client.create_logged_model(where, name=name, source_run_id=run_id, tags=all_tags, model_type="omnimri")
    client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    for key, value in (metrics or {}).items():
        client.log_metric(run_id, key, float(value), model_id=model.model_id)
    _ensure_registered_model(uri, name)
    # The source `models:/m-...` is what MLflow's pages follow. On a database file MLflow looks it up in the default
    # store of the process, whatever the client's is, and does not keep the id of the model (3.17).
    version_tags = {**all_tags, "model_id": model.model_id}
    with environment({"MLFLOW_TRACKING_URI": uri}):
        made = client.create_model_version(
            name, source=model.model_uri, run_id=run_id, model_id=model.model_id, tags=version_tags
        )
    client.set_registered_model_alias(name, alias, made.version)
    return _registered(client.get_model_version(name, made.version))


def promote(uri: str, name: str, version: int, alias: str = CHAMPION) -> Registered:
    """Move an alias to a version; the version that held `champion` becomes `previous`, so that one can go back.

    Raises:
        TrackingError: There is no such version.
    """
    client = connect(uri)
    _find(uri, name, None, str(version))
    if alias == CHAMPION and (former := _find_alias(uri, name, CHAMPION)) and int(former.version) != version:
        client.set_registered_model_alias(name, PREVIOUS, former.version)
    client.set_registered_model_alias(name, alias, str(version))
    return _registered(client.get_model_version(name, str(version)))


def resolve(uri: str, address: str, destination: Path | None = None) -> tuple[Registered, Path]:
    """Find the version that an address means now, and bring its files to this machine.

    Args:
        uri: Address of the tracking store and registry.
        address: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        destination: Folder for the files; None keeps them where they are if they are local already.

    Returns:
        The version, and its checkpoint folder, whose content was compared with the digest of the registration.

    Raises:
        ValueError: The address is written wrongly.
        TrackingError: Nothing is registered there, or the files have changed since.
    """
    match = re.fullmatch(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))", address)
    if match is None:
        raise ValueError(f"{address}: expected models:/NAME@ALIAS or models:/NAME/VERSION.")
    found = _registered(_find(uri, match["name"], match["alias"], match["version"]))
    # By the place of the files: for `models:/...` MLflow asks the process's default registry, not this one.
    location = connect(uri).get_logged_model(found.model_id).artifact_location
    target = None if destination is None else str(destination)
    folder = Path(mlflow.artifacts.download_artifacts(location, dst_path=target, tracking_uri=uri))
    if (digest := folder_digest(folder)) != found.digest:
        raise TrackingError(
            f"{found.uri} was registered with files of SHA-256 {found.digest[:12]}, {folder} has {digest[:12]}: "
            "the files have changed. Register them anew."
        )
    return found, folder


def folder_digest(folder: Path) -> str:
    """SHA-256 over names and contents of a checkpoint folder.

    Raises:
        ValueError: The folder is not a checkpoint, or holds files that could be pickles.
    """
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(f"{folder}: expected a checkpoint folder with {INDEX_FILE}, as `omnimri train` writes it.")
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix in {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"}:
            raise ValueError(f"{path}: a checkpoint holds safetensors and JSON only; this file could run code.")
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()


def _ensure_registered_model(uri: str, name: str) -> None:
    try:
        connect(uri).create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find(uri: str, name: str, alias: str | None, version: str | None) -> ModelVersion:
    """The version with that alias or number; the message of its absence lists what there is."""
    client = connect(uri)
    try:
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    except MlflowException as error:
        names = ", ".join(
            f"{model.name} ({', '.join(f'@{alias} -> {number}' for alias, number in sorted(model.aliases.items()))})"
            for model in client.search_registered_models()
        )
        wanted = f"@{alias}" if alias else f"version {version}"
        raise TrackingError(
            f"No model {name!r} with {wanted} in {uri}. Registered: {names or 'nothing; run `omnimri register`'}."
        ) from error


def has_alias(uri: str, name: str, alias: str) -> bool:
    """Whether a registered model has a version of that alias."""
    return _find_alias(uri, name, alias) is not None


def _find_alias(uri: str, name: str, alias: str) -> ModelVersion | None:
    try:
        return connect(uri).get_model_version_by_alias(name, alias)
    except MlflowException:
        return None


def _registered(version: ModelVersion) -> Registered:
    return Registered(
        name=version.name,
        version=int(version.version),
        aliases=tuple(sorted(version.aliases)),
        model_id=version.tags.get("model_id", ""),
        run_id=version.run_id,
        digest=version.tags.get("sha256", ""),
    )
