"""Head of stage 1 for volumes with labels: which of the known labels each place of the encoder's maps holds.

Self-supervision alone is slow to notice a lesion that fills a thousandth of a volume. Where labels exist, patches drawn
around them tell the encoder of it, at every level at once (deep supervision, arXiv 1409.5185).
"""

# B patches, L labels, E channels of a map, D H W voxels

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimri.models.vision import spread

_LEVEL_WEIGHTS = (1.0, 1.0, 1.0, 0.5, 0.25)
_PRESENT_WEIGHT = 5.0
"""A place that holds a label counts as much as this many that do not."""


class LabelHead(nn.Module):
    """A linear layer per level; a level's logits are those of the next coarser one plus its own."""

    def __init__(self, channels: Sequence[int], num_labels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Linear(width, num_labels) for width in channels)
        for level in self.levels:
            nn.init.constant_(level.bias, -1.0)  # most places hold no label

    def forward(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Logits `(B, L, d, h, w)` for each map `(B, E, d, h, w)`, finest first."""
        logits: list[Tensor] = []
        for level, features in zip(reversed(self.levels), reversed(pyramid), strict=True):
            normed = F.layer_norm(features.movedim(1, -1).float(), features.shape[1:2])
            own = level(normed).movedim(-1, 1)
            if logits:
                own = own + spread(logits[-1], 1 if own.shape == logits[-1].shape else 2, own)
            logits.append(own)
        return logits[::-1]


def label_loss(logits: Sequence[Tensor], labels: Tensor, known: Tensor) -> Tensor:
    """Cross-entropy of every label at every level; a place holds what any of its voxels holds.

    Args:
        logits: Of `LabelHead`.
        labels: Bool `(B, L, D, H, W)` on the grid of the volume.
        known: Bool `(B, L)`: labels that somebody looked for; the others do not count.
    """
    counts = known[..., None, None, None].float()
    total, present = torch.zeros((), device=labels.device), labels.float()
    for weight, level in zip(_LEVEL_WEIGHTS, logits, strict=True):
        # From level to level, as the encoder merges: an odd number of places leaves a last one that is half empty.
        merged = [-(-fine // coarse) for fine, coarse in zip(present.shape[2:], level.shape[2:], strict=True)]
        present = F.max_pool3d(present, merged, ceil_mode=True)
        loss = F.binary_cross_entropy_with_logits(level, present, reduction="none")
        loss = loss * (1 + (_PRESENT_WEIGHT - 1) * present) * counts
        total = total + weight * loss.sum() / (counts.sum().clamp_min(1) * level[0, 0].numel())
    return total
