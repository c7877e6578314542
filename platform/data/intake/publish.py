"""Putting a finished corpus in its place, as a whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
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


@contextlib.contextmanager
def turn(out: Path, former_requests: Sequence[str] | None) -> Iterator[None]:
    """Be the only one who changes a corpus that is appended to.

    Args:
        out: Its place.
        former_requests: Those it had when this ingest began; None for a corpus that is new or replaced as a whole.

    Raises:
        ValueError: If another ingest has changed it since.
    """
    if former_requests is None:
        yield
        return
    changed = ValueError(f"{out}: another ingest has added to it in the meantime. Run the same command again.")
    try:
        # Open for writing, or NFS gives no lock. Whoever waits here while another publishes has the manifest of before.
        lock = (out / MANIFEST_NAME).open("r+", encoding="utf-8")
    except FileNotFoundError:
        raise changed from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if requests_of(out) != list(former_requests):
            raise changed
        yield


def put_in_place(finished: Path, out: Path) -> None:
    """Move a finished folder to its place; a corpus that is replaced goes only when the new one stands."""
    replaced = out.with_name(f"{out.name}.replaced-{secrets.token_hex(4)}")
    if out.exists():
        out.rename(replaced)
    finished.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def restore(out: Path) -> None:
    """Put a corpus back that a kill caught on its way out of its place, before the new one stood there."""
    replaced = [folder for folder in out.parent.glob(f"{out.name}.replaced-*") if is_corpus(folder)]
    if len(replaced) == 1 and not out.exists():
        replaced[0].rename(out)
        logger.warning("%s was taken back: an ingest was killed while it replaced it", out)
