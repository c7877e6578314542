"""Scoring a model on held-out patients, beside its baselines and floors: plan, run, summarise, write.

Volumes stream through Ray Data to workers that each hold the model (`workers.py`); only numbers and single slices come
back, so no process ever holds more than one volume.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from omnimri.models.vocabulary import RESEARCH_NOTICE
from omnimri.platform.data.shards import RowRef, Shards, load_row, row_to_scan
from omnimri.platform.evaluation import baselines
from omnimri.platform.evaluation.baselines import SenseSetting
from omnimri.platform.evaluation.calibration import calibrate_boxes
from omnimri.platform.evaluation.cases import Record, Rivals, columns_of
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.floors import shuffled
from omnimri.platform.evaluation.measures import METHOD_LABELS
from omnimri.platform.evaluation.page import picture_name, write_page
from omnimri.platform.evaluation.summary import DECISIVE, Summary, summarise
from omnimri.platform.evaluation.workers import Unit, load_engine, no_rivals, score_units
from omnimri.platform.tracking import Tracker

logger = logging.getLogger(__name__)

NEEDS = {
    "reconstruct": "fully_sampled",
    "segment": "has_labels",
    "detect": "has_boxes",
    "diagnose": "has_classes",
    "report": "has_report",
}
"""What the manifest must say of a row before a task can be scored on it."""


def evaluate(
    model_dir: Path | None,
    shards: Shards,
    out: Path,
    config: EvaluateConfig,
    *,
    command: str = "",
    engine_loader: Callable[[Path], Any] = load_engine,
    rivals_loader: Callable[[], Rivals] = no_rivals,
    compared: Mapping[str, Sequence[str]] = DECISIVE,
    about: Mapping[str, Any] | None = None,
) -> Summary:
    """Score a model and its baselines, and write `summary.json`, `index.html`, `cases.jsonl` and `figures/` to `out`.

    Args:
        model_dir: Checkpoint folder; None scores the rivals alone.
        shards: The corpus, all splits.
        out: Folder for the results; made if absent.
        config: What is scored and how.
        command: Command line, for the header.
        engine_loader: Makes the engine from `model_dir` inside each worker.
        rivals_loader: Makes what answers the same cases beside the model, inside each worker.
        compared: As `summarise` takes it.
        about: More for the header.

    Raises:
        ValueError: If the split holds nothing that any of the tasks can be scored on, or nothing can be calibrated.
    """
    if config.calibrate and model_dir is None:
        raise ValueError(
            "evaluate: calibrate=true fits the scores of a model's boxes, and there is no model: set false."
        )
    out.mkdir(parents=True, exist_ok=True)
    units, notes = plan(shards, config)
    if not units:
        raise ValueError(
            f"evaluate: no row of split {config.split!r} can be scored on {', '.join(config.tasks)}. "
            "Ingest annotated data, or choose another --split."
        )
    settings, tuning_notes = tune_iterative(shards, config) if "reconstruct" in config.tasks else ({}, [])
    if model_dir is not None and config.calibrate and "detect" in config.tasks:
        held_out = shards.select(split=config.tuning_split, has_boxes=True).rows
        chosen = spread_over_patients(held_out, config.volume_limit("detect"))
        notes += calibrate_boxes(model_dir, shards, chosen, config, engine_loader)
    frequencies = baselines.class_frequencies(_training_classes(shards) if "diagnose" in config.tasks else {})
    records, skipped, version = _run(
        units, out, config, model_dir=model_dir, engine_loader=engine_loader, settings=settings,
        frequencies=frequencies, rivals_loader=rivals_loader,
    )  # fmt: skip
    if not records:
        raise ValueError(f"evaluate: none of {len(units)} units could be scored: {'; '.join(_skip_notes(skipped))}")
    notes += tuning_notes + _skip_notes(skipped) + _labeller_note(records)
    header = _header(shards, config, version, command, records) | dict(about or {})
    records += shuffled(records, config)
    summary = summarise(records, config, header, notes, compared=compared)
    write_cases(records, out / "cases.jsonl")
    summary.write(out / "summary.json")
    write_page(summary, records, out, config)
    return summary


def plan(shards: Shards, config: EvaluateConfig) -> tuple[list[Unit], list[str]]:
    """Units of work, and what was left out of them, in words."""
    units, notes = [], []
    for task in config.tasks:
        refs = shards.select(**config.where, split=config.split, **{NEEDS[task]: True}).rows
        chosen = spread_over_patients(refs, config.volume_limit(task))
        units += [Unit(task, ref) for ref in chosen]
        if len(chosen) < len(refs):
            notes.append(f"{task}: {len(chosen)} of {len(refs)} volumes scored (max_volumes, max_image_volumes).")
    if config.max_slices is not None and "reconstruct" in config.tasks:
        notes.append(f"reconstruct: scored on the central {config.max_slices} slices of each volume (max_slices).")
    return units, notes


def spread_over_patients(refs: Sequence[RowRef], limit: int | None) -> list[RowRef]:
    """At most `limit` rows, one of each patient before a second of any; the order does not depend on the input's."""
    turns: dict[str, int] = {}
    ordered = []
    for ref in sorted(refs, key=lambda ref: ref.row_id):
        turns[ref.patient_id] = turns.get(ref.patient_id, -1) + 1
        ordered.append((turns[ref.patient_id], ref.patient_id, ref))
    ordered.sort(key=lambda entry: entry[:2])
    return [ref for _, _, ref in ordered][:limit]


