"""The Ray Serve application: ingress, encoder, text, image; and how to run it inside a program.

`serve run omnimri.serve.app:build_app model=DIR` and a Serve YAML with `import_path: omnimri.serve.app:build_app` use
the same builder as `omnimri deploy`.
"""

# No `from __future__ import annotations` here: Serve reads the annotation of `build_app` to check its arguments, and
# would pass a plain dict where it finds a string.

import contextlib
import functools
import logging
import socket
from collections.abc import Iterator

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.schema import LoggingConfig

from omnimri.platform.errors import ClusterError
from omnimri.serve.config import AppArgs
from omnimri.serve.deployments import Encoder, EngineLoader, Image, Text, load_engine
from omnimri.serve.ingress import Ingress

APP_NAME = "omnimri"
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30"}
"""Serve gives its proxy 5 s three times to import and answer, then kills it; on a busy laptop that is too little."""


def build_app(args: AppArgs) -> serve.Application:
    """The application for a saved model."""
    return assemble(args, functools.partial(load_engine, args.model))


def assemble(args: AppArgs, load: EngineLoader) -> serve.Application:
    """Bind the four deployments, each with its own scaling, queue and resources; `load` brings the engine."""
    encoder = Encoder.options(**args.serving.encoder.options()).bind(load, args.serving.encoder)
    text = Text.options(**args.serving.text.options()).bind(load, args.serving.text, args.model)
    image = Image.options(**args.serving.image.options()).bind(load, args.serving.image)
    return Ingress.options(**args.serving.ingress.options()).bind(args, encoder, text, image)


@contextlib.contextmanager
def running_app(args: AppArgs, port: int | None = None, *, load: EngineLoader | None = None) -> Iterator[str]:
    """Run the application on the Ray this process is connected to; yields its URL once every deployment is ready.

    Args:
        args: What to serve, and the address to listen on.
        port: Port of the HTTP proxy; None takes a free one.
        load: Where the engine comes from; by default the saved model.

    Raises:
        ClusterError: If the port is taken, Serve already runs on this cluster, or a deployment does not start.
    """
    if serve.status().proxies:
        raise ClusterError(
            "Ray Serve already runs on this cluster, with an address of its own. Stop it (`serve shutdown`), or add "
            "OmniMRI to it: `serve run omnimri.serve.app:build_app model=DIR --name omnimri`."
        )
    port = port or free_port(args.host)
    expect_free(args.host, port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # This process; replicas keep their own level.
    try:
        _start(args.host, port)
        _run(assemble(args, load) if load else build_app(args))
        yield url_of(args.host, port)
    finally:
        serve.shutdown()


def _start(host: str, port: int) -> None:
    """Start Serve's controller and HTTP proxy."""
    try:
        serve.start(
            http_options={"host": host, "port": port},
            logging_config=LoggingConfig(log_level=logging.WARNING, enable_access_log=False),
            controller_options={"runtime_env": {"env_vars": PATIENCE}},
        )
    except (TimeoutError, RayActorError) as error:
        raise ClusterError(
            f"Serve's HTTP proxy did not start on {host} port {port}: the machine may be overloaded, try again."
        ) from error


def _run(app: serve.Application) -> None:
    """Deploy the application and wait until every deployment is ready."""
    try:
        serve.run(app, name=APP_NAME, route_prefix="/", logging_config=LoggingConfig(enable_access_log=False))
    except RuntimeError as error:
        raise ClusterError(f"The application did not start: {error}") from error


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on just now."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def expect_free(host: str, port: int) -> None:
    """Refuse a port that is taken, before Serve's proxy retries on it for a minute.

    Raises:
        ClusterError: If something listens there.
    """
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = f"Cannot listen on {host} port {port} ({error.strerror}); choose another --port."
            raise ClusterError(reason) from error


def url_of(host: str, port: int) -> str:
    """Where to reach a server that listens on `host`; an address that means every interface becomes loopback."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
