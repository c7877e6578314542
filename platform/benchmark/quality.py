"""OmniMRI beside specialists: networks of one task each, trained on the same shards for the same time.

Every method answers the same held-out cases, and one metric code scores them all. The result is an evaluation
(`omnimri.platform.evaluation`) with the specialists among its methods, the paired difference to each of them, and
their learning curves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omnimri.models.config import InputConfig, preset
from omnimri.models.preprocess import read_preprocess
from omnimri.platform.data.shards import Shards
from omnimri.platform.evaluation.cases import lead_method
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.evaluate import evaluate
from omnimri.platform.evaluation.measures import METRICS, QUALITY
from omnimri.platform.evaluation.summary import Summary, Value, Verdict, format_value, method_label
from omnimri.platform.evaluation.workers import load_engine
from omnimri.platform.specialists.specialists import RivalsLoader, SpecialistsConfig, train_missing
from omnimri.platform.training.trainer import RESULT

SPECIALISTS_FOLDER = "specialists"
TABLE_NAME = "table.md"


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """What is trained and how it is scored; every budget is set by `--minutes`."""

    specialists: SpecialistsConfig = field(default_factory=SpecialistsConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    preset: str = "tiny"
    """Whose grids the specialists see where there is no model to take them from."""


def benchmark_quality(
    model_dir: Path | None,
    shards: Shards,
    out: Path,
    config: QualityConfig,
    *,
    command: str = "",
    engine_loader: Callable[[Path], Any] = load_engine,
) -> Summary:
    """Train the specialists that are missing, score all methods, and write the evaluation and `table.md` to `out`.

    Args:
        model_dir: Checkpoint folder; None compares the specialists with the classical baselines alone.
        shards: The corpus, all splits.
        out: Folder for the results; the networks lie in `out/specialists`.
        config: Networks, budgets and scoring.
        command: Command line, for the header.
        engine_loader: Makes the engine from `model_dir` inside each worker.

    Raises:
        ValueError: If nothing can be scored, or `model_dir` is no checkpoint.
    """
    inputs = model_inputs(model_dir, config.preset)
    folder, specialists = out / SPECIALISTS_FOLDER, config.specialists.with_reference(config.evaluate.reference)
    cards = train_missing(shards, folder, specialists, inputs, validation_split=config.evaluate.tuning_split)
    summary = evaluate(
        model_dir, shards, out, config.evaluate, command=command, engine_loader=engine_loader,
        rivals_loader=RivalsLoader(folder.absolute(), specialists, inputs), compared=QUALITY,
        about={"specialists": [_told(card) for card in cards], "model_seconds": training_seconds(model_dir)},
    )  # fmt: skip
    (out / TABLE_NAME).write_text(quality_table(summary) + "\n", encoding="utf-8")
    return summary


def model_inputs(model_dir: Path | None, preset_name: str) -> InputConfig:
    """Grids and coil maps of a checkpoint, or those of a preset."""
    return preset(preset_name).inputs if model_dir is None else read_preprocess(model_dir).inputs


def training_seconds(model_dir: Path | None) -> float | None:
    """Wall time of all stages of the run that a checkpoint RUN/STAGE/model belongs to; None where it is not known."""
    if model_dir is None:
        return None
    results = sorted(model_dir.absolute().parent.parent.glob(f"*/{RESULT}"))
    seconds = [json.loads(path.read_text(encoding="utf-8")).get("seconds") for path in results]
    return sum(value for value in seconds if value) or None


def _told(card: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says of a network."""
    names = ("name", "label", "metric", "parameters", "patients", "volumes", "curve", "best")
    return {name: card[name] for name in names}


def quality_table(summary: Summary) -> str:
    """`comparison_table`, with a line for every network and its training."""
    return comparison_table(summary, _networks(summary))


def comparison_table(summary: Summary, remarks: Sequence[str] = ()) -> str:
    """Every method on the metrics of QUALITY as Markdown: mean with its interval, and the model's paired difference.

    Remarks follow it, and the notes of the summary.
    """
    rows = [
        row
        for task, conditions in summary.tasks.items()
        for condition, methods in conditions.items()
        for name in QUALITY[task]
        for row in _metric_rows(summary, task, condition, name, methods)
    ]
    columns = ("task", "metric", "method", "value [95 % interval]", "n", "OmniMRI minus it, paired [95 % interval]")
    lines = [columns, ("---",) * len(columns), *rows]
    notes = [f"- {note}" for note in summary.notes]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", *remarks, *notes])


def _metric_rows(
    summary: Summary, task: str, condition: str, name: str, methods: Mapping[str, Mapping[str, Value]]
) -> Iterator[tuple[str, ...]]:
    """One metric of every method that has it, the model first."""
    metric, lead = METRICS[task][name], lead_method(methods)
    title = f"{metric.label} ({metric.unit})" if metric.unit else metric.label
    differences = {
        v.baseline: v for v in summary.verdicts if (v.task, v.condition, v.metric) == (task, condition, name)
    }
    for method in (lead, *(other for other in methods if other != lead)):
        if name in methods[method]:
            value = methods[method][name]
            told = value.reason or "" if value.value is None else format_value(value, metric)
            beside = _difference(differences.get(method), metric.digits)
            yield f"{task} {condition}", title, method_label(method), told, str(value.n), beside


def _difference(verdict: Verdict | None, digits: int) -> str:
    if verdict is None:
        return ""
    told = f"{verdict.difference:+.{digits}f}"
    if verdict.interval is None:
        return told
    return f"{told} [{verdict.interval[0]:+.{digits}f}, {verdict.interval[1]:+.{digits}f}]"


def _networks(summary: Summary) -> Sequence[str]:
    """One line per trained network, and the model's own time."""
    lines = [
        f"- {card['label']} ({card['name']}): {card['parameters'] / 1e6:.2f} M parameters, {card['patients']} "
        f"patients, {card['curve'][-1]['steps']} steps in {card['curve'][-1]['seconds']:.0f} s, {card['metric']} "
        f"{_metric_of(card)} on the validation split."
        for card in summary.header["specialists"]
    ]
    seconds = summary.header["model_seconds"]
    return lines + ([f"- OmniMRI: all stages, all tasks, {seconds:.0f} s."] if seconds else [])


def _metric_of(card: Mapping[str, Any]) -> str:
    value = card["curve"][card["best"]]["metric"]
    return "unknown" if value is None else f"{value:.3f}"
