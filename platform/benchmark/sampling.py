"""What steps along the reconstruction bridge cost and what they bring: time per slice against PSNR on held-out volumes.

Volumes, undersampling, reference and scores are those of the evaluation; so its numbers come out, beside the time.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from omnimri.models.engine import Engine
from omnimri.models.metrics import patient_bootstrap
from omnimri.models.prompts import instruction_for
from omnimri.models.scan import Scan
from omnimri.platform.data.shards import Shards, load_row, row_to_scan
from omnimri.platform.data.undersampling import center_fraction_for
from omnimri.platform.evaluation import baselines
from omnimri.platform.evaluation.cases import columns_of, timed
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.evaluate import plan
from omnimri.platform.evaluation.image_cases import acquisitions, reconstruction_values

logger = logging.getLogger(__name__)

SCORES = ("psnr", "ssim")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What is reconstructed, with how many steps, and how often it is timed."""

    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of steps along the bridge."""
    accelerations: tuple[int, ...] = (4, 8)
    """Each with the centre lines that fastMRI pairs it with."""
    max_volumes: int | None = None
    """Held-out volumes at most, spread over the patients; None takes all."""
    max_slices: int | None = None
    """Central slices of a volume; None takes all."""
    repeats: int = 3
    """Timed reconstructions of every volume, after one that is scored and not timed."""

    def __post_init__(self) -> None:
        if not self.steps or not self.accelerations or self.repeats < 1:
            raise ValueError(f"SamplingConfig: steps, accelerations and repeats must not be empty or 0; found {self}.")
        object.__setattr__(self, "steps", tuple(sorted(set(self.steps))))

    @property
    def evaluation(self) -> EvaluateConfig:
        """The evaluation that scores the same volumes."""
        return EvaluateConfig(
            tasks=("reconstruct",), max_volumes=self.max_volumes, max_slices=self.max_slices,
            accelerations=self.accelerations, center_fractions=tuple(map(center_fraction_for, self.accelerations)),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SampledVolume:
    """One volume at one acceleration."""

    patient_id: str
    acceleration: int
    shape: tuple[int, int, int]
    zero_filled: dict[str, float]
    """Scores of the image that the model is given."""
    prompt_seconds: float
    scores: dict[int, dict[str, float]]
    """By number of steps."""
    seconds: dict[int, list[float]] = field(repr=False)
    """Of every timed reconstruction of all slices, by number of steps."""


def benchmark_sampling(engine: Engine, shards: Shards, config: SamplingConfig) -> dict[str, Any]:
    """Reconstruct held-out volumes with every number of steps, and time it.

    Args:
        engine: A loaded checkpoint, on the device that it is to be timed on.
        shards: The corpus, all splits.
        config: What is reconstructed and how often.

    Returns:
        Where the numbers come from; `prompt_ms`: median time of a volume's prompt, which the steps share; by
        acceleration the scores of `zero_filled`, and by number of `steps` the mean `psnr` and `ssim`, `ms_per_slice`,
        the median with coil maps and encoder, and `psnr_gain` over the fewest steps, paired, with its 95 % interval
        over patients.

    Raises:
        ValueError: If no volume of the test split can be reconstructed and scored.
    """
    units, notes = plan(shards, config.evaluation)
    volumes: list[SampledVolume] = []
    skipped: Counter[str] = Counter()
    for done, unit in enumerate(units, start=1):
        try:
            volumes += list(sampled(engine, load_row(unit.ref, columns_of("reconstruct")), config))
        except ValueError as error:
            skipped[str(error)] += 1
        logger.info("volume %d of %d", done, len(units))
    notes += [f"{count} volumes skipped: {reason}" for reason, count in skipped.items()]
    if not volumes:
        raise ValueError(f"benchmark sampling: the test split has no volume to reconstruct. {' '.join(notes)}".strip())
    of_acceleration = {
        f"{acceleration}x": [volume for volume in volumes if volume.acceleration == acceleration]
        for acceleration in config.accelerations
    }
    first = next(iter(of_acceleration.values()))
    return {
        "model": engine.version,
        "device": str(next(engine.model.parameters()).device),
        "threads": torch.get_num_threads(),
        "datasets": sorted({unit.ref.dataset for unit in units}),
        "simulated": any(unit.ref.simulated for unit in units),
        "data_digest": shards.digest,
        "patients": len({volume.patient_id for volume in first}),
        "volumes": len(first),
        "slices": sum(volume.shape[0] for volume in first),
        "matrix": dict(Counter(f"{volume.shape[1]} x {volume.shape[2]}" for volume in first)),
        "repeats": config.repeats,
        "notes": notes,
        "prompt_ms": round(1e3 * statistics.median(volume.prompt_seconds for volume in volumes), 1),
        "accelerations": {name: _summary(found, config.steps) for name, found in of_acceleration.items()},
    }


def sampled(engine: Engine, row: Mapping[str, Any], config: SamplingConfig) -> Iterator[SampledVolume]:
    """One row at every acceleration."""
    scan = baselines.central_slices(row_to_scan(row), config.max_slices)
    target = baselines.reference_magnitude(scan, config.evaluation.reference)
    for acceleration, acquisition in acquisitions(config.evaluation, scan, row["row_id"]):
        yield SampledVolume(
            patient_id=row["patient_id"], acceleration=acceleration, shape=target.shape,
            zero_filled=reconstruction_values(target, baselines.zero_filled(acquisition).abs().numpy()),
            **_reconstructed(engine, acquisition.scan, target, config),
        )  # fmt: skip


def _reconstructed(engine: Engine, scan: Scan, target: np.ndarray, config: SamplingConfig) -> dict[str, Any]:
    """Scores and times; the numbers of steps take turns, so that other work on the machine falls on all of them."""
    prompt, prompt_seconds = timed(partial(engine.encode, scan, instruction_for("reconstruct"), "reconstruct"))

    def reconstruct(num_steps: int) -> np.ndarray:
        return engine.reconstruct(scan, prompt, num_steps=num_steps).magnitude

    scores = {number: reconstruction_values(target, reconstruct(number)) for number in config.steps}
    seconds: dict[int, list[float]] = {number: [] for number in config.steps}
    for _ in range(config.repeats):
        for number in config.steps:
            seconds[number].append(timed(partial(reconstruct, number))[1])
    return {"prompt_seconds": prompt_seconds, "scores": scores, "seconds": seconds}


def _summary(volumes: Sequence[SampledVolume], steps: Sequence[int]) -> dict[str, Any]:
    """One acceleration: means of the scores over volumes, median of the times over volumes and repeats."""
    return {
        "zero_filled": _means([volume.zero_filled for volume in volumes]),
        "steps": {
            str(number): _means([volume.scores[number] for volume in volumes])
            | {"ms_per_slice": _ms_per_slice(volumes, number), "psnr_gain": _gain(volumes, number, steps[0])}
            for number in steps
        },
    }


def _means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(statistics.fmean(score[name] for score in scores), 4) for name in SCORES}


def _ms_per_slice(volumes: Sequence[SampledVolume], number: int) -> float:
    per_slice = [seconds / volume.shape[0] for volume in volumes for seconds in volume.seconds[number]]
    return round(1e3 * statistics.median(per_slice), 2)


def _gain(volumes: Sequence[SampledVolume], number: int, fewest: int) -> dict[str, Any]:
    """PSNR over that of the fewest steps on the same volumes, in dB."""
    gains = np.array([volume.scores[number]["psnr"] - volume.scores[fewest]["psnr"] for volume in volumes])
    interval = patient_bootstrap(lambda index: float(gains[index].mean()), [volume.patient_id for volume in volumes])
    return {
        "mean": round(float(gains.mean()), 4),
        "interval": None if interval is None else [round(bound, 4) for bound in interval],
    }


def sampling_figure(measured: Mapping[str, Any]) -> Figure:
    """PSNR against time per slice, a line for each acceleration, points labelled with their steps.

    Args:
        measured: As `benchmark_sampling` returns it.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, found) in enumerate(measured["accelerations"].items()):
        points = [(step["ms_per_slice"], step["psnr"]) for step in found["steps"].values()]
        axes.plot(*zip(*points, strict=True), marker="o", color=f"C{colour}", label=f"{name}, OmniMRI")
        level = found["zero_filled"]["psnr"]
        axes.axhline(level, linestyle=":", color=f"C{colour}", label=f"{name}, zero-filled: {level:.1f} dB")
        for place, (number, point) in enumerate(zip(found["steps"], points, strict=True)):
            text = f"{number} step{'s' * (number != '1')}\n{point[1]:.2f}"
            above_or_below = (0, -24 if place % 2 else 7)  # neighbours may lie close
            axes.annotate(text, point, above_or_below, textcoords="offset points", ha="center", fontsize=8)
    axes.set(
        xlabel=f"ms per slice ({measured['device']}, threads: {measured['threads']})", ylabel="PSNR, dB",
        title=f"{measured['volumes']} held-out volumes of {measured['patients']} patients",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.margins(x=0.08, y=0.15)
    axes.legend(fontsize=8)
    return figure
