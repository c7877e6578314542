"""How levels 2 and 3 of descriptions are generated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Backend = Literal["vllm", "endpoint", "transformers"]
BACKENDS: tuple[Backend, ...] = ("vllm", "endpoint", "transformers")
DEFAULT_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How an answer is drawn; changes what is written."""

    temperature: float = 0.0
    """0 takes the likeliest token. A volume whose answer was not valid is asked again at 0.7 at least."""
    top_p: float = 1.0
    seed: int = 0
    """Each volume and attempt gets a seed of its own from this one."""
    max_tokens: int = 1024
    """Longest answer; a longer one is cut off and not valid."""
    attempts: int = 3
    """Times that a volume is asked before it goes to the rejects."""

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.attempts) < 1:
            raise ValueError(f"sampling.max_tokens and sampling.attempts must be 1 or more, found {self}.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"sampling: expected temperature >= 0 and 0 < top_p <= 1, found {self}.")


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """What the model sees of a volume."""

    slices: int = 3
    """Slices across the volume's own slice axis, spread over those that show tissue."""
    longest_edge_px: int = 448
    """Longer edge of a picture, with square millimetres."""

    def __post_init__(self) -> None:
        if self.slices < 1 or self.longest_edge_px < 56:
            raise ValueError(f"pictures: expected slices >= 1 and longest_edge_px >= 56, found {self}.")


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """One annotation of a corpus."""

    backend: Backend = "vllm"
    model: str = DEFAULT_MODEL
    """Name on the hub, local folder, or what the endpoint calls it."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server, like http://host:8000/v1."""
    endpoint_retries: int = 5
    """Of a request that the server could not take (timeouts, 429, 5xx), with growing pauses."""
    endpoint_timeout_s: float = 300.0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    pictures: PictureConfig = field(default_factory=PictureConfig)
    batch_size: int = 16
    """Volumes that one worker has in hand; an interrupted run loses no more than that per worker."""
    min_workers: int = 1
    max_workers: int = 1
    """Engines, or clients of the endpoint; Ray Data starts more while volumes wait."""
    gpus_per_worker: float | None = None
    """None takes one where the cluster has any, else none."""
    cpus_per_worker: float = 1.0
    dtype: str = "auto"
    """Of weights and activations, for `vllm` and `transformers`: auto, bfloat16, float32."""
    engine: dict[str, Any] = field(default_factory=dict)
    """More arguments of vLLM's engine, for example {"tensor_parallel_size": 2, "max_model_len": 8192}."""
    cpu_cache_gib: int = 2
    """Key-value cache of vLLM where it runs without a GPU; it would take most of the memory else."""
    review_size: int = 50
    """Volumes on the review sheet, drawn at random."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, found {self.backend!r}.")
        if (self.endpoint is not None) != (self.backend == "endpoint"):
            raise ValueError("--endpoint URL goes with --backend endpoint, and only with it.")
        if self.batch_size < 1 or not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(
                "Expected batch_size >= 1 and 1 <= min_workers <= max_workers, found "
                f"{self.batch_size}, {self.min_workers}, {self.max_workers}."
            )
