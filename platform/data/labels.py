"""What the label map of a row says of each voxel, by the names that training and evaluation know."""

# Z Y X voxels of the native grid, L labels

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from omnimri.models.vocabulary import DENSE_LABELS, LESION
from omnimri.platform.language.instruct import segmentable
from omnimri.platform.language.words import finding_field, plain_name


def structure_mask(label_map: np.ndarray, names: Mapping[int, str], structure: str) -> np.ndarray:
    """Bool mask of a structure by name; `lesion` is every label that is a finding."""
    named = {value: plain_name(name) for value, name in names.items()}
    values = [v for v, name in named.items() if name == structure or (structure == LESION and finding_field(name))]
    return np.isin(label_map, values)


def dense_labels(row: Mapping[str, Any], on_grid: Callable[[np.ndarray], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks of what stage 1 is told of, by name; empty where nobody looked."""
    return {name: on_grid(structure_mask(row["label_map"], row["label_names"], name)) for name in DENSE_LABELS}


def known_labels(row: Mapping[str, Any]) -> np.ndarray:
    """Which of DENSE_LABELS somebody looked for in a row, bool `(L,)`."""
    names: dict[int, str] = row["label_names"]
    return np.isin(DENSE_LABELS, [*segmentable(names), *map(plain_name, names.values())])
