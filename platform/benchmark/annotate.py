"""The backends of `omnimri annotate` on the same volumes and the same model, one after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omnimri.platform.annotation.annotate import annotate
from omnimri.platform.annotation.config import AnnotateConfig


def benchmark_annotate(corpus: Path, configs: Sequence[AnnotateConfig], *, limit: int | None = None) -> dict[str, Any]:
    """Volumes and tokens per second of several ways to annotate; a connected Ray is expected.

    Args:
        corpus: An ingested corpus; what is written about it is thrown away.
        configs: One for each backend.
        limit: Volumes, the first of the corpus.

    Returns:
        By backend: `volumes`, `pictures`, `rejected`, `seconds` with the start of the engine, `volumes_per_s` without
        it, `answer_tokens_per_s` alike.
    """
    return {config.backend: _measured(corpus.absolute(), config, limit) for config in configs}


def _measured(corpus: Path, config: AnnotateConfig, limit: int | None) -> dict[str, Any]:
    with TemporaryDirectory(prefix="omnimri-benchmark-") as folder:
        link = Path(folder) / corpus.name  # the layer is written beside
        link.symlink_to(corpus)
        started = time.perf_counter()
        tables = annotate(link, config, limit=limit).tables
        seconds = time.perf_counter() - started
    per_volume = tables["answer_tokens"] / tables["annotated"]
    return {
        "volumes": tables["annotated"],
        "pictures": tables["annotated"] * config.pictures.slices,
        "rejected": tables["rejected"],
        "asked_again": tables["asked_again"],
        "seconds": round(seconds, 2),
        "volumes_per_s": round(tables["volumes_per_s"], 3),
        "answer_tokens_per_s": round(tables["volumes_per_s"] * per_volume, 1),
    }
