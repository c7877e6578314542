"""The sequence rules on headers at scale: how many they answer, what they answer, and how fast.

Made for the index of the Imaging Data Commons (Python package `idc-index-data`), whose MR rows are real headers
without images. Its columns are those of DICOM; any Parquet file or table with some of them will do.
"""

from __future__ import annotations

import importlib
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from omnimri.platform.data.formats.facts import age_years, body_part, sex, vendor
from omnimri.platform.data.formats.sequences import Header, SequenceClass, classify

COLUMNS = (
    "Modality", "SeriesDescription", "StudyDescription", "BodyPartExamined", "Manufacturer", "PatientSex", "PatientAge"
)  # fmt: skip


def default_headers() -> Path:
    """The index that `idc-index-data` ships.

    Raises:
        ValueError: If the package is not installed.
    """
    try:
        package = importlib.import_module("idc_index_data")
    except ImportError as error:
        raise ValueError("Name a Parquet file of headers, or `pip install idc-index-data`.") from error
    return Path(package.IDC_INDEX_PARQUET_FILEPATH)


def benchmark_sequences(path: Path) -> dict[str, Any]:
    """Classify every MR row of a table of headers.

    Args:
        path: Parquet with DICOM keywords as columns; absent ones count as empty.

    Returns:
        `rows`, `rows_per_second`; `coverage`: share of rows with an answer, by field; `answers`: counts by field;
        `body_part_confusion`: what BodyPartExamined states against what the descriptions alone say.
    """
    rows = load_headers(path)
    started = time.perf_counter()
    classes = [classify(Header(texts=(row["SeriesDescription"],))) for row in rows]
    facts = [_facts(row) for row in rows]
    seconds = time.perf_counter() - started
    answers = {name: Counter(str(getattr(c, name)) for c in classes) for name in SequenceClass.__dataclass_fields__}
    answers |= {name: Counter(str(fact[name]) for fact in facts) for name in facts[0]}
    confusion = Counter((fact["body_part_stated"], fact["body_part_in_words"]) for fact in facts)
    return {
        "rows": len(rows),
        "rows_per_second": round(len(rows) / seconds),
        "coverage": {name: round(1 - counts["None"] / len(rows), 4) for name, counts in answers.items()},
        "answers": {name: dict(counts.most_common()) for name, counts in answers.items()},
        "body_part_confusion": [[stated, said, n] for (stated, said), n in confusion.most_common()],
    }


def load_headers(path: Path) -> list[dict[str, Any]]:
    """The MR rows, every column of `COLUMNS` present.

    Raises:
        ValueError: If the table names no modality or has no MR row.
    """
    names = set(pq.read_schema(path).names)
    if "Modality" not in names:
        raise ValueError(f"{path} has no column Modality; expected DICOM keywords such as {', '.join(COLUMNS)}.")
    table = pq.read_table(path, columns=[name for name in COLUMNS if name in names])
    rows = table.filter(pc.equal(table["Modality"], "MR")).to_pylist()
    if not rows:
        raise ValueError(f"{path} has no row with Modality MR.")
    return [{name: row.get(name) for name in COLUMNS} for row in rows]


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    words = row["SeriesDescription"], row["StudyDescription"]
    return {
        "vendor": vendor(row["Manufacturer"]),
        "sex": sex(row["PatientSex"]),
        "age_years": age_years(row["PatientAge"]),
        "body_part": body_part(row["BodyPartExamined"], *words),
        "body_part_stated": body_part(row["BodyPartExamined"]),
        "body_part_in_words": body_part(*words),
    }
