"""A review sheet: pictures beside what a model wrote of them, verdicts kept in the browser and saved to a file.

One self-contained page without network. What a model wrote is untrusted text and is escaped everywhere.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from omnimri.models.vocabulary import RESEARCH_NOTICE
from omnimri.platform.annotation.checks import Contradiction
from omnimri.platform.language.description import Description

TEMPLATE = "review.html.j2"
_PNG = b"\x89PNG\r\n\x1a\n"

Decision = Literal["accept", "reject"]


@dataclass(frozen=True, kw_only=True)
class ReviewItem:
    """One volume of the sheet."""

    row_id: str
    pictures: list[bytes]
    """PNG files: the slices that the model saw."""
    facts: Mapping[str, str]
    """What is known, by name."""
    fields: Mapping[str, str]
    """What the model wrote, by `level.key`."""
    contradictions: list[Contradiction] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not all(picture.startswith(_PNG) for picture in self.pictures):
            raise ValueError(f"ReviewItem {self.row_id}: pictures must be PNG files.")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a reader decided."""

    decision: Decision
    note: str = ""


def write_review(path: Path, items: Sequence[ReviewItem], *, digest: str, title: str = "Review of annotations") -> None:
    """Write the page.

    Args:
        path: HTML file.
        items: In the order in which they are shown.
        digest: Of the layer that the texts come from: verdicts are kept and saved under it.
        title: Heading.

    Raises:
        ValueError: If two items are of one row, or a field is none of the paper's.
    """
    rows = [item.row_id for item in items]
    if twice := sorted({row for row in rows if rows.count(row) > 1}):
        raise ValueError(f"A review sheet shows a row once; found {twice[0]} more often.")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    shown = [_shown(item) for item in items]
    sheet = {"layer": digest, "rows": rows}
    html = environment.get_template(TEMPLATE).render(
        title=title, items=shown, sheet=sheet, digest=digest, notice=RESEARCH_NOTICE,
        num_contradicted=sum(bool(item.contradictions) for item in items),
    )  # fmt: skip
    path.write_text(html, encoding="utf-8")


def _shown(item: ReviewItem) -> dict[str, Any]:
    """One item as the template takes it: levels in the paper's order."""
    levels: dict[str, list[dict[str, Any]]] = {}
    for name, phrase in Description.from_fields(item.fields).filled():
        level, _, key = name.partition(".")
        wrong = [contradiction for contradiction in item.contradictions if contradiction.field == name]
        spans = marked(phrase, [contradiction.said for contradiction in wrong])
        levels.setdefault(level, []).append({"key": _in_words(key), "spans": spans, "wrong": wrong})
    return {
        "row_id": item.row_id,
        "pictures": [f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in item.pictures],
        "facts": item.facts,
        "levels": [{"name": _in_words(level), "fields": fields} for level, fields in levels.items()],
        "num_wrong": len(item.contradictions),
    }


def _in_words(key: str) -> str:
    return key.replace("_", " ").capitalize()


def marked(phrase: str, said: Sequence[str]) -> list[tuple[str, bool]]:
    """A phrase in parts, each with whether it is one of the statements; those that are not found mark nothing."""
    is_marked = [False] * len(phrase)
    for statement in filter(None, said):
        start = phrase.lower().find(statement.lower())
        if start >= 0:
            is_marked[start : start + len(statement)] = [True] * len(statement)
    edges = [place for place in range(1, len(phrase)) if is_marked[place] != is_marked[place - 1]]
    bounds = zip([0, *edges], [*edges, len(phrase)], strict=True)
    return [(phrase[start:end], is_marked[start]) for start, end in bounds if end > start]


def load_verdicts(path: Path, digest: str) -> dict[str, Verdict]:
    """Verdicts that a page has saved, by row; rows without a verdict are not in it.

    Raises:
        ValueError: If the file is none that a page saves, or one of another layer's page.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected the verdicts.json that a review sheet saves; {_reason(error)}.") from error
    if not isinstance(saved, dict) or set(saved) != {"layer", "verdicts"} or not isinstance(saved["verdicts"], dict):
        raise ValueError(f'{path}: expected the keys "layer" and "verdicts" of a review sheet\'s file.')
    if saved["layer"] != digest:
        raise ValueError(
            f"{path}: holds verdicts on layer {str(saved['layer'])[:80]}, not on {digest}. "
            "Save them from the page of this layer."
        )
    return {row_id: _verdict(path, row_id, entry) for row_id, entry in saved["verdicts"].items()}


def _reason(error: OSError | ValueError) -> str:
    """Why a file cannot be read, without what it holds."""
    if isinstance(error, OSError):
        return error.strerror or "it cannot be read"
    return "it is no JSON in UTF-8"


def _verdict(path: Path, row_id: str, entry: object) -> Verdict:
    decision, note = (entry.get("verdict"), entry.get("note", "")) if isinstance(entry, dict) else (None, "")
    if decision not in get_args(Decision) or not isinstance(note, str):
        raise ValueError(f'{path}: row {row_id[:80]}: expected {{"verdict": "accept" or "reject", "note": text}}.')
    return Verdict(decision=cast(Decision, decision), note=note)
