"""The corpus as one self-contained HTML page: the paper's table, charts, quality flags and reject reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

REPORT_NAME = "report.html"
TEMPLATE = "report.html.j2"

_CHARTS = (
    "contrast",
    "plane",
    "body part",
    "sex",
    "contrast agent",
    "acquisition",
    "source format",
    "split",
    "annotation",
)
_AGE_WIDTH = 10
_SPACING_EDGES_MM = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)


def write_report(folder: Path, tables: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `report.html`.

    Args:
        folder: Of the corpus.
        tables: As `summarise` counts them, with the `digest`.
        rows: Manifest entries.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    charts = {name: {value: counts["volumes"] for value, counts in tables[name].items()} for name in _CHARTS}
    charts |= {"age in years": _ages(rows), "slice spacing in mm": _spacings(rows)}
    html = environment.get_template(TEMPLATE).render(
        tables=tables,
        charts={name: _bars(counts) for name, counts in charts.items() if counts},
        cross=cross_table(rows),
        datasets=tables["data set"],
        licences=Counter(row["licence"] or "unknown" for row in rows).most_common(),
    )
    (folder / REPORT_NAME).write_text(html, encoding="utf-8")


def cross_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Volumes by vendor and field strength: `columns`, and `lines` of vendor and one count per column."""
    counts = Counter((row["vendor"] or "unknown", _field(row)) for row in rows)
    columns = sorted({field for _, field in counts}, key=lambda name: (name == "unknown", name))
    vendors = sorted({vendor for vendor, _ in counts}, key=lambda name: (name == "unknown", name))
    return {"columns": columns, "lines": [(v, [counts[v, c] for c in columns]) for v in vendors]}


def _field(row: Mapping[str, Any]) -> str:
    return "unknown" if row["field_strength_t"] is None else f"{row['field_strength_t']:g} T"


def _ages(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Patients by decade."""
    ages = {(row["dataset"], row["patient_id"]): row["age_years"] for row in rows}
    decades = Counter(None if age is None else int(age // _AGE_WIDTH) * _AGE_WIDTH for age in ages.values())
    known = {f"{d}-{d + _AGE_WIDTH - 1}": n for d, n in sorted((d, n) for d, n in decades.items() if d is not None)}
    return known | ({"unknown": decades[None]} if decades[None] else {})


def _spacings(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Volumes by distance between slices."""
    edges = (0.0, *_SPACING_EDGES_MM, float("inf"))
    counted = {(low, high): sum(low < row["spacing_mm"][0] <= high for row in rows) for low, high in pairwise(edges)}
    return {
        (f"over {low:g}" if high == float("inf") else f"{low:g}-{high:g}"): n for (low, high), n in counted.items() if n
    }


def _bars(counts: Mapping[str, int]) -> list[tuple[str, int, float]]:
    """Name, count, and the length of the bar in per cent of the longest."""
    longest = max(counts.values()) or 1
    return [(name, count, round(100 * count / longest, 1)) for name, count in counts.items()]
