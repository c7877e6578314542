"""cluster.yaml is what Ray's launcher accepts, and opens nothing to the world."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_launcher_accepts_it(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "cpu_etl", "gpu_train", "gpu_diffusion", "gpu_text"}


def test_a_field_that_ray_does_not_know_is_refused(config: dict[str, Any]) -> None:
    config["available_node_types"]["cpu_etl"]["max_worker"] = 3
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(prepare_config(config))


def test_idle_costs_only_the_head_and_no_task_runs_there(config: dict[str, Any]) -> None:
    workers = {name: node for name, node in config["available_node_types"].items() if name != "head"}
    assert all(node["min_workers"] == 0 for node in workers.values())
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    roles = [node["labels"]["omnimri-role"] for node in config["available_node_types"].values()]
    assert len(set(roles)) == len(roles)


def test_control_is_loopback_only_and_needs_the_token(config: dict[str, Any]) -> None:
    starts = [c for c in config["head_start_ray_commands"] + config["worker_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert any(remote.endswith(".ray/auth_token") for remote in config["file_mounts"])


def test_nodes_run_the_ray_that_was_tested(config: dict[str, Any]) -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray==")]
    version = pins[0].removeprefix("ray==")
    images = [node["docker"]["worker_image"] for node in config["available_node_types"].values() if "docker" in node]
    for text in [config["docker"]["image"], *images, *config["setup_commands"]]:
        assert version in text
