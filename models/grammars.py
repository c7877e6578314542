"""Grammars of answers, for llguidance: as a logits processor of transformers, and in vLLM. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from omnimri.models.vocabulary import SIDES

MAX_BOXES = 32
"""Boxes in one answer."""
MAX_PHRASE = 160
"""Characters of one field of a description."""


def detection_grammar(labels: Sequence[str] = ()) -> str:
    """The grammar of a detection answer between its tags: what `boxes_to_text` writes.

    Args:
        labels: That a box may have; any where there are none.
    """
    label = " | ".join(json.dumps(json.dumps(name)[1:-1]) for name in labels) or "LABEL"
    sides = " | ".join(json.dumps(side) for side in ("", *SIDES))
    return rf"""start: "[" (entry (", " entry){{0,{MAX_BOXES - 1}}})? "]"
entry: "{{\"label\": \"" label "\", \"side\": \"" side "\", \"box\": [" INTEGER (", " INTEGER){{5}} "]}}"
label: {label}
side: {sides}
LABEL: /[A-Za-z][^"\\{{}}\x00-\x1f]{{0,63}}/
INTEGER: /0|[1-9][0-9]{{0,2}}/
"""


def json_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of one JSON object on one line; strings without a length of their own get `MAX_PHRASE`."""
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps writes
    bounded = _bounded(schema) | {"x-guidance": style}
    return f"start: %json {json.dumps(bounded)}\n"


def _bounded(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_bounded(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    parts = {name: _bounded(part) for name, part in schema.items()}
    return {"maxLength": MAX_PHRASE, **parts} if schema.get("type") == "string" else parts
