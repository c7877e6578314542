"""Putting a finished corpus in its place, as a whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from omnimri.platform.data.shards import MANIFEST_NAME

logger = logging.getLogger(__name__)


def is_corpus(folder: Path) -> bool:
    """Whether a finished corpus lies in a folder."""
    return (folder / MANIFEST_NAME).is_file()


def requests_of(corpus: Path) -> list[str]:
    """What was asked for to make a corpus, one after the other; empty where there is none."""
    if not is_corpus(corpus):
        return []
    return json.loads((corpus / MANIFEST_NAME).read_text(encoding="utf-8")).get("requests", [])


def publish(finished: Path, out: Path, former_requests: Sequence[str] | None) -> None:
    """Put the finished folder in its place; a corpus that is replaced goes only when the new one stands.

    Args:
        finished: The folder, on the same file system as `out`.
        out: Its place.
        former_requests: Those of the corpus that was appended to; None replaces whatever is there.

    Raises:
        ValueError: If another ingest has changed that corpus in the meantime; the finished folder stays.
    """
    with _alone(out.parent):
        if former_requests is not None and requests_of(out) != list(former_requests):
            raise ValueError(f"{out}: another ingest has added to it in the meantime. Run the same command again.")
        replaced = out.with_name(f"{out.name}.replaced-{secrets.token_hex(4)}")
        if out.exists():
            out.rename(replaced)
        finished.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def restore(out: Path) -> None:
    """Put a corpus back that a kill caught on its way out of its place, before the new one stood there."""
    replaced = [folder for folder in out.parent.glob(f"{out.name}.replaced-*") if is_corpus(folder)]
    if len(replaced) == 1 and not out.exists():
        with _alone(out.parent):
            replaced[0].rename(out)
        logger.warning("%s was taken back: an ingest was killed while it replaced it", out)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for whoever publishes in a folder; the system gives the lock back when the process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
