"""The package imports in every form it is shipped in, and the standard library stays what it is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("platform", "models", "serve", "jobs")


def run_python(code: str, *, cwd: Path, search_path: Path | None) -> str:
    """Output of a fresh interpreter; it must end well."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if search_path is not None:
        variables["PYTHONPATH"] = str(search_path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources, so that the checkout stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*ROOMS, "omnimri"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("omnimri-*.whl"))


def test_standard_platform_module_is_intact() -> None:
    code = "import platform, os, sysconfig; print(platform.system(), os.path.dirname(platform.__file__))"
    system, _, folder = run_python(code, cwd=ROOT, search_path=ROOT).partition(" ")
    assert system
    assert Path(folder) != ROOT / "platform"
    assert Path(folder) == Path(os.__file__).parent


def test_a_planted_init_file_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "platform").mkdir()
    (tmp_path / "platform" / "__init__.py").touch()
    shadowed = run_python("import platform; print(hasattr(platform, 'system'))", cwd=tmp_path, search_path=tmp_path)
    assert shadowed == "False"


@pytest.mark.parametrize("room", ROOMS)
def test_links_resolve(room: str) -> None:
    link = ROOT / "omnimri" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..") / room
    assert link.resolve() == (ROOT / room).resolve()


def test_a_checkout_without_links_still_imports(tmp_path: Path) -> None:
    (tmp_path / "omnimri").mkdir()
    shutil.copy(ROOT / "omnimri" / "__init__.py", tmp_path / "omnimri")
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "probe.py").write_text(f"NAME = {room!r}\n")
    code = "import omnimri.platform.probe as p, omnimri.jobs.probe as j; print(p.NAME, j.NAME)"
    assert run_python(code, cwd=tmp_path, search_path=None) == "platform jobs"


def test_wheel_holds_every_file_of_the_rooms(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if name.startswith("omnimri/")}
    in_tree = {
        f"omnimri/{path.relative_to(ROOT).as_posix()}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert in_wheel == in_tree | {"omnimri/__init__.py"}


def test_wheel_imports_and_its_command_answers(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
        distribution = "-".join(wheel.name.split("-")[:2])
        entry_points = archive.read(f"{distribution}.dist-info/entry_points.txt").decode()
    code = (
        "import omnimri.models.vocabulary, omnimri.platform.overrides as o, platform; platform.system();"
        "from omnimri.jobs.main import main; main(['--version']); print(o.__file__)"
    )
    version, file = run_python(code, cwd=tmp_path, search_path=installed).splitlines()
    assert version.startswith("omnimri ")
    assert Path(file).is_relative_to(installed)
    assert "omnimri = omnimri.jobs.main:main" in entry_points
