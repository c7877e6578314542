"""One training loop for every specialist, by the clock: AdamW under a one-cycle rate, the best validated weights kept.

Progress is the share of the budget that is spent, so that the learning rate ends low whatever the machine manages in
the time. Reading and augmenting count as training; validation does not.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long and how fast one specialist learns."""

    seconds: float | None = None
    """Wall time of training; the same for all."""
    steps: int | None = None
    """Optimizer steps instead, for runs that must not depend on the machine."""
    lr: float = 2e-3
    """Peak of the one-cycle rate."""
    weight_decay: float = 1e-2
    warmup_share: float = 0.1
    """Of the budget, in which the rate rises."""
    max_grad_norm: float = 1.0
    validations: int = 6
    """Times that the validation split is looked at, the last at the end."""
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise ValueError(f"FitConfig: give seconds or steps, one of them; found {self.seconds} and {self.steps}.")
        if min(value for value in (self.seconds, self.steps) if value is not None) <= 0 or self.validations < 1:
            raise ValueError("FitConfig: the budget must be positive and validations at least 1.")


@dataclass(frozen=True)
class CurvePoint:
    """What was known when the validation split was looked at."""

    seconds: float
    """Of training."""
    steps: int
    loss: float
    """Mean since the point before."""
    metric: float
    """On the validation split, higher is better; NaN where there is none."""


@dataclass(frozen=True)
class Fitted:
    """What a training left behind; the network holds the weights of `best`."""

    curve: tuple[CurvePoint, ...]
    best: int
    """Index of the point whose weights were kept."""

    def as_json(self) -> dict[str, Any]:
        """Plain data without NaN."""
        points = [asdict(point) for point in self.curve]
        return {"curve": [point | {"metric": _finite(point["metric"])} for point in points], "best": self.best}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def learning_rate(progress: float, config: FitConfig) -> float:
    """The rate at a share of the budget in [0, 1]: a linear rise, then half a cosine to a hundredth of the peak."""
    if progress < config.warmup_share:
        return config.lr * max(progress / config.warmup_share, 0.01)
    along = (progress - config.warmup_share) / max(1 - config.warmup_share, 1e-9)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(along, 1.0))))


def fit(
    network: nn.Module,
    loss_of_batch: Callable[[], Tensor],
    validate: Callable[[], float],
    config: FitConfig,
    *,
    name: str = "",
) -> Fitted:
    """Train a network in place.

    Args:
        network: In any mode; it is left in evaluation mode with the best weights.
        loss_of_batch: Draws a batch and gives its loss.
        validate: Score on the validation split, higher is better; NaN keeps the last weights.
        config: Budget and rates.
        name: For the log.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    curve: list[CurvePoint] = []
    kept, best, steps, spent, losses = network.state_dict(), 0, 0, 0.0, []
    while not curve or progress_of(spent, steps, config) < 1:
        started = time.perf_counter()
        network.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress_of(spent, steps, config), config)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of_batch()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
        steps += 1
        spent += time.perf_counter() - started
        progress = progress_of(spent, steps, config)
        if progress >= min(1.0, (len(curve) + 1) / config.validations):
            network.eval()
            with torch.inference_mode():
                metric = validate()
            curve.append(CurvePoint(round(spent, 2), steps, sum(losses) / len(losses), metric))
            logger.info("%s: step %d, %.0f s, loss %.4f, validation %.4f", name, steps, spent, curve[-1].loss, metric)
            losses = []
            if len(curve) == 1 or not metric < curve[best].metric:
                kept, best = copy.deepcopy(network.state_dict()), len(curve) - 1
    network.load_state_dict(kept)
    network.eval()
    return Fitted(tuple(curve), best)


def progress_of(seconds: float, steps: int, config: FitConfig) -> float:
    """Share of the budget that is spent, in [0, 1]."""
    share = seconds / config.seconds if config.seconds is not None else steps / (config.steps or 1)
    return min(share, 1.0)
