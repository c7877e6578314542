"""Serve a trained model over HTTP until interrupted.

  omnimri deploy --model runs/demo/model
  omnimri deploy --model models:/omnimri@champion --tracking-uri sqlite:///runs/demo/mlflow.db
  OMNIMRI_TOKEN=$(openssl rand -hex 32) omnimri deploy --model DIR --host 0.0.0.0

Four Ray Serve deployments start: ingress, encoder, text and image, each with its own scaling, queue and resources
(--set lists them). They run on the cluster that RAY_ADDRESS names, else on a local Ray. The job prints the URL and a
request to try, waits for Ctrl-C, and stops what it started. With --check it stops as soon as everything is ready.

On a long-lived cluster use Serve's own tools instead, with the same builder:
  serve run omnimri.serve.app:build_app model=DIR
"""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from omnimri.jobs.command import job_parser, run_job
from omnimri.jobs.register import find_store
from omnimri.platform import registry
from omnimri.platform.cluster import ensure_ray
from omnimri.platform.overrides import apply_overrides
from omnimri.serve.app import running_app
from omnimri.serve.config import TOKEN_VARIABLE, AppArgs, ServingConfig


def main(argv: list[str] | None = None) -> int:
    """Deploy."""
    parser = job_parser("deploy", __doc__)
    parser.add_argument("--model", required=True, help="folder of a saved model, or models:/NAME@ALIAS of the registry")
    parser.add_argument("--tracking-uri", help="MLflow that holds the registry; only for models:/...")
    parser.add_argument("--name", default="omnimri", help="model name that answers carry (default: %(default)s)")
    parser.add_argument(
        "--host", default="127.0.0.1",
        help=f"address to listen on; anything but this machine needs {TOKEN_VARIABLE} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: %(default)s)")
    parser.add_argument("--artifacts", help="folder for downloadable results (default: in the temporary folder)")
    parser.add_argument("--check", action="store_true", help="stop as soon as every deployment is ready")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="change a field, for example image.max_replicas=4, text.backend=vllm, limits.max_upload_mb=2000",
    )  # fmt: skip
    options = parser.parse_args(argv)
    return run_job("deploy", lambda: deploy(options))


def deploy(options: argparse.Namespace) -> int:
    """Start, say where, wait, stop."""
    args = app_args(options)
    started = time.perf_counter()
    with ensure_ray():
        # Only now: Ray brings a handler of its own for SIGTERM, which would end the process without cleaning up.
        signal.signal(signal.SIGTERM, _interrupt)
        with running_app(args, options.port or None) as url:
            print(f"OmniMRI is ready at {url} after {time.perf_counter() - started:.0f} s.", flush=True)
            print(how_to_ask(url, needs_token=args.token is not None), flush=True)
            if not options.check:
                _wait_for_interrupt()
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _wait_for_interrupt() -> None:
    try:
        signal.pause()
    except KeyboardInterrupt:
        print("Stopping.", flush=True)


def app_args(options: argparse.Namespace) -> AppArgs:
    """The command line as the arguments of the application.

    Raises:
        ValueError: In one sentence, where a value cannot be used.
    """
    values = {
        "model": str(model_folder(options.model, options.tracking_uri)),
        "name": options.name,
        "host": options.host,
        "serving": apply_overrides(ServingConfig(), options.set),
        "artifacts_dir": options.artifacts,
    }
    try:
        return AppArgs(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


def model_folder(model: str, store: str | None) -> Path:
    """The folder of a model that was given by path or by its address in the registry."""
    if not model.startswith("models:"):
        return Path(model).absolute()
    registered, folder = registry.resolve(find_store(store, None), model)
    print(f"{model} is {registered.uri}, in {folder}.", flush=True)
    return folder.absolute()


def how_to_ask(url: str, *, needs_token: bool) -> str:
    """A page, a description and a request to copy."""
    token = f' -H "Authorization: Bearer ${TOKEN_VARIABLE}"' if needs_token else ""
    return (
        f"  page       {url}/\n"
        f"  interface  {url}/docs\n"
        f"  request    curl{token} -F file=@scan.zip {url}/v1/report\n"
        "Research use only, not for diagnosis. Ctrl-C stops it."
    )


if __name__ == "__main__":
    raise SystemExit(main())
