"""From records to a summary: values with patient intervals, subgroups, verdicts, and a table for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omnimri.models import metrics
from omnimri.models.vocabulary import TASKS
from omnimri.platform.evaluation.cases import CEILING, MODEL, SUBGROUP_FACTS, Record, lead_method
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.measures import (
    HEADLINE,
    METHOD_LABELS,
    METRICS,
    NOT_APPLICABLE,
    SUBGROUP_METRIC,
    Metric,
    Table,
)
from omnimri.platform.evaluation.text import LEXICAL_PACKAGES, missing_package

AGE_BANDS = ((0, 40), (40, 60), (60, 200))


@dataclass(frozen=True)
class Value:
    """One number of the summary."""

    value: float | None
    """None: not computed."""
    interval: tuple[float, float] | None = None
    """95 % patient bootstrap; None with fewer than two patients."""
    n: int = 0
    """Volumes (patients, where the condition says so) that it is made of."""
    reason: str | None = None
    """Why it was not computed."""


@dataclass(frozen=True)
class Verdict:
    """The model against one baseline on one metric, paired over the same volumes."""

    task: str
    condition: str
    baseline: str
    metric: str
    difference: float
    """Model minus baseline."""
    interval: tuple[float, float] | None
    beats: bool | None
    """True: the whole interval is a gain. False: no gain. None: a gain that may be chance."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything an evaluation found; `summary.json` is this, and the page and MLflow are made from it."""

    header: dict[str, Any]
    """Model version, data digest, split, command, machine, date, config."""
    tasks: dict[str, dict[str, dict[str, dict[str, Value]]]]
    """task -> condition -> method -> metric -> value."""
    subgroups: dict[str, dict[str, dict[str, dict[str, Value]]]]
    """task -> condition -> fact -> level -> value of SUBGROUP_METRIC for the model."""
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was limited, skipped or tuned."""

    def as_json(self) -> dict[str, Any]:
        """Plain data, in the order of the fields."""
        return asdict(self)

    def write(self, path: Path) -> None:
        """Write as JSON, NaN-free."""
        path.write_text(json.dumps(self.as_json(), indent=2, allow_nan=False) + "\n")

    def flat(self) -> dict[str, float]:
        """`task/condition/method/metric` to value, for a tracking run; what was not computed is left out."""
        return {
            f"{task}/{condition}/{method}/{name}": value.value
            for task, conditions in self.tasks.items()
            for condition, methods in conditions.items()
            for method, values in methods.items()
            for name, value in values.items()
            if value.value is not None
        }


DECISIVE = {task: names[:1] for task, names in HEADLINE.items()}


def summarise(
    records: Sequence[Record],
    config: EvaluateConfig,
    header: dict[str, Any],
    notes: Iterable[str] = (),
    *,
    compared: Mapping[str, Sequence[str]] = DECISIVE,
) -> Summary:
    """Aggregate the records of all cases.

    Args:
        records: In any order.
        config: Settings of the evaluation.
        header: Where the numbers come from.
        notes: What a reader must know beside them.
        compared: Metrics of each task on which the model stands against every other method.
    """
    groups: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in sorted([*records, *_patient_diagnoses(records)], key=_rank):
        groups.setdefault((record.task, record.condition), {}).setdefault(record.method, []).append(record)
    tasks: dict[str, Any] = {task: {} for task in config.tasks}
    subgroups: dict[str, Any] = {}
    verdicts: list[Verdict] = []
    for (task, condition), methods in groups.items():
        tasks[task][condition] = {method: _values(task, rows, config) for method, rows in methods.items()}
        subgroups.setdefault(task, {})[condition] = _subgroups(task, methods[lead_method(methods)], config)
        verdicts += [
            verdict for name in compared[task] for verdict in _verdicts(task, condition, name, methods, config)
        ]
    return Summary(header=header, tasks=tasks, subgroups=subgroups, verdicts=verdicts, notes=list(notes))


def _rank(record: Record) -> tuple[int, int, str, int, str]:
    """Order of the summary: tasks as the vocabulary has them, volumes before patients, the model first."""
    known = list(METHOD_LABELS)
    method = known.index(record.method) if record.method in known else len(known)
    return TASKS.index(record.task), record.condition == "patient", record.condition, method, record.row_id


def _patient_diagnoses(records: Sequence[Record]) -> list[Record]:
    """Diagnosis per patient: the mean of the probabilities over a patient's volumes."""
    members: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.task == "diagnose":
            members.setdefault((record.method, record.patient_id), []).append(record)
    return [_merge_patient(rows) for rows in members.values()]


