"""Every command in the README exists."""

import re
from pathlib import Path

import pytest

from omnimri.jobs.main import JOBS

ROOT = Path(__file__).parents[1]


def fenced_code(markdown: str) -> str:
    """The text of all code blocks."""
    return "\n".join(re.findall(r"^```[^\n]*\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def commands() -> str:
    return fenced_code((ROOT / "README.md").read_text(encoding="utf-8"))


def test_every_job_named_exists(commands: str) -> None:
    starts = r"(?:^|[;&|$]|\.venv/bin/)\s*omnimri\s+([a-z][\w-]*)|omnimri\.jobs\.(\w+)"
    named = {first or second for first, second in re.findall(starts, commands, flags=re.MULTILINE)} - {"main"}
    assert named, "the README shows no omnimri command"
    assert named <= set(JOBS)


def test_every_make_target_named_exists(commands: str) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|[;&|])\s*make\s+([a-z][\w-]*)", commands, flags=re.MULTILINE))
    assert {"demo", "test"} <= named, "the README's two commands are `make demo` and `make test`"
    assert named <= targets
