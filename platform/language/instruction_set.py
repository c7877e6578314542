"""The instruction-response pairs of a corpus as JSON lines, balanced, with a table of what was made."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ray

from omnimri.models.config import preset
from omnimri.models.preprocess import Preprocess
from omnimri.models.vocabulary import IMAGE_TASKS
from omnimri.platform.cluster import quiet_ray_data
from omnimri.platform.data.shards import RowRef, Shards, load_row
from omnimri.platform.language.evidence import Evidence
from omnimri.platform.language.instruct import (
    Pair,
    drawn_context,
    plain_pair,
    plain_tasks,
    question_pair,
    reconstruct_pair,
    segment_pair,
    segmentable,
)
from omnimri.platform.language.questions import draw_question, questions

logger = logging.getLogger(__name__)

PAIRS_NAME, SKIPPED_NAME, SUMMARY_NAME = "pairs.jsonl", "skipped.jsonl", "summary.json"
ROWS_PER_PART = 16
BALANCED_KINDS = ("yes-no", "named")
"""Kinds with two answers."""

_COLUMNS = (
    "image", "affine", "contrast", "quantitative", "quantity", "quantity_unit", "plane", "body_part", "contrast_agent",
    "acquisition_type", "sex", "age_years", "label_map", "label_names", "boxes", "classes", "report",
    "description",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class InstructConfig:
    """What is made of each row."""

    seed: int = 0
    split: str | None = None
    """Only rows of this split."""
    preset: str = "tiny"
    """Model whose grid the boxes count in."""
    questions_per_row: int = 8
    """Questions besides the plain tasks, at most."""
    structures_per_row: int = 4
    """Structures to segment, at most."""
    accelerations: tuple[int, ...] = (4, 8)
    """That the context of a reconstruction may state."""
    balance: bool = True
    """Leave out answers of yes or no, and of boxes or none, until there are as many of both, by topic and anatomy."""

    def __post_init__(self) -> None:
        if min(self.questions_per_row, self.structures_per_row) < 0 or not self.accelerations:
            raise ValueError(
                "InstructConfig: questions_per_row and structures_per_row must be 0 or more and accelerations not "
                f"empty; found {self}."
            )
        preset(self.preset)


def make_instruction_set(shards: Shards, out: Path, config: InstructConfig) -> dict[str, Any]:
    """Write the pairs of every row to a folder, which appears when it is complete.

    Returns:
        `summary.json`: settings, the digest of the data, rows and pairs, and a table of counts.

    Raises:
        ValueError: If `out` holds something else, or no row was chosen.
    """
    settings = {**json.loads(json.dumps(asdict(config))), "data_digest": shards.digest}
    if out.exists():
        return _standing(out, settings)
    refs = [ref for ref in shards.rows if config.split in (None, ref.split)]
    if not refs:
        known = ", ".join(sorted({ref.split for ref in shards.rows}))
        raise ValueError(f"No row is of split {config.split!r}; known: {known}.")
    partial = partial_folder(out, settings)
    (partial / "parts").mkdir(parents=True, exist_ok=True)
    parts = _write_parts(refs, partial / "parts", config)
    kept, dropped, skipped = _join(parts, partial, config)
    summary = {"settings": settings, "rows": len(refs), "rows_without_pairs": skipped, "pairs": kept.total(),
               "left_out_to_balance": dropped, "table": _table(kept)}  # fmt: skip
    (partial / SUMMARY_NAME).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(partial / "parts")
    partial.rename(out)
    return summary


def partial_folder(out: Path, settings: Mapping[str, Any]) -> Path:
    """Where the pairs lie until all are there: a run that was interrupted goes on with it under the same settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return out.absolute().with_name(f".{out.name}.{digest}.partial")


