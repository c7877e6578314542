"""How many requests may be under way per decoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from omnimri.serve.schemas import RequestError


class Admission:
    """Requests in flight per decoder, so that a burst on one is turned away before its scan is read.

    Serve's own queue limit counts per handle and lets more through when a response is passed on unawaited.
    """

    def __init__(self, limits: dict[str, int], retry_after_s: int) -> None:
        self.limits = limits
        self.retry_after_s = retry_after_s
        self.in_flight = dict.fromkeys(limits, 0)

    @contextlib.contextmanager
    def slot(self, decoder: str) -> Iterator[None]:
        """Hold one place of a decoder.

        Raises:
            RequestError: 429 when all are taken.
        """
        if self.in_flight[decoder] >= self.limits[decoder]:
            raise busy(decoder, self.retry_after_s)
        self.in_flight[decoder] += 1
        try:
            yield
        finally:
            self.in_flight[decoder] -= 1


def busy(decoder: str, retry_after_s: int) -> RequestError:
    """The answer to a full queue."""
    message = f"The {decoder} decoder is busy; try again in {retry_after_s} s."
    return RequestError(429, "busy", message, retry_after_s)