def _training_classes(shards: Shards) -> dict[str, list[str]]:
    """Diagnoses of every training patient."""
    refs = shards.select(split="train", has_classes=True).rows
    return {ref.patient_id: load_row(ref, ("classes",))["classes"] for ref in spread_over_patients(refs, None)}


def tune_iterative(shards: Shards, config: EvaluateConfig) -> tuple[dict[str, dict[int, SenseSetting]], list[str]]:
    """The best setting of every iterative baseline per acceleration on the tuning split, and notes on how it was found.

    It runs here and not in workers: a handful of slices of a handful of volumes, whatever the size of the corpus.
    """
    grids = {"cg_sense": (config.cg_weights, config.cg_steps)}
    grids |= dict.fromkeys(config.compressed_sensing, (config.cs_weights, config.cs_steps))
    refs = spread_over_patients(
        shards.select(split=config.tuning_split, fully_sampled=True).rows, config.tuning_volumes
    )
    if not refs:
        note = (
            f"{_names(grids)} not tuned: split {config.tuning_split!r} holds no fully sampled k-space; "
            f"{SenseSetting()} used."
        )
        return {method: dict.fromkeys(config.accelerations, SenseSetting()) for method in grids}, [note]
    scores: dict[tuple[str, int], list[dict[SenseSetting, float]]] = defaultdict(list)
    for ref in refs:
        scan = baselines.central_slices(row_to_scan(load_row(ref, columns_of("reconstruct"))), config.tuning_slices)
        for acceleration, center_fraction in config.conditions:
            mask = baselines.case_mask(
                scan, ref.row_id, acceleration=acceleration, center_fraction=center_fraction,
                kind=config.mask_kind, seed=config.seed,
            )  # fmt: skip
            for method, (weights, steps) in grids.items():
                grid = baselines.grid_psnr(scan, mask, weights, steps, config.sens_maps, method, config.reference)
                scores[method, acceleration].append(grid)
    settings: dict[str, dict[int, SenseSetting]] = {method: {} for method in grids}
    for (method, acceleration), found in scores.items():
        settings[method][acceleration] = baselines.best_setting(found)
    notes = [
        _tuning_note(method, acceleration, setting, grids[method], config)
        for method, chosen in settings.items()
        for acceleration, setting in chosen.items()
    ]
    return settings, notes


def _names(methods: Iterable[str]) -> str:
    return " and ".join(METHOD_LABELS[method].partition(",")[0] for method in methods)


