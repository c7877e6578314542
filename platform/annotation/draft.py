"""The layer of a corpus while it is being written: an answer that was given is not asked for again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnimri.platform.data.intake.draft import try_lock

_LINES, _LOCK = "answers.jsonl", "lock"


@dataclass(frozen=True)
class Draft:
    """A folder beside the layer with one line per volume that is done; the last line of a volume counts."""

    folder: Path

    def lines(self) -> dict[str, dict[str, Any]]:
        """Row id to its line; a line that a kill cut off does not count."""
        path = self.folder / _LINES
        if not path.is_file():
            return {}
        whole = path.read_bytes().split(b"\n")[:-1]
        return {line["row_id"]: line for line in map(json.loads, whole)}

    def add(self, line: Mapping[str, Any]) -> None:
        """Keep a line; after this it survives any kill."""
        with (self.folder / _LINES).open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def mend(self) -> None:
        """Cut off a line that a kill left half-written."""
        path = self.folder / _LINES
        if path.is_file():
            text = path.read_bytes()
            os.truncate(path, text.rfind(b"\n") + 1)

    def clear(self) -> None:
        """Leave in the folder only what the layer keeps."""
        (self.folder / _LINES).unlink(missing_ok=True)
        (self.folder / _LOCK).unlink()

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def open_draft(layer: Path, request: str) -> Iterator[Draft]:
    """The draft of a layer, new or as an interrupted run left it; drafts of other requests stay.

    Raises:
        ValueError: If another process works on it.
    """
    folder = layer.with_name(f"{layer.name}.partial-{request[:16]}")
    folder.mkdir(parents=True, exist_ok=True)
    # The system gives the lock back when the process dies, however it dies.
    with (folder / _LOCK).open("w") as lock:
        if not try_lock(lock.fileno()):
            raise ValueError(f"{layer}: another run of the same annotation is at work. Wait for its end.")
        draft = Draft(folder)
        draft.mend()
        yield draft
