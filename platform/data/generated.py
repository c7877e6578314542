"""What a model wrote about the volumes of a corpus: a folder beside it, read together with its rows.

`CORPUS.generated/` holds one JSON line per volume in `annotations.jsonl` and where each line lies in `manifest.json`.
The corpus itself stays as it is; rows are found by their ids, which name their content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnimri.platform.language.description import Description

LAYER_MANIFEST, LINES_NAME = "manifest.json", "annotations.jsonl"
LAYER_VERSION = 1


@dataclass(frozen=True)
class GeneratedRef:
    """Where the generated fields of one volume lie."""

    path: str
    offset: int
    length: int
    digest: str
    """SHA-256 of the line."""


def layer_folder(corpus: Path) -> Path:
    """Where the generated fields of a corpus lie."""
    return corpus.absolute().with_name(f"{corpus.absolute().name}.generated")


def read_layer(corpus: Path) -> dict[str, Any] | None:
    """The manifest of what was generated for a corpus; None where nothing was.

    Raises:
        ValueError: If it is of another version.
    """
    path = layer_folder(corpus) / LAYER_MANIFEST
    if not path.is_file():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("layer_version") != LAYER_VERSION:
        raise ValueError(
            f"{path.parent} has layer version {manifest.get('layer_version')}, this program reads {LAYER_VERSION}. "
            "Run `omnimri annotate --overwrite`."
        )
    return manifest


def usable_lines(corpus: Path) -> dict[str, GeneratedRef]:
    """Row id to the line that training may use: what contradicts its volume, or was rejected by a reader, is left out.

    Raises:
        ValueError: If the layer is of another version.
    """
    manifest = read_layer(corpus)
    if manifest is None:
        return {}
    path = str(layer_folder(corpus) / LINES_NAME)
    return {
        entry["row_id"]: GeneratedRef(path, entry["offset"], entry["length"], entry["digest"])
        for entry in manifest["rows"]
        if not entry["excluded"]
    }


def read_line(ref: GeneratedRef) -> dict[str, Any]:
    """One line of a layer.

    Raises:
        ValueError: If the file was changed under the manifest.
    """
    with Path(ref.path).open("rb") as file:
        file.seek(ref.offset)
        line = file.read(ref.length)
    if hashlib.sha256(line).hexdigest() != ref.digest:
        raise ValueError(f"{ref.path} is not what its manifest says. Run `omnimri annotate` again.")
    return json.loads(line)


def with_generated(description: str | None, origin: str | None, fields: Mapping[str, str]) -> tuple[str, str]:
    """Description and origin, as the columns hold them, with generated fields where nothing else is known."""
    known = Description.model_validate_json(description) if description else Description()
    origins: dict[str, str] = json.loads(origin) if origin else {}
    filled = dict(known.filled())
    added = {name: phrase for name, phrase in fields.items() if name not in filled}
    merged = Description.from_fields({**filled, **added}).model_dump()
    return _json(merged), _json({**origins, **dict.fromkeys(added, "generated")})


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def write_lines(folder: Path, lines: Iterable[Mapping[str, Any]], excluded: Mapping[str, str]) -> list[dict[str, Any]]:
    """Write the lines of a layer and return the entries of its manifest.

    Args:
        folder: Of the layer.
        lines: With `row_id` each.
        excluded: Row id to why its line is not used.
    """
    entries, offset = [], 0
    with (folder / LINES_NAME).open("wb") as file:
        for line in lines:
            data = (json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n").encode()
            file.write(data)
            entries.append(
                {
                    "row_id": line["row_id"],
                    "offset": offset,
                    "length": len(data),
                    "digest": hashlib.sha256(data).hexdigest(),
                    "excluded": excluded.get(line["row_id"]),
                }
            )
            offset += len(data)
    return entries


def write_layer_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a layer, which makes it one."""
    content = {"layer_version": LAYER_VERSION, **manifest}
    partial = folder / f".{LAYER_MANIFEST}.partial"
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / LAYER_MANIFEST)
