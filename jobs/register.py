"""Put a checkpoint into the model registry, and say which version serves.

A checkpoint folder becomes the next version of a name and gets an alias. `--promote` moves the alias `champion` to
it, which is what `omnimri deploy` serves; the former champion keeps the alias `previous`, so that one can go back.

The registry is the MLflow store of --tracking-uri, or of MLFLOW_TRACKING_URI, or the mlflow.db of the run folder
that the checkpoint lies in.

Examples:
  omnimri register --checkpoint runs/demo/instruct/model --name omnimri --alias candidate
  omnimri register --checkpoint runs/demo/instruct/model --promote
  omnimri register --promote --version 3
"""

import argparse
import os
from pathlib import Path

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform import registry
from omnimri.platform.tracking import tracking_uri


def main(argv: list[str] | None = None) -> int:
    """Register, promote, or both."""
    parser = job_parser("register", __doc__)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="checkpoint folder (with omnimri.json)")
    parser.add_argument("--name", default="omnimri", help="name of the registered model (default: %(default)s)")
    parser.add_argument("--alias", default=registry.CANDIDATE, help="alias of the new version (default: %(default)s)")
    parser.add_argument("--promote", action="store_true", help="move the alias champion to the version")
    parser.add_argument("--version", type=int, help="promote this version, which is registered already")
    parser.add_argument("--run-id", help="MLflow run that made the checkpoint")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store (default: see above)")
    args = parser.parse_args(argv)
    if (args.checkpoint is None) == (args.version is None):
        parser.error("give either --checkpoint DIR or --version N")
    if args.version is not None and not args.promote:
        parser.error("--version needs --promote")
    return run_job("register", lambda: register_and_promote(args))


def register_and_promote(args: argparse.Namespace) -> None:
    """Do what the command line says, and print version and aliases."""
    uri = find_store(args.tracking_uri, args.checkpoint)
    if args.checkpoint is not None:
        made = registry.register(uri, args.checkpoint, args.name, alias=args.alias, run_id=args.run_id)
        version = made.version
    else:
        version = args.version
    if args.promote:
        made = registry.promote(uri, args.name, version)
    aliases = " ".join(f"@{alias}" for alias in made.aliases)
    print(f"{made.uri} {aliases} sha256 {made.digest[:12]} in {uri}")


def find_store(given: str | None, checkpoint: Path | None) -> str:
    """The MLflow store that was named, or the nearest mlflow.db at or above the checkpoint.

    Raises:
        ValueError: None was named and none is found.
    """
    start = Path.cwd() if checkpoint is None else checkpoint.absolute()
    nearest = next((folder for folder in (start, *start.parents) if (folder / "mlflow.db").is_file()), None)
    if nearest is None and not given and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(
            f"no mlflow.db in {start} or above: name the store, as in --tracking-uri sqlite:///PATH/mlflow.db"
        )
    return tracking_uri(nearest or start, given)


if __name__ == "__main__":
    raise SystemExit(main())
