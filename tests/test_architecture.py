"""The tree is the architecture: who may import whom, and what may never be shadowed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {  # room -> the rooms it may import besides itself
    "models": set(),
    "platform": {"models"},
    "serve": {"models", "platform"},
    "jobs": {"models", "platform", "serve"},
}
FORBIDDEN = {  # room -> packages it must do without
    "models": {"ray", "mlflow", "deepspeed", "fastapi"},
    "platform": {"fastapi"},
    "serve": {"deepspeed"},
    "jobs": {"deepspeed"},
}
MLFLOW_FILES = {"platform/tracking.py", "platform/registry.py"}


def imports(path: Path) -> set[str]:
    """Absolute dotted names imported anywhere in a source file, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = f"{'.' * node.level}{node.module or ''}"
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def violations(root: Path) -> Iterator[str]:
    """What the sources under `root` import and may not."""
    for room, allowed in ROOMS.items():
        for path in sorted((root / room).rglob("*.py")):
            place = path.relative_to(root).as_posix()
            for name in sorted(imports(path)):
                top, _, rest = name.partition(".")
                target = rest.partition(".")[0]
                if not top:
                    yield f"{place}: write the whole name, not {name}"
                elif top == "omnimri" and target in ROOMS and target not in {room, *allowed}:
                    yield f"{place}: {room} may not import {name}"
                elif top in FORBIDDEN[room] or (top == "mlflow" and place not in MLFLOW_FILES):
                    yield f"{place}: may not import {name}"
                elif top in ROOMS.keys() - {"platform"}:
                    yield f"{place}: write omnimri.{name}, not {name}"


def test_imports_point_one_way() -> None:
    assert any((ROOT / "platform").rglob("*.py"))
    assert list(violations(ROOT)) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("models/a.py", "from omnimri.platform.cluster import ensure_ray", "models may not import omnimri.platform"),
        ("models/a.py", "def f():\n    import ray.data", "may not import ray.data"),
        ("platform/data/a.py", "import omnimri.serve.app", "platform may not import omnimri.serve.app"),
        ("platform/data/a.py", "from omnimri import jobs", "platform may not import omnimri.jobs"),
        ("platform/a.py", "from mlflow import MlflowClient", "may not import mlflow"),
        ("serve/a.py", "from omnimri.jobs.train import main", "serve may not import omnimri.jobs"),
        ("serve/a.py", "from models.scan import Scan", "write omnimri.models"),
        ("jobs/a.py", "from .train import main", "write the whole name"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(line + "\n")
    found = list(violations(tmp_path))
    assert any(complaint in message and message.startswith(file) for message in found), found


def test_what_is_allowed_is_not_complained_about(tmp_path: Path) -> None:
    for file, line in {
        "models/a.py": "import torch\nfrom omnimri.models.scan import Scan\nimport platform",
        "platform/tracking.py": "import mlflow, ray, deepspeed\nfrom omnimri.models import scan",
        "jobs/a.py": "from ray import serve\nfrom omnimri.serve.app import build_app\nfrom omnimri import platform",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(line + "\n")
    assert list(violations(tmp_path)) == []


def test_rooms_have_no_init_file() -> None:
    found = [str(path.relative_to(ROOT)) for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("__init__.py")]
    assert found == [], (
        "platform/__init__.py hides the standard library's `platform` from every process that has the repository root "
        "on sys.path, and Ray workers then die at `import ray`; the other rooms follow the same rule."
    )
