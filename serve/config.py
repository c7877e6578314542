"""What a deployment of OmniMRI can be told: replicas, queues, limits on uploads, access, artifacts.

`AppArgs` is the one argument of `omnimri.serve.app.build_app`, so `serve run omnimri.serve.app:build_app model=DIR`
and a Serve YAML (`args:`) are checked by the same code as `omnimri deploy`.
"""

from __future__ import annotations

import ipaddress
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

TOKEN_VARIABLE = "OMNIMRI_TOKEN"


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """Resources, scaling and queue of one deployment."""

    min_replicas: int = 1
    """Replicas kept when idle; 0 lets the deployment scale to nothing (the next request pays the cold start)."""
    max_replicas: int = 2
    """Replicas under load."""
    target_ongoing_requests: float = 2.0
    """Requests per replica, running and queued, that autoscaling aims for."""
    max_ongoing_requests: int = 4
    """Requests one replica accepts at a time."""
    max_queued_requests: int = 16
    """Requests that may wait for a replica before callers are told to come back."""
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    num_cpus: float = 0.5
    """Logical CPUs that Ray reserves per replica; a share below one lets a laptop hold all four deployments."""
    num_gpus: float = 0.0
    """GPUs, or the share of one, per replica."""
    num_threads: int | None = None
    """Threads of the tensor library per replica; None takes every core the process may use."""
    health_check_period_s: float = 10.0
    health_check_timeout_s: float = 60.0
    """Generous, because a replica that loads weights or computes on all cores answers late."""
    graceful_shutdown_timeout_s: float = 20.0
    """How long a replica may finish its requests before it is stopped."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) must lie between 0 and max_replicas ({self.max_replicas}), "
                "and max_replicas must be at least 1."
            )

    @property
    def capacity(self) -> int:
        """Requests that all replicas together run or queue."""
        return self.max_replicas * self.max_ongoing_requests + self.max_queued_requests

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `Deployment.options`."""
        return {
            "autoscaling_config": {
                "min_replicas": self.min_replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.target_ongoing_requests,
                "upscale_delay_s": self.upscale_delay_s,
                "downscale_delay_s": self.downscale_delay_s,
            },
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
            "health_check_period_s": self.health_check_period_s,
            "health_check_timeout_s": self.health_check_timeout_s,
            "graceful_shutdown_timeout_s": self.graceful_shutdown_timeout_s,
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
        }


@dataclass(frozen=True, kw_only=True)
class IngressConfig(ReplicaConfig):
    """HTTP, file reading and pictures; needs no GPU."""

    max_replicas: int = 1
    """More than one needs `AppArgs.artifacts_dir` on storage that all of them see."""
    num_cpus: float = 0.2
    max_ongoing_requests: int = 32
    """Bounds the disk that uploads may take: this many times `UploadLimits.max_upload_mb`."""
    target_ongoing_requests: float = 16.0
    max_queued_requests: int = 64


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(ReplicaConfig):
    """Vision encoder, alignment layer and, for image tasks, one pass of the backbone."""

    max_queued_requests: int = 32


@dataclass(frozen=True, kw_only=True)
class TextConfig(ReplicaConfig):
    """Text decoding."""

    backend: str = "transformers"
    """`transformers`, or `vllm` where vLLM is installed."""
    outline: bool = True
    """Before a text answer the image deployment draws lesions, and the prompt tells of them, as in training."""
    outline_timeout_s: float = 30.0
    """Longest wait for it; then the answer is written without, and says so."""
    vllm_dtype: str = "auto"
    """Number type of vLLM's weights: auto, bfloat16, float16, float32."""
    vllm_max_model_len: int | None = None
    """Longest sequence vLLM plans memory for, in tokens; None takes the model's own limit."""
    vllm_cpu_cache_gib: int | None = None
    """Memory for vLLM's key-value cache on a CPU, in GiB; None leaves vLLM's own default."""
    vllm_eager: bool = False
    """Start faster and decode slower: no compilation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend not in ("transformers", "vllm"):
            raise ValueError(f"TextConfig.backend {self.backend!r} is unknown; known: transformers, vllm.")
        if self.outline_timeout_s <= 0:
            raise ValueError(
                f"TextConfig.outline_timeout_s must be positive, found {self.outline_timeout_s}; outline=false leaves "
                "the drawing out."
            )


@dataclass(frozen=True, kw_only=True)
class ImageConfig(ReplicaConfig):
    """Diffusion decoding and data consistency; a request is long, so few run at once."""

    max_ongoing_requests: int = 2
    target_ongoing_requests: float = 1.0
    max_queued_requests: int = 8


@dataclass(frozen=True, kw_only=True)
class UploadLimits:
    """Bounds on what a request may bring, on the wire and unpacked."""

    max_upload_mb: float = 512.0
    """Bytes of one request, in MB of 10^6."""
    max_unpacked_mb: float = 2048.0
    """Bytes after decompression of zip, gzip or HDF5 filters, in MB."""
    max_ratio: float = 200.0
    """Unpacked over packed size, for anything that unpacks to more than 16 MB; real series stay below 20."""
    max_files: int = 5000
    """Files in one request, members of zips included."""
    max_voxels: int = 256 * 1024 * 1024
    """Voxels of one image as its header declares them."""
    max_axis: int = 4096
    """Voxels along one axis."""


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """What `omnimri deploy --set` can change."""

    limits: UploadLimits = UploadLimits()
    ingress: IngressConfig = IngressConfig()
    encoder: EncoderConfig = EncoderConfig()
    text: TextConfig = TextConfig()
    image: ImageConfig = ImageConfig()


class AppArgs(BaseModel):
    """Arguments of `build_app`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(description="Folder of a saved model, readable on every node.")
    name: str = Field("omnimri", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Model name that answers carry.")
    host: str = Field("127.0.0.1", description="Address the HTTP proxy listens on.")
    token: SecretStr | None = Field(
        default_factory=lambda: SecretStr(os.environ[TOKEN_VARIABLE]) if os.environ.get(TOKEN_VARIABLE) else None,
        description=f"Bearer token that every request must carry; default: the environment variable {TOKEN_VARIABLE}.",
    )
    request_timeout_s: float = Field(600.0, gt=0, description="Longest time a request may take.")
    retry_after_s: int = Field(5, ge=1, description="Value of Retry-After when a queue is full.")
    artifacts_dir: str = Field(
        default_factory=lambda: str(Path(tempfile.gettempdir()) / f"omnimri-artifacts-{os.getuid()}"),
        description="Folder for downloadable results.",
    )
    max_artifact_requests: int = Field(200, ge=1, description="Requests whose artifacts are kept; oldest go first.")
    max_artifact_age_s: float = Field(24 * 3600.0, gt=0, description="Age after which artifacts are removed.")
    serving: ServingConfig = ServingConfig()

    @field_validator("model")
    @classmethod
    def _model_is_a_folder(cls, value: str) -> str:
        if not (Path(value) / "omnimri.json").is_file():
            raise ValueError(
                f"model: expected a folder with omnimri.json (a saved OmniMRI model), found {value!r}. "
                "Train one with `omnimri train` or `omnimri demo`, or give the folder of a finished run."
            )
        return str(Path(value).resolve())

    @model_validator(mode="after")
    def _open_only_with_token(self) -> AppArgs:
        if self.token is None and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is reachable from other machines, so a token is required: set {TOKEN_VARIABLE} "
                "(for example to the output of `openssl rand -hex 32`), or keep --host 127.0.0.1."
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether an address or host name stays on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
