"""`ray job submit` runs a job from the uninstalled tree, on a cluster that asks for its token."""

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from ray._private.runtime_env.packaging import _zip_files

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class RayHead:
    """A running head, and how to hand it work."""

    dashboard: str
    """Address of the Jobs API."""
    variables: dict[str, str] = field(repr=False)
    """Environment of whoever talks to it: mode and token."""

    def submit(self, *entrypoint: str, timeout_s: float = 600) -> str:
        """Submit a command as a user would, wait for its end, and return what both printed; it must succeed."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", self.dashboard]
        for _ in range(6):
            done = subprocess.run(
                [*command, "--working-dir", ".", "--", *entrypoint],
                cwd=ROOT,
                env=self.variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout_s,
            )
            if "No available agent" not in done.stdout:  # a head that is young says so, and asks to try again
                break
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def ray_head() -> Iterator[RayHead]:
    """`ray start --head` on free loopback ports, in a folder and a process group of its own."""
    port, dashboard_port, agent_port, client_port = free_ports(4)
    with tempfile.TemporaryDirectory(prefix="oray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        variables = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
        variables |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HOME": folder,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        options = {
            "--port": port,
            "--dashboard-port": dashboard_port,
            "--dashboard-agent-listen-port": agent_port,
            "--ray-client-server-port": client_port,
            "--dashboard-host": "127.0.0.1",
            "--num-cpus": 4,
            "--temp-dir": folder,
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        head = subprocess.Popen(
            [*command, *(f"{name}={value}" for name, value in options.items())],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            wait_for_start(head)
            yield RayHead(f"http://127.0.0.1:{dashboard_port}", variables)
        finally:
            stop(head)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def wait_for_start(head: subprocess.Popen[str]) -> None:
    """Read what the head says until it says that it runs; when it ends instead, show what it said."""
    said = []
    for line in head.stdout:
        said.append(line)
        if "Ray runtime started" in line:
            return
    raise AssertionError(f"the head ended with status {head.wait()}:\n{''.join(said)}")


def stop(head: subprocess.Popen[str]) -> None:
    """Ask the head to end, which ends what it has started; end by force what is left of it."""
    if head.poll() is not None:
        return
    family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    head.terminate()
    _, alive = psutil.wait_procs(family, timeout=60)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait()
    head.stdout.close()


def test_a_job_runs_from_the_uninstalled_tree(ray_head: RayHead) -> None:
    said = ray_head.submit("python", "-m", "omnimri.jobs.main", "--version")
    assert re.search(r"^omnimri \d", said, flags=re.MULTILINE), said
    assert "succeeded" in said


def test_workers_of_a_submitted_job_import_the_same_tree(ray_head: RayHead) -> None:
    code = (
        "import ray; from omnimri.platform.cluster import ensure_ray, submitted_job\n"
        "def look(row):\n"
        "    import os, platform, omnimri.platform.data.schema as schema\n"
        "    return {'file': schema.__file__, 'threads': os.environ['OMP_NUM_THREADS'], 'system': platform.system()}\n"
        "with ensure_ray():\n"
        "    row = ray.data.range(1).map(look, num_cpus=0.5).take_all()[0]\n"
        "    print('WORKER', row['file'], row['threads'], row['system'])\n"
        "    print('SUBMISSION', submitted_job()['metadata']['job_submission_id'])\n"
    )
    said = ray_head.submit("python", "-c", code)
    file, threads, system = re.search(r"^WORKER (\S+) (\S+) (\S+)$", said, flags=re.MULTILINE).groups()
    assert "/working_dir_files/" in file
    assert not Path(file).is_relative_to(ROOT)
    assert (threads, system) == ("1", "Linux")
    assert re.search(r"^SUBMISSION raysubmit_", said, flags=re.MULTILINE)


def test_nobody_gets_in_without_the_token(ray_head: RayHead) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{ray_head.dashboard}/api/jobs/", timeout=30)


def test_only_sources_are_uploaded() -> None:
    """What Ray leaves at home of a tree in which everything was run."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        for file in (".gitignore", ".rayignore"):
            shutil.copy(ROOT / file, tree)
        wanted = {"platform/data/schema.py", "models/scan.py", "serve/static/page.js", "pyproject.toml"}
        junk = {
            ".git/objects/pack", ".venv/bin/python", "runs/demo/model.safetensors", "mlflow.db", "corpus/a.dcm",
            "shards/a.parquet", "platform/__pycache__/x.pyc", ".ruff_cache/x", "build/lib/x.py", "mlruns/1",
        }  # fmt: skip
        for file in wanted | junk:
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            (tree / file).write_text("x")
        archive = tree.parent / f"{tree.name}.zip"
        _zip_files(tree, [], archive, include_gitignore=True)
        with zipfile.ZipFile(archive) as file:
            uploaded = set(file.namelist()) - {".gitignore", ".rayignore"}
        archive.unlink()
    assert {file for file in uploaded if not file.endswith("/")} == wanted


def test_the_whole_pipeline_runs_as_a_submitted_job(ray_head: RayHead) -> None:
    """Corpus, four stages, evaluation and registry from the uninstalled tree, at small numbers."""
    with tempfile.TemporaryDirectory() as folder:
        settings = (
            "run.train.steps=2", "run.train.checkpoint_every=2", "run.stream.num_tasks=1", "evaluate.max_volumes=1",
            "evaluate.max_slices=4", "evaluate.tasks=reconstruct,diagnose", "evaluate.bootstrap_samples=0",
            "evaluate.num_workers=1",
        )  # fmt: skip
        said = ray_head.submit(
            "python", "-m", "omnimri.jobs.pipeline", "--preset", "tiny", "--out", f"{folder}/run", "--patients", "5",
            *(part for setting in settings for part in ("--set", setting)), timeout_s=900,
        )  # fmt: skip
        assert "succeeded" in said
        assert (Path(folder) / "run" / "instruct" / "model" / "omnimri.json").is_file()
        assert (Path(folder) / "run" / "evaluation" / "index.html").is_file()
        assert "@champion" in said
