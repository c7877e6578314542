"""Files that answers point to: written under random ids, served back by exact name, bounded in number and age."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import threading
import time
from pathlib import Path

MEDIA_TYPES = {
    ".nii.gz": "application/gzip",
    ".png": "image/png",
    ".dcm": "application/dicom",
    ".json": "application/json",
}
"""Media types by file ending."""

_ID = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9]+)+")


def media_type(name: str) -> str:
    """Media type of an artifact."""
    for ending, kind in MEDIA_TYPES.items():
        if name.endswith(ending):
            return kind
    raise ValueError(f"Artifact {name!r}: expected an ending of {', '.join(MEDIA_TYPES)}.")


def new_request_id() -> str:
    """128 random bits: an artifact cannot be found by guessing."""
    return secrets.token_hex(16)


class ArtifactStore:
    """One folder per request under `root`, readable by this user only.

    Args:
        root: Created when missing.
        max_requests: Requests whose artifacts are kept; the oldest go first.
        max_age_s: Age after which the artifacts of a request are removed.
    """

    def __init__(self, root: Path | str, *, max_requests: int, max_age_s: float) -> None:
        self.root = Path(root)
        self.max_requests = max_requests
        self.max_age_s = max_age_s
        self._lock = threading.Lock()
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.root.stat().st_uid != os.getuid():
            raise ValueError(f"artifacts_dir {self.root} belongs to another user; set AppArgs.artifacts_dir.")
        self.prune()

    def write(self, request_id: str, files: dict[str, bytes]) -> None:
        """Store the files of one request, all or none, and drop what is over the bounds."""
        for name in files:
            if not (_NAME.fullmatch(name) and _ID.fullmatch(request_id)):
                raise ValueError(f"Artifact {request_id}/{name}: expected a 32 digit id and a plain file name.")
        draft = self.root / f".{request_id}"
        draft.mkdir(mode=0o700)
        for name, content in files.items():
            (draft / name).write_bytes(content)
        draft.rename(self.root / request_id)
        self.prune()

    def find(self, request_id: str, name: str) -> Path | None:
        """Path of an artifact, or None; nothing outside the store can be named."""
        if not (_ID.fullmatch(request_id) and _NAME.fullmatch(name)):
            return None
        self.prune()
        path = self.root / request_id / name
        return path if path.is_file() and not path.is_symlink() else None

    def prune(self) -> int:
        """Remove requests that are too old or too many; returns how many went."""
        with self._lock:
            kept = sorted(((_written(path), path) for path in self.root.iterdir() if path.is_dir()), reverse=True)
            oldest = time.time() - self.max_age_s
            gone = [path for rank, (written, path) in enumerate(kept) if rank >= self.max_requests or written < oldest]
            for path in gone:
                shutil.rmtree(path, ignore_errors=True)
        return len(gone)


def _written(path: Path) -> float:
    """Time of writing; 0 for a folder that another replica has just removed."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
