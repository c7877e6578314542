"""What the ingress knows of a saved model: its version and its preprocessing, not its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnimri.models.config import InputConfig
from omnimri.models.preprocess import Preprocess
from omnimri.serve.schemas import Preprocessing


@dataclass(frozen=True)
class Contract:
    """What every answer says about the model."""

    version: str
    preprocessing: Preprocessing
    preprocess: Preprocess


def read_contract(model: Path) -> Contract:
    """Version and preprocessing of a saved model, without its weights."""
    version = json.loads((model / "omnimri.json").read_text())["version"]
    saved = json.loads((model / "preprocessing.json").read_text())
    inputs: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in saved["inputs"].items()
    }
    return Contract(
        version=version,
        preprocessing=Preprocessing(version=saved["version"], steps=saved["steps"]),
        preprocess=Preprocess(InputConfig(**inputs)),
    )
