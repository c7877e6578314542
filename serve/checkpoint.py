"""What the ingress knows of a saved model: its version and its preprocessing, not its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from omnimri.models.preprocess import Preprocess, read_preprocess
from omnimri.serve.schemas import Preprocessing


@dataclass(frozen=True)
class Contract:
    """What every answer says about the model."""

    version: str
    preprocessing: Preprocessing
    preprocess: Preprocess


def read_contract(model: Path) -> Contract:
    """Version and preprocessing of a saved model, without its weights.

    Raises:
        ValueError: If the preprocessing is of a contract that this program cannot keep.
    """
    version = json.loads((model / "omnimri.json").read_text())["version"]
    preprocess = read_preprocess(model)
    return Contract(
        version=version,
        preprocessing=Preprocessing(version=preprocess.version, steps=preprocess.steps),
        preprocess=preprocess,
    )
