"""The distributed part of an evaluation: units of work through Ray Data to workers that each hold what they need.

What comes back is JSON and NumPy archives, so that nothing of it is ever unpickled.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from omnimri.platform.cluster import quiet_ray_data
from omnimri.platform.data.shards import RowRef, load_row
from omnimri.platform.evaluation.baselines import SenseSetting
from omnimri.platform.evaluation.cases import CaseContext, CaseResult, Record, Rivals, columns_of
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.image_cases import reconstruct_case, segment_case
from omnimri.platform.evaluation.text_cases import detect_case, diagnose_case, report_case

logger = logging.getLogger(__name__)

RUNNERS: dict[str, Callable[[CaseContext, Mapping[str, Any]], CaseResult]] = {
    "reconstruct": reconstruct_case,
    "segment": segment_case,
    "detect": detect_case,
    "diagnose": diagnose_case,
    "report": report_case,
}


@dataclass(frozen=True)
class Unit:
    """One task on one volume."""

    task: str
    ref: RowRef


def load_engine(folder: Path) -> Any:
    """The engine of a checkpoint folder; imported here so that the driver never loads the model's packages."""
    from omnimri.models.engine import Engine

    return Engine.load(folder)


def no_rivals() -> Rivals:
    """A model beside classical baselines alone."""
    return {}


def score_units(
    units: Sequence[Unit], config: EvaluateConfig, **arguments: Any
) -> Iterator[tuple[Unit, CaseResult, str]]:
    """Score units in any order; yields each with its result and the model's version.

    Args:
        units: What to score.
        config: Of the evaluation.
        arguments: Of `CaseWorker` besides `config`.
    """
    with quiet_ray_data():
        indices = ray.data.from_items([{"index": index} for index in range(len(units))], override_num_blocks=len(units))
        results = indices.map_batches(
            CaseWorker,
            fn_constructor_kwargs={"units": list(units), "config": config, **arguments},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(config.num_workers, len(units))),
            num_cpus=config.threads_per_worker,
        )
        for row in results.iter_rows():
            records = [Record.from_json(record) for record in json.loads(row["records"])]
            picture = dict(np.load(io.BytesIO(row["picture"]), allow_pickle=False))
            yield units[int(row["index"])], CaseResult(records, picture, row["skipped"] or None), row["version"]


class CaseWorker:
    """Holds the model and scores one unit at a time."""

    def __init__(
        self,
        *,
        units: Sequence[Unit],
        config: EvaluateConfig,
        model_dir: Path | None,
        engine_loader: Callable[[Path], Any],
        settings: Mapping[str, Mapping[int, SenseSetting]],
        frequencies: np.ndarray,
        rivals_loader: Callable[[], Rivals] = no_rivals,
    ) -> None:
        torch.set_num_threads(config.threads_per_worker)
        self.units = units
        self.context = CaseContext(
            engine=None if model_dir is None else engine_loader(model_dir), config=config, settings=settings,
            frequencies=frequencies, rivals=rivals_loader(),
        )  # fmt: skip

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Read the columns that one unit needs, and score it."""
        index = int(batch["index"][0])
        unit = self.units[index]
        try:
            result = RUNNERS[unit.task](self.context, load_row(unit.ref, columns_of(unit.task)))
        except ValueError as error:  # a volume that the model or a metric refuses; it is counted and named
            logger.warning("%s on row %s not scored: %s", unit.task, unit.ref.row_id, error)
            result = CaseResult(skipped=str(error))
        archive = io.BytesIO()
        np.savez_compressed(archive, **result.picture)  # type: ignore[arg-type]
        return {
            "index": [index],
            "records": [json.dumps([record.as_json() for record in result.records], allow_nan=False)],
            "picture": [archive.getvalue()],
            "skipped": [result.skipped or ""],
            "version": ["" if self.context.engine is None else self.context.engine.version],
        }