def _merge_patient(rows: list[Record]) -> Record:
    first = rows[0]
    probabilities = np.mean([row.values["probabilities"] for row in rows], axis=0)
    shared = {name: value for name, value in first.facts.items() if all(row.facts[name] == value for row in rows)}
    return Record(
        task="diagnose", condition="patient", method=first.method, row_id=first.patient_id,
        patient_id=first.patient_id, facts={name: shared.get(name) for name in first.facts},
        values={"truth": first.values["truth"], "probabilities": probabilities.tolist()},
    )  # fmt: skip


def _table(rows: Sequence[Record], metric: Metric, *, keep: np.ndarray | None = None) -> tuple[Table, np.ndarray]:
    """Columns of the records, and which records the metric counts."""
    names = sorted(set().union(*(row.values for row in rows)))
    table = {name: np.array([row.values.get(name, math.nan) for row in rows], dtype=float) for name in names}
    scored = np.ones(len(rows), bool) if keep is None else keep
    for column in metric.columns:
        found = np.isfinite(table.get(column, np.full(len(rows), math.nan)))
        scored = scored & found.reshape(len(rows), -1).all(axis=1)
    return {name: values[scored] for name, values in table.items()}, scored


def _value(metric_name: str, metric: Metric, rows: Sequence[Record], config: EvaluateConfig) -> Value:
    """One metric of one method with its interval, or why there is none."""
    table, scored = _table(rows, metric)
    count = int(scored.sum())
    estimate = metric.compute(table) if count else math.nan
    if not math.isfinite(estimate):
        return Value(None, reason=_why_not(rows[0].method, metric_name, metric, count))
    patients = [row.patient_id for row, kept in zip(rows, scored, strict=True) if kept]
    return Value(estimate, _interval(lambda index: metric.compute(_take(table, index)), patients, config), count)


def _interval(
    statistic: Callable[[np.ndarray], float], patients: Sequence[str], config: EvaluateConfig
) -> tuple[float, float] | None:
    return metrics.patient_bootstrap(statistic, patients, num_samples=config.bootstrap_samples, seed=config.seed)


def _take(table: Table, index: np.ndarray) -> Table:
    return {name: values[index] for name, values in table.items()}


def _why_not(method: str, metric_name: str, metric: Metric, count: int) -> str:
    if (method, metric_name) in NOT_APPLICABLE:
        return f"not computed: {NOT_APPLICABLE[method, metric_name]}"
    package = missing_package(metric_name) if metric_name in LEXICAL_PACKAGES else None
    if package:
        return f"not computed: package {package} is not installed"
    return f"not computed: {metric.undefined if count else 'no volume has a value'}"


def _values(task: str, rows: Sequence[Record], config: EvaluateConfig) -> dict[str, Value]:
    """Every metric of a task that applies to a method."""
    found = set().union(*(row.values for row in rows))
    return {
        name: _value(name, metric, rows, config)
        for name, metric in METRICS[task].items()
        if found.issuperset(metric.columns)
    }


def _subgroups(task: str, rows: Sequence[Record], config: EvaluateConfig) -> dict[str, dict[str, Value]]:
    """The task's metric by every level of every fact, unknown included."""
    name = SUBGROUP_METRIC[task]
    tables: dict[str, dict[str, Value]] = {}
    for fact in SUBGROUP_FACTS:
        levels: dict[str, list[Record]] = {}
        for row in rows:
            levels.setdefault(_level(fact, row.facts.get(fact)), []).append(row)
        tables[fact] = {
            level: _value(name, METRICS[task][name], members, config) for level, members in sorted(levels.items())
        }
    return {fact: levels for fact, levels in tables.items() if set(levels) != {"unknown"}}


