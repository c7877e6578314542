"""What each stage of training buys: the same run without it, scored on the same held-out cases.

A variant shares the stages before the one that it leaves out, trains those after it for as many steps, and answers
what the whole run answers. The result is one table with the paired difference to each variant.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from omnimri.platform.benchmark.quality import TABLE_NAME, comparison_table
from omnimri.platform.data.shards import Shards
from omnimri.platform.evaluation.cases import ABLATIONS, MODEL, Record
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.evaluate import evaluate, read_cases
from omnimri.platform.evaluation.measures import QUALITY
from omnimri.platform.evaluation.summary import Summary, summarise
from omnimri.platform.training.config import RunConfig
from omnimri.platform.training.stages import STAGES
from omnimri.platform.training.trainer import MODEL as MODEL_FOLDER
from omnimri.platform.training.trainer import StageResult, new_model, run_stages

logger = logging.getLogger(__name__)

EVALUATION, UNTRAINED = "evaluation", "untrained"


@dataclass(frozen=True)
class Variant:
    """One way to leave something out."""

    stages: tuple[str, ...]
    """Stages that are trained anew."""
    starts_from: str | None
    """Stage of the whole run whose model they start from; None takes a model that has learnt nothing."""
    is_dense: bool = False
    """As many experts as answer a token, which all answer every token: dense, of the size that is active otherwise."""


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "without_vision": Variant(("align", "multimodal", "instruct"), None),
        "without_align": Variant(("multimodal", "instruct"), "vision"),
        "without_multimodal": Variant(("instruct",), "align"),
        "dense": Variant(("multimodal", "instruct"), "align", is_dense=True),
    }
)
"""By method of the table (`cases.ABLATIONS`)."""


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """What is trained and how it is scored."""

    run: RunConfig
    """The whole run; its stages are taken from its folder where they are complete."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """The same cases for all."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Of VARIANTS, those that are trained and scored."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.variants) - set(VARIANTS)):
            raise ValueError(
                f"AblationConfig: variants {', '.join(unknown)} are unknown; known: {', '.join(VARIANTS)}."
            )


def benchmark_ablation(config: AblationConfig, shards: Shards, out: Path, *, command: str = "") -> Summary:
    """Train what is missing, score the whole run and every variant, and write `table.md` and `summary.json` to `out`.

    Args:
        config: The run and its scoring.
        shards: The corpus that is scored, all splits.
        out: Folder for the results; a variant lies in a folder of its name.
        command: Command line, for the header.

    Raises:
        ValueError: If the folder of the run holds stages with other settings, or nothing can be scored.
    """
    run, scoring = config.run, config.evaluate
    whole = run_stages(list(STAGES), run)
    records, summary = _scored(whole[-1], shards, out / MODEL, scoring, command)
    notes = [_told("whole run", whole)]
    for name in config.variants:
        results = train_variant(name, run, out)
        found, _ = _scored(results[-1], shards, out / name, scoring, command)
        records += [replace(record, method=name) for record in found if record.method == MODEL]
        notes.append(_told(ABLATIONS[name], results))
    combined = summarise(records, scoring, summary.header, [*notes, *summary.notes], compared=QUALITY)
    combined.write(out / "summary.json")
    (out / TABLE_NAME).write_text(comparison_table(combined) + "\n", encoding="utf-8")
    return combined


def train_variant(name: str, run: RunConfig, out: Path) -> list[StageResult]:
    """Train the stages of a variant in `out`/NAME, or return what has been trained there."""
    variant = VARIANTS[name]
    if variant.starts_from is None:
        init = new_model(run, out / UNTRAINED)
    else:
        init = run.folder(variant.starts_from) / MODEL_FOLDER
    changed = replace(run, name=f"{run.name}-{name}", out=str((out / name).absolute()))
    if variant.is_dense:
        backbone = replace(run.model.backbone, num_experts=run.model.backbone.experts_per_token)
        changed = replace(changed, model=replace(run.model, backbone=backbone))
    logger.info("%s: training %s from %s", name, ", ".join(variant.stages), init)
    return run_stages(variant.stages, changed, init=init)


def _scored(
    result: StageResult, shards: Shards, out: Path, config: EvaluateConfig, command: str
) -> tuple[list[Record], Summary]:
    """The records of a model, without those that `summarise` makes again, and its summary."""
    folder = out / EVALUATION
    summary = evaluate(Path(result.model_folder), shards, folder, config, command=command)
    return read_cases(folder / "cases.jsonl"), summary


def _told(label: str, results: list[StageResult]) -> str:
    """What a variant was trained on, in words."""
    stages = ", ".join(f"{result.stage} {result.steps} steps in {result.seconds:.0f} s" for result in results)
    return f"{label[0].upper()}{label[1:]}: {stages}."
