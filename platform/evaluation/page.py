"""The evaluation as one self-contained HTML page: numbers first, then pictures, then where they come from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from omnimri.models.vocabulary import DIAGNOSES, LESION, TISSUES
from omnimri.platform.evaluation import figures
from omnimri.platform.evaluation.cases import BLANK, MODEL, RIVALS, Record, lead_method
from omnimri.platform.evaluation.config import EvaluateConfig
from omnimri.platform.evaluation.figures import Panel
from omnimri.platform.evaluation.measures import HEADLINE, METRICS, SUBGROUP_METRIC
from omnimri.platform.evaluation.summary import Summary, Value, format_value, has_model, method_label
from omnimri.platform.evaluation.text import Label, label_text

TEMPLATE = "page.html.j2"

TASK_TITLES = {
    "reconstruct": "Reconstruction",
    "segment": "Segmentation",
    "detect": "Detection",
    "diagnose": "Diagnosis",
    "report": "Report",
}
ORDER_BY = {
    "reconstruct": ("psnr", "PSNR"),
    "segment": ("dice_tissues", "mean Dice over tissues"),
    "detect": ("best_iou", "best overlap with the reference boxes"),
    "diagnose": ("truth_probability", "probability given to the true diagnosis"),
    "report": ("case_f1", "label F1"),
}
"""Column of the model's records that orders the cases of a task, and its name."""
FACT_TITLES = {
    "vendor": "Vendor",
    "field_strength_t": "Field strength",
    "sex": "Sex",
    "age_years": "Age, years",
    "contrast": "Contrast",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case as the page shows it."""

    rank: str
    """Such as `worst of 18`."""
    record: Record
    rows: list[list[Panel]]
    captions: list[str] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    """Title, text and label chips of each column of a text case."""
    bars: list[dict[str, Any]] = field(default_factory=list)
    """Name, share and truth of each diagnosis."""


def picture_name(task: str, row_id: str) -> str:
    """File name of a case's arrays."""
    return f"{task}-{re.sub(r'[^A-Za-z0-9_.-]', '_', row_id)}.npz"


def write_page(summary: Summary, records: Sequence[Record], out: Path, config: EvaluateConfig) -> None:
    """Write `index.html` and one picture per task and condition to `out/figures`.

    Args:
        summary: The numbers.
        records: Of all cases.
        out: Folder of the evaluation, with the cases' arrays in `pictures/`; those that are not shown are removed.
        config: Settings of the evaluation.
    """
    galleries = {
        (task, condition): _gallery(task, condition, records, out / "pictures", config)
        for task, conditions in summary.tasks.items()
        for condition in conditions
        if condition != "patient"
    }
    _write_figures(galleries, out / "figures")
    _remove_unshown(galleries, out / "pictures")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = environment.get_template(TEMPLATE).render(
        summary=summary,
        header=summary.header,
        headline=headline_rows(summary),
        sections=[_section(task, summary, galleries) for task in summary.tasks],
        networks=_networks(summary, out / "figures"),
        lead="OmniMRI" if has_model(summary) else "Specialist",
        facts=FACT_TITLES,
        format_value=format_value,
        **_legend(),
    )
    (out / "index.html").write_text(html, encoding="utf-8")


def _networks(summary: Summary, folder: Path) -> dict[str, Any] | None:
    """The specialists of the header, the model against each of them, and their learning curves; None without any."""
    cards = summary.header.get("specialists")
    if not cards:
        return None
    curves = Panel("Learning curves", figures.curves_figure(cards))
    (folder / "learning_curves.png").write_bytes(figures.png_bytes(curves.image))
    against = [
        {
            "task": f"{TASK_TITLES[v.task]}, {condition_title(v.condition)}",
            "verdict": v,
            "own": format_value(summary.tasks[v.task][v.condition][MODEL][v.metric], METRICS[v.task][v.metric]),
            "other": format_value(summary.tasks[v.task][v.condition][v.baseline][v.metric], METRICS[v.task][v.metric]),
            "metric": METRICS[v.task][v.metric].label,
            "label": method_label(v.baseline),
        }
        for v in summary.verdicts
        if v.baseline in RIVALS
    ]
    return {"cards": cards, "curves": curves, "against": against}


def _legend() -> dict[str, Any]:
    """Colours of the pictures as the style sheet writes them."""
    return {
        "error_gain": figures.ERROR_GAIN,
        "inferno": ", ".join(figures.colour_map_stops()),
        "tissue_colours": [(name, _rgb(figures.STRUCTURE_COLOURS[name])) for name in TISSUES],
        "reference_colour": _rgb(figures.REFERENCE_COLOUR),
        "predicted_colour": _rgb(figures.PREDICTED_COLOUR),
    }


def _rgb(colour: tuple[int, int, int]) -> str:
    return f"rgb({', '.join(map(str, colour))})"


def headline_rows(summary: Summary) -> list[dict[str, Any]]:
    """One row per task and condition: the model's first number, its rivals, and the verdicts."""
    rows = []
    for task, conditions in summary.tasks.items():
        for condition, methods in conditions.items():
            name = HEADLINE[task][0]
            metric = METRICS[task][name]
            lead = lead_method(methods)
            verdicts = [v for v in summary.verdicts if (v.task, v.condition, v.metric) == (task, condition, name)]
            rows.append(
                {
                    "task": TASK_TITLES[task],
                    "condition": condition_title(condition),
                    "metric": f"{metric.label} ({metric.unit})" if metric.unit else metric.label,
                    "lead": method_label(lead),
                    "value": methods[lead][name],
                    "text": format_value(methods[lead][name], metric),
                    "others": [
                        (method_label(method), format_value(values[name], metric))
                        for method, values in methods.items()
                        if method != lead and name in values
                    ],
                    "verdicts": verdicts,
                }
            )
    return rows


def condition_title(condition: str) -> str:
    """A condition in words."""
    if condition.startswith("iou_"):
        return f"IoU at least {condition.removeprefix('iou_')}"
    return {"volume": "per volume", "patient": "per patient"}.get(condition, f"{condition} undersampled")


def _section(task: str, summary: Summary, galleries: Mapping[tuple[str, str], list[Case]]) -> dict[str, Any]:
    """Everything the page says about one task."""
    conditions = summary.tasks[task]
    return {
        "task": task,
        "title": TASK_TITLES[task],
        "order": ORDER_BY[task][1],
        "conditions": [
            {
                "title": condition_title(condition),
                "table": _metric_table(task, methods),
                "cases": galleries.get((task, condition), []),
                "subgroups": summary.subgroups[task][condition],
                "verdicts": [v for v in summary.verdicts if (v.task, v.condition) == (task, condition)],
            }
            for condition, methods in conditions.items()
        ],
        "subgroup_metric": METRICS[task][SUBGROUP_METRIC[task]],
        "metrics": METRICS[task],
    }


def _metric_table(task: str, methods: Mapping[str, Mapping[str, Value]]) -> dict[str, Any]:
    """Metrics down, methods across, the model first."""
    lead = lead_method(methods)
    names = [lead, *(method for method in methods if method != lead)]
    rows = [
        {
            "metric": metric,
            "cells": [_cell(methods[method].get(name), metric) for method in names],
            "n": methods[lead][name].n if name in methods[lead] else 0,
        }
        for name, metric in METRICS[task].items()
        if any(name in methods[method] for method in names)
    ]
    return {"methods": [method_label(name) for name in names], "rows": rows}


def _cell(value: Value | None, metric: Any) -> dict[str, str]:
    """Number, interval and reason of one cell; a metric that a method cannot have is blank."""
    if value is None:
        return {"main": "", "interval": "", "reason": ""}
    if value.value is None:
        return {"main": "not computed", "interval": "", "reason": (value.reason or "").removeprefix("not computed: ")}
    main, _, interval = format_value(value, metric).partition(" ")
    return {"main": main, "interval": interval, "reason": ""}


def choose(records: Sequence[Record], column: str, number: int) -> list[tuple[str, Record]]:
    """Cases evenly spread from worst to best by a column, each with its place in words."""
    scored = [record for record in records if np.isfinite(record.values.get(column, np.nan))]
    scored.sort(key=lambda record: (record.values[column], record.row_id))
    places = sorted({int(place) for place in np.linspace(0, len(scored) - 1, min(number, len(scored))).round()})
    return [(_place(place, len(scored)), scored[place]) for place in places]


def _place(place: int, total: int) -> str:
    if total == 1:
        return "only case"
    names = {total - 1: "best", 0: "worst"} | ({(total - 1) // 2: "median", total // 2: "median"} if total > 2 else {})
    return f"{names.get(place, f'rank {place + 1}')} of {total}"


def _gallery(task: str, condition: str, records: Sequence[Record], folder: Path, config: EvaluateConfig) -> list[Case]:
    """The chosen cases of a task and condition with their pictures."""
    relevant = [record for record in records if (record.task, record.condition) == (task, condition)]
    lead = lead_method(dict.fromkeys(record.method for record in relevant))
    chosen = choose([r for r in relevant if r.method == lead], ORDER_BY[task][0], config.cases_per_task)
    cases = []
    for rank, record in chosen:
        with np.load(folder / picture_name(task, record.row_id), allow_pickle=False) as archive:
            picture = dict(archive)
        others = {other.method: other for other in relevant if other.row_id == record.row_id}
        cases.append(_CASES[task](rank, record, others, picture))
    return cases


def _reconstruct_case(rank: str, record: Record, others: Mapping[str, Record], picture: figures.Picture) -> Case:
    values = {method: other.values for method, other in others.items()}
    images, errors = figures.reconstruction_panels(picture, record.condition, values)
    return Case(rank=rank, record=record, rows=[images, errors], captions=[_where(picture)])


def _segment_case(rank: str, record: Record, _: Mapping[str, Record], picture: figures.Picture) -> Case:
    dice = [f"mean Dice over tissues {record.values['dice_tissues']:.3f}"]
    if np.isfinite(record.values["dice_lesion"]):
        dice.append(f"lesion {record.values['dice_lesion']:.3f}")
    elif f"reference_{LESION}" in picture:
        dice.append("no lesion in the reference")
    captions = [_where(picture), ", ".join(dice)]
    panels = figures.segmentation_panels(picture, method_label(record.method))
    return Case(rank=rank, record=record, rows=[panels], captions=captions)


def _detect_case(rank: str, record: Record, _: Mapping[str, Record], picture: figures.Picture) -> Case:
    values = record.values
    found = f"found {values['matched']:.0f} of {values['num_reference']:.0f}, {values['false_positives']:.0f} false"
    captions = [_where(picture), found + ("" if values["parsed"] else ", answer not readable")]
    texts = [
        {"title": title, "lines": _box_lines(record.texts[name]), "labels": []}
        for title, name in (("Reference", "reference"), (method_label(record.method), "predicted"))
    ]
    return Case(rank=rank, record=record, rows=[figures.detection_panels(picture)], captions=captions, texts=texts)


def _box_lines(boxes: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line per box; slices counted from 1, as viewers do."""
    lines = []
    for box in boxes:
        z1, _, _, z2, _, _ = box["box_voxel"]
        lines.append(f"{box['label']}, {box['side'] or 'side not stated'}, slices {z1 + 1}-{z2}")
    return lines or ["no box"]


def _diagnose_case(rank: str, record: Record, _: Mapping[str, Record], picture: figures.Picture) -> Case:
    bars = [
        {"name": name, "share": share, "truth": index == record.values["truth"]}
        for index, (name, share) in enumerate(zip(DIAGNOSES, record.values["probabilities"], strict=True))
    ]
    return Case(rank=rank, record=record, rows=[[figures.plain_panel(picture)]], captions=[_where(picture)], bars=bars)


def _report_case(rank: str, record: Record, others: Mapping[str, Record], picture: figures.Picture) -> Case:
    wanted = label_text(record.texts["reference"])
    texts = [_text_column("Reference", record.texts["reference"], wanted, wanted)]
    for method in dict.fromkeys((record.method, BLANK, *RIVALS)):
        if method in others:
            answer = others[method].texts["answer"]
            texts.append(_text_column(method_label(method), answer, label_text(answer), wanted))
    panel = [[figures.plain_panel(picture)]]
    return Case(rank=rank, record=record, rows=panel, captions=[_where(picture)], texts=texts)


def _text_column(title: str, text: str, labels: frozenset[Label], wanted: frozenset[Label]) -> dict[str, Any]:
    """A text with chips: what it asserts rightly, what nothing supports, what it leaves out."""
    chips = [(f"{finding}, {side}", "ok" if (finding, side) in wanted else "bad") for finding, side in sorted(labels)]
    chips += [(f"missing: {finding}, {side}", "missing") for finding, side in sorted(wanted - labels)]
    return {"title": title, "lines": text.splitlines() or ["(empty)"], "labels": chips or [("no finding", "ok")]}


def _where(picture: figures.Picture) -> str:
    shown, total = (int(number) for number in picture["slice"])
    return f"slice {shown + 1} of {total}"


_CASES = {
    "reconstruct": _reconstruct_case,
    "segment": _segment_case,
    "detect": _detect_case,
    "diagnose": _diagnose_case,
    "report": _report_case,
}


def _write_figures(galleries: Mapping[tuple[str, str], list[Case]], folder: Path) -> None:
    """The middle case of every image gallery as one PNG file."""
    folder.mkdir(exist_ok=True)
    for (task, condition), cases in galleries.items():
        if cases and task in ("reconstruct", "segment", "detect"):
            case = cases[len(cases) // 2]
            name = task if condition == "volume" or task == "detect" else f"{task}_{condition}"
            (folder / f"{name}.png").write_bytes(figures.png_bytes(figures.strip(case.rows)))


def _remove_unshown(galleries: Mapping[tuple[str, str], list[Case]], folder: Path) -> None:
    """Delete the arrays of cases that the page does not show; a large split would fill the disk."""
    shown = {picture_name(task, case.record.row_id) for (task, _), cases in galleries.items() for case in cases}
    for path in folder.glob("*.npz"):
        if path.name not in shown:
            path.unlink()