def _level(fact: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if fact == "age_years":
        return next(f"{low}-{high - 1}" if high < 200 else f"{low} and over" for low, high in AGE_BANDS if value < high)
    return f"{value:g} T" if fact == "field_strength_t" else str(value)


def _verdicts(
    task: str, condition: str, name: str, methods: Mapping[str, Sequence[Record]], config: EvaluateConfig
) -> list[Verdict]:
    """The model against every other method on one metric; nothing without a model."""
    metric = METRICS[task][name]
    return [
        verdict
        for method, rows in methods.items()
        if MODEL in methods
        and method not in (MODEL, CEILING)
        and (verdict := _verdict(task, condition, name, metric, methods[MODEL], method, rows, config)) is not None
    ]


def _verdict(
    task: str, condition: str, name: str, metric: Metric, model: Sequence[Record], baseline: str,
    rows: Sequence[Record], config: EvaluateConfig,
) -> Verdict | None:  # fmt: skip
    """Paired difference over the volumes that both methods have; None if the metric has no value there."""
    others = {row.row_id: row for row in rows}
    pairs = [(row, others[row.row_id]) for row in model if row.row_id in others]
    if not pairs:
        return None
    ours, theirs = zip(*pairs, strict=True)
    _, keep_ours = _table(ours, metric)
    _, keep_theirs = _table(theirs, metric)
    keep = keep_ours & keep_theirs
    (table, _), (other, _) = _table(ours, metric, keep=keep), _table(theirs, metric, keep=keep)

    def difference(index: np.ndarray) -> float:
        return _gap(metric.compute(_take(table, index)), metric.compute(_take(other, index)))

    if not keep.any():
        return None
    estimate = difference(np.arange(int(keep.sum())))
    if not math.isfinite(estimate):
        return None
    patients = [row.patient_id for row, kept in zip(ours, keep, strict=True) if kept]
    interval = _interval(difference, patients, config)
    sign = 1 if metric.higher_is_better else -1
    beats = _judge(sign * estimate, interval and tuple(sorted(sign * edge for edge in interval)))
    text = _verdict_text(metric, baseline, estimate, interval, beats)
    return Verdict(task, condition, baseline, name, estimate, interval, beats, text)


def _gap(value: float, other: float) -> float:
    """Difference of two shares; one without a denominator (no box, no finding at all) counts as none found."""
    if math.isnan(value) and math.isnan(other):
        return math.nan
    return (0.0 if math.isnan(value) else value) - (0.0 if math.isnan(other) else other)


def _judge(gain: float, interval: tuple[float, ...] | None) -> bool | None:
    """True where the whole interval is a gain, False where there is none, None where it cannot be told."""
    if gain <= 0:
        return False
    return True if interval is not None and interval[0] > 0 else None


def _verdict_text(
    metric: Metric, baseline: str, difference: float, interval: tuple[float, float] | None, beats: bool | None
) -> str:
    unit = f" {metric.unit}" if metric.unit else ""
    amount = f"{metric.label} {difference:+.{metric.digits}f}{unit}"
    if interval:
        amount += f" [{interval[0]:+.{metric.digits}f}, {interval[1]:+.{metric.digits}f}]"
    other = method_label(baseline)
    if beats:
        return f"beats {other}: {amount}"
    if beats is False:
        return f"does NOT beat {other}: {amount}"
    reason = "interval includes zero" if interval else "too few patients for an interval"
    return f"not clearly better than {other} ({reason}): {amount}"


def format_value(value: Value, metric: Metric) -> str:
    """`32.10 [31.20, 33.00]`, or a dash where nothing was computed."""
    if value.value is None:
        return "-"
    text = f"{value.value:.{metric.digits}f}"
    if value.interval:
        text += f" [{value.interval[0]:.{metric.digits}f}, {value.interval[1]:.{metric.digits}f}]"
    return text


def format_table(summary: Summary) -> str:
    """The headline numbers, the verdicts and the notes as text for a terminal; it is valid Markdown."""
    title = METHOD_LABELS[MODEL] if has_model(summary) else "first of them"
    rows: list[tuple[str, ...]] = [("task", "condition", "metric", "n", title, "beside it")]
    for task, conditions in summary.tasks.items():
        for condition, methods in conditions.items():
            own = methods[lead_method(methods)]
            rows += [_table_row(task, condition, name, methods) for name in HEADLINE[task] if name in own]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    verdicts = [f"- {verdict.task} {verdict.condition}: {verdict.text}" for verdict in summary.verdicts]
    missing = [f"- {task}: not computed: no volume of the split could be scored" for task in unscored(summary)]
    return "\n".join([*lines, "", *verdicts, *missing, *(f"- note: {note}" for note in summary.notes)])


def _table_row(task: str, condition: str, name: str, methods: Mapping[str, Mapping[str, Value]]) -> tuple[str, ...]:
    """One metric of the model with its interval, and the plain values of the other methods."""
    lead = lead_method(methods)
    metric, own = METRICS[task][name], methods[lead][name]
    others = [
        f"{method_label(method)} {format_value(values[name], metric).partition(' ')[0]}"
        for method, values in methods.items()
        if method != lead and name in values
    ]
    if lead != MODEL:
        others.insert(0, f"(the first is {method_label(lead)})")
    label = f"{metric.label} ({metric.unit})" if metric.unit else metric.label
    return task, condition, label, str(own.n), format_value(own, metric), "; ".join(others)


def has_model(summary: Summary) -> bool:
    """Whether the summary is about a model, or about specialists alone."""
    return any(MODEL in methods for conditions in summary.tasks.values() for methods in conditions.values())


def method_label(method: str) -> str:
    """A method as tables call it."""
    return METHOD_LABELS.get(method, method)


def unscored(summary: Summary) -> list[str]:
    """Tasks that were asked for and for which no volume could be scored."""
    return [task for task, conditions in summary.tasks.items() if not conditions]
