"""Levels 2 and 3 of a corpus, written by a vision-language model: each volume once, whatever is interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import pickle
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from omnimri.platform.annotation import ask
from omnimri.platform.annotation.backends import answered, check_backend
from omnimri.platform.annotation.checks import Contradiction, contradictions
from omnimri.platform.annotation.config import AnnotateConfig
from omnimri.platform.annotation.draft import Draft, open_draft
from omnimri.platform.annotation.review import ReviewItem, load_verdicts, write_review
from omnimri.platform.cluster import quiet_ray_data
from omnimri.platform.data.formats.records import UNREADABLE
from omnimri.platform.data.generated import (
    LINES_NAME,
    layer_folder,
    read_layer,
    write_layer_manifest,
    write_lines,
)
from omnimri.platform.data.intake.publish import put_in_place, restore
from omnimri.platform.data.schema import FACTS
from omnimri.platform.data.shards import RowRef, Shards, load_row
from omnimri.platform.language.derive import Known

logger = logging.getLogger(__name__)

REJECTS_NAME, REVIEW_NAME, SUMMARY_NAME = "rejects.jsonl", "review.html", "summary.json"
_RETRY_TEMPERATURE = 0.7
_TRUTH = ("label_map", "label_names", "boxes", "classes", "report")


@dataclass(frozen=True, kw_only=True)
class AnnotationSummary:
    """What stands after an annotation."""

    out: Path
    tables: dict[str, Any]
    """As in summary.json."""
    num_added: int
    """Volumes that this run asked about."""


def annotate(
    corpus: Path, config: AnnotateConfig, *, limit: int | None = None, overwrite: bool = False
) -> AnnotationSummary:
    """Annotate what of a corpus is not annotated yet, and publish the layer beside it as a whole.

    Volumes that were rejected before are asked again.

    Args:
        corpus: An ingested corpus.
        config: By which model, and how.
        limit: Ask about so many volumes at most, the first of the corpus.
        overwrite: Replace a layer that was made in another way.

    Raises:
        ValueError: If a layer made in another way is there, another process works on it, or no volume could be
            annotated.
    """
    check_backend(config)
    out = layer_folder(corpus)
    restore(out)
    rows = Shards.open(corpus).without_generated().rows
    former = _former(corpus, config, overwrite=overwrite)
    with open_draft(out, request_of(config)) as draft:
        pending = _pending(rows[:limit], {**former.lines, **draft.lines()})
        if not pending and not draft.lines() and former.manifest is not None:
            draft.discard()
            return AnnotationSummary(out=out, tables=former.manifest["summary"], num_added=0)
        rate = _ask_until_answered(pending, draft, config) or former.rate
        lines = {**former.lines, **draft.lines()}
        annotated = [lines[row.row_id] for row in rows if "fields" in lines.get(row.row_id, {})]
        rejected = [lines[row.row_id] for row in rows if "rejected" in lines.get(row.row_id, {})]
        if not annotated:
            reasons = [reason for reason, _ in Counter(line["rejected"] for line in rejected).most_common(1)]
            raise ValueError("; ".join([f"No volume of {corpus} was annotated: {len(rejected)} rejected", *reasons]))
        _write_rejects(draft.folder, rejected)
        manifest = _write_layer(draft.folder, annotated, rejected, former.verdicts, rate, corpus, config)
        _write_sheet(draft.folder, rows, annotated, manifest["digest"], config)
        draft.clear()
        put_in_place(draft.folder, out)
    return AnnotationSummary(out=out, tables=manifest["summary"], num_added=len(pending))


def _pending(rows: Sequence[RowRef], lines: Mapping[str, Mapping[str, Any]]) -> list[RowRef]:
    """Rows without a valid answer."""
    return [row for row in rows if "fields" not in lines.get(row.row_id, {})]


def request_of(config: AnnotateConfig) -> str:
    """SHA-256 of what decides which words are written: model, prompt, pictures, sampling; not how fast."""
    written = {
        "model": config.model,
        "prompt": ask.PROMPT_VERSION,
        "sampling": dataclasses.asdict(config.sampling),
        "pictures": dataclasses.asdict(config.pictures),
        "backend": config.backend,
        "dtype": config.dtype,
    }
    return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Former:
    """A layer that is there already."""

    manifest: dict[str, Any] | None = None
    lines: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def verdicts(self) -> dict[str, Any]:
        return self.manifest["verdicts"] if self.manifest else {}

    @property
    def rate(self) -> float | None:
        return self.manifest["summary"]["volumes_per_s"] if self.manifest else None


def _former(corpus: Path, config: AnnotateConfig, *, overwrite: bool) -> _Former:
    manifest = None if overwrite else read_layer(corpus)
    if manifest is None:
        return _Former()
    if manifest["request"] != request_of(config):
        raise ValueError(
            f"{layer_folder(corpus)} was written by {manifest['model']} ({manifest['backend']}, prompt "
            f"{manifest['prompt_version']}) or with other sampling or pictures. Replace it with --overwrite, or give "
            "the settings that it was made with."
        )
    return _Former(manifest=manifest, lines={line["row_id"]: line for line in _written_lines(corpus)})


def _written_lines(corpus: Path) -> list[dict[str, Any]]:
    """The lines of a layer; bytes are split at line feeds alone, text at every separator that it quotes."""
    return [json.loads(line) for line in (layer_folder(corpus) / LINES_NAME).read_bytes().splitlines()]


def _ask_until_answered(pending: Sequence[RowRef], draft: Draft, config: AnnotateConfig) -> float | None:
    """Ask until every answer is valid or the attempts are used up; returns volumes per second, or None."""
    rate = None
    for attempt in range(config.sampling.attempts):
        last = attempt == config.sampling.attempts - 1
        unanswered, meter = [], _Meter(len(pending))
        by_id = {row.row_id: row for row in pending}
        for line in _answers(pending, attempt, config):
            meter.count()
            if "rejected" in line and not last:
                unanswered.append(by_id[line["row_id"]])
            else:
                draft.add(line)
        rate = rate or meter.rate
        if not unanswered:
            break
        logger.warning("%d of %d answers were not valid; these volumes are asked again", len(unanswered), len(pending))
        pending = unanswered
    return rate


class _Meter:
    """Progress in the log, and the rate of answers."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._started = self._logged = time.monotonic()
        self._answered: list[float] = []

    @property
    def rate(self) -> float | None:
        """Volumes per second since the first ones came; where all came at once, since the start."""
        if not self._answered:
            return None
        first, last = self._answered[0], self._answered[-1]
        later = sum(moment > first + _BURST_S for moment in self._answered)
        return later / (last - first) if later else len(self._answered) / (last - self._started)

    def count(self) -> None:
        """Take note of an answer."""
        now = time.monotonic()
        self._answered.append(now)
        done = len(self._answered)
        if now - self._logged > 10 or done == self._total:
            self._logged, rate = now, self.rate or 0.0
            logger.info("%d of %d volumes, %.2f/s, %.0f s left", done, self._total, rate, (self._total - done) / rate)


