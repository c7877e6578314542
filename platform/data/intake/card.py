"""The card of a corpus in MLflow: its digest, its counts, its report, and what was refused."""

from __future__ import annotations

import json
from pathlib import Path

from omnimri.platform.data.intake.report import REPORT_NAME
from omnimri.platform.data.intake.summary import REJECTS_NAME, SUMMARY_NAME
from omnimri.platform.data.shards import MANIFEST_NAME
from omnimri.platform.tracking import Tracker

FOLDER = "corpus"


def log_corpus(tracker: Tracker, corpus: Path) -> None:
    """Record a finished corpus as the data set of a run, with its report as the data set's card.

    Only pseudonyms go there: names of source files stay in the ledger beside the corpus.
    """
    manifest = json.loads((corpus / MANIFEST_NAME).read_text(encoding="utf-8"))
    summary = json.loads((corpus / SUMMARY_NAME).read_text(encoding="utf-8"))
    tracker.log_dataset(manifest["dataset"], manifest["digest"], str(corpus), "ingest")
    tracker.set_tags({"data_digest": manifest["digest"], "deidentification": json.dumps(manifest["deidentification"])})
    tracker.log_metrics({**summary["total"], "rejected": sum(summary["rejected"].values())})
    for name in (REPORT_NAME, SUMMARY_NAME, REJECTS_NAME):
        tracker.log_artifact(corpus / name, folder=FOLDER)
