"""List and describe the public data sets that can be read by name.

  omnimri datasets                 every set of the catalogue: anatomy, tasks, licence, access, evidence
  omnimri datasets NAME            one set: layout, labels, citation, overlaps
  omnimri datasets --task detection --anatomy knee

Download a set from its authors under their terms, and read it in its own layout with

  omnimri ingest ROOT --dataset NAME --out DIR

Tasks in brackets have targets that are not read yet; the notes say why. `evidence` says how a row was checked: the
layout of a row with `page` or `recall` was not verified, and a licence that nobody has read is `unknown`. --json prints
the same for machines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Sequence

from omnimri.jobs.command import job_parser, run_job
from omnimri.platform.data.catalogue.entries import (
    ANATOMIES,
    FAMILIES,
    TASKS,
    DatasetEntry,
    ImageRule,
    catalogue,
    find_dataset,
)

_WIDTH = 110
_COLUMNS = ("name", "anatomy", "tasks", "licence", "access", "evidence")
_WIDTHS = (28, 16, 26, 26, 32, 10)


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = job_parser("datasets", __doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a data set to describe")
    parser.add_argument("--task", choices=TASKS, help="only sets with targets for this task")
    parser.add_argument("--anatomy", choices=ANATOMIES, help="only sets of this anatomy")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    return run_job("datasets", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.name:
        entry = find_dataset(args.name)
        print(json.dumps(dataclasses.asdict(entry), ensure_ascii=False, indent=1) if args.json else describe(entry))
        return 0
    entries = [
        entry for entry in catalogue().values()
        if args.task in (None, *entry.tasks) and args.anatomy in (None, *entry.anatomy)
    ]  # fmt: skip
    if args.json:
        print(json.dumps([{key: getattr(entry, key) for key in _COLUMNS} for entry in entries], ensure_ascii=False))
    else:
        print(listing(entries))
    return 0


def listing(entries: Sequence[DatasetEntry]) -> str:
    """One line for each set."""
    rows = [
        _COLUMNS,
        *((e.name, ", ".join(e.anatomy), _tasks(e), e.licence, e.access, e.evidence) for e in entries),
    ]
    lines = ["  ".join(_cell(text, width) for text, width in zip(row, _WIDTHS, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"{len(entries)} data sets; `omnimri datasets NAME` describes one."])


def _cell(text: str, width: int) -> str:
    return (text if len(text) <= width else f"{text[: width - 1]}…").ljust(width)


def _tasks(entry: DatasetEntry) -> str:
    return ", ".join(f"({task})" if task in entry.unread else task for task in entry.tasks)


def describe(entry: DatasetEntry) -> str:
    """Everything that the catalogue knows of one set."""
    evidence = entry.evidence if entry.is_verified else f"{entry.evidence} (layout not verified)"
    parts = {
        "anatomy": ", ".join(entry.anatomy), "tasks": _tasks(entry), "subjects": entry.subjects,
        "reader": f"{entry.family}: {FAMILIES[entry.family].summary}", "layout": entry.layout,
        "volumes": "\n".join(map(_volumes, entry.images)), "labels": _labels(entry), "tables": _tables(entry),
        "split": _split(entry),
        "left out": "\n".join(f"{ignored.pattern}: {ignored.reason}" for ignored in entry.ignored),
        "licence": entry.licence, "access": entry.access, "citation": entry.citation,
        "overlaps": ", ".join(entry.overlaps), "evidence": evidence, "notes": entry.notes,
    }  # fmt: skip
    lines = [f"{entry.name}: {entry.title}"]
    for key, text in parts.items():
        wrapped = [line for part in text.splitlines() for line in textwrap.wrap(part, _WIDTH, break_long_words=False)]
        lines += [f"  {key if first else '':<10}{line}" for first, line in _marked(wrapped)]
    return "\n".join(lines)


def _marked(lines: Sequence[str]) -> list[tuple[bool, str]]:
    return [(number == 0, line) for number, line in enumerate(lines)]


def _volumes(rule: ImageRule) -> str:
    """The pattern of volumes, with the words that `{contrast}` stands for."""
    words = (f"{word} {name or 'of no named contrast'}" for word, name in rule.contrasts.items())
    return rule.pattern + (f" ({', '.join(words)})" if rule.contrasts else "")


def _labels(entry: DatasetEntry) -> str:
    """Where label maps lie and what their values mean."""
    lines: list[str] = []
    for rule in entry.images:
        where = ", else ".join(rule.label_map) or rule.structures or rule.label_member
        meaning = ", ".join(f"{value} {name}" for value, name in rule.label_names.items()) or rule.foreground
        meaning = meaning or (
            "as dataset.json says" if rule.card else "one structure a file" if rule.structures else ""
        )
        if where:
            lines.append(f"{where}: {meaning or 'values without stated meaning'}")
        lines += [
            f"class by {{{name}}}: {', '.join(filter(None, words.values()))}" for name, words in rule.classes.items()
        ]
    return "\n".join(dict.fromkeys(lines))


def _split(entry: DatasetEntry) -> str:
    """Where the official split is read from."""
    folders = [f"{folder} {split}" for folder, split in entry.splits.items()]
    tables = dict.fromkeys(table.path for table in entry.tables if table.split)
    return "; ".join(filter(None, (", ".join(folders), *tables)))


def _tables(entry: DatasetEntry) -> str:
    """What is read of each table."""
    lines = []
    for table in entry.tables:
        what = {
            "classes": table.classes, "boxes": table.boxes, "report": table.report,
            f"facts {', '.join(table.facts)}": table.facts, "labelled frames": table.label_frames,
            "official split": table.split,
        }  # fmt: skip
        lines.append(f"{table.path}: {'; '.join(name for name, given in what.items() if given)}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
