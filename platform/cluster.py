"""One way into Ray, for a laptop, a cluster and a submitted job alike."""

import contextlib
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray

import omnimri
from omnimri.platform.errors import ClusterError

logger = logging.getLogger(__name__)

MIN_LOGICAL_CPUS = 4
"""A local Ray is oversubscribed on purpose: a trainer, its controller and its data tasks need a slot each."""

WORKER_DEFAULTS = {
    # Workers are many and small: one thread each, or two cores spend their time on switching.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Train and Tune change into a folder of the run; our paths are absolute, relative links in user code are not.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Has no default in Ray: a rank that died before a barrier would hold the others for ever.
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Nothing leaves the machine unasked: no model hub, no usage reports.
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # The registry holds safetensors; a pickled model from elsewhere is code from elsewhere.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Environment of every worker unless the caller's environment says otherwise."""


def worker_environment(*, use_gpu: bool | None = None) -> dict[str, str]:
    """Environment variables that a worker must have before it imports anything.

    Args:
        use_gpu: Whether the worker computes on a GPU; None asks this machine.

    Returns:
        Name to value. A variable that is set in this process keeps its value.
    """
    defaults = dict(WORKER_DEFAULTS)
    if use_gpu is None:
        import torch  # takes a second, and every worker of Ray Data imports this file

        use_gpu = torch.cuda.is_available()
    if not use_gpu:
        defaults["DS_ACCELERATOR"] = "cpu"
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process, and put the former ones back afterwards."""
    # Ray sets these two itself when it starts, and the next program started from here would inherit them.
    former = {name: os.environ.get(name) for name in (*variables, "RAY_AUTH_MODE", "RAY_CLIENT_MODE")}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def ensure_ray(num_cpus: int | None = None, address: str | None = None) -> Iterator[None]:
    """Be connected to Ray inside the `with` block; stop afterwards only what was started here.

    A Ray that this process is connected to already is used as it is. Otherwise `address`, or `RAY_ADDRESS` as set by
    `ray job submit`, names the cluster. Without either, a local Ray is started: no dashboard, and no way in without
    the token that Ray keeps in the home directory.

    Args:
        num_cpus: Logical CPUs of a local Ray; by default those of the machine, and at least four. Ignored elsewhere.
        address: Address of a running cluster, as `ray.init` takes it.

    Raises:
        ClusterError: No cluster answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    # Every new local Ray announces, as a warning, that it asks for a token; that is what we want.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    connection = _connected(address) if address and address != "local" else _local_ray(num_cpus)
    with environment(worker_environment()), connection:
        yield


@contextlib.contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Leave the story of a run to our own log: Ray Data tells its plan and resources every few seconds."""
    import ray.data

    context, ray_logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    former = context.enable_progress_bars, context.print_on_execution_start, ray_logger.level
    ray_logger.setLevel(logging.ERROR)
    context.enable_progress_bars = context.print_on_execution_start = False
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = former[:2]
        ray_logger.setLevel(former[2])


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """Join a running cluster; its accelerators are the trainer's business, so only the common variables travel."""
    given = submitted_job().get("runtime_env", {}).get("env_vars", {})  # Ray refuses a second opinion on these
    variables = {name: os.environ[name] for name in WORKER_DEFAULTS if name not in given}
    _knock(address)
    try:
        ray.init(address=address, runtime_env={"env_vars": variables}, **_QUIET)
    except ConnectionError as error:
        raise ClusterError(_NO_ANSWER.format(address=address, reason=error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """See whether anything listens there: Ray itself tries for minutes before it says that nothing does."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ClusterError(_NO_ANSWER.format(address=address, reason=error)) from error


def submitted_job() -> dict[str, Any]:
    """What `ray job submit` tells its driver: `runtime_env` and `metadata`; empty outside a submitted job."""
    return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")


@contextlib.contextmanager
def _local_ray(num_cpus: int | None) -> Iterator[None]:
    """Start a Ray of our own and stop it."""
    # From an uninstalled tree the workers would not find the package.
    search_path = [str(Path(omnimri.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    # Workers inherit the environment of the Ray that is started here; one of their own costs each a second more.
    variables = {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, search_path))),
        # The operating system's own limit is enough on a laptop; Ray's monitor kills workers when others are large.
        "RAY_memory_monitor_refresh_ms": "0",
    }
    with _temp_dir() as folder, environment(variables):
        ray.init(
            num_cpus=num_cpus or max(MIN_LOGICAL_CPUS, os.cpu_count() or 1),
            include_dashboard=False,
            _temp_dir=folder,
            **_QUIET,
        )
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _temp_dir() -> Iterator[str]:
    """A folder with a short name, for sockets lie in it, or the one that RAY_TMPDIR names."""
    given = os.environ.get("RAY_TMPDIR")
    if given:
        yield given
        return
    parent = tempfile.gettempdir()
    # A socket's path has 107 characters at most, and Ray adds about 80.
    folder = tempfile.mkdtemp(prefix="omnimri-ray-", dir=parent if len(parent) < 16 else "/tmp")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_NO_ANSWER = (
    "No Ray cluster answers at {address}: {reason}. Start one (`ray start --head`), or unset RAY_ADDRESS to use a "
    "local Ray."
)
_QUIET = {"logging_level": logging.WARNING, "configure_logging": True, "log_to_driver": True}
