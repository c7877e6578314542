"""The folder of a corpus while it is being made: what an interrupted ingest finished is not done again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from omnimri.platform.data.intake.publish import is_corpus
from omnimri.platform.data.intake.writer import ShardReport
from omnimri.platform.data.shards import SHARDS_FOLDER

_REPORTS_FOLDER = "reports"
_LOCK_NAME = "lock"


@dataclass(frozen=True)
class Draft:
    """Finished shards, each with a report of what it holds; a shard without a report is written again."""

    folder: Path
    first_shard: int = 0
    """Number of the first shard; those before it are another's."""

    def shard(self, number: int) -> Path:
        """Where a shard belongs."""
        return self.folder / SHARDS_FOLDER / f"shard-{self.first_shard + number:05d}.parquet"

    def report(self, shard: Path) -> ShardReport | None:
        """What a finished shard holds; None for one that is not finished."""
        path = self._report_path(shard)
        return ShardReport(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def finish(self, shard: Path, report: ShardReport) -> None:
        """Record that a shard is complete; after this it is never written again."""
        path = self._report_path(shard)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(asdict(report)), encoding="utf-8")
        partial.replace(path)

    def clear(self) -> None:
        """Leave in the folder only what the corpus keeps."""
        shutil.rmtree(self.folder / _REPORTS_FOLDER)
        for half_written in (self.folder / SHARDS_FOLDER).glob(".*"):
            half_written.unlink()
        (self.folder / _LOCK_NAME).unlink()

    def _report_path(self, shard: Path) -> Path:
        return self.folder / _REPORTS_FOLDER / f"{shard.stem}.json"


@contextlib.contextmanager
def open_draft(out: Path, request: str, *, first_shard: int = 0) -> Iterator[Draft]:
    """The draft of a corpus, new or as an interrupted ingest left it. Drafts of other requests are removed.

    Args:
        out: Where the corpus will stand; the draft lies beside it.
        request: What was asked for; another request is another draft.
        first_shard: Number of its first shard.

    Raises:
        ValueError: If another process works on it.
    """
    folder = out.with_name(f"{out.name}.partial-{request[:16]}")
    for other in out.parent.glob(f"{out.name}.partial-*"):
        if other != folder:
            _remove_abandoned(other)
    for name in (SHARDS_FOLDER, _REPORTS_FOLDER):
        (folder / name).mkdir(parents=True, exist_ok=True)
    # The system gives the lock back when the process dies, however it dies.
    with (folder / _LOCK_NAME).open("w") as lock:
        if not try_lock(lock.fileno()):
            raise ValueError(f"{out}: another ingest of the same files is at work in {folder}. Wait for its end.")
        yield Draft(folder, first_shard)


def _remove_abandoned(folder: Path) -> None:
    if is_corpus(folder):  # finished, and killed before it was published
        shutil.rmtree(folder)
        return
    with contextlib.suppress(FileNotFoundError), (folder / _LOCK_NAME).open() as lock:
        if try_lock(lock.fileno()):
            shutil.rmtree(folder)


def try_lock(descriptor: int) -> bool:
    """Take the lock of a file; False where another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
