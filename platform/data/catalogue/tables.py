"""The small tables that lie beside images: CSV, TSV, JSON and `key: value` files, as rows of text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

MAX_TABLE_BYTES = 512 * 2**20

Row = dict[str, str]


def parse_table(content: bytes, name: str, header: Sequence[str] = ()) -> list[Row]:
    """Rows of a table, by the suffix of its name.

    Args:
        content: Of the file.
        name: `.csv`, `.tsv`, `.json`; anything else holds `key: value` lines and is one row.
        header: Names of the columns where the file has none.

    Raises:
        ValueError: If the file is too large, or no table of its kind.
    """
    if len(content) > MAX_TABLE_BYTES:
        raise ValueError(f"The table is larger than {MAX_TABLE_BYTES // 2**20} MiB.")
    suffix = PurePosixPath(name).suffix.lower()
    text = content.decode("utf-8-sig", "replace")
    if suffix == ".json":
        return _json_rows(text)
    if suffix in (".csv", ".tsv"):
        return _separated_rows(text, "\t" if suffix == ".tsv" else _separator(text), header)
    lines = (line.partition(":") for line in text.splitlines())
    return [{key.strip(): value.strip() for key, colon, value in lines if colon}]


def _separator(text: str) -> str:
    first = text.partition("\n")[0]
    return ";" if first.count(";") > first.count(",") else ","


def _separated_rows(text: str, separator: str, header: Sequence[str]) -> list[Row]:
    try:
        lines = [line for line in csv.reader(io.StringIO(text), delimiter=separator) if line]
    except csv.Error as error:
        raise ValueError(f"No readable table: {error}.") from error
    names = list(header) or [name.strip() for name in lines[0]] if lines else []
    rows = lines if header else lines[1:]
    return [{name: value.strip() for name, value in zip(names, row, strict=False)} for row in rows]


def _json_rows(text: str) -> list[Row]:
    """A list of objects, or an object of objects or texts whose keys become the first column `key`."""
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError("No readable JSON.") from error
    if isinstance(document, dict):
        records = [{"key": key, **_record(value)} for key, value in document.items()]
    elif isinstance(document, list):
        records = [_record(value) for value in document]
    else:
        raise ValueError("JSON without records: expected a list or an object.")
    return [{key: _text(value) for key, value in record.items()} for record in records]


def _record(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"value": value}


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def column(row: Row, name: str | int) -> str | None:
    """A value by the name or the number of its column; None where the row has none."""
    if isinstance(name, int):
        values = list(row.values())
        return values[name] if name < len(values) else None
    return row.get(name)


def whole_number(value: str | None) -> int:
    """A cell as a whole number.

    Raises:
        ValueError: If it is none; the cell is not quoted, because it may name a patient.
    """
    try:
        return int(float(value or ""))
    except (ValueError, OverflowError):
        raise ValueError("a column holds no whole number.") from None


def index(rows: Iterable[Row], columns: Sequence[str | int]) -> Mapping[tuple[str | None, ...], list[Row]]:
    """Rows by what they hold in some columns."""
    found: dict[tuple[str | None, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(bare(column(row, name)) for name in columns), []).append(row)
    return found


def bare(identifier: str | None) -> str | None:
    """An identifier as it is compared: tables leave out the `sub-` of BIDS and leading zeros."""
    if identifier is None:
        return None
    plain = identifier.strip().removeprefix("sub-")
    return plain.lstrip("0") or "0" if plain.isdigit() else plain
