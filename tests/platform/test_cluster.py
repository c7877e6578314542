"""The way into Ray: what workers see, and that nothing is left behind."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from omnimri.platform.cluster import ensure_ray, environment, submitted_job, worker_environment


@pytest.mark.usefixtures("ray_cluster")
def test_workers_get_the_environment_and_the_package() -> None:
    @ray.remote(num_cpus=0.1)
    def look() -> tuple[dict[str, str], str]:
        import platform

        import omnimri.platform.overrides

        assert omnimri.platform.overrides.__file__
        return dict(os.environ), platform.system()

    variables, system = ray.get(look.remote())
    expected = worker_environment()
    assert {name: variables.get(name) for name in expected} == expected
    assert system == "Linux"
    assert ray.cluster_resources()["CPU"] == 4


@pytest.mark.usefixtures("ray_cluster")
def test_a_running_ray_is_used_and_not_stopped() -> None:
    with ensure_ray(num_cpus=64):
        assert ray.cluster_resources()["CPU"] == 4
    assert ray.is_initialized()


def test_what_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert worker_environment(use_gpu=True)["OMP_NUM_THREADS"] == "3"
    assert "DS_ACCELERATOR" not in worker_environment(use_gpu=True)
    assert worker_environment(use_gpu=False)["DS_ACCELERATOR"] == "cpu"


def test_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIMRI_KEPT", "before")
    former = dict(os.environ)
    with pytest.raises(KeyError), environment({"OMNIMRI_KEPT": "during", "OMNIMRI_NEW": "1"}):
        assert (os.environ["OMNIMRI_KEPT"], os.environ["OMNIMRI_NEW"]) == ("during", "1")
        os.environ["RAY_AUTH_MODE"] = "set by ray"
        raise KeyError
    assert dict(os.environ) == former


def test_submission_is_read_from_what_ray_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert submitted_job() == {}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    assert submitted_job()["metadata"]["job_submission_id"] == "raysubmit_1"


def test_local_ray_starts_beside_a_long_temporary_folder_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, ray; from omnimri.platform.cluster import ensure_ray; before = dict(os.environ)\n"
        "with ensure_ray(num_cpus=1): print(ray._private.worker._global_node.get_temp_dir_path())\n"
        "assert not ray.is_initialized() and dict(os.environ) == before"
    )
    done = run_python(code, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.name.startswith("omnimri-ray-")
    assert not folder.exists()
    assert "WARNING" not in done.stderr


def test_a_cluster_that_does_not_answer_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    done = run_python(f"from omnimri.platform.cluster import ensure_ray\nwith ensure_ray(address={address!r}): pass")
    assert f"ClusterError: No Ray cluster answers at {address}: [Errno 111] Connection refused" in done.stderr


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, for this one may hold the session's Ray."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_TMPDIR")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": str(Path(__file__).parents[2]), **variables},
        capture_output=True,
        text=True,
        timeout=180,
    )
