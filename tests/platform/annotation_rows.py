"""What the tests of annotation share: volumes of the built-in corpus with what is known of them and what is true."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omnimri.platform.corpus.anatomy import load_template
from omnimri.platform.corpus.corpus import CorpusConfig
from omnimri.platform.language.derive import Known
from omnimri.platform.language.description import Description
from tests.platform.corpus_files import all_series, write_patients


@dataclass(frozen=True)
class TrueRow:
    """One series, and the words that the corpus has for it."""

    known: Known
    fields: dict[str, str]
    """`level.key` to phrase, of all levels."""


def corpus_rows(out: Path, *, num_patients: int, seed: int) -> Iterator[TrueRow]:
    """Every series of a corpus of small volumes, read from its files."""
    config = CorpusConfig(
        num_patients=num_patients, seed=seed, num_slices=14, matrix=(80, 72), spacing_mm=(9.0, 2.6, 2.6), num_coils=1
    )
    for series in all_series(write_patients(out, load_template(), config), seed):
        entry = series.entry
        known = Known(
            image=series.scan.image, affine=series.scan.affine, facts=series.scan.facts, label_map=series.labels,
            label_names={int(value): name for value, name in entry["label_names"].items()},
            boxes=entry["boxes"], classes=entry["classes"], report=entry["report"],
        )  # fmt: skip
        yield TrueRow(known, dict(Description.model_validate(entry["description"]).filled()))