_BURST_S = 1.0
"""Answers of one batch come within this time."""


def _answers(pending: Sequence[RowRef], attempt: int, config: AnnotateConfig) -> Iterator[dict[str, Any]]:
    """One line for each volume, in the order in which they are done."""
    if not pending:
        return
    tasks = [{"row_id": row.row_id, "row": pickle.dumps(row)} for row in pending]
    with quiet_ray_data():
        questions = ray.data.from_items(tasks, override_num_blocks=-(-len(tasks) // config.batch_size))
        questions = questions.map(_Ask(config, attempt), num_cpus=0.25)
        checked = answered(questions, config).map(_Check(attempt), num_cpus=0.25)
        # Reading ahead would hold answers back that a kill then loses.
        for block in checked.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from map(json.loads, block["line"].to_pylist())


@dataclass(frozen=True)
class _Ask:
    """From a reference to a question; what cannot be read carries its error along."""

    config: AnnotateConfig
    attempt: int

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        sampling = self.config.sampling
        temperature = max(sampling.temperature, _RETRY_TEMPERATURE if self.attempt else 0.0)
        asked = {**task, "seed": ask.seed_of(task["row_id"], self.attempt, sampling.seed), "temperature": temperature}
        try:
            row = load_row(pickle.loads(task["row"]), ("image", "affine", *FACTS))
            question = ask.question_about(row, self.config.pictures)
        except UNREADABLE as error:
            reason = f"The row cannot be read ({type(error).__name__})."
            return {**asked, "prompt": "", "pictures": [], "schema": "{}", "error": reason}
        return {
            **asked, "prompt": question.prompt, "pictures": question.pictures, "schema": question.schema, "error": ""
        }  # fmt: skip


@dataclass(frozen=True)
class _Check:
    """From an answer to the line of a volume: its fields and what contradicts them, or why there are none."""

    attempt: int

    def __call__(self, answer: dict[str, Any]) -> dict[str, str]:
        line = {
            "row_id": answer["row_id"],
            "attempt": self.attempt,
            "seed": int(answer["seed"]),
            "prompt_tokens": int(answer["prompt_tokens"]),
            "answer_tokens": int(answer["answer_tokens"]),
        }
        if answer["error"]:
            return {"line": json.dumps({**line, "rejected": answer["error"]})}
        try:
            fields = ask.read_answer(answer["text"])
        except ValueError as error:
            return {"line": json.dumps({**line, "rejected": str(error)})}
        try:
            found = contradictions(fields, known_of(pickle.loads(answer["row"]))) if fields else []
        except UNREADABLE as error:
            return {"line": json.dumps({**line, "rejected": f"The row cannot be read ({type(error).__name__})."})}
        checked = {"fields": fields, "contradictions": [dataclasses.asdict(one) for one in found]}
        return {"line": json.dumps({**line, **checked}, ensure_ascii=False)}


def known_of(ref: RowRef) -> Known:
    """What a row knows, for the checks."""
    row = load_row(ref, ("image", "affine", *FACTS, *_TRUTH))
    return Known(
        image=row["image"], affine=np.reshape(row["affine"], (4, 4)), facts={name: row[name] for name in FACTS},
        label_map=row["label_map"], label_names=row["label_names"] or {}, boxes=row["boxes"], classes=row["classes"],
        report=row["report"],
    )  # fmt: skip


def _write_layer(
    folder: Path, annotated: Sequence[dict[str, Any]], rejected: Sequence[dict[str, Any]],
    verdicts: Mapping[str, Any], rate: float | None, corpus: Path, config: AnnotateConfig,
) -> dict[str, Any]:  # fmt: skip
    entries = write_lines(folder, annotated, _excluded(annotated, verdicts))
    summary = _summary(annotated, rejected, entries, rate)
    manifest = {
        "corpus": corpus.absolute().name,
        "request": request_of(config),
        "backend": config.backend,
        "model": config.model,
        "prompt_version": ask.PROMPT_VERSION,
        "config": dataclasses.asdict(config),
        "digest": hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest(),
        "summary": summary,
        "verdicts": dict(verdicts),
        "rows": entries,
    }
    (folder / SUMMARY_NAME).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    write_layer_manifest(folder, manifest)
    return manifest


def _excluded(annotated: Sequence[Mapping[str, Any]], verdicts: Mapping[str, Any]) -> dict[str, str]:
    """Row id to why training does not use a line. A reader who accepts it has the last word."""
    excluded = {}
    for line in annotated:
        row_id = line["row_id"]
        decision = verdicts.get(row_id, {}).get("decision")
        kinds = sorted({one["kind"] for one in line["contradictions"]})
        if decision == "reject":
            excluded[row_id] = "rejected by a reader"
        elif kinds and decision != "accept":
            excluded[row_id] = f"contradicts: {', '.join(kinds)}"
    return excluded


def _summary(
    annotated: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]],
    rate: float | None,
) -> dict[str, Any]:  # fmt: skip
    kinds = Counter(kind for line in annotated for kind in {one["kind"] for one in line["contradictions"]})
    return {
        "annotated": len(annotated),
        "usable": sum(not entry["excluded"] for entry in entries),
        "empty": sum(not line["fields"] for line in annotated),
        "contradicted": sum(bool(line["contradictions"]) for line in annotated),
        "contradictions": dict(sorted(kinds.items())),
        "rejected": len(rejected),
        "asked_again": sum(line["attempt"] > 0 for line in annotated),
        "prompt_tokens": sum(line["prompt_tokens"] for line in annotated),
        "answer_tokens": sum(line["answer_tokens"] for line in annotated),
        "volumes_per_s": rate,
    }


