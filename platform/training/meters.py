"""Numbers that a training loop gathers: averages between two records, and losses at the start and end of a stage."""

from __future__ import annotations

import resource
from collections import defaultdict
from dataclasses import dataclass, field

PHASES = ("data", "forward", "backward", "optimizer")
"""What a step's time is split into: waiting for the batch, and the three calls of the engine."""


@dataclass
class Meters:
    """Sums since the last record."""

    losses: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    steps: int = 0
    rows: int = 0
    tokens: int = 0
    gradient_norm: float | None = None
    """Of the step that is recorded, before clipping; None under ZeRO, whose optimizer knows."""

    def add(self, source: str, losses: dict[str, float], seconds: dict[str, float], rows: int, tokens: int) -> None:
        """Add one forward pass; `rows` and `tokens` are those of all ranks."""
        for name, value in losses.items():
            self.losses[name].append(value)
        self.losses[f"loss/{source}"].append(losses["loss"])
        for phase, duration in seconds.items():
            self.seconds[phase] += duration
        self.rows += rows
        self.tokens += tokens

    def flush(self) -> dict[str, float]:
        """Averages since the last call, with throughput and memory; starts anew."""
        total = max(sum(self.seconds.values()), 1e-9)
        record = {name: sum(values) / len(values) for name, values in self.losses.items()}
        record |= {f"time/{phase}_ms": 1e3 * value / max(1, self.steps) for phase, value in self.seconds.items()}
        record["samples_per_s"] = self.rows / total
        if self.tokens:
            record["tokens_per_s"] = self.tokens / total
        record["memory_peak_mb"] = peak_memory_mb()
        self.__init__()  # type: ignore[misc]
        return record


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class LossTenths:
    """Mean of every loss over the first and over the last tenth of a stage's steps: did it learn?"""

    def __init__(self, num_steps: int, state: dict[str, list[float]] | None = None) -> None:
        """Begin, or go on from the `state` of a checkpoint."""
        self._tenth = max(1, num_steps // 10)
        self._num_steps = num_steps
        self.state: dict[str, list[float]] = {name: list(sums) for name, sums in (state or {}).items()}
        """By loss: sum and count of the first tenth, sum and count of the last."""

    def add(self, step: int, source: str, losses: dict[str, float]) -> None:
        """Add the losses of one forward pass at optimizer step `step` (from 0)."""
        for name, value in {**losses, f"loss/{source}": losses["loss"]}.items():
            sums = self.state.setdefault(name, [0.0, 0, 0.0, 0])
            if step < self._tenth:
                sums[0] += value
                sums[1] += 1
            if step >= self._num_steps - self._tenth:
                sums[2] += value
                sums[3] += 1

    def summary(self) -> dict[str, dict[str, float]]:
        """`{loss: {"first_tenth": mean, "last_tenth": mean}}`; a loss that did not occur in a tenth is left out."""
        return {
            name: {"first_tenth": first / n_first, "last_tenth": last / n_last}
            for name, (first, n_first, last, n_last) in sorted(self.state.items())
            if n_first and n_last
        }
