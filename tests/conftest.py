"""What the tests share: a seeded generator and one small local Ray."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from omnimri.platform.cluster import ensure_ray, worker_environment

ROOT = Path(__file__).parents[1]


@pytest.fixture
def rng() -> torch.Generator:
    """A generator of its own for every test, so that tests do not depend on their order."""
    return torch.Generator().manual_seed(20250825)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray with four logical CPUs for the whole session; nothing outside the machine can reach it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in worker_environment().items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        with ensure_ray(num_cpus=4):
            yield