def _standing(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a finished folder that was made with the same settings of the same data."""
    path = out / SUMMARY_NAME
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if summary.get("settings") != settings:
        raise ValueError(f"{out} holds something else, or pairs of other data or settings. Give another --out.")
    logger.info("%s was made with these settings before.", out)
    return dict(summary)


def _write_parts(refs: Sequence[RowRef], folder: Path, config: InstructConfig) -> list[Path]:
    """One file of JSON lines for every few rows, in the order of the rows; a file that is there is not made again."""
    files = {start: folder / f"{start:09d}.jsonl" for start in range(0, len(refs), ROWS_PER_PART)}
    missing = [start for start, file in files.items() if not file.exists()]

    def write(batch: dict[str, np.ndarray]) -> dict[str, list[int]]:
        start = int(batch["start"][0])
        lines = (line for ref in refs[start : start + ROWS_PER_PART] for line in row_lines(ref, config))
        unfinished = files[start].with_suffix(".tmp")
        unfinished.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
        unfinished.rename(files[start])
        return {"start": [start]}

    if not missing:
        return list(files.values())
    with quiet_ray_data():
        items = ray.data.from_items([{"start": start} for start in missing], override_num_blocks=len(missing))
        for done, _ in enumerate(items.map_batches(write, batch_size=1).iter_rows(), start=1):
            logger.info("%d of %d parts of %d rows", done, len(missing), ROWS_PER_PART)
    return list(files.values())


def row_lines(ref: RowRef, config: InstructConfig) -> Iterator[dict[str, Any]]:
    """The pairs of a row as they are written, or one line `{"row_id", "reason"}` where there are none."""
    try:
        lines = list(_row_lines(ref, config))
    except (ValueError, OSError) as error:
        lines = [{"row_id": ref.row_id, "reason": f"{type(error).__name__}: {error}"}]
    yield from lines or [{"row_id": ref.row_id, "reason": _why_nothing(ref)}]


def _row_lines(ref: RowRef, config: InstructConfig) -> Iterator[dict[str, Any]]:
    row = load_row(ref, _COLUMNS)
    evidence = Evidence.of_row(row)
    rng = np.random.default_rng([config.seed, zlib.crc32(ref.row_id.encode())])
    for pair in _pairs(ref, row, evidence, config, rng):
        acceleration = int(rng.choice(config.accelerations)) if pair.task == "reconstruct" else None
        yield {
            "row_id": ref.row_id, "dataset": ref.dataset, "split": ref.split, "anatomy": ref.body_part or "unknown",
            "task": pair.task, "kind": pair.kind, "topic": pair.topic, "instruction": pair.instruction,
            "context": drawn_context(
                evidence, rng, is_text=pair.task not in IMAGE_TASKS, hides=pair.hides, acceleration=acceleration
            ),
            "answer": pair.answer, "verdict": pair.verdict, "labels": dict(pair.labels),
        }  # fmt: skip


def _pairs(
    ref: RowRef, row: Mapping[str, Any], evidence: Evidence, config: InstructConfig, rng: np.random.Generator
) -> Iterator[Pair]:
    """Every plain task, then questions drawn without repeating one."""
    preprocess = Preprocess(preset(config.preset).inputs)
    if ref.fully_sampled:
        yield reconstruct_pair(rng)
    known = segmentable(evidence.known.label_names) if evidence.volume else []
    for index in sorted(rng.permutation(len(known))[: config.structures_per_row]):
        yield segment_pair(known[index], rng)
    for task in plain_tasks(evidence):
        yield plain_pair(task, row, evidence, preprocess, rng)
    pool = questions(evidence)
    for _ in range(min(config.questions_per_row, len(pool))):
        question = draw_question(pool, rng)
        pool.remove(question)
        yield question_pair(question, row, preprocess, rng)


def _why_nothing(ref: RowRef) -> str:
    has = {
        "a label map without names of structures or findings": ref.has_labels,
        "classes, none of them stated": ref.has_classes,
        "k-space with missing lines": ref.has_kspace,
    }
    found = ", ".join(words for words, given in has.items() if given) or "no label, report or k-space"
    return f"It has {found}, and no contrast, plane or body part that a question could be about."


Cell = tuple[str, str, str, str, str]
"""Task, anatomy, kind, topic and verdict of a pair."""


def _cell(line: Mapping[str, Any]) -> Cell:
    return line["task"], line["anatomy"], line["kind"], line["topic"], line["verdict"]


def _join(parts: Sequence[Path], out: Path, config: InstructConfig) -> tuple[Counter[Cell], int, int]:
    """Write pairs and ledger; returns pairs by cell, how many balancing left out, and rows without pairs."""
    ranks: dict[Cell, list[int]] = defaultdict(list)
    skipped = 0
    with (out / SKIPPED_NAME).open("w", encoding="utf-8") as ledger:
        for line in _lines(parts):
            if "reason" in line:
                skipped += 1
                ledger.write(f"{json.dumps(line, ensure_ascii=False)}\n")
            else:
                ranks[_cell(line)].append(_rank(line, config.seed))
    last = _last_ranks(ranks) if config.balance else {cell: max(found) for cell, found in ranks.items()}
    kept = Counter({cell: n for cell, found in ranks.items() if (n := sum(rank <= last[cell] for rank in found))})
    weights = balancing_weights(kept)
    with (out / PAIRS_NAME).open("w", encoding="utf-8") as pairs:
        for line in _lines(parts):
            if "reason" not in line and _rank(line, config.seed) <= last[cell := _cell(line)]:
                pairs.write(f"{json.dumps(line | {'weight': round(weights[cell], 6)}, ensure_ascii=False)}\n")
    return kept, sum(map(len, ranks.values())) - kept.total(), skipped


def _lines(parts: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for part in parts:
        with part.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def _rank(line: Mapping[str, Any], seed: int) -> int:
    """A number that is the same in every run with this seed, and says which pairs are left out first."""
    text = f"{seed} {line['row_id']} {line['instruction']}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _last_ranks(ranks: Mapping[Cell, Sequence[int]]) -> dict[Cell, int]:
    """The highest rank that is kept of each cell: as many of both answers, of one answer alone none."""
    answers: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
    for cell in ranks:
        answers[cell[:-1]].append(cell)
    last = {}
    for cell, found in ranks.items():
        both = answers[cell[:-1]]
        number = min(len(ranks[other]) for other in both) if len(both) > 1 else 0
        is_balanced = cell[2] in BALANCED_KINDS
        last[cell] = max(found) if not is_balanced else sorted(found)[number - 1] if number else -1
    return last


def balancing_weights(counts: Mapping[Cell, int]) -> dict[Cell, float]:
    """Weight of a pair of each cell, one on average over all pairs.

    Under it all tasks weigh the same, within a task all parts of the body, within these all topics, and within a topic
    all answers.
    """
    total = sum(counts.values())
    children: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    for cell in counts:
        levels = (cell[:0], cell[:1], cell[:2], cell[:4], cell)
        for parent, child in pairwise(levels):
            children[parent].add(child)
    parents = {cell: (cell[:0], cell[:1], cell[:2], cell[:4]) for cell in counts}
    return {
        cell: total / number / math.prod(len(children[parent]) for parent in parents[cell])
        for cell, number in counts.items()
    }


def _table(counts: Mapping[Cell, int]) -> list[dict[str, Any]]:
    """One entry per cell, in the order of the words."""
    names = ("task", "anatomy", "kind", "topic", "answer")
    return [dict(zip(names, cell, strict=True)) | {"pairs": counts[cell]} for cell in sorted(counts)]


def format_table(summary: Mapping[str, Any]) -> str:
    """The table as text: a line for each task, anatomy, kind and topic, with its answers, the commonest first."""
    groups: dict[tuple[str, str, str], list[tuple[int, str]]] = defaultdict(list)
    for entry in summary["table"]:
        key = (entry["task"], entry["anatomy"], " ".join(filter(None, (entry["kind"], entry["topic"]))))
        groups[key].append((entry["pairs"], entry["answer"]))
    rows = [("task", "anatomy", "kind and topic", "pairs", "answers")]
    for key, answers in groups.items():
        listed = ", ".join(f"{answer} {number}" for number, answer in sorted(answers, key=lambda a: (-a[0], a[1])))
        rows.append((*key, str(sum(number for number, _ in answers)), listed))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    )
