"""Where a training loop runs: as one worker of Ray Train, or alone in the calling process.

The loop asks a session for its rank, its last checkpoint and a place to report to, and needs nothing else of Ray.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol


class Session(Protocol):
    """One worker's view of the run."""

    rank: int
    world_size: int

    def last_checkpoint(self) -> AbstractContextManager[Path | None]:
        """Folder of the newest checkpoint that was completed, or None at the start of a run."""

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None, *, wait: bool = True) -> None:
        """Hand in metrics and, from every rank, a folder made by `checkpoint_folder`, which is taken away.

        Args:
            metrics: Plain numbers and strings.
            checkpoint: This rank's files; those of all ranks are merged.
            wait: Return when the checkpoint is safe; otherwise it is copied while training goes on.
        """

    def checkpoint_folder(self) -> Path:
        """A new, empty folder for this rank's part of a checkpoint."""

    def barrier(self) -> None:
        """Wait for all ranks."""


class RayTrainSession:
    """A worker that Ray Train started."""

    def __init__(self) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()

    @contextlib.contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        """See `Session`."""
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def checkpoint_folder(self) -> Path:
        """See `Session`. Not a context manager: an upload in the background still reads it, and deletes it."""
        return Path(tempfile.mkdtemp(prefix="omnimri-checkpoint-"))

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None, *, wait: bool = True) -> None:
        """See `Session`."""
        import ray.train

        mode = ray.train.CheckpointUploadMode
        ray.train.report(
            metrics,
            checkpoint=None if checkpoint is None else ray.train.Checkpoint.from_directory(checkpoint),
            checkpoint_upload_mode=mode.SYNC if wait else mode.ASYNC,
            delete_local_checkpoint_after_upload=checkpoint is not None,
        )

    def barrier(self) -> None:
        """See `Session`."""
        import ray.train.collective

        ray.train.collective.barrier()


class LocalSession:
    """The calling process alone: for tests, and for the trials of a sweep."""

    rank = 0
    world_size = 1

    def __init__(
        self, folder: Path, on_report: Callable[[dict[str, Any]], None] | None = None, num_to_keep: int = 2
    ) -> None:
        """Keep checkpoints under `folder`, and pass every report's metrics to `on_report`."""
        self._folder = folder
        self._on_report = on_report
        self._num_to_keep = num_to_keep

    def _kept(self) -> list[Path]:
        return sorted(self._folder.glob("checkpoint_*"))

    @contextlib.contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        """See `Session`."""
        kept = self._kept()
        yield kept[-1] if kept else None

    def checkpoint_folder(self) -> Path:
        """See `Session`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".writing-", dir=self._folder))

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None, *, wait: bool = True) -> None:  # noqa: ARG002
        """See `Session`."""
        if checkpoint is not None:
            kept = self._kept()
            number = int(kept[-1].name.split("_")[1]) + 1 if kept else 0
            checkpoint.rename(self._folder / f"checkpoint_{number:06d}")
            for old in self._kept()[: -self._num_to_keep]:
                shutil.rmtree(old)
        if self._on_report is not None:
            self._on_report(metrics)

    def barrier(self) -> None:
        """See `Session`."""
