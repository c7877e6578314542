"""OmniMRI: train, evaluate and serve one vision-language model for the whole MRI workflow.

usage: omnimri JOB [options]        the same as  python -m omnimri.jobs.JOB [options]
       omnimri JOB --help           what the job does, and its options
       omnimri --version
"""

import ast
import importlib
import sys
from pathlib import Path

import omnimri

JOBS = (
    "corpus", "datasets", "ingest", "annotate", "instruct", "upcycle", "plan", "train", "sweep", "evaluate", "probe",
    "benchmark", "register", "deploy", "pipeline", "demo",
)  # fmt: skip
"""In the order of the work; each is a module beside this one with a `main(argv) -> int`."""


def main(argv: list[str] | None = None) -> int:
    """Run the job that the first argument names, with the arguments that follow it."""
    arguments = sys.argv[1:] if argv is None else argv
    name, *rest = arguments or ["--help"]
    if name in ("--version", "-V"):
        print(f"omnimri {omnimri.__version__}")
        return 0
    if name in ("--help", "-h", "help"):
        print(overview())
        return 0
    if name not in JOBS:
        print(f"omnimri: error: unknown job {name!r}; known: {', '.join(JOBS)}", file=sys.stderr)
        return 1
    # Only now: a job imports what it needs, and that can take seconds.
    return importlib.import_module(f"omnimri.jobs.{name}").main(rest)


def overview() -> str:
    """The manual with one line for each job, read from the sources without importing them."""
    width = max(map(len, JOBS)) + 2
    lines = [f"  {name:<{width}}{summary(name)}" for name in JOBS]
    return "\n".join([str(__doc__), "jobs, in the order of the work:", *lines])


def summary(name: str) -> str:
    """First line of the manual of a job."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    raise SystemExit(main())
