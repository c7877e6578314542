"""What the visual tokens of a checkpoint know of their own place: which labels it holds.

The mean of all tokens hides a lesion that fills one of hundreds. Here a linear classifier reads each token by itself,
so that it can be told whether text that misses a lesion could have known of it. Classifiers learn on the training
patients and are scored on the held-out ones.
"""

# N volumes, P places of a volume, V token width, L labels, D H W voxels

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from omnimri.models.preprocess import Preprocess
from omnimri.models.vocabulary import DENSE_LABELS
from omnimri.platform.data.labels import dense_labels, known_labels
from omnimri.platform.data.shards import row_to_scan


@dataclass(frozen=True)
class Places:
    """Some tokens of a volume, and what their places hold."""

    tokens: np.ndarray
    """`(P, V)`, half precision."""
    holds: np.ndarray
    """Bool `(P, L)` in the order of DENSE_LABELS: whether any voxel of the place has the label."""
    known: np.ndarray
    """Bool `(L,)`: labels that somebody looked for."""


def places_of(
    row: Mapping[str, Any], tokens: Tensor, stride: tuple[int, int, int], preprocess: Preprocess, most: int, seed: int
) -> Places:
    """Tokens `(P, V)` of a row with the labels of their places, `most` of them drawn evenly.

    Args:
        row: With image, facts, `label_map` and `label_names`; a row without labels has no places.
        tokens: Of the whole volume, in the order of its grid.
        stride: Voxels of a place along `z y x`.
        preprocess: The contract that the volume is made by.
        most: Places that are kept.
        seed: Of the draw.
    """
    if row["label_map"] is None:
        nothing = np.zeros((0, len(DENSE_LABELS)), bool)
        return Places(np.zeros((0, tokens.shape[1]), np.float16), nothing, np.zeros(len(DENSE_LABELS), bool))
    scan = row_to_scan(row)
    labels = dense_labels(row, lambda mask: torch.as_tensor(preprocess.volume_labels(mask, scan)))
    voxels = torch.stack(list(labels.values())).float()
    holds = F.max_pool3d(voxels, stride, ceil_mode=True).flatten(1).T.numpy() > 0
    kept = np.sort(np.random.default_rng(seed).permutation(len(tokens))[:most])
    return Places(tokens.numpy()[kept].astype(np.float16), holds[kept], known_labels(row))


def place_scores(learned: Sequence[Places], held_out: Sequence[Places]) -> dict[str, dict[str, Any]]:
    """How far each label can be read from the token of a place.

    Returns:
        Of each label `auroc` over the held-out places, `top_place` (share of held-out volumes with the label whose
        highest place is one that holds it), `chance` (the same for a place drawn evenly), `volumes` with the label and
        `places`; or `reason`.
    """
    return {name: _score(learned, held_out, label) for label, name in enumerate(DENSE_LABELS)}


def _score(learned: Sequence[Places], held_out: Sequence[Places], label: int) -> dict[str, Any]:
    train, test = ([places for places in split if places.known[label]] for split in (learned, held_out))
    nothing = np.zeros(0, bool)
    y, y_new = (np.concatenate([nothing, *(places.holds[:, label] for places in split)]) for split in (train, test))
    if min(len(set(y)), len(set(y_new))) < 2:
        return {"reason": "not computed: in one of the splits no place holds it, or all do", "places": len(y_new)}
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)).fit(
        np.concatenate([places.tokens for places in train]).astype(np.float32), y
    )
    scores = [classifier.decision_function(places.tokens.astype(np.float32)) for places in test]
    holding = [(score, places.holds[:, label]) for score, places in zip(scores, test, strict=True)]
    holding = [(score, holds) for score, holds in holding if holds.any()]
    return {
        "auroc": float(roc_auc_score(y_new, np.concatenate(scores))),
        "top_place": float(np.mean([holds[score.argmax()] for score, holds in holding])),
        "chance": float(np.mean([holds.mean() for _, holds in holding])),
        "volumes": len(holding), "places": len(y_new),
    }  # fmt: skip


def format_places(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| place holds | AUROC | highest place is one | by chance | volumes |", "|---|---|---|---|---|"]
    for name, row in scores.items():
        figures = [row.get(key) for key in ("auroc", "top_place", "chance")]
        numbers = " | ".join("-" if figure is None else f"{figure:.2f}" for figure in figures)
        lines.append(f"| {name} | {numbers} | {row.get('volumes', '-')} |")
    return "\n".join(lines)
