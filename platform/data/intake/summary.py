"""The table of a corpus, as the paper prints it: patients, scans, volumes and slices, by what they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from omnimri.platform.data.shards import flag_kind

SUMMARY_NAME = "summary.json"
REJECTS_NAME = "rejects.jsonl"

_SPLIT_ORIGINS = {
    "drawn": "drawn", "official": "official split of the set", "moved": "moved: the person is in another split",
}  # fmt: skip

_BREAKDOWNS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "vendor": lambda row: row["vendor"],
    "field strength": lambda row: None if row["field_strength_t"] is None else f"{row['field_strength_t']:g} T",
    "contrast": lambda row: row["contrast"],
    "contrast agent": lambda row: {True: "with", False: "without"}.get(row["contrast_agent"]),
    "acquisition": lambda row: row["acquisition_type"],
    "plane": lambda row: row["plane"],
    "body part": lambda row: row["body_part"],
    "sex": lambda row: row["sex"],
    "source format": lambda row: row["source_format"],
    "split": lambda row: row["split"],
    "split by": lambda row: _SPLIT_ORIGINS[row["split_origin"]],
    "data set": lambda row: row["dataset"],
}
"""Name of a breakdown and the value that a row counts under."""

_ANNOTATIONS = {
    "k-space": "has_kspace", "label map": "has_labels", "boxes": "has_boxes", "diagnosis": "has_classes",
    "measurements": "has_measurements", "report": "has_report", "description": "has_description",
}  # fmt: skip

_UNITS = ("patients", "scans", "volumes", "slices")


def summarise(rows: Sequence[dict[str, Any]], rejects: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Count a corpus.

    Args:
        rows: Manifest entries.
        rejects: Lines of the reject ledger.

    Returns:
        `total` and one mapping per breakdown, value to counts; a scan is a series. `annotation` counts a volume
        under every kind it has. `flags` counts volumes by quality flag, `rejected` ledger lines by reason.
    """
    tables: dict[str, Any] = {"total": _count(rows)}
    for name, value_of in _BREAKDOWNS.items():
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault(str(value_of(row) or "unknown"), []).append(row)
        ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
        tables[name] = {value: _count(members) for value, members in ordered}
    kinds = {kind: [row for row in rows if row[flag]] for kind, flag in _ANNOTATIONS.items()}
    tables["annotation"] = {kind: _count(members) for kind, members in kinds.items() if members}
    flagged = Counter(flag_kind(flag) for row in rows for flag in row["flags"])
    tables["flags"] = dict(flagged.most_common())
    tables["rejected"] = dict(Counter(reject["reason"] for reject in rejects).most_common())
    return tables


def _count(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {
        "patients": len({(row["dataset"], row["patient_id"]) for row in rows}),
        "scans": len({row["series_id"] for row in rows}),
        "volumes": len(rows),
        "slices": sum(row["shape"][0] for row in rows),
    }


def format_summary(tables: dict[str, Any]) -> str:
    """The counts as text in aligned columns."""
    lines = [("", "", *_UNITS), ("total", "", *_cells(tables["total"]))]
    for name in (*_BREAKDOWNS, "annotation"):
        for position, (value, counts) in enumerate(tables[name].items()):
            lines.append((name if position == 0 else "", value, *_cells(counts)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(_aligned(line, widths) for line in lines)


def _cells(counts: dict[str, int]) -> list[str]:
    return [f"{counts[unit]:,}" for unit in _UNITS]


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    words = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
    return "  ".join([*words, *numbers]).rstrip()