def _tuning_note(
    method: str, acceleration: int, setting: SenseSetting, grid: tuple[tuple[float, ...], tuple[int, ...]],
    config: EvaluateConfig,
) -> str:  # fmt: skip
    weights, steps = grid
    field = "cg_weights" if method == "cg_sense" else "cs_weights"
    edge = setting.weight in (min(weights), max(weights))
    return (
        f"{_names([method])} at {acceleration}x: weight {setting.weight:g}, {setting.num_steps} iterations, "
        f"the best of {len(weights) * len(steps)} settings on split {config.tuning_split!r}, "
        f"{config.sens_maps} coil maps" + (f" (at the edge of {field})." if edge else ".")
    )


def _run(
    units: Sequence[Unit], out: Path, config: EvaluateConfig, **arguments: Any
) -> tuple[list[Record], Counter[tuple[str, str]], str]:
    """Records of every unit, units skipped by task and reason, and the model's version; pictures go to disk."""
    folder = out / "pictures"
    folder.mkdir(exist_ok=True)
    records: list[Record] = []
    skipped: Counter[tuple[str, str]] = Counter()
    version = ""
    for done, (unit, result, found) in enumerate(score_units(units, config, **arguments), start=1):
        version = found
        records += result.records
        if result.skipped:
            skipped[unit.task, result.skipped] += 1
        if result.picture:
            np.savez_compressed(folder / picture_name(unit.task, unit.ref.row_id), **result.picture)  # type: ignore[arg-type]
        if done % max(1, len(units) // 10) == 0:
            logger.info("evaluated %d of %d (last: %s)", done, len(units), unit.task)
    return records, skipped, version


def _skip_notes(skipped: Counter[tuple[str, str]]) -> list[str]:
    return [f"{task}: {count} volumes not scored: {reason}." for (task, reason), count in sorted(skipped.items())]


def _labeller_note(records: Iterable[Record]) -> list[str]:
    """How often the labels read from a reference report are those of the row's boxes."""
    reports = {r.row_id: r for r in records if r.task == "report"}
    checked = [record.values["labeller_agrees"] for record in reports.values()]
    checked = [value for value in checked if np.isfinite(value)]
    if not checked:
        return []
    return [
        f"report: the labels read from the reference text are those of the boxes in {int(sum(checked))} of "
        f"{len(checked)} volumes that have both."
    ]


def _header(
    shards: Shards, config: EvaluateConfig, version: str, command: str, records: Sequence[Record]
) -> dict[str, Any]:
    """Where the numbers come from."""
    scored = {record.row_id for record in records}
    refs = [ref for ref in shards.rows if ref.row_id in scored]
    return {
        "model_version": version,
        "data_digest": shards.digest,
        "datasets": sorted({ref.dataset for ref in refs}),
        "simulated": any(ref.simulated for ref in refs),
        "split": config.split,
        "num_patients": len({ref.patient_id for ref in refs}),
        "num_volumes": len(refs),
        "command": command,
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "system": platform.platform(terse=True)},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": asdict(config),
        "notice": RESEARCH_NOTICE,
    }


def cpu_model() -> str:
    """Name of the processor as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_cases(records: Iterable[Record], path: Path) -> None:
    """One line of JSON per method and volume, so that every number of the summary can be made again."""
    with path.open("w") as lines:
        for record in sorted(records, key=lambda r: (r.task, r.condition, r.row_id, r.method)):
            lines.write(json.dumps(record.as_json(), allow_nan=False) + "\n")


def read_cases(path: Path) -> list[Record]:
    """Inverse of `write_cases`."""
    with path.open() as lines:
        return [Record.from_json(json.loads(line)) for line in lines]


def log_evaluation(tracker: Tracker, summary: Summary, out: Path, *, source: str) -> None:
    """Record numbers, page, `summary.json` and figures of an evaluation with a tracking run.

    Args:
        tracker: The run.
        summary: As `evaluate` returned it.
        out: Folder that `evaluate` wrote.
        source: Where the data lies.
    """
    tracker.log_metrics(summary.flat())
    tracker.log_dataset(
        ", ".join(summary.header["datasets"]), summary.header["data_digest"], source, summary.header["split"]
    )
    tracker.set_tags({"model_version": summary.header["model_version"]})
    for path in (out / "index.html", out / "summary.json", out / "figures"):
        tracker.log_artifact(path, "figures" if path.is_dir() else None)