def _write_rejects(folder: Path, rejected: Sequence[Mapping[str, Any]]) -> None:
    lines = [
        {"row_id": line["row_id"], "reason": line["rejected"], "hint": "Run the same command again to ask once more."}
        for line in rejected
    ]
    (folder / REJECTS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _write_sheet(
    folder: Path, rows: Sequence[RowRef], annotated: Sequence[Mapping[str, Any]], digest: str, config: AnnotateConfig
) -> None:
    """The review sheet of a random sample, the same for the same seed."""
    by_id = {row.row_id: row for row in rows}
    sample = random.Random(config.sampling.seed).sample(annotated, min(config.review_size, len(annotated)))
    items = []
    for line in sample:
        row = load_row(by_id[line["row_id"]], ("image", "affine", *FACTS))
        question = ask.question_about(row, config.pictures)
        facts = {name.replace("_", " "): str(row[name]) for name in _SHOWN_FACTS if row[name] is not None}
        found = [Contradiction(**one) for one in line["contradictions"]]
        items.append(
            ReviewItem(
                row_id=line["row_id"], pictures=question.pictures, facts=facts, fields=line["fields"],
                contradictions=found,
            )
        )  # fmt: skip
    write_review(folder / REVIEW_NAME, items, digest=digest, title=f"Descriptions by {config.model}")


_SHOWN_FACTS = ("body_part", "contrast", "contrast_agent", "plane", "acquisition_type", "field_strength_t", "vendor")


def apply_verdicts(corpus: Path, file: Path) -> AnnotationSummary:
    """Take over what a reader accepted and rejected on the review sheet.

    Raises:
        ValueError: If there is no layer, or the verdicts are of another one.
    """
    manifest = read_layer(corpus)
    if manifest is None:
        raise ValueError(f"{corpus} is not annotated: there is no {layer_folder(corpus)}.")
    out = layer_folder(corpus)
    given = {row_id: dataclasses.asdict(v) for row_id, v in load_verdicts(file, manifest["digest"]).items()}
    verdicts = {**manifest["verdicts"], **given}
    excluded = _excluded(_written_lines(corpus), verdicts)
    rows = [{**entry, "excluded": excluded.get(entry["row_id"])} for entry in manifest["rows"]]
    summary = {
        **manifest["summary"],
        "usable": sum(not entry["excluded"] for entry in rows),
        "accepted": sum(verdict["decision"] == "accept" for verdict in verdicts.values()),
        "refused": sum(verdict["decision"] == "reject" for verdict in verdicts.values()),
    }
    write_layer_manifest(out, {**manifest, "verdicts": verdicts, "rows": rows, "summary": summary})
    return AnnotationSummary(out=out, tables=summary, num_added=0)


def estimate(
    corpus: Path, config: AnnotateConfig, *, limit: int | None = None, probe: int = 0, overwrite: bool = False
) -> dict[str, Any]:
    """What an annotation would cost: counts, tokens, hours.

    Args:
        corpus: An ingested corpus.
        config: By which model, and how.
        limit: As for `annotate`.
        probe: Ask about so many volumes now to measure the rate; their answers are kept for the run itself.
        overwrite: As for `annotate`.

    Returns:
        Numbers by name; those of tokens are estimates of Qwen's picture tokens and of four letters a token, unless
        volumes were asked; `hours` is None where no rate was measured.
    """
    rows = Shards.open(corpus).without_generated().rows[:limit]
    former = _former(corpus, config, overwrite=overwrite)
    with open_draft(layer_folder(corpus), request_of(config)) as draft:
        rate = former.rate
        if probe and (pending := _pending(rows, {**former.lines, **draft.lines()})):
            check_backend(config)
            rate = _ask_until_answered(pending[:probe], draft, config)
        lines = {**former.lines, **draft.lines()}
        pending = _pending(rows, lines)
        if not draft.lines():
            draft.discard()
    measured = [line for line in lines.values() if "fields" in line]
    per_volume = _measured_tokens(measured) or _estimated_tokens(pending[:20], config)
    return {
        "volumes": len(rows),
        "annotated": len(rows) - len(pending),
        "to annotate": len(pending),
        "pictures, at most": len(pending) * config.pictures.slices,
        "prompt tokens": round(len(pending) * per_volume["prompt"]),
        "answer tokens": round(len(pending) * per_volume["answer"]),
        "measured on volumes": len(measured),
        "volumes per second": rate,
        "hours": len(pending) / rate / 3600 if rate else None,
    }


def _measured_tokens(lines: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    if not lines:
        return None
    return {name: float(np.mean([line[f"{name}_tokens"] for line in lines])) for name in ("prompt", "answer")}


_PIXELS_PER_TOKEN = 28
"""Edge of the square that is one token to Qwen2-VL and Qwen2.5-VL."""


def _estimated_tokens(rows: Sequence[RowRef], config: AnnotateConfig) -> dict[str, float]:
    counts = []
    for ref in rows:
        question = ask.question_about(load_row(ref, ("image", "affine", *FACTS)), config.pictures)
        squares = (config.pictures.longest_edge_px / _PIXELS_PER_TOKEN) ** 2
        counts.append(len(question.prompt) / 4 + squares * len(question.pictures))
    return {"prompt": float(np.mean(counts)) if counts else 0.0, "answer": 200.0}
